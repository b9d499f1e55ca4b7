"""The bilinear form, full or in blocks: a matrix for every value of the other stream."""

from __future__ import annotations

import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from multint.errors import OptionError
from multint.integrators.base import BiAffine
from multint.integrators.checks import flag, positive
from multint.integrators.init import Projection, fill, share
from multint.integrators.terms import Terms, bias_term
from multint.integrators.vectors import add_bias, vector

# einops notes every class of tensor that it meets. Where torch traces the body of an operator, as an exported loop is,
# nothing may be noted any more.
rearrange(nn.Parameter(torch.empty(1)), "i -> i")


class TensorProduct(nn.Module):
    """y_o = Σ_ij z_i W[o,i,j] x_j: the bilinear part alone, with one weight (O, Z/k, X) for k blocks.

    Shapes: x (..., X), z (..., Z) → (..., O). It is to an integrator's interaction what `Projection` is to a
    stream, and `stream` and `variance` are as there. With more than one block, outputs meet the z of their own alone.
    """

    def __init__(
        self,
        stream: str,
        x_features: int,
        z_features: int,
        out_features: int,
        variance: float = 1.0,
        blocks: int = 1,
    ) -> None:
        super().__init__()
        self.out_features, self.blocks = out_features, blocks
        self.weight = nn.Parameter(torch.empty(out_features, z_features // blocks, x_features))
        fill(self.weight, variance * blocks / (x_features * z_features))
        self.x_weights = ("weight",) if "x" in stream else ()
        self.z_weights = ("weight",) if "z" in stream else ()

    def forward(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        if self.blocks > 1:
            return self._in_blocks(x, z)
        W = self.weight
        out_features, z_features, x_features = W.shape
        x_rows, z_rows = x.numel() // x_features, z.numel() // z_features
        # Every order has one product with W; they differ in the intermediate that stands beside it. The smallest is
        # taken: it is what is written and read back, and a stream shared by many rows is contracted once.
        by_outer = math.prod(torch.broadcast_shapes(x.shape[:-1], z.shape[:-1])) * z_features * x_features
        by_x, by_z = x_rows * out_features * z_features, z_rows * out_features * x_features
        if by_outer < by_x and by_outer < by_z:
            outer = z.unsqueeze(-1) * x.unsqueeze(-2)  # (..., Z, X)
            return functional.linear(outer.flatten(-2), rearrange(W, "o z x -> o (z x)"))
        if by_x <= by_z:
            matrix = functional.linear(x, rearrange(W, "o z x -> (o z) x"))
            matrix = rearrange(matrix, "... (o z) -> ... o z", o=out_features)
            return _apply(matrix, z)
        matrix = functional.linear(z, rearrange(W, "o z x -> (o x) z"))
        matrix = rearrange(matrix, "... (o x) -> ... o x", o=out_features)
        return _apply(matrix, x)

    def _in_blocks(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        z = rearrange(z, "... (k z) -> ... k z", k=self.blocks)
        x_rows, z_rows = x[..., 0].numel(), z[..., 0, 0].numel()
        if x_rows * z.shape[-1] <= z_rows * x.shape[-1]:  # the smaller intermediate, as above
            matrix = functional.linear(x, rearrange(self.weight, "o z x -> (o z) x"))
            matrix = rearrange(matrix, "... (k o z) -> ... k o z", k=self.blocks, z=z.shape[-1])
            return _apply(matrix, z).flatten(-2)
        W = rearrange(self.weight, "(k o) z x -> k (o x) z", k=self.blocks)
        matrix = torch.einsum("...kz,kpz->...kp", z, W)
        return _apply(rearrange(matrix, "... k (o x) -> ... (k o) x", x=x.shape[-1]), x)

    def dense(self) -> Tensor:  # (O, Z, X)
        """W, with zeros between the blocks."""
        if self.blocks == 1:
            return self.weight
        W = rearrange(self.weight, "(k o) z x -> k o z x", k=self.blocks)
        return torch.einsum("kozx,kl->kolzx", W, torch.eye(self.blocks).to(W)).flatten(2, 3).flatten(0, 1)

    def within_blocks(
        self,
        W: Tensor,  # (O, Z, X)
    ) -> Tensor:  # (O, Z/k, X)
        """What a dense W has where the weight has its numbers."""
        W = rearrange(W, "(k o) (l z) x -> k o l z x", k=self.blocks, l=self.blocks)
        return torch.einsum("kokzx->kozx", W).flatten(0, 1)

    def extra_repr(self) -> str:
        out_features, z_features, x_features = self.weight.shape
        return f"{x_features}, {z_features * self.blocks}, {out_features}"


def _apply(
    matrix: Tensor,  # (..., O, I)
    x: Tensor,  # (..., I)
) -> Tensor:  # (..., O)
    """The product of each matrix with its vectors; the leading shapes broadcast."""
    if matrix.shape[:-2] == x.shape[:-1]:
        return torch.matmul(matrix, x.unsqueeze(-1)).squeeze(-1)
    # matmul would write out a copy of a matrix for every vector that shares it.
    return torch.einsum("...oi,...i->...o", matrix, x)


class Bilinear(BiAffine):
    """y = zᵀWx + Uz + Vx + b, with the full tensor W (O, Z, X), or with one that is 0 but for k blocks.

    Equals a linear hypernetwork: y = W'(z)x + b'(z) with W'(z) = zᵀW + V and b'(z) = Uz + b, each one matrix times z.
    Its mixed derivative ∂²y/∂x∂z is W everywhere, where a ReLU network on [x; z] has none almost everywhere; with
    W = U = 0 it is a linear layer; with every lower-order term left out it is the second-order RNN's term.

    With k blocks, y and z are cut into k parts of equal size, and each part of y multiplies x with its own part of z
    alone: W[o,i,j] = 0 where o and i are of different parts, and the weight is (O, Z/k, X). As a recurrence,
    h' = A_x h has a block-diagonal matrix for every input, and with as many blocks as features a diagonal one. U stays
    full.

    Args:
        z_term: whether there is Uz.
        x_term: whether there is Vx.
        bias: what b starts at; None leaves it out.
        blocks: k, a divisor of Z and of O.

    Raises: OptionError for a number of blocks below 1, or that does not divide Z and O.
    Source: Jayakumar et al. 2020; for the blocks, Ebrahimi and Memisevic 2025.
    """

    def __init__(
        self,
        x_features: int,
        z_features: int,
        out_features: int,
        z_term: bool = True,
        x_term: bool = True,
        bias: float | None = 0.0,
        blocks: int = 1,
    ) -> None:
        super().__init__(x_features, z_features, out_features)
        variance = share(True, flag(self, "z_term", z_term), flag(self, "x_term", x_term))
        for name, features in (("z_features", z_features), ("out_features", out_features)):
            if features % positive(self, "blocks", blocks):
                raise OptionError(f"Bilinear: blocks is {blocks}, expected a divisor of {name}, which is {features}")
        self.interaction = TensorProduct("xz", x_features, z_features, out_features, variance, blocks)
        self.lower = LowerOrder(x_features, z_features, out_features, z_term, x_term, bias, variance)

    def integrate(
        self,
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        return self.lower(self.interaction(x, z), x, z)

    def terms(self) -> Terms:
        return self.lower.terms(self.interaction.dense())

    def extra_repr(self) -> str:
        blocks = self.interaction.blocks
        return super().extra_repr() + (f", blocks={blocks}" if blocks > 1 else "")


class LowerOrder(nn.Module):
    """y + Uz + Vx + b: the lower-order terms that follow an interaction y, each of which can be left out."""

    def __init__(
        self,
        x_features: int,
        z_features: int,
        out_features: int,
        z_term: bool,
        x_term: bool,
        bias: float | None,
        variance: float,
    ) -> None:
        super().__init__()
        self.z_projection = Projection("z", z_features, out_features, variance) if z_term else None
        self.x_projection = Projection("x", x_features, out_features, variance) if x_term else None
        self.bias = vector(self, "bias", bias, out_features)

    def forward(
        self,
        y: Tensor,  # (..., O)
        x: Tensor,  # (..., X)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        if self.z_projection is None and self.x_projection is None:
            return add_bias(y, self.bias)
        # The bias goes with one of the products, so that no kernel is its own.
        if self.z_projection is not None:
            y = y + self.z_projection.plus(z, self.bias)
        if self.x_projection is not None:
            y = y + self.x_projection.plus(x, self.bias if self.z_projection is None else None)
        return y

    def terms(
        self,
        W: Tensor,  # (O, Z, X), the interaction's
    ) -> Terms:
        out_features, z_features, x_features = W.shape
        return Terms(
            W=W,
            U=W.new_zeros(out_features, z_features) if self.z_projection is None else self.z_projection.weight,
            V=W.new_zeros(out_features, x_features) if self.x_projection is None else self.x_projection.weight,
            b=bias_term(self.bias, W),
        )
