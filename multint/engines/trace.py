"""From a cell's step to a graph of ATen operations, with the number of rows left open."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from multint.errors import EngineError, MultintError, in_a_line

aten = torch.ops.aten

# Tracing and compiling go by states of the whole process: one thread at a time.
TRACING = threading.Lock()

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
    inputs or to the cell, turns gradients off, or lets the rows of a batch see each other; MultintError of the step's
    own.
    """
    cell = _copy(cell)
    unaware(_rehearse, cell, x, state)
    traced = _trace(cell, x, state)
    dtypes = [node.meta["val"].dtype for node in traced.outputs]
    if dtypes != [field.dtype for field in state]:
        # Under autocast a float32 initial state is followed by states of the products' dtype.
        state = type(state)(*(field.to(dtype) for field, dtype in zip(state, dtypes, strict=True)))
        traced = _trace(cell, x, state)
        if dtypes != [node.meta["val"].dtype for node in traced.outputs]:
            raise EngineError(f"fused: the dtypes of the state change from step to step, from {dtypes} on")
    for old, new in zip(traced.states, traced.outputs, strict=True):
        if old.meta["val"].shape[1:] != new.meta["val"].shape[1:]:
            before, after = (tuple(node.meta["val"].shape[1:]) for node in (old, new))
            raise EngineError(f"fused: the state's shape changes from step to step: of a row, from {before} to {after}")
    _check_rows(_flat(cell, x, state), traced, list(tensors(cell).values()))
    return traced


def unaware(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a thread of its own, which knows nothing of the caller's modes.

    Inference mode and the hooks of saved tensors, which checkpointing sets, would show in what it does.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *arguments).result()


def _copy(cell: nn.Module) -> nn.Module:
    """The cell with the same parameters, but buffers and attributes of its own, which may change meanwhile."""
    try:
        return copy.deepcopy(cell, {id(parameter): parameter for parameter in cell.parameters()})
    except Exception as error:
        raise EngineError(f"fused: the cell cannot be copied, to be traced: {in_a_line(error)}") from error


class _Step(nn.Module):
    """A cell's step as a forward, so that `functional_call` can put other tensors in its parameters' place."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Any, state: Any) -> Any:
        step: Any = self.cell.step
        return step(x, state)


def _flat(cell: nn.Module, x: Any, state: Any) -> Callable[..., list[Tensor]]:
    """The step as a function of the cell's tensors, the leaves of x, and the state's fields."""
    names = [f"cell.{name}" for name in tensors(cell)]
    count, spec = len(pytree.tree_leaves(x)), pytree.tree_structure(x)
    step, form = _Step(cell), type(state)

    def flat(*leaves: Tensor) -> list[Tensor]:
        weights, rest = leaves[: len(names)], leaves[len(names) :]
        one_x, one_state = pytree.tree_unflatten(list(rest[:count]), spec), form(*rest[count:])
        new = list(torch.func.functional_call(step, dict(zip(names, weights, strict=True)), (one_x, one_state)))
        if len(new) != len(one_state):
            raise EngineError(f"fused: the step gives {len(new)} tensors for a state of {len(one_state)}")
        return new

    return flat


def _trace(cell: nn.Module, x: Any, state: Any) -> Trace:
    leaves, weights = pytree.tree_leaves(x), tensors(cell).values()
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    stand_ins = [_stand_in(mode, leaf, rows=False) for leaf in weights]
    stand_ins += [_stand_in(mode, leaf, rows=True) for leaf in (*leaves, *state)]
    try:
        with mode, enable_python_dispatcher(), torch.no_grad():
            flat = torch.func.functionalize(_flat(cell, x, state))
            module = make_fx(flat, _allow_non_fake_inputs=True)(*stand_ins)
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"fused: the step cannot be traced: {in_a_line(error)}") from error
    graph = module.graph
    _refuse(graph, mode)
    _free_constants(graph)
    _split_addmm(graph)
    _merge_duplicates(graph)
    graph.eliminate_dead_code()
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    first, last = len(weights), len(weights) + len(leaves)
    outputs: Any = graph.output_node().args[0]
    return Trace(graph, placeholders[:first], placeholders[first:last], placeholders[last:], list(outputs), mode)


_RANDOM = "the step draws random numbers ({}); draw them outside, as streams"


class _Operations(TorchDispatchMode):
    """Notes the operations that no graph for all rows and steps can hold."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.found.append(_RANDOM.format(func))
        elif func is aten._local_scalar_dense.default:
            self.found.append(f"the step branches on a value ({func}); use torch.where")
        elif "batch_norm" in str(func) and any(argument is True for argument in args):  # in training
            self.found.append(f"the rows of a batch see each other ({func})")
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """Notes what a graph of operations does not show."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            self.found.append("the step turns gradients on or off; use detach")
        elif func is Tensor.register_hook:
            self.found.append("the step registers a hook on a tensor")
        return func(*args, **(kwargs or {}))


def _rehearse(cell: nn.Module, x: Any, state: Any) -> None:
    """Run the step on up to three rows, to see what it does beside computing."""

    def rows(leaf: Tensor) -> Tensor:
        some = leaf.detach()[:3].clone()
        return some.requires_grad_().clone() if some.is_floating_point() else some

    found: list[str] = []
    step: Any = cell.step
    with torch.random.fork_rng(devices=[]):
        some_x, some_state = pytree.tree_map(rows, x), type(state)(*map(rows, state))
        before = _attributes(cell)
        try:
            with _Calls(found), _Operations(found):
                step(some_x, some_state)
        except MultintError:
            raise
        except Exception as error:
            raise EngineError(f"fused: the step fails: {in_a_line(error)}") from error
    after = _attributes(cell)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if changed:
        found.append(f"the step changes the cell's {changed[0]}; keep it in the state")
    if found:
        raise EngineError(f"fused: {found[0]}")


def _attributes(cell: nn.Module) -> dict[str, Any]:
    """What every attribute of the cell's modules is, by identity, and the versions of its buffers."""
    return {
        f"{prefix}.{name}".lstrip("."): (id(value), value._version if isinstance(value, Tensor) else 0)
        for prefix, module in cell.named_modules()
        for name, value in (*vars(module).items(), *module._buffers.items())
    }


def _stand_in(mode: FakeTensorMode, tensor: Tensor, rows: bool) -> Tensor:
    """A tensor without numbers; with rows, of an open number of them, the same for all such tensors."""
    if rows:
        tensor = tensor.new_empty(_TYPICAL_ROWS, *tensor.shape[1:])
    sizes = [DimDynamic.DUCK if rows and i == 0 else DimDynamic.STATIC for i in range(tensor.ndim)]
    return mode.from_tensor(tensor.detach(), symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


def _refuse(graph: fx.Graph, mode: FakeTensorMode) -> None:
    """Raise for what a graph cannot say, or says for one call alone."""
    for node in graph.nodes:
        if node.op == "get_attr":
            raise EngineError("fused: the step holds a tensor that is no parameter; register it as a buffer")
        if isinstance(node.meta.get("val"), Tensor) and node.meta["val"].is_complex():
            raise EngineError(f"fused: the step computes with complex numbers ({node.target})")
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
        if not all(guard.expr.subs(dict.fromkeys(symbols, n)) for n in (*range(2, 130), 1000, 10**6)):
            raise EngineError(f"fused: the step branches on the number of rows, or fixes it ({guard.expr})")


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


_ROWS = 5


def _check_rows(step: Callable[..., list[Tensor]], traced: Trace, weights: list[Tensor]) -> None:
    """Raise unless the step of some rows together is that of each by itself, tried on random numbers."""
    generator = torch.Generator().manual_seed(0)

    def moved(weight: Tensor) -> Tensor:
        """A weight that no chance has made 0 or 1, which would hide what it multiplies."""
        noise = torch.randn(weight.shape, generator=generator).to(weight.device, weight.dtype)
        return (weight + noise / 10).detach() if isinstance(weight, nn.Parameter) else weight.detach()

    def draw(node: fx.Node, scale: float) -> Tensor:
        value = node.meta["val"]
        numbers = scale * torch.randn(_ROWS, *value.shape[1:], generator=generator)
        if value.dtype == torch.bool:
            numbers = numbers > 0
        elif not value.is_floating_point():
            numbers = numbers * 0  # an index, perhaps
        return numbers.to(value.device, value.dtype)

    native = [moved(weight) for weight in weights]
    empty = set(range(len(traced.outputs)))
    for scale in (1.0, 10.0):
        rows = [draw(node, scale) for node in (*traced.inputs, *traced.states)]
        try:
            together, alone, tolerance = *_both(step, _double(native), _double(rows)), 1e-9
        except Exception:  # a step that insists on its dtypes
            try:
                together, alone = _both(step, native, rows)
            except Exception as error:
                raise EngineError(f"fused: the step cannot be tried on random numbers: {in_a_line(error)}") from error
            tolerance = 1e-3 if all(new.dtype in (torch.float32, torch.float64) for new in together) else 0.1
        empty -= {i for i, new in enumerate(together) if not new.numel() or not new.isnan().all()}
        if not all(map(partial(_agree, tolerance=tolerance), together, alone)):
            raise EngineError(f"fused: the rows of a batch see each other{_culprit(traced.graph, native, rows)}")
    if empty:
        raise EngineError("fused: the step gives nothing but NaN for random numbers, so its rows cannot be checked")


def _double(values: list[Tensor]) -> list[Tensor]:
    return [value.double() if value.is_floating_point() else value for value in values]


def _both(step: Callable[..., Any], weights: list[Tensor], rows: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The step of all rows, and of each alone."""
    with torch.no_grad(), torch.autocast(rows[0].device.type, enabled=False):
        together = step(*weights, *rows)
        alone = [step(*weights, *(row[i : i + 1] for row in rows)) for i in range(_ROWS)]
    return list(together), [torch.cat(parts) for parts in zip(*alone, strict=True)]


def _agree(whole: Tensor, parts: Tensor, tolerance: float) -> bool:
    return whole.shape == parts.shape and torch.allclose(whole, parts, tolerance, tolerance, equal_nan=True)


def _culprit(graph: fx.Graph, weights: list[Tensor], rows: list[Tensor]) -> str:
    """The first operation of the graph in which rows see each other, where there is one."""
    with torch.no_grad():
        together = _values(graph, [*weights, *rows])
        alone = [_values(graph, [*weights, *(row[i : i + 1] for row in rows)]) for i in range(_ROWS)]
    on_rows = {node for node in graph.nodes if node.op == "placeholder"} - set(list(graph.nodes)[: len(weights)])
    for node in graph.nodes:
        if node.op == "call_function" and on_rows & set(node.all_input_nodes):
            on_rows.add(node)
            value = together[node]
            if isinstance(value, Tensor):
                apart = value.ndim == 0 or not _agree(value, torch.cat([one[node] for one in alone]), 1e-3)
                if apart:
                    return f" ({node.target})"
    return ""


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
    return values
