"""What networks whose inputs are time-major ask of their recurrent stack."""

import torch
from torch import Tensor, nn

from multint import Recurrent
from multint.errors import OptionError


def time_major(owner: nn.Module, recurrent: Recurrent) -> Recurrent:
    """The stack, if it is time-major: another one would take steps for sequences. Raises OptionError."""
    if recurrent.batch_first:
        raise OptionError(
            f"{type(owner).__name__}: recurrent.batch_first is true, expected false: its inputs are time-major, (T, B)"
        )
    return recurrent


def last_output(
    recurrent: Recurrent,
    xs: Tensor,  # (T, B, X)
    lengths: Tensor,  # (B,)
) -> Tensor:  # (B, O)
    """The stack's output at each sequence's end; of a bidirectional one beside it that at its start, read backwards."""
    _, state = recurrent(xs, lengths=lengths)
    fields = state if isinstance(state, tuple) else (state,)
    return torch.cat([*fields[0][-2 if recurrent.bidirectional else -1 :]], -1)  # of (layers · directions, B, H)
