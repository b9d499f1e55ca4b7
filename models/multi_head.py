"""A layer that all tasks share, with a linear head for each."""

import math

from torch import Tensor, nn

from multint import Bilinear, Integrator
from multint.integrators.checks import positive


class MultiHead(Integrator):
    """y = H_z √2·relu(Vx + c) + u_z: a hidden layer that does not see z, and a head for each task of a one-hot code z.

    The heads are `Bilinear` without the terms that all tasks would share.

    Args:
        hidden: features of the shared layer.

    Raises: OptionError for a number of features below 1; ShapeError for streams that do not fit.
    """

    def __init__(self, x_features: int, z_features: int, out_features: int, hidden: int = 128) -> None:
        super().__init__(x_features, z_features, out_features)
        self.shared = nn.Linear(x_features, positive(self, "hidden", hidden))
        self.heads = Bilinear(hidden, z_features, out_features, x_term=False, bias=None)

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        return self.heads(math.sqrt(2) * self.shared(x).relu(), z)
