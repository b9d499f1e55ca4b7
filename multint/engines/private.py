"""The parts of torch without a promise that the engines use: to trace a step, to compile a graph, to see who calls.

Everything else in this package but `onednn.py` keeps to torch's public names. A version of torch that lacks one of
these parts raises an ImportError or an AttributeError when it is used: then pieces run op by op (`compiled`), or `auto`
loops (the rest).

What is slow to import is imported where it is used: most programs never trace.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from multint.engines.failures import RefusedError
from multint.errors import EngineError

# The number of rows is open, but the compiler decides by this one where threads are worth it. It is not the first
# call's, so that the cached kernel does not depend on the first call's batch size.
_TYPICAL_ROWS = 64


class StandIns:
    """A world of tensors without numbers, in which steps are traced; the number of rows is one open symbol."""

    def __init__(self) -> None:
        from torch._dispatch.python import enable_python_dispatcher
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

        self._make_graph, self._dispatcher = make_fx, enable_python_dispatcher
        self._context, self._open, self._fixed = StatelessSymbolicContext, DimDynamic.DUCK, DimDynamic.STATIC
        self._shapes = ShapeEnv()
        self.mode: Any = FakeTensorMode(shape_env=self._shapes, allow_non_fake_inputs=True)

    def whole(self, tensor: Tensor) -> Tensor:
        """A stand-in for a tensor whose every size is fixed."""
        return self._stand_in(in_memory(tensor.detach()), open_rows=False)

    def rows(self, tensor: Tensor) -> Tensor:
        """A stand-in for a tensor (B, ...) of an open number of rows, the same for all such tensors."""
        return self._stand_in(tensor.new_empty(_TYPICAL_ROWS, *tensor.shape[1:]), open_rows=True)

    def like(self, stand_in: Tensor) -> Tensor:
        """Another, contiguous one of the same shape: a tensor that is two arguments would be traced as one."""
        with self.mode:
            return torch.empty_like(stand_in, memory_format=torch.contiguous_format)

    def new(self, stand_in: Tensor, shape: tuple[Any, ...], dtype: torch.dtype | None = None) -> Tensor:
        """One of another shape, on the same device."""
        with self.mode:
            return stand_in.new_empty(shape, dtype=dtype)

    def _stand_in(self, tensor: Tensor, open_rows: bool) -> Tensor:
        # Open sizes that are equal are one symbol, and only the numbers of rows are open.
        sizes = [self._open if open_rows and i == 0 else self._fixed for i in range(tensor.ndim)]
        made: Tensor = self.mode.from_tensor(tensor, symbolic_context=self._context(dynamic_sizes=sizes))
        return made

    def trace(
        self, function: Callable[..., Any], stand_ins: list[Tensor], decompositions: Any = None
    ) -> fx.GraphModule:
        """The function as a graph of ATen operations that writes to none of its values."""
        with self.mode, self._dispatcher(), _rows_without_text():
            module: fx.GraphModule = self._make_graph(
                torch.func.functionalize(function),
                decomposition_table=decompositions,
                _allow_non_fake_inputs=True,
            )(*stand_ins)
        return module

    def fixed_rows(self) -> str:
        """The condition on the number of rows that the traced code has tested; empty where there is none.

        What every number from 2 on meets is not among them.
        """
        return str(self._shapes.guards[0].expr) if self._shapes.guards else ""


@contextlib.contextmanager
def _rows_without_text() -> Iterator[None]:
    """Within it, the user's code that makes a text of an open size is an error: it would be the symbol's name."""
    original = torch.SymInt.__repr__

    def refuse(size: torch.SymInt) -> str:
        if not str(sys._getframe(1).f_globals.get("__name__")).startswith("torch."):
            raise EngineError("fused: the step makes a text of the number of rows")
        return str(original(size))  # type: ignore[no-untyped-call]

    torch.SymInt.__repr__ = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.SymInt.__repr__ = original  # type: ignore[method-assign]


def row_dimensions(stand_in: Any) -> list[int]:
    """The dimensions of a stand-in whose size has to do with the number of rows."""
    return [i for i, size in enumerate(stand_in.shape) if isinstance(size, torch.SymInt)]


def has_rows(stand_in: Any, rows: Any) -> bool:
    """Whether a stand-in has one row for each of the batch, where `rows` is a size of that symbol."""
    first = stand_in.shape[0] if isinstance(stand_in, Tensor) and stand_in.ndim else None
    return isinstance(first, torch.SymInt) and first.node.expr == rows.node.expr


def is_operation(target: Any) -> bool:
    """Whether a node's target is an ATen operation, and not a function of Python."""
    return isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket)


def is_pointwise(target: Any) -> bool:
    """Whether an operation works on each number by itself."""
    return is_operation(target) and torch.Tag.pointwise in target.tags


def is_view(target: Any) -> bool:
    """Whether an operation arranges the numbers of its argument anew."""
    return any(result.alias_info is not None for result in target._schema.returns)


def writes(target: Any) -> bool:
    """Whether an operation writes to one of its arguments."""
    return is_operation(target) and bool(target._schema.is_mutable)


def short_name(target: Any) -> str:
    """An operation's name without that of its overload: `sum`, for `aten.sum.dim_IntList`."""
    return str(target._schema.name).removeprefix("aten::")


def given(target: Any, args: Sequence[Any], kwargs: dict[str, Any], name: str) -> Any:
    """What an operation is given for the argument of that name, or its default; None where it has none."""
    for place, argument in enumerate(target._schema.arguments):
        if argument.name == name:
            return args[place] if place < len(args) else kwargs.get(name, argument.default_value)
    return None


def arguments(target: Any) -> list[str]:
    """The names of an operation's arguments, in order."""
    return [argument.name for argument in target._schema.arguments] if is_operation(target) else []


def has_argument(target: Any, name: str) -> bool:
    """Whether an operation has an argument of that name."""
    return any(argument.name == name for argument in target._schema.arguments)


def version(tensor: Tensor) -> tuple[int, int]:
    """What changes when a tensor is replaced or written to."""
    return id(tensor), 0 if tensor.is_inference() else tensor._version


# What Inductor is told. tanh as 2 / (1 + exp(−2x)) − 1 would be accurate near 0 in absolute terms only. The asserts
# would run at every step, and the engine gives contiguous tensors of the right sizes.
_OPTIONS = {"cpp.use_decompose_tanh": False, "alignment_asserts": False}


def compiled(
    function: Callable[..., Any], stand_ins: list[Tensor], world: StandIns, size_asserts: bool
) -> Callable[[list[Tensor]], Any]:
    """The function as one that Inductor has compiled for any number of rows; it takes its arguments in a list.

    This is Inductor's inner entry: torch.compile would check guards at every call, which costs as much as a small
    piece. `size_asserts` is for versions whose generated code lacks a size without them (torch 2.15).
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    with torch.no_grad():
        fakes = [world.like(stand_in) for stand_in in stand_ins]
        graph = world.trace(function, fakes, select_decomp_table())
        with tracing(TracingContext(world.mode)), world.mode, config.patch(_OPTIONS | {"size_asserts": size_asserts}):
            made: Any = compile_fx_inner(graph, fakes)
    # Beneath `made` itself, which looks for a profiler at every call.
    run: Callable[[list[Tensor]], Any] = getattr(made, "current_callable", None) or made
    return run


def plain(module: fx.GraphModule, stand_ins: list[Tensor], world: StandIns) -> fx.Graph:
    """The module's graph with composite operations, such as norms and derivatives, in terms of plainer ones."""
    with torch.no_grad():
        graph: fx.Graph = world.trace(module, [world.like(s) for s in stand_ins], _decompositions()).graph
    for node in graph.nodes:  # what only writes passes for dead code
        if is_operation(node.target) and node.target._schema.is_mutable:
            raise RefusedError(f"it has the operation {node.target}, which writes into a tensor")
    graph.eliminate_dead_code()
    return graph


# By those that torch has for them.
_COMPOSITE = """
    addcdiv addcmul elu elu_backward fill gelu gelu_backward hardsigmoid hardsigmoid_backward hardswish
    hardswish_backward hardtanh hardtanh_backward leaky_relu leaky_relu_backward lerp log_sigmoid_backward
    log_sigmoid_forward _log_softmax _log_softmax_backward_data logsumexp masked_fill mish native_layer_norm
    native_layer_norm_backward new_full new_ones new_zeros ones_like rsub select_backward sigmoid_backward silu
    silu_backward slice_backward _softmax _softmax_backward_data softplus softplus_backward square stack tanh_backward
    threshold_backward unsafe_split zeros_like
"""


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    from torch._decomp import get_decompositions

    aten: Any = torch.ops.aten
    found: dict[Any, Callable[..., Any]] = get_decompositions(
        [getattr(aten, name) for name in _COMPOSITE.split() if hasattr(aten, name)]
    )
    found[aten.mean.dim], found[aten.var_mean.correction] = _mean, _var_mean
    for name, value in _AT_NAN.items():
        derivative = getattr(aten, name).default
        found[derivative] = _with_nan(found[derivative], value)
    return found


# Torch's own operations give these where whole vectors are computed. Its decompositions give what it gives for the few
# numbers at the end of a tensor, where an exploded activation gets the gradient of a large one.
_AT_NAN = {"elu_backward": math.nan, "hardswish_backward": math.nan, "hardtanh_backward": 0.0}


def _with_nan(derivative: Callable[..., Tensor], value: float) -> Callable[..., Tensor]:
    """The derivative with this value where the activation's argument is NaN."""

    def decomposition(*args: Any) -> Tensor:
        _, x = (arg for arg in args if isinstance(arg, Tensor))
        return torch.where(x == x, derivative(*args), value)

    return decomposition


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    dims = list(range(x.ndim) if dim is None else dim)
    return x.sum(dims, keepdim, dtype=dtype) / math.prod(x.shape[d] for d in dims)


def _var_mean(x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    dims = list(range(x.ndim) if dim is None else dim)
    mean = _mean(x, dims, keepdim=True)
    count = math.prod(x.shape[d] for d in dims) - (1 if correction is None else correction)
    return (x - mean).square().sum(dims, keepdim) / count, mean if keepdim else mean.squeeze(dims)


def surroundings() -> str:
    """What is active around the caller that its own operations would meet and a kept program would not, if anything."""
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active"
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None:
        return "the caller itself is being traced"
    if torch.is_anomaly_enabled():
        return "anomaly detection is on, which tells of each operation of a step"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    count = torch._C._len_torch_function_stack()
    modes = {type(torch._C._get_function_stack_at(i)).__name__ for i in range(count)}
    if modes - {"DeviceContext"}:  # which `torch.set_default_device` sets, and a trace knows of
        return f"a torch function mode is active ({', '.join(sorted(modes))})"
    return ""


def are_batched(*tensors: Tensor) -> bool:
    """Whether any of these stands for many, as `torch.autograd.grad(..., is_grads_batched=True)` makes them."""
    return any(torch._C._functorch.is_legacy_batchedtensor(tensor) for tensor in tensors)


_WHY = 'this layer runs its own compiled scan; with engine="loop" its loop is compiled, unrolled'
# A dict and not functools.cache, of which Dynamo warns where it looks into it.
_DISABLED: dict[Callable[..., Any], Callable[..., Any]] = {}


def uncompiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function without torch.compile, which would unroll its loops, or trace the tracer."""
    # The public way to say so imports Dynamo, which would double the time that `import multint` takes. Where it is not
    # there, nobody compiles.
    if "torch._dynamo" not in sys.modules:
        return function(*arguments)
    if function not in _DISABLED:
        _DISABLED[function] = torch.compiler.disable(function, reason=_WHY)
    return _DISABLED[function](*arguments)


# The mark itself, so that a frame which calls this breaks its graph here.
uncompiled._torchdynamo_disable = True  # type: ignore[attr-defined]


def is_free(size: int) -> bool:
    """Whether a size of a traced program is open, and not a number."""
    return isinstance(size, torch.SymInt)


def scan_operator(step: Callable[[Any, Any], Any], xs: Any, state: Any) -> tuple[Tensor, Any]:
    """`state = step(xs[t], state)` for every t, as one operator: the first fields of all states, and the last state."""
    from torch._higher_order_ops.scan import scan

    def body(fields: tuple[Tensor, ...], x: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        new = step(x, type(state)(*fields))
        # Copies, since the operator allows no result that is an argument or another result.
        return tuple(field.clone() for field in new), new[0].clone()

    last, output = scan(body, tuple(state), xs)
    return output, type(state)(*last)


def kept_by_identity() -> MutableMapping[Any, Any]:
    """A dictionary that keeps none of its keys alive, and takes two for one only where they are the same object."""
    from torch.utils.weak import WeakIdKeyDictionary

    return WeakIdKeyDictionary()


def in_memory(tensor: Tensor) -> Tensor:
    """A tensor whose memory holds its numbers: not one whose sign is a mark, nor zeros that have no memory."""
    return tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg()


def is_control_flow(error: Exception) -> bool:
    """Whether an exception is how checkpointing stops what it computes again, and not a failure."""
    return type(error).__module__ == "torch.utils.checkpoint"


# What a module keeps of its hooks that run in a forward or backward pass, its own and those of all modules.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")  # fmt: skip  # noqa: E501
_ALWAYS_THERE = frozenset(vars(nn.Module()))


def hooks(module: nn.Module) -> list[Any]:
    """The hooks that a call of the module runs, other than those of all modules."""
    return [hook for kind in _HOOKS for hook in getattr(module, kind).values()]


def global_hooks() -> bool:
    """Whether there are hooks that calls of all modules run."""
    return any(getattr(nn.modules.module, kind) for kind in _GLOBAL_HOOKS)


def parts(module: nn.Module) -> Iterator[tuple[str, nn.Module | None]]:
    """A module's parts by name, one that has two names twice."""
    return iter(module._modules.items())


def dictionaries(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Where a module keeps all of its own: the attributes, and what is held for it beside them."""
    yield vars(module)
    yield from (getattr(module, name) for name in ("_parameters", "_buffers", "_modules", *_HOOKS))


def has_hooks(tensor: Tensor) -> bool:
    """Whether functions are called with a tensor's gradient."""
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


def attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """A module's attributes beside what every module has: its parameters, buffers, parts and hooks."""
    return ((name, value) for name, value in vars(module).items() if name not in _ALWAYS_THERE)


# Where a module holds its tensors. Assigning to its attributes would check and register them.
PLACES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "parameter": lambda module: module._parameters,
    "buffer": lambda module: module._buffers,
}


def held(module: nn.Module) -> Iterator[tuple[str, str, Tensor | None]]:
    """A module's parameters and buffers: in which of the `PLACES`, the name there, and what it is."""
    for how, place in PLACES.items():
        yield from ((how, name, value) for name, value in place(module).items())


@contextlib.contextmanager
def python_function_calls(seen: Callable[[Any], None]) -> Iterator[None]:
    """Within it, every function of torch that Python code calls on tensors is shown to `seen` first."""
    from torch.overrides import TorchFunctionMode

    class Calls(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen(func)
            return func(*args, **(kwargs or {}))

    with Calls():
        yield


@contextlib.contextmanager
def operations(seen: Callable[[Any, Any, Any], None]) -> Iterator[None]:
    """Within it, every ATen operation is shown to `seen` with its arguments first."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen(func, args, kwargs or {})
            return func(*args, **(kwargs or {}))

    with Operations():  # type: ignore[no-untyped-call]
        yield


@contextlib.contextmanager
def linear_apart() -> Iterator[None]:
    """Within it, `linear` of a 3-D value adds its bias apart: torch's own code would fix the number of rows."""
    from torch.overrides import TorchFunctionMode

    def apart(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = nn.functional.linear(x, weight)
        return y if bias is None else y + bias.to(y.dtype)  # under autocast y has the products' dtype

    class Linear(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is nn.functional.linear and args and args[0].ndim > 2:
                with torch._C.DisableTorchFunction():
                    return apart(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Linear():
        yield


# What `no_grad` and its like call.
SETS_GRADIENTS = getattr(torch._C, "_set_grad_enabled", None)
