"""From a traced step to a graph of ATen operations, and what no graph of a step may hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from multint.engines import private
from multint.engines.decompositions import products
from multint.engines.failures import RefusedError
from multint.engines.guarded import Match
from multint.engines.step import field_names
from multint.errors import EngineError, in_a_line


@dataclass
class Trace:
    """A step as a graph: placeholders for the invariants, then the inputs, then the state; the new state as output."""

    graph: fx.Graph
    invariants: dict[str, fx.Node]  # the cell's tensors by name
    learnt: frozenset[str]  # those of them that want gradients
    inputs: dict[str, fx.Node]  # the streams by name
    states: dict[str, fx.Node]  # the state's fields by name
    literals: dict[fx.Node, Tensor]  # what the step makes of numbers in its code
    outputs: list[fx.Node]  # the new state, field by field
    state_type: type  # of what the step gives
    world: private.StandIns  # of the stand-ins in every node's meta["val"]


def capture(found: Match, cell: nn.Module) -> tuple[Trace, list[int]]:
    """The step of a call as ATen operations for any number of rows; and which of the call's arguments it takes.

    Raises: EngineError where the step draws random numbers, branches on values or on the number of rows, writes to its
    inputs, or has gradients that its operations do not show.
    """
    module = found.graph.module
    _check_calls(module.graph)
    inputs = found.x if isinstance(found.x, dict) else {"x": found.x}
    fields = dict(zip(field_names(found.state), found.state, strict=True))
    given = {id(tensor): i for i, tensor in enumerate([*inputs.values(), *fields.values()])}
    names = _names(cell)
    invariants: dict[str, Tensor] = {}
    places: list[int] = []  # of the invariants among the arguments
    order: list[int | None] = []  # of each argument among the values below; None for the number of rows
    for place, argument in enumerate(found.arguments):
        if not isinstance(argument, Tensor):
            order.append(None)
        elif id(argument) in given:
            order.append(given[id(argument)] - len(given))
        else:
            order.append(len(invariants))
            name = names.get(id(argument), f"tensor{place}")
            while name in invariants:
                name += "'"
            invariants[name] = argument
            places.append(place)

    def step(*values: Tensor) -> list[Tensor]:
        rows = values[-1].shape[0]
        results = module.forward(*(rows if place is None else values[place] for place in order))
        results = dict(zip(found.graph.results, results, strict=True))
        return [
            results[field] if isinstance(field, fx.Node) else values[given[id(field)] - len(given)]
            for field in found.new
        ]

    if any(not isinstance(field, fx.Node) and id(field) not in given for field in found.new):
        raise EngineError("fused: the step fixes the number of rows: the new state has not the batch's")
    world = private.StandIns()
    stand_ins = [world.whole(tensor) for tensor in invariants.values()]
    stand_ins += [world.rows(tensor) for tensor in (*inputs.values(), *fields.values())]
    try:
        with torch.no_grad(), private.free_of_rows(), private.linear_as_products():
            traced = world.trace(step, stand_ins, products() | _PLAINER)
            # Composite operations write to temporaries of their own.
            if any(private.writes(node.target) for node in traced.graph.nodes):
                traced = world.trace(traced, [world.like(stand_in) for stand_in in stand_ins])
    except EngineError:
        raise
    except RefusedError as error:
        raise EngineError(f"fused: rows may interact: {str(error).replace('it ', 'the step ', 1)}") from None
    except Exception as error:
        if drawn := [name for name in map(_name, module.graph.nodes) if "dropout" in name]:  # not of open rows
            raise EngineError(f"fused: {_draws(drawn[0])}") from error
        raise EngineError(f"fused: the step cannot be traced: {in_a_line(error)}") from error
    graph, literals = traced.graph, _take_literals(traced)
    _merge_duplicates(graph)
    graph.eliminate_dead_code()
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    first, last = len(invariants), len(invariants) + len(inputs)
    trace = Trace(
        graph=graph,
        invariants=dict(zip(invariants, nodes, strict=False)),
        learnt=frozenset(name for name, tensor in invariants.items() if tensor.requires_grad),
        inputs=dict(zip(inputs, nodes[first:last], strict=True)),
        states=dict(zip(fields, nodes[last : len(stand_ins)], strict=True)),
        literals={node: literals[node.name] for node in nodes[len(stand_ins) :]},
        outputs=list(graph.output_node().args[0]),  # type: ignore[arg-type]
        state_type=type(found.new),
        world=world,
    )
    _check_operations(trace)
    return trace, places


def _names(cell: nn.Module) -> dict[int, str]:
    """The cell's tensors by identity, each with the first of its names."""
    named = [*cell.named_parameters(remove_duplicate=False), *cell.named_buffers(remove_duplicate=False)]
    return {id(tensor): name for name, tensor in reversed(named)}


# ---- The same values by plainer operations.


def _copy(target: Tensor, source: Tensor, *_: Any) -> Tensor:
    """What writing into a part of a tensor becomes, by operations that have derivatives: `copy` has none."""
    source = source.to(target.dtype)
    return source if tuple(source.shape) == tuple(target.shape) else source.expand_as(target)


def _index_put(target: Tensor, indices: list[Tensor | None], value: Tensor, accumulate: bool = False) -> Any:
    """`v[mask] = number` as a `where`: as an index, a mask would seem to choose among the rows."""
    mask, *others = indices
    if others or mask is None or mask.dtype != torch.bool or value.ndim or accumulate:
        return NotImplemented
    return torch.where(mask[(..., *[None] * (target.ndim - mask.ndim))], value, target)


def _where(mask: Tensor, value: Tensor, other: Tensor) -> Any:
    """No choice of two values that are one: a layer's masks make it of a field of the state that its cell keeps."""
    spreads = mask.ndim > value.ndim or any(
        size not in (1, own) for size, own in zip(reversed(mask.shape), reversed(value.shape), strict=False)
    )
    return value if value is other and not spreads else NotImplemented


def _constant(number: int) -> Callable[..., Any]:
    """A constant of a fixed shape depends on nothing: what it is made like gives it a dtype alone."""

    def decomposition(like: Tensor, shape: Any = None, dtype: Any = None, device: Any = None, **_: Any) -> Any:
        shape = like.shape if shape is None else shape
        if not all(isinstance(size, int) for size in shape):
            return NotImplemented
        return torch.full(shape, number, dtype=dtype or like.dtype, device=device or like.device)

    return decomposition


aten: Any = torch.ops.aten
_PLAINER = {
    aten.copy.default: _copy,
    aten.index_put.default: _index_put,
    aten.where.self: _where,
    aten.sgn.default: torch.sign,  # whose derivative is no tensor without memory
    aten.new_zeros.default: _constant(0),
    aten.zeros_like.default: _constant(0),
    aten.new_ones.default: _constant(1),
    aten.ones_like.default: _constant(1),
}


def _take_literals(module: fx.GraphModule) -> dict[str, Tensor]:
    """Give what the step makes of numbers in its code, as `torch.tensor(0.5)`, a placeholder; refuse other tensors.

    Those are no arguments of the graph, and would be frozen with today's numbers.

    Returns: the literals by the names of their placeholders.
    """
    graph, found = module.graph, dict[str, Tensor]()
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        value = getattr(module, str(node.target))
        if any(user.target is not aten.lift_fresh_copy.default for user in node.users):
            raise EngineError(
                f"fused: the step uses a tensor of the shape {tuple(value.shape)} that is no parameter, buffer or "
                "attribute of the cell; register it as a buffer"
            )
        with graph.inserting_after([n for n in graph.nodes if n.op == "placeholder"][-1]):
            placeholder = graph.placeholder(f"literal_{len(found)}")
        found[placeholder.name] = value
        for user in list(node.users):
            placeholder.meta = dict(user.meta)
            user.replace_all_uses_with(placeholder)
            graph.erase_node(user)
        graph.erase_node(node)
    return found


def _merge_duplicates(graph: fx.Graph) -> None:
    """Compute once what the step computes twice from the same values."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function":
            # Nodes show by their names, which are unique.
            first = seen.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


# ---- What is refused.

# What stands in a traced step for more than an operation, and what to tell of it.
_CALLS = {
    "_set_grad_enabled": "the step turns gradients on or off; use detach",
    "_enter_inference_mode": "the step turns gradients on or off; use detach",
    "_get_data_attr": "the step takes .data, whose gradient a graph does not show; use detach()",
    "autograd_function_apply": "the step has an autograd.Function, whose backward pass a graph does not show",
    "getattr": "the step reads an attribute of a tensor that a graph does not show",
    "register_hook": "the step registers a hook on a tensor",
    "tag_activation_checkpoint": "the step uses checkpointing; a scan computes again by itself",
}
# Attributes that a tensor's device and dtype tell. `pad` asks for one where algorithms are to be deterministic.
_KNOWN = ("is_cpu", "is_mps", "is_xpu", "itemsize")


def _draws(name: Any) -> str:
    return f"the step draws random numbers ({name}); draw them outside, as streams"


def _name(node: fx.Node) -> str:
    """What a node of a traced step calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


# Whose functions may stand in a traced step as they are.
_READ = {"torch", "einops"}


def _check_calls(graph: fx.Graph) -> None:
    """Raise for what a traced step calls that is no operation, and for what it has asked of the number of rows."""
    given = [node for node in graph.nodes if node.op == "placeholder"]
    tensors = [value for node in given if isinstance(value := node.meta.get("example_value"), Tensor)]
    if fixed := private.fixed_rows(tensors):
        raise EngineError(f"fused: the step branches on the number of rows, or fixes it ({fixed})")
    for node in graph.nodes:
        name = _name(node)
        value = node.meta.get("example_value")
        is_known = name == "getattr" and (isinstance(value, Tensor) or node.args[1] in _KNOWN)
        if node.op in ("call_function", "call_method") and name in _CALLS and not is_known:
            raise EngineError(f"fused: {_CALLS[name]}")
        if node.op == "call_function" and isinstance(node.target, torch._ops.HigherOrderOperator):
            raise EngineError(f"fused: the step has the operator {name}, whose gradient a graph does not show")
        if isinstance(node.target, FunctionType) and node.target.__module__.partition(".")[0] not in _READ:
            raise EngineError(f"fused: the step calls {name}, into which the tracer does not look")
        if "functorch" in str(getattr(node.target, "__module__", "")):
            raise EngineError(f"fused: the step uses a transform of torch.func ({name})")
        if node.op == "placeholder":
            if not isinstance(value, Tensor | torch.SymInt):
                raise EngineError(f"fused: the step takes a {type(value).__name__} from outside")
            if isinstance(value, torch.SymInt) and node.users and private.is_stride(value):
                raise EngineError("fused: the step reads a stride of a tensor that is not contiguous")
        elif node.users and (isinstance(value, bool | int | float | str) or private.is_unknown(value)):
            raise EngineError(f"fused: the step reads what a graph does not show ({name})")


def _check_operations(trace: Trace) -> None:
    """Raise for an operation that a graph cannot hold."""
    for node in trace.graph.nodes:
        target = node.target
        if not private.is_operation(target):
            continue
        if private.writes(target):
            raise EngineError(f"fused: the step writes to one of its inputs ({target}); return a new tensor instead")
        if torch.Tag.nondeterministic_seeded in target.tags:
            raise EngineError(f"fused: {_draws(target)}")
        if target is aten.embedding.default and any(node.args[3:4]):  # forward no row sees another one
            raise EngineError("fused: rows interact in the gradient of an embedding with scale_grad_by_freq")
        if target is aten._local_scalar_dense.default:
            raise EngineError(f"fused: the step branches on a value ({target}); use torch.where")
    if fixed := private.fixed_rows([node.meta["val"] for node in trace.states.values()]):
        raise EngineError(f"fused: the step branches on the number of rows, or fixes it ({fixed})")
    rows = next(iter(trace.states.values())).meta["val"].shape[0]
    for name, node in zip(trace.states, trace.outputs, strict=True):
        if not private.has_rows(node.meta["val"], rows):
            raise EngineError(f"fused: the step fixes the number of rows: the new state's {name} has not the batch's")
