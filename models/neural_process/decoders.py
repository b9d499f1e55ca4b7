"""Where the context meets the input: the decoder that is a plain MLP."""

import torch
from torch import Tensor, nn

from models.neural_process.encoders import mlp
from multint.errors import OptionError


class ConcatMLP(nn.Module):
    """An MLP of [x; c]: the context enters its first layer alone.

    Args:
        hidden: width of the layers.
        layers: linear layers.

    Raises: OptionError for settings out of range.
    """

    def __init__(
        self,
        x_features: int,
        context_features: int,
        out_features: int,
        hidden: int = 128,
        layers: int = 3,
    ) -> None:
        super().__init__()
        if layers < 2:
            raise OptionError(f"ConcatMLP: layers is {layers}, expected at least 2")
        self.x_features = x_features
        self.first = nn.Linear(x_features + context_features, hidden)
        self.rest = mlp(hidden, hidden, out_features, layers - 1)

    def forward(
        self,
        x: Tensor,  # (..., X)
        c: Tensor,  # (..., C); leading shapes broadcast
    ) -> Tensor:  # (..., O)
        # By halves, since one context serves many inputs: its product is made once for all of them.
        of_x, of_c = self.first.weight.split([self.x_features, c.shape[-1]], dim=1)
        h = nn.functional.linear(x, of_x) + nn.functional.linear(c, of_c, self.first.bias)
        return self.rest(torch.relu(h))
