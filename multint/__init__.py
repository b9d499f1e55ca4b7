"""multint: multiplicative ways for two streams of information to meet in a network.

An integrator is a map f(x, z) -> y; a cell is one step in time that uses one; a layer runs a cell over a sequence.
"""

from importlib.metadata import PackageNotFoundError, version

from multint.cells import Cell, GRUCell, LSTMCell, Mogrifier, RNNCell
from multint.conditional import Conditional, condition
from multint.engines import explain, scan
from multint.errors import MultintError
from multint.integrators import (
    Additive,
    BiAffine,
    Bilinear,
    Concat,
    Diagonal,
    Gated,
    Hadamard,
    Hypernetwork,
    Integrator,
    LowRank,
    MultiplicativeIntegration,
    Pairwise,
    Scaled,
    Sum,
    Swapped,
    Terms,
    Through,
    Tucker,
)
from multint.recurrent import GRU, LSTM, RNN, Recurrent, from_torch

__all__ = [
    # what an integrator is
    "Integrator",
    "BiAffine",
    "Terms",
    # integrators
    "Additive",
    "Bilinear",
    "Concat",
    "Diagonal",
    "Gated",
    "Hadamard",
    "Hypernetwork",
    "LowRank",
    "MultiplicativeIntegration",
    "Pairwise",
    "Tucker",
    # their algebra
    "Scaled",
    "Sum",
    "Swapped",
    "Through",
    # networks on a context
    "Conditional",
    "condition",
    # cells
    "Cell",
    "GRUCell",
    "LSTMCell",
    "Mogrifier",
    "RNNCell",
    # layers
    "GRU",
    "LSTM",
    "RNN",
    "Recurrent",
    "from_torch",
    # running a cell over time
    "explain",
    "scan",
    # errors
    "MultintError",
]

try:
    __version__ = version("multint")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "unknown"
