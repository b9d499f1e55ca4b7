"""A stack of recurrent layers of any cell, with nn.LSTM's contract."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterable
from textwrap import indent
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from multint.cells import Cell, LSTMCell, build_cell
from multint.engines import Explanation, explain
from multint.engines.checks import ENGINES
from multint.engines.explanation import run_both_passes
from multint.errors import OptionError, ShapeError
from multint.integrators.checks import flag, number, positive, probability
from multint.recurrent.direction import Direction
from multint.recurrent.masks import locked_mask
from multint.recurrent.sequences import Sequences, backwards, blanked, restore, reversed_reset, unify


class Recurrent(nn.Module):
    """A stack of recurrent layers: `(output, state) = rnn(x, state)`, as `nn.LSTM` has it, for any cell.

    Where the cell's output has more axes than (B, H), as the images (B, H, rows, columns) of a convolutional LSTM, the
    input has as many, (T, B, X, rows, columns): features are the first axis after the batch everywhere.

    Args:
        input_size: features X of the input.
        hidden_size: H, given to every cell.
        cell: factory `(input_size, hidden_size) -> Cell`, called once for each direction of each layer.
        num_layers: number of layers L.
        batch_first: the input is (B, T, X) and the output (B, T, ·); states are not affected.
        dropout: probability of dropping each value of a layer's output, except the last layer's.
        bidirectional: run every layer in both directions, D = 2, and concatenate their outputs' features.
        zoneout: probability that a state keeps its old value at a step (Krueger et al. 2017): a number for every field
            of the state, or a dict such as {"h": 0.05, "c": 0.5}. In evaluation the mean is taken.
        input_dropout: probability of dropping a feature of every layer's input, with one mask for all steps.
        state_dropout: the same for what each integrator reads of the state (Gal and Ghahramani 2016).
        weight_drop: probability of dropping an entry of the integrators' recurrent matrices, drawn once a pass
            (Merity et al. 2018). A tensor that both streams share, as in `Concat` and `Bilinear`, counts whole.
        weight_noise: standard deviation of the Gaussian noise that is added to every parameter of the cells, drawn once
            a pass (Graves 2013).
        learnt_state: the state before the first step is learnt, for every direction of every layer.
        engine: what runs the scan over time (see `multint.scan`).

    Raises: OptionError for a setting out of range.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        cell: Callable[[int, int], Cell] = LSTMCell,
        num_layers: int = 1,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        zoneout: float | dict[str, float] = 0.0,
        input_dropout: float = 0.0,
        state_dropout: float = 0.0,
        weight_drop: float = 0.0,
        weight_noise: float = 0.0,
        learnt_state: bool = False,
        engine: str = "auto",
    ) -> None:
        super().__init__()
        self.input_size = positive(self, "input_size", input_size)
        self.hidden_size = positive(self, "hidden_size", hidden_size)
        self.num_layers = positive(self, "num_layers", num_layers)
        self.batch_first = flag(self, "batch_first", batch_first)
        self.bidirectional = flag(self, "bidirectional", bidirectional)
        self.dropout = probability(self, "dropout", dropout, up_to_one=True)
        self.input_dropout = probability(self, "input_dropout", input_dropout)
        probability(self, "state_dropout", state_dropout)
        probability(self, "weight_drop", weight_drop)
        if number(self, "weight_noise", weight_noise) < 0:
            raise OptionError(f"{type(self).__name__}: weight_noise is {weight_noise!r}, expected at least 0")
        flag(self, "learnt_state", learnt_state)
        if engine not in ENGINES:
            raise OptionError(f"Recurrent: engine is {engine!r}, expected one of {', '.join(map(repr, ENGINES))}")
        self.engine = engine
        if dropout and num_layers == 1:
            warnings.warn("Recurrent: dropout acts between layers, so it has no effect with num_layers=1", stacklevel=2)
        self._factory = _Factory(cell)
        self.directions = nn.ModuleList()  # layer by layer, forward before backward
        for _ in range(num_layers):
            size = self.output_size if len(self.directions) else input_size
            for _ in range(2 if bidirectional else 1):
                built = build_cell(self, cell, size, hidden_size)
                noise = _zoneout(self, built, zoneout), state_dropout, weight_drop, weight_noise
                self.directions.append(Direction(built, *noise, learnt_state))

    @property
    def output_size(self) -> int:
        """Features of the output: the width of a cell's output times the number of directions."""
        first: Any = self.directions[0]
        width = first.form[0][0] if first.form[0] else 1
        return int(width) * (2 if self.bidirectional else 1)

    @property
    def _axes(self) -> int:
        """Of a step's input, as of the cell's output: 2 for (B, H)."""
        first: Any = self.directions[0]
        return max(2, 1 + len(first.form[0]))

    def forward(
        self,
        input: Tensor | PackedSequence,  # (T, B, X, ...); (B, T, X, ...) if batch_first; (T, X, ...) unbatched
        hx: Any = None,  # a named tuple of tensors (L·D, B, ·), or one bare tensor for a cell with one field
        *,
        lengths: Tensor | list[int] | None = None,  # (B,)
        reset: Tensor | None = None,  # (T, B) bool
    ) -> tuple[Any, Any]:  # (T, B, ·), and the state after each sequence's last step
        """Run the stack.

        Args:
            hx: the state before the first step, by PyTorch's name; the cell's initial one where it is None.
            lengths: number of steps of each sequence, from 0 to T; beyond them the output is 0 and the state stays.
                Their range is checked where their values can be read. In a program of torch.export or torch.compile,
                and under vmap, more than T counts as T.
            reset: True where a step starts an episode: before it the state returns to the cell's initial one.

        Raises: ShapeError or OptionError for what does not fit.
        """
        if any(direction.has_steps for direction in self.directions) and not (hx is None and reset is None):
            raise OptionError(
                f"RecurrentBatchNorm: got {'resets' if hx is None else 'a state'}, expected none, since its statistics "
                "are by steps from a sequence's start; or give it max_steps=1"
            )
        sequences = unify(input, lengths, reset, self.input_size, self.batch_first, self._axes)
        pairs: Any = zip(self.directions, self._states(hx, sequences), strict=True)
        xs = sequences.xs
        finals: list[Any] = []
        for layer in range(self.num_layers):
            if layer:
                xs = nn.functional.dropout(xs, self.dropout, self.training)
            if self.input_dropout and self.training:
                xs = xs * locked_mask(xs[:1], self.input_dropout)
            outputs = []
            for backward in range(2 if self.bidirectional else 1):
                direction, state = next(pairs)
                output, final = self._run(direction, xs, sequences, state, bool(backward))
                outputs.append(output)
                finals.append(final)
            xs = torch.cat(outputs, dim=2) if self.bidirectional else outputs[0]
        fields = [torch.stack(field) for field in zip(*finals, strict=True)]
        if sequences.unbatched:
            fields = [field.squeeze(1) for field in fields]
        final = type(finals[0])(*fields) if len(fields) > 1 else fields[0]
        return restore(xs, sequences, self.batch_first), final

    def _run(
        self, direction: Direction, xs: Tensor, sequences: Sequences, state: Any, backward: bool
    ) -> tuple[Tensor, Any]:
        """One direction of one layer.

        Padding comes first when reading backwards, and leaves the state as it was. It comes last where statistics are
        by steps: there all sequences are to begin together.
        """
        align = backward and direction.has_steps and sequences.valid is not None
        streams = {"x": xs}
        if sequences.valid is not None:
            streams["valid"] = sequences.valid
        if align:
            streams["x"] = backwards(xs, streams["valid"])
        elif backward:
            streams = {name: stream.flip(0) for name, stream in streams.items()}
        if sequences.reset is not None:
            streams["reset"] = reversed_reset(sequences.reset) if backward else sequences.reset
        output, final = direction.run(streams, state, self.engine)
        if "valid" in streams:
            output = blanked(output, streams["valid"])
        if align:
            return backwards(output, streams["valid"]), final
        return (output.flip(0) if backward else output), final

    def _states(self, state: Any, sequences: Sequences) -> list[Any]:
        """The initial state of each direction of each layer."""
        rows, count = sequences.xs.shape[1], len(self.directions)
        if state is None:
            return self.initial_states(rows)
        form: Any = self.directions[0].form
        fields = (state,) if isinstance(state, Tensor) else state
        if not isinstance(fields, tuple | list) or not all(isinstance(field, Tensor) for field in fields):
            got = ", ".join(type(field).__name__ for field in fields) if isinstance(fields, tuple | list) else ""
            raise ShapeError(
                f"state is a {type(state).__name__}{f' of {got}' if got else ''}, expected the tensors "
                f"{', '.join(form._fields)}"
            )
        if len(fields) != len(form):
            raise ShapeError(f"state has {len(fields)} tensors, expected {len(form)}: {', '.join(form._fields)}")
        if sequences.unbatched:
            fields = [field.unsqueeze(1) for field in fields]
        for name, field, shape in zip(form._fields, fields, form, strict=True):
            if field.shape != (count, rows, *shape):
                raise ShapeError(
                    f"state.{name} has the shape {tuple(field.shape)}, expected {(count, rows, *shape)}: layers × "
                    "directions, sequences, features"
                )
        return [type(form)(*values) for values in zip(*(field.unbind(0) for field in fields), strict=True)]

    def initial_states(self, batch_size: int) -> list[Any]:
        """The state before the first step of each direction of each layer, fields (B, ...)."""
        return [direction.initial_state(batch_size) for direction in self.directions]  # type: ignore[operator]

    def reset_parameters(self) -> None:
        """Draw all weights anew, as the constructor does.

        Raises: OptionError for a layer whose factory of cells did not come through pickling.
        """
        for direction in self.directions:
            cell: Any = direction.cell
            fresh = build_cell(self, self._factory.get(self), cell.input_size, self.hidden_size)
            cell.load_state_dict(fresh.state_dict())
            for start in direction.start.values():  # type: ignore[operator]
                nn.init.zeros_(start)

    def explain(self) -> Explanations:
        """How the last call ran, for each direction of each layer: the engine, why, the plan. To be printed.

        Raises: OptionError where there was none by "auto" or "fused".
        """
        if self.engine == "loop":
            return Explanations([Explanation("loop", "asked for") for _ in self.directions], self.bidirectional)
        return Explanations(map(explain, self.directions), self.bidirectional)  # type: ignore[arg-type]

    def precompile(
        self,
        input: Tensor,  # as a call takes it, of any T
    ) -> Explanations:
        """Compile what calls with such inputs run by "fused", in both passes, whatever T and B are later.

        The first step is run. No gradient is left in the parameters. See `multint.engines.precompile`.

        Raises: as a call does by "fused".
        """
        one = input.narrow(1 if self.batch_first and input.ndim > self._axes else 0, 0, 1)
        engine, self.engine = self.engine, "fused"
        try:
            run_both_passes(lambda: self(one), self)
            return self.explain()
        finally:
            self.engine = engine

    def extra_repr(self) -> str:
        named = ("num_layers", "batch_first", "bidirectional", "dropout", "input_dropout", "engine")
        defaults = {"num_layers": 1, "engine": "auto"}
        settings = {name: getattr(self, name) for name in named}
        shown = [f"{name}={value!r}" for name, value in settings.items() if value != defaults.get(name, 0)]
        return ", ".join([str(self.input_size), str(self.hidden_size), *shown])


class Explanations(list[Explanation]):
    """One explanation for each direction of each layer, forward before backward; printed with their names."""

    def __init__(self, explanations: Iterable[Explanation], bidirectional: bool) -> None:
        super().__init__(explanations)
        self.bidirectional = bidirectional

    def __str__(self) -> str:
        parts = []
        for i, explanation in enumerate(self):
            layer, backward = divmod(i, 2) if self.bidirectional else (i, 0)
            parts.append(f"layer {layer}{', backward' if backward else ''}\n{indent(str(explanation), '  ')}")
        return "\n".join(parts)

    __repr__ = __str__


class _Factory:
    """The factory of a layer's cells, kept to reset them. Pickled without what cannot be: lambdas, local functions."""

    def __init__(self, cell: Callable[[int, int], Cell] | None) -> None:
        self.cell = cell

    def get(self, owner: nn.Module) -> Callable[[int, int], Cell]:
        if self.cell is None:
            raise OptionError(
                f"{type(owner).__name__}: how its cells are made was lost in pickling; build the layer anew, or from a "
                "class or a partial instead of a lambda"
            )
        return self.cell

    def __deepcopy__(self, _: Any) -> _Factory:
        return self

    def __reduce__(self) -> tuple[type, tuple[Any]]:
        try:
            pickle.dumps(self.cell)
        except Exception:  # whatever an object of the user's raises
            return _Factory, (None,)
        return _Factory, (self.cell,)


def _zoneout(owner: nn.Module, cell: Cell, zoneout: float | dict[str, float]) -> dict[str, float]:
    """The probabilities above 0, by field of the cell's state."""
    fields = cell.initial_state(1)._fields
    given = zoneout if isinstance(zoneout, dict) else dict.fromkeys(fields, zoneout)
    for name, value in given.items():
        if name not in fields:
            raise OptionError(f"Recurrent: zoneout names {name!r}, expected the state's fields: {', '.join(fields)}")
        probability(owner, f"zoneout of {name}", value)
    return {name: value for name, value in given.items() if value}
