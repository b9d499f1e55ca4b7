"""Cells: recurrent networks written as one step, `step(x, state) -> state`, in plain PyTorch."""

from multint.cells.base import Cell, HiddenState, build_cell
from multint.cells.gru import GRUCell
from multint.cells.lstm import LSTMCell, LSTMState
from multint.cells.mogrifier import Mogrifier
from multint.cells.rnn import RNNCell

__all__ = ["Cell", "GRUCell", "HiddenState", "LSTMCell", "LSTMState", "Mogrifier", "RNNCell", "build_cell"]
