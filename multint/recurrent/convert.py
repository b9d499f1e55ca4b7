"""PyTorch's recurrent layers as ours, weights and all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from multint.errors import OptionError
from multint.integrators import Additive
from multint.recurrent.drop_in import GRU, LSTM, RNN


def from_torch(module: nn.RNN | nn.LSTM | nn.GRU) -> RNN | LSTM | GRU:
    """A multint layer with `Additive` integrators that equals the given one number for number.

    PyTorch's two biases of a gate, which act only by their sum, become one; the candidate of a GRU keeps both. The
    weights are copies, all trainable, and settings, device, dtype and training mode carry over.

    Raises: OptionError for a module of another class.
    """
    if not isinstance(module, nn.RNN | nn.LSTM | nn.GRU):
        raise OptionError(f"from_torch: got {type(module).__name__}, expected nn.RNN, nn.LSTM or nn.GRU")
    settings: dict[str, Any] = {
        name: getattr(module, name, None)
        for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
    }
    weight = next(module.parameters())
    settings |= {"device": weight.device, "dtype": weight.dtype, "integrator": Additive}
    ours: RNN | LSTM | GRU
    if isinstance(module, nn.LSTM):
        ours = LSTM(**settings, proj_size=module.proj_size)
    elif isinstance(module, nn.GRU):
        ours = GRU(**settings)
    else:
        ours = RNN(**settings, nonlinearity=module.nonlinearity)
    with torch.no_grad():
        for index, direction in enumerate(ours.directions):
            layer, backward = divmod(index, 2) if module.bidirectional else (index, 0)
            _copy(module, f"_l{layer}{'_reverse' if backward else ''}", direction.cell)
    return ours.train(module.training)


def _copy(module: nn.RNNBase, suffix: str, cell: Any) -> None:
    """Copy one cell's weights."""

    def theirs(name: str) -> Tensor:
        return getattr(module, name + suffix)

    W, U = theirs("weight_ih"), theirs("weight_hh")
    b_x, b_h = (theirs("bias_ih"), theirs("bias_hh")) if module.bias else (W.new_zeros(len(W)),) * 2
    if not isinstance(module, nn.GRU):
        _fill(cell.gates if isinstance(module, nn.LSTM) else cell.integrator, W, U, b_x + b_h)
        if module.proj_size:
            cell.projection.weight.copy_(theirs("weight_hr"))
        return
    gates = len(cell.gate_names) * module.hidden_size
    _fill(cell.gates, W[:gates], U[:gates], (b_x + b_h)[:gates])
    _fill(cell.candidate, W[gates:], U[gates:], b_x[gates:])
    if module.bias:
        cell.recurrent_bias.copy_(b_h[gates:])


def _fill(integrator: Additive, W: Tensor, U: Tensor, b: Tensor) -> None:
    integrator.x_projection.weight.copy_(W)
    integrator.z_projection.weight.copy_(U)
    if integrator.bias is not None:
        integrator.bias.copy_(b)
