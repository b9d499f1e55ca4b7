"""What networks whose inputs are time-major ask of their recurrent stack."""

from torch import nn

from multint import Recurrent
from multint.errors import OptionError


def time_major(owner: nn.Module, recurrent: Recurrent) -> Recurrent:
    """The stack, if it is time-major: another one would take steps for sequences. Raises OptionError."""
    if recurrent.batch_first:
        raise OptionError(
            f"{type(owner).__name__}: recurrent.batch_first is true, expected false: its inputs are time-major, (T, B)"
        )
    return recurrent
