"""Where the context meets the input: the decoder that is a plain MLP."""

import torch
from torch import Tensor, nn

from models.neural_process.encoders import MLP
from multint import Integrator
from multint.errors import OptionError
from multint.integrators.checks import positive


class ConcatMLP(Integrator):
    """An MLP of [x; c]: the context enters its first layer alone.

    Args:
        hidden: width of the layers.
        layers: linear layers.

    Raises: OptionError for settings out of range; ShapeError for streams that do not fit.
    """

    z_name = "context"
    x_weights = z_weights = ("first.weight",)

    def __init__(
        self,
        x_features: int,
        context_features: int,
        out_features: int,
        hidden: int = 128,
        layers: int = 3,
    ) -> None:
        super().__init__(x_features, context_features, out_features)
        if layers < 2:
            raise OptionError(f"ConcatMLP: layers is {layers}, expected at least 2")
        self.first = nn.Linear(x_features + context_features, positive(self, "hidden", hidden))
        self.rest = MLP(hidden, hidden, out_features, layers - 1)

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., C)
    ) -> Tensor:  # (..., O)
        # By halves, since one context serves many inputs: its product is made once for all of them.
        of_x, of_z = self.first.weight.split([self.x_features, self.z_features], dim=1)
        h = nn.functional.linear(x, of_x) + nn.functional.linear(z, of_z, self.first.bias)
        return self.rest(torch.relu(h))
