"""Cells: recurrent networks written as one step, `step(x, state) -> state`, in plain PyTorch."""

from multint.cells.base import Cell, HiddenState, build_cell
from multint.cells.gru import GRUCell
from multint.cells.gru_d import GRUDCell, GRUDState, observed
from multint.cells.lstm import LSTMCell, LSTMState
from multint.cells.mogrifier import Mogrifier
from multint.cells.rnn import RNNCell
from multint.cells.slstm import SLSTMCell, SLSTMState

__all__ = [
    "Cell",
    "GRUCell",
    "GRUDCell",
    "GRUDState",
    "HiddenState",
    "LSTMCell",
    "LSTMState",
    "Mogrifier",
    "RNNCell",
    "SLSTMCell",
    "SLSTMState",
    "build_cell",
    "observed",
]
