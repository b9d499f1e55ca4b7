"""Layers on a context, by each form, against the ways in which they are written today."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.bench.case import Case
from multint import (
    Additive,
    Bilinear,
    Concat,
    Conditional,
    Hypernetwork,
    Integrator,
    LowRank,
    MultiplicativeIntegration,
)
from multint.integrators import Projected

Leaves = dict[str, Any]  # parameters, or their gradients


class Written(NamedTuple):
    """A layer as it is written today: its weights, in its own order and shapes, and what it computes.

    `named` gives the weights' gradients the names and shapes of ours, for the comparison.
    """

    leaves: Leaves
    layer: Callable[[Tensor, Tensor], Tensor]
    named: Callable[[Leaves], Leaves] = dict


@dataclass(frozen=True)
class ConditionalCase(Case):
    """A layer on a context of Z features for each of B rows, X → H: forward and backward."""

    context: int = 0  # Z
    written: dict[str, Callable[[nn.Module], Written]] = field(default_factory=dict, hash=False)

    @property
    def rivals(self) -> list[str]:
        return list(self.written)

    @property
    def references(self) -> list[str]:
        return self.rivals

    @property
    def told(self) -> list[str]:
        return self.rivals

    def aim(self, rival: str) -> float | None:
        return self.at_least

    def build(self, contender: str) -> Callable[[], list[Tensor]]:
        torch.manual_seed(0)
        _, rows, inputs, outputs = self.size
        module = self.ours(inputs, self.context, outputs)
        with torch.no_grad():
            for parameter in module.parameters():
                if not parameter.any():  # what starts at 0 hides mistakes
                    parameter.normal_(0, 0.1)
        x, z = (torch.randn(rows, n, requires_grad=True) for n in (inputs, self.context))
        cotangent = torch.randn(rows, outputs)
        names = [name for name, _ in module.named_parameters()]
        ours = Written(dict(module.named_parameters()), module)
        leaves, layer, named = ours if contender == "ours" else self.written[contender](module)
        layer = layer if contender == "ours" else _Layer(layer)
        del ours, module  # a rival's memory is its own

        def run() -> list[Tensor]:
            y = layer(x, z)
            d_x, d_z, *rest = torch.autograd.grad(y, [x, z, *leaves.values()], cotangent)
            gradients = named(dict(zip(leaves, rest, strict=True)))
            return [y, d_x, d_z, *(gradients[name] for name in names)]

        return run


@dataclass(frozen=True)
class GeneratedCase(ConditionalCase):
    """A whole network whose weights are generated for every row; the loop over rows is to be beaten by far."""

    def aim(self, rival: str) -> float | None:
        return self.at_least if rival == "loop over rows" else 1.0


class _Layer(nn.Module):
    """A layer as a module, since so it is written."""

    def __init__(self, layer: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.layer(x, z)


def _leaf(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach().clone())


def _linear(weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight, linear.bias = weight, bias
    return linear


def _own(module: nn.Module) -> Leaves:
    return {name: _leaf(parameter) for name, parameter in module.named_parameters()}


def concat_and_linear(f: Additive | Concat) -> Written:
    """`nn.Linear(X + Z, O)` of `torch.cat([x, z])`."""
    _, U, V, b = f.terms()
    leaves = {"weight": _leaf(torch.cat([V, U], 1)), "bias": _leaf(b)}
    is_one, X = isinstance(f, Concat), f.x_features

    def named(gradients: Leaves) -> Leaves:
        weight, bias = gradients["weight"], gradients["bias"]
        if is_one:
            return {"projection.weight": weight, "bias": bias}
        return {"x_projection.weight": weight[:, :X], "z_projection.weight": weight[:, X:], "bias": bias}

    linear = _linear(**leaves)
    return Written(leaves, lambda x, z: linear(torch.cat([x, z], -1)), named)


def mi_by_hand(f: MultiplicativeIntegration) -> Written:
    """The published equation, term by term."""
    w = _own(f)
    first, second = (_linear(w[f"{stream}_projection.weight"]) for stream in "xz")

    def layer(x: Tensor, z: Tensor) -> Tensor:
        wx, uz = first(x), second(z)
        return w["alpha"] * wx * uz + w["beta1"] * uz + w["beta2"] * wx + w["bias"]

    return Written(w, layer)


def low_rank_by_hand(f: LowRank) -> Written:
    """Three linear layers and a product between, beside two linear layers."""
    w = _own(f)
    first, second, last = (_linear(w[f"{name}_factor.weight"]) for name in ("x", "z", "out"))
    lower = _lower(w)

    def layer(x: Tensor, z: Tensor) -> Tensor:
        return last(first(x) * second(z)) + lower(x, z)

    return Written(w, layer)


def film_by_hand(f: Projected) -> Written:
    """A linear layer, scaled and shifted by what one linear layer makes of the context."""
    w = _own(f)
    names = [f"integrator.{kind}_{part}" for part in ("projection.weight", "bias") for kind in ("scale", "shift")]
    weight, bias = (_leaf(torch.cat([w[a], w[b]])) for a, b in (names[:2], names[2:]))
    leaves = {"projection.weight": w["projection.weight"], "weight": weight, "bias": bias}
    linear, film = _linear(w["projection.weight"]), _linear(weight, bias)

    def layer(x: Tensor, z: Tensor) -> Tensor:
        scale, shift = film(z).chunk(2, -1)
        return scale * linear(x) + shift

    def named(gradients: Leaves) -> Leaves:
        halves = [*gradients["weight"].chunk(2), *gradients["bias"].chunk(2)]
        return {"projection.weight": gradients["projection.weight"], **dict(zip(names, halves, strict=True))}

    return Written(leaves, layer, named)


def torch_bilinear(f: Bilinear) -> Written:
    """`nn.Bilinear` and two linear layers."""
    w = _own(f)
    w["interaction.weight"] = _leaf(w["interaction.weight"].transpose(1, 2).contiguous())

    def named(gradients: Leaves) -> Leaves:
        return gradients | {"interaction.weight": gradients["interaction.weight"].transpose(1, 2)}

    bilinear, lower = nn.Bilinear(1, 1, 1, bias=False), _lower(w)
    bilinear.weight = w["interaction.weight"]
    return Written(w, lambda x, z: bilinear(x, z) + lower(x, z), named)


def bilinear_einsum(f: Bilinear) -> Written:
    """One einsum over both streams and the tensor."""
    w = _own(f)
    W, lower = w["interaction.weight"], _lower(w)
    return Written(w, lambda x, z: torch.einsum("bi,oij,bj->bo", z, W, x) + lower(x, z))


def bilinear_vmap(f: Bilinear) -> Written:
    """Linear layers write each row's weights and bias, and `torch.func.vmap` applies them."""
    leaves, generate, named = _generator(f)
    linear = torch.func.vmap(functional.linear)
    return Written(leaves, lambda x, z: linear(x, *generate(z)), named)


def _lower(w: Leaves) -> Callable[[Tensor, Tensor], Tensor]:
    first = _linear(w["lower.x_projection.weight"], w["lower.bias"])
    second = _linear(w["lower.z_projection.weight"])
    return lambda x, z: first(x) + second(z)


def _generator(f: Bilinear) -> tuple[Leaves, Callable[[Tensor], tuple[Tensor, Tensor]], Callable[[Leaves], Leaves]]:
    """A layer's weights (B, O, X) and biases (B, O) as linear layers of a context, and those layers' weights."""
    W, U, V, b = f.terms()
    O, Z, X = W.shape  # noqa: E741
    leaves = {
        "matrix": _leaf(W.transpose(1, 2).reshape(O * X, Z)),
        "base": _leaf(V.flatten()),
        "lower.z_projection.weight": _leaf(U),
        "lower.bias": _leaf(b),
    }

    weights, biases = _linear(leaves["matrix"], leaves["base"]), _linear(*list(leaves.values())[2:])

    def generate(z: Tensor) -> tuple[Tensor, Tensor]:
        return weights(z).view(-1, O, X), biases(z)

    def named(gradients: Leaves) -> Leaves:
        return gradients | {
            "interaction.weight": gradients["matrix"].view(O, X, Z).transpose(1, 2),
            "lower.x_projection.weight": gradients["base"].view(O, X),
        }

    return leaves, generate, named


def generated(head: Callable[[Bilinear], Written]) -> Callable[[nn.Module], Written]:
    """A hypernetwork whose head is written in that way."""

    def write(f: Hypernetwork) -> Written:
        leaves, layer, named = head(f.head)
        context, network = _network(f)
        return Written(
            network | {f"head.{name}": leaf for name, leaf in leaves.items()},
            lambda x, z: layer(x, context(z)),
            lambda gradients: _nested(gradients, "head.", named),
        )

    return write


def _network(f: Hypernetwork) -> tuple[Callable[[Tensor], Tensor], Leaves]:
    """tanh(Az + a), scaled, and its weights."""
    leaves, scale = {f"network.{name}": leaf for name, leaf in _own(f.network).items()}, f.scale
    linear = _linear(*leaves.values())
    return lambda z: linear(z).tanh() * scale, leaves


def _nested(gradients: Leaves, prefix: str, named: Callable[[Leaves], Leaves]) -> Leaves:
    """The gradients, of which those with the prefix are renamed by `named`."""
    inner = {name.removeprefix(prefix): d for name, d in gradients.items() if name.startswith(prefix)}
    return gradients | {prefix + name: d for name, d in named(inner).items()}


def network_of_rows(by_loop: bool) -> Callable[[Conditional], Written]:
    """Two generated layers, their weights written for all rows at once and applied row by row, or by `vmap`."""

    def write(f: Conditional) -> Written:
        leaves: Leaves = {}
        layers, names = [], []
        for k, hypernetwork in enumerate(f.layers):
            prefix = f"layers.{k}."
            context, network = _network(hypernetwork)
            inner, generate, named = _generator(hypernetwork.head)
            leaves |= {prefix + name: leaf for name, leaf in network.items()}
            leaves |= {f"{prefix}head.{name}": leaf for name, leaf in inner.items()}
            layers.append((context, generate))
            names.append((f"{prefix}head.", named))

        def layer(x: Tensor, z: Tensor) -> Tensor:
            weights = [tensor for context, generate in layers for tensor in generate(context(z))]
            if not by_loop:
                return torch.func.vmap(_two_layers)(x, *weights)
            rows = zip(x, *(tensor.unbind() for tensor in weights), strict=True)
            return torch.stack([_two_layers(*row) for row in rows])

        def all_named(gradients: Leaves) -> Leaves:
            for prefix, named in names:
                gradients = _nested(gradients, prefix, named)
            return gradients

        return Written(leaves, layer, all_named)

    return write


def _two_layers(x: Tensor, first: Tensor, first_bias: Tensor, second: Tensor, second_bias: Tensor) -> Tensor:
    return functional.linear(functional.linear(x, first, first_bias).relu(), second, second_bias)


FORMS: dict[str, tuple[Callable[..., Integrator], dict[str, Callable[..., Written]]]] = {
    "additive": (Additive, {"concat + Linear": concat_and_linear}),
    "concat": (Concat, {"concat + Linear": concat_and_linear}),
    "mi": (MultiplicativeIntegration, {"by hand": mi_by_hand}),
    "bilinear": (Bilinear, {"nn.Bilinear": torch_bilinear, "einsum": bilinear_einsum, "vmap": bilinear_vmap}),
    "low-rank": (LowRank, {"by hand": low_rank_by_hand}),
    "film": (Projected, {"by hand": film_by_hand}),
    "hypernetwork": (
        partial(Hypernetwork, features=16),
        {"einsum": generated(bilinear_einsum), "vmap": generated(bilinear_vmap)},
    ),
}


def conditional_cases() -> list[ConditionalCase]:
    """Each form at batch 256, in two sizes, and a network of generated weights."""
    network = partial(Conditional, hidden=32, layers=2, integrator=Hypernetwork, gain=1)
    rows = {"loop over rows": network_of_rows(by_loop=True), "vmap": network_of_rows(by_loop=False)}
    return [
        ConditionalCase(
            f"{form}-{x}x{z}-{o}",
            (1, 256, x, o),
            ours,
            at_least=1.0,
            context=z,
            # nn.Bilinear takes 48 s for the larger one.
            written={name: write for name, write in written.items() if x < 1024 or name != "nn.Bilinear"},
        )
        for x, z, o in ((128, 32, 128), (1024, 64, 1024))
        for form, (ours, written) in FORMS.items()
    ] + [GeneratedCase("generated-256x32-256", (1, 256, 256, 256), network, at_least=20.0, context=32, written=rows)]
