"""An existing network's layers made conditional."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from multint.errors import OptionError, OptionTypeError, ShapeError
from multint.integrators import Diagonal, Integrator
from multint.integrators.base import build, check_parts
from multint.integrators.checks import check_features, positive

Selector = type | str | Callable[[str, nn.Module], bool]
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# How a layer says what it gives: the attribute, and the dimension of the features.
_WIDTHS = {
    "out_channels": 1,
    "num_channels": 1,
    "num_features": 1,
    "out_features": -1,
    "embedding_dim": -1,
    "normalized_shape": -1,
}


def condition(
    module: nn.Module,
    context_features: int,
    integrator: Callable[[int, int, int], Integrator] = Diagonal,
    where: Selector | tuple[type | str, ...] = LAYERS,
) -> Conditioned:
    """Let an integrator follow each chosen layer of a network, so that a context c acts on what the layer gives:

    y ← f(y, c) where f starts at the identity, as `Diagonal` does (FiLM), and y ← y + r ⊙ f(y, c) with a learnt r that
    starts at 0 for any other f. Either way the network starts exactly as it was.

        f = condition(net, 16, where=nn.BatchNorm2d)
        y = f(images, context=c)  # c (B, 16)

    Shapes: the context is (..., C). For a layer with channels in dimension 1 (convolutions, batch and group
    normalisation) c is (B, C), or (C,) for all, and acts alike at every place. For others the features are the last
    dimension, and the context's leading shape broadcasts to the layer's, from the right: rows (B, O) take c (B, C), and
    sequences (B, T, O) take c (B, 1, C). As (B, C) it is an error there for all T but T = B, where step n of every
    sequence would get context n. A recurrent layer's state (1, B, C) has a dimension too many for rows: give its [-1].

    Args:
        module: the network. It is changed in place, so that an optimiser that has its weights already trains them. They
            keep their names. From now on it is called only through what is returned; `copy.deepcopy` it before to keep
            it, or to condition it a second time.
        integrator: factory `(O, C, O) -> Integrator`, called for every chosen layer of O features.
        where: which layers: a type; a name such as "blocks.*.conv", in which * stands for one part or within one; a
            tuple of these; or a function of a layer's name and the layer. Linear and convolutional ones if not given.

    A layer's O is read from its `out_channels`, `num_channels` or `num_features` (dimension 1) or its `out_features`,
    `embedding_dim` or `normalized_shape` (last dimension). A block of your own that sets one of them can be chosen too.

    Raises: OptionError for what is no module or is conditioned already, and where `where` chooses no layer, or one
    whose width is not known; ShapeError, when called, where the context would change the shape of a layer's result.
    Source: Perez et al. 2018 (FiLM); Bachlechner et al. 2021 (ReZero) for r.
    """
    if not isinstance(module, nn.Module):
        raise OptionTypeError(f"condition: module is a {type(module).__name__}, expected a torch.nn.Module")
    _check_not_conditioned(module)
    return Conditioned(module, context_features, integrator, _choose(module, where))


class Conditioned(nn.Module):
    """A network whose chosen layers read a context: what `condition` returns. Call it as `f(*inputs, context=c)`.

    Besides the network's own, in `module`, it has one integrator for each name in `names`, in `integrators`. Copies,
    threads and calls within calls do not see each other's contexts. A part of the network that is run again in the
    backward pass (`torch.utils.checkpoint` inside it) has no context by then, and says so: checkpoint the whole call.

    Raises: OptionError where the context is missing; ShapeError where it does not fit. Warns after the first call of
    chosen layers that were not called: their owner may use their weights only.
    """

    def __init__(
        self,
        module: nn.Module,
        context_features: int,
        integrator: Callable[[int, int, int], Integrator],
        layers: dict[str, nn.Module],
    ) -> None:
        super().__init__()
        self.context_features = positive(self, "context_features", context_features)
        self.module = module
        self.names = tuple(layers)
        self.integrators = nn.ModuleList()
        self._context = _Context()
        # First all that may fail, and then what changes the network.
        widths = {name: _width(name, layer) for name, layer in layers.items()}
        for name, layer in layers.items():
            like = next(iter((*layer.parameters(), *module.parameters())), torch.empty(0))
            self.integrators.append(_from_identity(self, integrator, widths[name][0], context_features).to(like))
        self._hooks = [
            _Hook(name, widths[name][1], f, self._context) for name, f in zip(self.names, self.integrators, strict=True)
        ]
        for layer, hook in zip(layers.values(), self._hooks, strict=True):
            layer.register_forward_hook(hook)
        self._has_run = False
        self.integrators.train(module.training)
        self.training = module.training  # not by train(), which a frozen part of the network would obey too

    def forward(
        self,
        *inputs: Any,
        context: Tensor | None = None,  # (..., C)
        **settings: Any,
    ) -> Any:
        if not isinstance(context, Tensor):
            raise OptionError(
                f"Conditioned: context is {'missing' if context is None else f'a {type(context).__name__}'}, "
                f"expected a tensor (..., {self.context_features}), as in f(x, context=c)"
            )
        check_features(self, "context", context, self.context_features, "context_features")
        before = self._context.value
        self._context.value = context
        try:
            result = self.module(*inputs, **settings)
        finally:
            self._context.value = before
        if not torch.compiler.is_compiling() and not self._has_run:
            self._has_run = True
            if idle := [hook.name for hook in self._hooks if not hook.has_run]:
                warnings.warn(f"condition: chosen layers that were not called: {', '.join(idle)}", stacklevel=2)
        return result

    def extra_repr(self) -> str:
        return f"context_features={self.context_features}, names={self.names}"


class Correction(Integrator):
    """y = x + r ⊙ f(x, z) with a learnt vector r that starts at 0, so that it starts at the identity for any f.

    Source: Bachlechner et al. 2021 (ReZero), with a number for every feature.
    """

    def __init__(self, integrator: Integrator) -> None:
        check_parts(self, integrator)
        super().__init__(integrator.x_features, integrator.z_features, integrator.out_features)
        self.integrator = integrator
        self.rate = nn.Parameter(torch.zeros(self.out_features))

    def integrate(
        self,
        x: Tensor,  # (..., O)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        correction = self.integrator(x, z)
        return x + self.rate.to(correction.dtype) * correction


class _Context(threading.local):
    """The context of the call that runs in this thread. A copy of a network gets a new one."""

    value: Tensor | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()


class _Hook:
    """Runs after a layer. An object and no function, so that a copied layer calls the copied integrator."""

    def __init__(self, name: str, dim: int, integrator: nn.Module, context: _Context) -> None:
        self.name, self.dim, self.integrator, self.context = name, dim, integrator, context
        self.has_run = False

    def __call__(self, layer: nn.Module, _: tuple[Any, ...], y: Any) -> Tensor:
        context = self.context.value
        if context is None:
            raise OptionError(
                f"condition: {_shown(self.name, layer)} was called without a context; call what condition returned, "
                "as f(x, context=c)"
            )
        if not isinstance(y, Tensor):
            raise ShapeError(
                f"condition: {_shown(self.name, layer)} gives a {type(y).__name__}, expected one tensor; choose "
                "another layer"
            )
        if not torch.compiler.is_compiling():
            self.has_run = True
        try:
            return self._integrate(y, context)
        except ShapeError as error:
            raise ShapeError(f"condition: after {_shown(self.name, layer)}: {error}") from None

    def _integrate(self, y: Tensor, context: Tensor) -> Tensor:
        dim = -1 if self.dim == -1 or y.ndim < 2 else self.dim % y.ndim - y.ndim
        places = (1,) * (-1 - dim)
        placed = context.reshape(*context.shape[:-1], *places, context.shape[-1])
        result: Tensor = self.integrator(y.movedim(dim, -1), placed).movedim(-1, dim)
        if result.shape != y.shape:
            raise ShapeError(
                f"the context {tuple(context.shape)} makes {tuple(result.shape)} of the layer's {tuple(y.shape)}, "
                "expected one that leaves the shape as it is, such as (B, C)"
            )
        return result.contiguous() if y.is_contiguous() else result  # the network may view it


def _from_identity(
    owner: nn.Module, factory: Callable[[int, int, int], Integrator], features: int, context_features: int
) -> Integrator:
    """The factory's integrator, corrected where it does not start at the identity, which a draw shows."""
    with torch.device("cpu"):
        f = build(owner, "integrator", factory, features, context_features, features)
        generator = torch.Generator().manual_seed(0)
        y, context = (torch.randn(2, n, generator=generator) for n in (features, context_features))
        with torch.no_grad():
            starts_as_it_was = torch.equal(f.eval()(y, context), y)
        return f if starts_as_it_was else Correction(f)


def _check_not_conditioned(module: nn.Module) -> None:
    """Raise an OptionError where a layer follows a context that no part of the module would give it."""
    inner = [part._context for part in module.modules() if isinstance(part, Conditioned) and part is not module]
    for name, layer in module.named_modules():
        for hook in layer._forward_hooks.values():
            if isinstance(hook, _Hook) and not any(hook.context is context for context in inner):
                raise OptionError(
                    f"condition: {_shown(name, layer)} is conditioned already, and would miss its first context: "
                    "condition a copy.deepcopy that was made of the network before, or choose all layers at once"
                )


def _choose(module: nn.Module, where: Selector | tuple[type | str, ...]) -> dict[str, nn.Module]:
    """The layers that are chosen, by name. A layer that has several is called by the first."""
    layers = dict(module.named_modules())
    selectors = where if isinstance(where, tuple) else (where,)
    found = [{name for name, layer in layers.items() if _matches(one, name, layer)} for one in selectors]
    for one, names in zip(selectors, found, strict=True):
        if not names and (isinstance(one, str) or not any(found)):
            shown = ", ".join(
                getattr(s, "__name__", repr(s)) for s in (selectors if not isinstance(one, str) else [one])
            )
            raise OptionError(f"condition: where ({shown}) chooses no layer; there are {_listed(layers)}")
    return {name: layer for name, layer in layers.items() if any(name in names for names in found)}


def _matches(selector: Any, name: str, layer: nn.Module) -> bool:
    if isinstance(selector, type):
        return isinstance(layer, selector)
    if isinstance(selector, str):
        parts, patterns = name.split("."), selector.split(".")
        return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
    if not callable(selector):
        raise OptionTypeError(
            f"condition: where is {selector!r}, expected a type, a name, a tuple of these, or a function of a name "
            "and a layer"
        )
    try:
        inspect.signature(selector).bind(name, layer)
    except TypeError:
        raise OptionError(
            f"condition: where ({getattr(selector, '__name__', repr(selector))}) does not take a name and a layer, "
            "expected a function as in lambda name, layer: isinstance(layer, nn.Linear)"
        ) from None
    except ValueError:  # built in, and without a signature
        pass
    return bool(selector(name, layer))


def _width(name: str, layer: nn.Module) -> tuple[int, int]:
    """The features that a layer gives, and their dimension."""
    for attribute, dim in _WIDTHS.items():
        features = getattr(layer, attribute, None)
        if isinstance(features, tuple) and features:
            features = features[-1]
        if isinstance(features, int):
            kernel = getattr(layer, "kernel_size", None)  # a convolution also takes one input without a batch
            return features, -1 - len(kernel) if isinstance(kernel, tuple) and dim == 1 else dim
    raise OptionError(
        f"condition: how many features {_shown(name, layer)} gives is not known; expected one of the attributes "
        f"{', '.join(_WIDTHS)}"
    )


def _shown(name: str, layer: nn.Module) -> str:
    return f"'{name}' ({type(layer).__name__})" if name else f"the {type(layer).__name__}"


def _listed(layers: dict[str, nn.Module]) -> str:
    """The layers that could be chosen, or all where there is none; the first twenty."""

    def names(known: bool) -> Iterator[str]:
        for name, layer in layers.items():
            if not known or any(hasattr(layer, attribute) for attribute in _WIDTHS):
                yield _shown(name, layer)

    found = list(names(known=True)) or list(names(known=False))
    return ", ".join(found[:20]) + (f" and {len(found) - 20} more" if len(found) > 20 else "")
