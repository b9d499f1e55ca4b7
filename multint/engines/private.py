"""The parts of torch without a promise that the engines use: to trace a step, to compile a graph, to see who calls.

Everything else in this package keeps to torch's public names. A version of torch that lacks one of these parts raises
an ImportError or an AttributeError when it is used: then pieces run op by op (`compiled`), or `auto` loops (the rest).

What is slow to import is imported where it is used: most programs never trace.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from multint.engines.failures import RefusedError
from multint.errors import in_a_line

# The number of rows is open, but the compiler decides by this one where threads are worth it. It is not the first
# call's, so that the cached kernel does not depend on the first call's batch size.
_TYPICAL_ROWS = 64


class StandIns:
    """A world of tensors without numbers, in which steps are traced; the number of rows is one open symbol.

    Attributes:
        plainer: the graphs of composite operations in terms of plainer ones; see `kernel.plain`.
    """

    def __init__(self) -> None:
        from torch._dispatch.python import enable_python_dispatcher
        from torch._dynamo import config
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import make_fx
        from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

        self._make_graph, self._dispatcher = make_fx, enable_python_dispatcher
        self._context, self._open, self._fixed = StatelessSymbolicContext, DimDynamic.DUCK, DimDynamic.STATIC
        self.plainer: dict[Any, fx.Graph] = {}
        self._shapes = ShapeEnv()
        with config.patch(fake_tensor_cache_enabled=False):  # as in `tracing_settings`
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

    def new(self, stand_in: Tensor, shape: tuple[Any, ...]) -> Tensor:
        """One of another shape, on the same device."""
        with self.mode:
            return stand_in.new_empty(shape)

    def _stand_in(self, tensor: Tensor, open_rows: bool) -> Tensor:
        # Open sizes that are equal are one symbol, and only the numbers of rows are open.
        sizes = [self._open if open_rows and i == 0 else self._fixed for i in range(tensor.ndim)]
        made: Tensor = self.mode.from_tensor(tensor, symbolic_context=self._context(dynamic_sizes=sizes))
        return made

    def trace(
        self, function: Callable[..., Any], stand_ins: list[Tensor], decompositions: Any = None
    ) -> fx.GraphModule:
        """The function as a graph of ATen operations that writes to none of its values."""
        with self.mode, self._dispatcher():
            module: fx.GraphModule = self._make_graph(
                torch.func.functionalize(function),
                decomposition_table=decompositions,
                _allow_non_fake_inputs=True,
            )(*stand_ins)
        return module


def for_rows(number: Any, rows: int) -> Any:
    """A size, or several, where there are so many rows."""
    if isinstance(number, torch.Size):
        return tuple(for_rows(size, rows) for size in number)
    is_open = isinstance(number, torch.SymInt | torch.SymBool)
    return number.node.expr.subs(dict.fromkeys(number.node.expr.free_symbols, rows)) if is_open else number


def is_stride(number: Any) -> bool:
    """Whether an open number that a traced step was given is a stride of a tensor that is not contiguous."""
    return bool(_strides(number.node.shape_env, number.node.expr))


def is_of_numpy(node: fx.Node) -> bool:
    """Whether a node of a traced step is an array or a number of NumPy's that it was given."""
    return type(getattr(node.meta.get("grapharg"), "source", None)).__name__ == "NumpyTensorSource"


def is_unknown(number: Any) -> bool:
    """Whether an open number is of no size: it is a tensor's version, or comes of its numbers."""
    if not isinstance(number, torch.SymInt | torch.SymFloat):
        return False
    return any(not number.node.shape_env.var_to_sources.get(symbol) for symbol in number.node.expr.free_symbols)


def fixed_rows(values: Sequence[Tensor]) -> str:
    """The condition on the number of rows of such stand-ins that the traced code has tested; empty where there is none.

    What every number from 2 on meets is not among them.
    """
    sizes: list[Any] = [size for value in values for size in value.shape if isinstance(size, torch.SymInt)]
    if not sizes:
        return ""
    shapes = sizes[0].node.shape_env
    for guard in shapes.guards:
        if _strides(shapes, guard.expr):
            # Torch's own code asks for the order of a tensor in memory, which changes no number. What else a step asks
            # of a stride may be different for another tensor of the same kind.
            asked_in = guard.sloc.framework_loc if guard.sloc else None
            if asked_in is None or not asked_in.filename.endswith(_ORDERS):
                return f"a stride: {guard.expr}"
            continue
        first, *others = sorted(guard.expr.free_symbols, key=str) or [None]
        # All open sizes are the number of rows: that two of them are equal is no condition.
        if guard.expr.subs(dict.fromkeys(others, first)) != True:  # noqa: E712  # of sympy's
            return str(guard.expr)
    return ""


_ORDERS = os.path.join("torch", "_prims_common", "__init__.py")


def _strides(shapes: Any, expression: Any) -> list[Any]:
    """The symbols in an expression that stand for strides, and not for sizes."""
    sources = shapes.var_to_sources
    kinds = {
        symbol: [getattr(source, "prop", None) for source in sources.get(symbol, ())]
        for symbol in expression.free_symbols
    }
    return [
        symbol for symbol, found in kinds.items() if found and all(getattr(k, "name", "") == "STRIDE" for k in found)
    ]


def row_dimensions(stand_in: Any) -> list[int]:
    """The dimensions of a stand-in whose size has to do with the number of rows."""
    return [i for i, size in enumerate(stand_in.shape) if isinstance(size, torch.SymInt)]


def rows_in(size: Any) -> int:
    """How many numbers each row has in a dimension: 1, or k where the dimension's size is k times the number of rows.

    Raises: RefusedError where it is neither.
    """
    factor, symbol = size.node.expr.as_coeff_Mul()
    if not (symbol.is_Symbol and factor.is_Integer):
        raise RefusedError("it arranges the rows anew")
    return int(factor)


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


# What Inductor is told. tanh as 2 / (1 + exp(−2x)) − 1 would be accurate near 0 in absolute terms only. The asserts on
# addresses would run at every step. A graph of CUDA's for each piece would copy what it reads: it is another view at
# every step.
_OPTIONS = {"cpp.use_decompose_tanh": False, "alignment_asserts": False, "triton.cudagraphs": False}


def compiled(function: Callable[..., Any], stand_ins: list[Tensor], world: StandIns) -> Callable[..., Any]:
    """The function as one that Inductor has compiled for any number of rows.

    By Inductor's own door for graphs, and not by torch.compile, whose guards would be checked at every step: that takes
    longer than a small piece, and whoever changes their settings or resets them would change our scan.
    """
    from torch._inductor import compile

    with torch.no_grad():
        fakes: list[Any] = [world.like(stand_in) for stand_in in stand_ins]
        run: Callable[..., Any] = compile(world.trace(function, fakes), fakes, _OPTIONS)
    return run


def decompositions(names: Sequence[str]) -> dict[Any, Callable[..., Any]]:
    """Torch's own decompositions of the operations of these names; what its version lacks is left out."""
    from torch._decomp import get_decompositions

    aten: Any = torch.ops.aten
    found: dict[Any, Callable[..., Any]] = get_decompositions(
        [getattr(aten, name) for name in names if hasattr(aten, name)]
    )
    return found


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


def scan_operator(step: Callable[[Any, Any], Any], xs: Any, state: Any) -> tuple[Tensor, Any]:
    """`state = step(xs[t], state)` for every t, as one operator: the first fields of all states, and the last state."""
    from torch._higher_order_ops.scan import scan

    def body(fields: tuple[Tensor, ...], x: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        new = step(x, type(state)(*fields))
        # Copies, since the operator allows no result that is an argument or another result.
        return tuple(field.clone() for field in new), new[0].clone()

    last, output = scan(body, tuple(state), xs)
    return output, type(state)(*last)


def in_memory(tensor: Tensor) -> Tensor:
    """A tensor whose memory holds its numbers: not one whose sign is a mark, nor zeros that have no memory."""
    return tensor.clone() if tensor._is_zerotensor() else tensor.resolve_neg()


def is_control_flow(error: Exception) -> bool:
    """Whether an exception is how checkpointing stops what it computes again, and not a failure."""
    return type(error).__module__ == "torch.utils.checkpoint"


def modules_of(module: nn.Module) -> list[nn.Module]:
    """A module and all within it, each once. Torch's own way takes five times as long, and the hash of each."""
    found = {id(module): module}
    left = [module]
    while left:
        for inner in left.pop()._modules.values():
            if inner is not None and id(inner) not in found:
                found[id(inner)] = inner
                left.append(inner)
    return list(found.values())


def parameters_of(module: nn.Module) -> list[Tensor]:
    """All parameters of a module, each once."""
    found = [tensor for part in modules_of(module) for tensor in part._parameters.values() if tensor is not None]
    return list({id(tensor): tensor for tensor in found}.values())


def are_hashed(module: nn.Module) -> bool:
    """Whether a module and all within it have a hash, without which torch cannot list what they hold."""
    try:
        return bool(set(modules_of(module)))
    except Exception:
        return False


_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks")  # fmt: skip  # noqa: E501


def global_hooks() -> bool:
    """Whether there are hooks that calls of all modules run."""
    return any(getattr(nn.modules.module, kind) for kind in _GLOBAL_HOOKS)


_thread = threading.local()


def is_read_in_a_step() -> bool:
    """Whether the tracer reads the caller's code as a part of a cell's step, and not as a program of torch.compile's.

    The tracer calls this and keeps what it gives.
    """
    return getattr(_thread, "reads_a_step", False)


# As `torch.compiler.assume_constant_result` marks it, which imports Dynamo.
is_read_in_a_step._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextlib.contextmanager
def free_of_rows() -> Iterator[None]:
    """Within it, torch chooses no algorithm by the number of rows: an order of einsum's, a library for convolutions."""
    from torch.backends import nnpack, opt_einsum

    before = torch._C._get_mkldnn_enabled()  # the public flag of oneDNN sets others too, and warns of them
    torch._C._set_mkldnn_enabled(False)
    try:
        with opt_einsum.flags(enabled=False), nnpack.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@contextlib.contextmanager
def tracing_settings(side_effects: bool) -> Iterator[None]:
    """What the tracer is told while it traces a step.

    `side_effects` lets the step change Python objects, which it is then seen to do at each call of its graph.
    """
    from torch import _dynamo

    guards: Any = _dynamo.guards
    settings: Any = _dynamo.config.patch(
        side_effect_replay_policy="silent" if side_effects else "error",
        skip_nnmodule_hook_guards=False,  # hooks may come later
        recompile_limit=10**6,  # we count ourselves
        accumulated_recompile_limit=10**6,
        error_on_recompile=False,
        # It would keep a megabyte of every step for good, and few steps ask the same twice.
        fake_tensor_cache_enabled=False,
    )
    with settings, free_of_rows(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer looks at the .grad of what a step takes, leaf or not
        logger = logging.getLogger("torch._guards")  # which tells of what is raised, too
        logger.disabled, before = True, logger.disabled
        # What the tracer tells its log: how long its guards take, with the processor's caches emptied first.
        measure, guards.profile_guard_manager = guards.profile_guard_manager, lambda *_: 0.0
        _thread.reads_a_step = True
        try:
            yield
        finally:
            _thread.reads_a_step, logger.disabled, guards.profile_guard_manager = False, before, measure


def forget_code(function: Any) -> None:
    """Drop what the tracer keeps for a function's code."""
    from torch._C._dynamo.eval_frame import reset_code

    reset_code(function.__code__)


def changed_objects(error: Exception) -> list[str]:
    """Where the Python objects are that a step was seen to change, where that is the error: as `L['cell'].count`."""
    _, told, sources = str(error).partition("you can double check: ")
    try:
        return [str(source) for source in ast.literal_eval(sources.splitlines()[0])] if told else []
    except (SyntaxError, ValueError):
        return [sources]


def _as_written(source: str) -> str:
    """A place of the tracer's, such as `L['cell'].count`, in the words of a message."""
    if "__closure__" in source:
        return "what a function has in its closure"
    source = re.sub(r"\._(?:modules|parameters|buffers)\['(\w+)'\]", r".\1", source)
    inside = source.removeprefix("L['cell']")
    return source if inside == source else "the cell" + (f"'s {inside.lstrip('.')}" if inside else "")


def is_steps_own(error: Exception) -> bool:
    """Whether the step itself raises an error, or an operation of it does: it may be, where the tracer does not say."""
    from torch._dynamo import exc

    if isinstance(error, exc.TorchRuntimeError) or not isinstance(error, exc.TorchDynamoException):
        return True
    told = str(error).partition("\n")[0]
    return any(name in told for name in ("Observed exception", "RecursionError", "assertion failed"))


def why_untraced(error: Exception) -> str:
    """What the tracer says, in one line."""
    if changed := changed_objects(error):
        return f"the step changes {', '.join(map(_as_written, changed))}; keep it in the state"
    if "Boolean value of Tensor" in str(error):  # the tracer compares what it has made of an array
        return "the step takes the values of an array; make it a buffer"
    if "ata-dependent" in str(error):
        return "the step branches on a value; use torch.where"
    first, explained = in_a_line(error).partition(": ")[2].strip().rstrip("."), explanation_in(error)
    return f"the step cannot be traced: {first}" + ("" if explained.startswith(first) else f": {explained}")


def explanation_in(error: Exception) -> str:
    """What an error of the tracer's says, without its advice and its stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    marked = (line.partition("Explanation: ")[2] for line in lines if line.startswith("Explanation: "))
    return next(marked, lines[0])


@contextlib.contextmanager
def linear_as_products() -> Iterator[None]:
    """Within it, `linear` of sets of vectors is a product and a sum: torch's own code would fix the number of rows."""
    from torch.overrides import TorchFunctionMode

    class Linear(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is nn.functional.linear and args[0].ndim > 2 and not kwargs:
                y = args[0] @ args[1].t()
                return y if len(args) < 3 or args[2] is None else y + args[2].to(y.dtype)  # which autocast may choose
            return func(*args, **(kwargs or {}))

    with Linear():
        yield
