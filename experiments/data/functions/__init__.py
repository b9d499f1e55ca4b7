"""Functions for neural processes: curves of Gaussian processes, images, and tables of a user's own."""

from experiments.data.functions.batches import Batch, Ceiling
from experiments.data.functions.curves import Curves
from experiments.data.functions.function_data import FunctionData
from experiments.data.functions.images import Images
from experiments.data.functions.kernels import RBF, Kernel, Matern52, Mixture, Periodic, WeaklyPeriodic
from experiments.data.functions.table import Table

__all__ = [
    "RBF",
    "Batch",
    "Ceiling",
    "Curves",
    "FunctionData",
    "Images",
    "Kernel",
    "Matern52",
    "Mixture",
    "Periodic",
    "Table",
    "WeaklyPeriodic",
]
