"""From a traced step to a graph of ATen operations, and what no graph of a step may hold."""

from __future__ import annotations

from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn

from multint.engines import passes, private
from multint.engines.decompositions import products
from multint.engines.failures import RefusedError
from multint.engines.guarded import Mark, Met
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


def capture(met: Met, cell: nn.Module, x: Any, state: Any) -> tuple[Trace, list[int]]:
    """The step of a call as ATen operations for any number of rows; and which of the call's arguments it takes.

    Raises: EngineError where the step draws random numbers, branches on values or on the number of rows, writes to its
    inputs, or has gradients that its operations do not show.
    """
    module = met.graph.module
    _check_calls(module.graph)
    inputs = x if isinstance(x, dict) else {"x": x}
    fields = dict(zip(field_names(state), state, strict=True))
    given = {id(tensor): i for i, tensor in enumerate([*inputs.values(), *fields.values()])}
    names = _names(cell)
    invariants: dict[str, Tensor] = {}
    places: list[int] = []  # of the invariants among the arguments
    order: list[int | None] = []  # of each argument among the values below; None for the number of rows
    for place, argument in enumerate(met.arguments):
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
        return [
            results[some.place] if isinstance(some, Mark) else values[given[id(some)] - len(given)] for some in met.new
        ]

    if any(not isinstance(some, Mark) and id(some) not in given for some in met.new):
        raise EngineError("fused: the step fixes the number of rows: the new state has not the batch's")
    world = private.StandIns()
    stand_ins = [world.whole(tensor) for tensor in invariants.values()]
    stand_ins += [world.rows(tensor) for tensor in (*inputs.values(), *fields.values())]
    try:
        with torch.no_grad(), private.free_of_rows(), private.linear_as_products():
            traced = world.trace(step, stand_ins, products())
            if passes.mutates(traced.graph):  # what composite operations do to their own temporaries
                traced = world.trace(traced, [world.like(stand_in) for stand_in in stand_ins])
    except EngineError:
        raise
    except RefusedError as error:
        raise EngineError(f"fused: rows may interact: {str(error).replace('it ', 'the step ', 1)}") from None
    except Exception as error:
        if drawn := _RANDOM.intersection(map(_name, module.graph.nodes)):
            raise EngineError(f"fused: {_draws(min(drawn))}") from error
        raise EngineError(f"fused: the step cannot be traced: {in_a_line(error)}") from error
    graph, literals = passes.tidied(traced)
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
        state_type=type(met.new),
        world=world,
    )
    _check_operations(trace)
    return trace, places


def _names(cell: nn.Module) -> dict[int, str]:
    """The cell's tensors by identity, each with the first of its names."""
    named = [*cell.named_parameters(remove_duplicate=False), *cell.named_buffers(remove_duplicate=False)]
    return {id(tensor): name for name, tensor in reversed(named)}


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


# What a trace of open rows cannot always draw.
_RANDOM = {
    "dropout",
    "bernoulli",
    "multinomial",
    "normal",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "randn_like",
    "rrelu",
}


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
        is_tensor = name == "getattr" and isinstance(value, Tensor)
        if node.op in ("call_function", "call_method") and name in _CALLS and not is_tensor:
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


def _is_random(node: fx.Node) -> bool:
    # Attention has a probability of dropout, and draws nothing where that is 0.
    return torch.Tag.nondeterministic_seeded in node.target.tags and (  # type: ignore[union-attr]
        private.given(node.target, node.args, node.kwargs, "dropout_p") != 0
    )


def _check_operations(trace: Trace) -> None:
    """Raise for an operation that a graph cannot hold."""
    for node in trace.graph.nodes:
        value, target = node.meta.get("val"), node.target
        if isinstance(value, Tensor) and value.is_complex():
            raise EngineError(f"fused: the step computes with complex numbers ({target})")
        if not private.is_operation(target):
            continue
        if private.writes(target):
            raise EngineError(f"fused: the step writes to one of its inputs ({target}); return a new tensor instead")
        if _is_random(node):
            raise EngineError(f"fused: {_draws(target)}")
        if target is torch.ops.aten._local_scalar_dense.default:
            raise EngineError(f"fused: the step branches on a value ({target}); use torch.where")
    fixed = trace.world.fixed_rows()
    if fixed:
        raise EngineError(f"fused: the step branches on the number of rows, or fixes it ({fixed})")
    rows = next(iter(trace.states.values())).meta["val"].shape[0]
    for name, node in zip(trace.states, trace.outputs, strict=True):
        if not private.has_rows(node.meta["val"], rows):
            raise EngineError(f"fused: the step fixes the number of rows: the new state's {name} has not the batch's")
