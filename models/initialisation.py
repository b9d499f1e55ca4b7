"""Initialisation of a whole network, where a paper asks for another than each part's own."""

from dataclasses import dataclass

import torch
from torch import nn

from multint import Cell
from multint.errors import OptionError
from multint.integrators import outermost_integrators


@dataclass(frozen=True)
class Uniform:
    """Every matrix ~ U(−scale, scale); the integrators' input matrices ~ U(−input_scale, input_scale).

    A matrix that both streams share, as in Concat and Bilinear, is no input matrix: it is filled with `scale`.

    Vectors keep what their owners gave them: α, β and b are settings of the integrators.

    Args:
        scale: half the width of the distribution.
        input_scale: the same for the matrices that multiply an integrator's x, the paper's r_W; `scale` if None.
        integrators_only: fill the integrators' matrices alone; an embedding, a softmax and the like keep their own.
        orthogonal: the cells' recurrent matrices are orthogonal instead, that of each gate on its own.

    Raises: OptionError for a width that is not positive.
    Source: Wu et al. 2016, sections 3.1 and, for orthogonal ones, 3.4.
    """

    scale: float
    input_scale: float | None = None
    integrators_only: bool = False
    orthogonal: bool = False

    def __post_init__(self) -> None:
        for name, value in (("scale", self.scale), ("input_scale", self.input_scale)):
            if value is not None and not value > 0:
                raise OptionError(f"Uniform: {name} is {value}, expected a positive number")

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> None:
        """Fill the network's matrices in place."""
        integrators = list(outermost_integrators(network).values())
        for module in integrators if self.integrators_only else [network]:
            for parameter in module.parameters():
                if parameter.ndim >= 2:
                    parameter.uniform_(-self.scale, self.scale)
        if self.input_scale is not None:
            for integrator in integrators:
                for name in integrator.x_weights:
                    if name not in integrator.z_weights:
                        integrator.get_parameter(name).uniform_(-self.input_scale, self.input_scale)
        if self.orthogonal:
            _make_orthogonal(network)


def _make_orthogonal(network: nn.Module) -> None:
    """Matrices that multiply the state alone; each block of as many rows as it has columns is a gate's."""
    for cell in network.modules():
        if isinstance(cell, Cell):
            for integrator in outermost_integrators(cell).values():
                for name in integrator.z_weights:
                    matrix = integrator.get_parameter(name)
                    if name not in integrator.x_weights and matrix.ndim == 2:
                        for block in matrix.split(matrix.shape[1]):
                            nn.init.orthogonal_(block)


@dataclass(frozen=True)
class Glorot:
    """Linear layers ~ U(−a, a) with a² = 6 / (inputs + outputs), their biases 0; those of `multint` keep their own.

    PyTorch's own start has a² = 1 / inputs. Little comes through many layers of that, so that they may not learn.

    Source: Glorot and Bengio 2010, equation 16.
    """

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> None:
        """Fill the network's linear layers in place."""
        # They start at unit variance, and a hypernetwork is scaled by what its generator was built with.
        integrators = outermost_integrators(network).values()
        ours = [integrator for integrator in integrators if type(integrator).__module__.startswith("multint.")]
        kept = {part for integrator in ours for part in integrator.modules()}
        for module in network.modules():
            if isinstance(module, nn.Linear) and module not in kept:
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
