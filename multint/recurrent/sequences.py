"""nn.LSTM's conventions for what goes in and comes out, brought to one inner form and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from multint.errors import OptionError, ShapeError

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Sequences(NamedTuple):
    """A batch in the inner form: time-major, padded, batched."""

    xs: Tensor  # (T, B, X), or (T, B, X, ...)
    valid: Tensor | None  # (T, B) bool, False past a sequence's end; None where all have the full length
    reset: Tensor | None  # (T, B) bool, True where an episode starts
    packed: PackedSequence | None  # what came in, where that was packed
    unbatched: bool


def unify(
    x: Tensor | PackedSequence,
    lengths: Tensor | list[int] | None,
    reset: Tensor | None,
    input_size: int,
    batch_first: bool,
    axes: int,
) -> Sequences:
    """Bring an input to the inner form.

    Args:
        axes: of a step's input, 2 for (B, X).

    Raises: ShapeError for shapes that do not fit; OptionError for lengths out of range or given twice.
    """
    packed, unbatched = None, False
    if isinstance(x, PackedSequence):
        if torch.compiler.is_exporting():
            raise OptionError("x is a PackedSequence, which cannot be exported: expected a tensor, and lengths=")
        if lengths is not None:
            raise OptionError("lengths: a PackedSequence brings its own lengths, expected None")
        packed = x
        xs, lengths = pad_packed_sequence(packed)
    else:
        if not isinstance(x, Tensor):
            raise ShapeError(f"x is a {type(x).__name__}, expected a tensor or a PackedSequence")
        unbatched = x.ndim == axes
        if x.ndim not in (axes, axes + 1):
            shape = "(T, X)" if axes == 2 else "(T, X, ...), as many in a row as the cell's output has"
            raise ShapeError(
                f"x has {x.ndim} dimensions, expected {axes + 1}, or {axes} where it is unbatched: {shape}"
            )
        xs = x.unsqueeze(1) if unbatched else x.transpose(0, 1) if batch_first else x
    if xs.ndim != axes + 1:
        raise ShapeError(f"x has {xs.ndim} dimensions where it is padded, expected {axes + 1}")
    if xs.shape[2] != input_size:
        raise ShapeError(f"x has {xs.shape[2]} features, expected {input_size} (input_size)")
    if xs.shape[0] == 0:
        raise ShapeError("x has 0 steps, expected at least 1")
    if reset is not None:
        if not isinstance(reset, Tensor) or reset.ndim != (1 if unbatched else 2):
            got = f"of {reset.ndim} dimensions" if isinstance(reset, Tensor) else f"a {type(reset).__name__}"
            raise ShapeError(f"reset is {got}, expected a bool tensor with one flag for each step of each sequence")
        # A packed batch's flags are given padded, in the layer's own layout.
        reset = reset.unsqueeze(1) if unbatched else reset.transpose(0, 1) if batch_first else reset
        if reset.shape != xs.shape[:2] or reset.dtype != torch.bool:
            raise ShapeError(
                f"reset is {reset.dtype} of the shape {tuple(reset.shape)} (time-major), expected torch.bool of the "
                f"shape {tuple(xs.shape[:2])}: one flag for each step of each sequence"
            )
    valid = _valid(xs, lengths)
    if valid is not None:
        # Whatever stands in the padding, a NaN too, must not reach a gradient by way of 0 · NaN.
        xs = blanked(xs, valid)
    return Sequences(xs, valid, reset, packed, unbatched)


def restore(output: Tensor, sequences: Sequences, batch_first: bool) -> Tensor | PackedSequence:
    """Bring an output (T, B, ·) to the form that the input had."""
    packed = sequences.packed
    if packed is None:
        return output.squeeze(1) if sequences.unbatched else output.transpose(0, 1) if batch_first else output
    if packed.sorted_indices is not None:
        output = output.index_select(1, packed.sorted_indices)
    # The number of sequences still running at each step gives the sorted lengths back.
    lengths = (torch.arange(1, output.shape[1] + 1)[:, None] <= packed.batch_sizes).sum(1)
    data = pack_padded_sequence(output, lengths).data
    return PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)


def blanked(values: Tensor, valid: Tensor) -> Tensor:
    """Values (T, B, ...) with zeros past each sequence's end."""
    return torch.where(valid.view(*valid.shape, *[1] * (values.ndim - 2)), values, 0)


def backwards(values: Tensor, valid: Tensor) -> Tensor:
    """Values (T, B, ...) of each sequence from its own end to its start, and then what is past its end."""
    step = torch.arange(len(valid), device=valid.device).unsqueeze(1)
    order = torch.where(valid, valid.sum(0) - 1 - step, step)
    return values[order, torch.arange(valid.shape[1], device=valid.device)]


def reversed_reset(reset: Tensor) -> Tensor:
    """The flags for the sequence read backwards: an episode then starts at what was its last step."""
    return torch.cat([reset[1:], torch.zeros_like(reset[:1])]).flip(0)


def _valid(xs: Tensor, lengths: Tensor | list[int] | None) -> Tensor | None:
    if lengths is None:
        return None
    steps, batch_size = xs.shape[:2]
    lengths = torch.as_tensor(lengths, device=xs.device)
    if batch_size == 0:
        return None
    if lengths.shape != (batch_size,) or lengths.dtype not in INTEGERS:
        raise ShapeError(
            f"lengths is {lengths.dtype} of the shape {tuple(lengths.shape)}, expected whole numbers of the shape "
            f"({batch_size},): one for each sequence"
        )
    if torch.compiler.is_compiling() or not _all_full(lengths, steps):  # a traced program has no numbers to check
        return torch.arange(steps, device=xs.device)[:, None] < lengths
    return None


def _all_full(lengths: Tensor, steps: int) -> bool:
    """Whether every sequence is known to have that many steps; an OptionError where one has more, or below 0."""
    try:
        shortest, longest = int(lengths.min()), int(lengths.max())
    except RuntimeError:  # under vmap, and on the meta device, they have no numbers
        return False
    if shortest < 0 or longest > steps:
        raise OptionError(f"lengths are from {shortest} to {longest}, expected from 0 to {steps} (the steps of x)")
    return shortest == steps
