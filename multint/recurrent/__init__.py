"""Layers: stacks of any cell with nn.LSTM's contract, and the drop-ins for PyTorch's own."""

from multint.recurrent.convert import from_torch
from multint.recurrent.drop_in import GRU, LSTM, RNN
from multint.recurrent.layer import Recurrent

__all__ = ["GRU", "LSTM", "RNN", "Recurrent", "from_torch"]
