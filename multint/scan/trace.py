"""From a cell's step to a graph of ATen operations, with the number of rows left open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from multint.errors import EngineError, in_a_line

aten = torch.ops.aten

# The number of rows is open, but the compiler decides by this one where threads are worth it: not by the first call's,
# so that no chance of the first call is kept in its cache.
_TYPICAL_ROWS = 64


@dataclass
class Trace:
    """A step as a graph: placeholders for the invariants, then the inputs, then the state; the new state as output."""

    graph: fx.Graph
    invariants: list[fx.Node]  # parameters and buffers, in the order of `tensors(cell)`
    inputs: list[fx.Node]  # the leaves of x
    states: list[fx.Node]
    outputs: list[fx.Node]  # the new state, field by field
    mode: FakeTensorMode  # of the stand-ins in every node's meta["val"]


def tensors(cell: nn.Module) -> dict[str, Tensor]:
    """The cell's parameters and buffers by name: what is the same at every step."""
    return dict(cell.named_parameters()) | dict(cell.named_buffers())


def trace(cell: nn.Module, x: Any, state: Any) -> Trace:
    """Trace `cell.step(x, state)` for any number of rows, with the state in the dtypes that the step gives it.

    Raises: EngineError where the step draws random numbers, branches on values or on the number of rows, writes to its
    inputs, or lets the rows of a batch see each other.
    """
    traced = _trace(cell, x, state)
    dtypes = [node.meta["val"].dtype for node in traced.outputs]
    if dtypes != [field.dtype for field in state]:
        # Under autocast a float32 initial state is followed by states of the products' dtype.
        traced = _trace(cell, x, type(state)(*(field.to(dtype) for field, dtype in zip(state, dtypes, strict=True))))
        if dtypes != [node.meta["val"].dtype for node in traced.outputs]:
            raise EngineError(f"fused: the dtypes of the state change from step to step, from {dtypes} on")
    for old, new in zip(traced.states, traced.outputs, strict=True):
        if old.meta["val"].shape[1:] != new.meta["val"].shape[1:]:
            before, after = (tuple(node.meta["val"].shape[1:]) for node in (old, new))
            raise EngineError(f"fused: the state's shape changes from step to step: of a row, from {before} to {after}")
    _check_rows(traced, list(tensors(cell).values()))
    return traced


class _Step(nn.Module):
    """A cell's step as a forward, so that `functional_call` can put other tensors in its parameters' place."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Any, state: Any) -> Any:
        step: Any = self.cell.step
        return step(x, state)


def _trace(cell: nn.Module, x: Any, state: Any) -> Trace:
    names = [f"cell.{name}" for name in tensors(cell)]
    x_leaves, x_spec = pytree.tree_flatten(x)
    step, form = _Step(cell), type(state)

    def flat(*leaves: Tensor) -> list[Tensor]:
        weights, rest = leaves[: len(names)], leaves[len(names) :]
        one_x = pytree.tree_unflatten(list(rest[: len(x_leaves)]), x_spec)
        one_state = form(*rest[len(x_leaves) :])
        return list(torch.func.functional_call(step, dict(zip(names, weights, strict=True)), (one_x, one_state)))

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    weights = [_stand_in(mode, leaf, rows=False) for leaf in tensors(cell).values()]
    rows = [_stand_in(mode, leaf, rows=True) for leaf in (*x_leaves, *state)]
    try:
        with mode, enable_python_dispatcher(), torch.no_grad():
            module = make_fx(torch.func.functionalize(flat), _allow_non_fake_inputs=True)(*weights, *rows)
    except Exception as error:
        raise EngineError(f"fused: {_why_not(cell, x, state, error)}") from error
    graph = module.graph
    _refuse(graph, mode)
    _free_constants(graph)
    _split_addmm(graph)
    _merge_duplicates(graph)
    graph.eliminate_dead_code()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    first, last = len(names), len(names) + len(x_leaves)
    outputs: Any = graph.output_node().args[0]
    return Trace(graph, placeholders[:first], placeholders[first:last], placeholders[last:], list(outputs), mode)


_RANDOM = "the step draws random numbers ({}); draw them outside, as streams"


class _Watch(TorchDispatchMode):
    """Notes the operations that no graph for all rows and steps can hold."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.found.append(_RANDOM.format(func))
        elif func is aten._local_scalar_dense.default:
            self.found.append(f"the step branches on a value ({func}); use torch.where")
        return func(*args, **(kwargs or {}))


def _why_not(cell: nn.Module, x: Any, state: Any, error: Exception) -> str:
    """What kept the step from being traced: the tracer's error seldom names it, a run of the step does."""
    step: Any = cell.step
    with torch.random.fork_rng(), torch.no_grad(), _Watch() as watch:
        step(x, state)
    return watch.found[0] if watch.found else f"the step cannot be traced: {in_a_line(error)}"


def _stand_in(mode: FakeTensorMode, tensor: Tensor, rows: bool) -> Tensor:
    """A tensor without numbers; with rows, of an open number of them, the same for all such tensors."""
    if rows:
        tensor = tensor.new_empty(_TYPICAL_ROWS, *tensor.shape[1:])
    sizes = [DimDynamic.DUCK if rows and i == 0 else DimDynamic.STATIC for i in range(tensor.ndim)]
    return mode.from_tensor(tensor.detach(), symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


def _refuse(graph: fx.Graph, mode: FakeTensorMode) -> None:
    """Raise for what a graph cannot say, or says for one call alone."""
    for node in graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise EngineError(f"fused: {_RANDOM.format(node.target)}")
        if node.target._schema.is_mutable:
            raise EngineError(
                f"fused: the step writes to one of its inputs ({node.target}); return a new tensor instead"
            )
    assert mode.shape_env is not None
    for guard in mode.shape_env.guards:
        symbols = guard.expr.free_symbols
        if not all(guard.expr.subs(dict.fromkeys(symbols, n)) for n in (2, 3, 4, 7, 64, 1000, 10**6)):
            raise EngineError(f"fused: the step branches on the number of rows ({guard.expr})")


_CONSTANTS = {
    aten.new_zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.new_ones.default: 1,
    aten.ones_like.default: 1,
}


def _free_constants(graph: fx.Graph) -> None:
    """Let a constant of a fixed shape depend on nothing: its argument gave it a dtype alone."""
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.target in _CONSTANTS and all(isinstance(size, int) for size in value.shape):
            with graph.inserting_before(node):
                constant = graph.call_function(
                    aten.full.default,
                    (list(value.shape), _CONSTANTS[node.target]),
                    {"dtype": value.dtype, "device": value.device},
                )
            constant.meta["val"] = value
            node.replace_all_uses_with(constant)
            graph.erase_node(node)


def _split_addmm(graph: fx.Graph) -> None:
    """A product and its bias apart, so that the bias joins the pointwise code."""
    for node in list(graph.nodes):
        if node.target is aten.addmm.default and not node.kwargs:
            bias, left, right = node.args
            with graph.inserting_before(node):
                product = graph.call_function(aten.mm.default, (left, right))
                total = graph.call_function(aten.add.Tensor, (product, bias))
            product.meta["val"] = total.meta["val"] = node.meta["val"]
            node.replace_all_uses_with(total)
            graph.erase_node(node)


def _merge_duplicates(graph: fx.Graph) -> None:
    """Compute once what the step computes twice from the same values."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        first = seen.setdefault((node.target, str(spec), tuple((type(leaf), leaf) for leaf in leaves)), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _check_rows(traced: Trace, weights: list[Tensor]) -> None:
    """Raise unless the step of three rows together is that of each by itself, tried on random numbers."""
    generator = torch.Generator().manual_seed(0)

    def draw(node: fx.Node) -> Tensor:
        value = node.meta["val"]
        numbers = torch.randn(3, *value.shape[1:], generator=generator)
        return (numbers > 0 if value.dtype == torch.bool else numbers.to(value.dtype)).to(value.device)

    rows = [draw(node) for node in (*traced.inputs, *traced.states)]
    with torch.no_grad(), torch.autocast(rows[0].device.type, enabled=False):
        together = _values(traced.graph, [*weights, *rows])
        alone = [_values(traced.graph, [*weights, *(row[i : i + 1] for row in rows)]) for i in range(3)]

    def agree(node: fx.Node) -> bool:
        whole = together[node]
        if whole.ndim == 0:
            return False
        parts = torch.cat([one[node] for one in alone])
        tolerance = 1e-3 if whole.dtype in (torch.float32, torch.float64) else 0.1
        return whole.shape == parts.shape and torch.allclose(whole, parts, tolerance, tolerance, equal_nan=True)

    if all(agree(node) for node in traced.outputs):
        return
    on_rows = {*traced.inputs, *traced.states}
    for node in traced.graph.nodes:
        if node.op == "call_function" and on_rows & set(node.all_input_nodes):
            on_rows.add(node)
            if isinstance(together[node], Tensor) and not agree(node):
                raise EngineError(f"fused: the rows of a batch see each other ({node.target})")


def _values(graph: fx.Graph, arguments: list[Tensor]) -> dict[fx.Node, Any]:
    """The value of every node."""
    values: dict[fx.Node, Any] = {}
    rest = iter(arguments)
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(rest)
        elif node.op == "call_function":
            args, kwargs = pytree.tree_map_only(fx.Node, values.__getitem__, (node.args, node.kwargs))
            values[node] = node.target(*args, **kwargs)
        elif node.op == "get_attr":
            raise EngineError(f"fused: the step holds a tensor that is no parameter or buffer ({node.target})")
    return values
