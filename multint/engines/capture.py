"""From a cell's step to a graph of ATen operations, with the number of rows left open."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from multint.engines import legality, passes, private, trials
from multint.engines.copies import Copy, as_state
from multint.errors import EngineError, in_a_line

# Tracing and compiling go by states of the whole process: one thread at a time.
TRACING = threading.RLock()


@dataclass
class Trace:
    """A step as a graph: placeholders for the invariants, then the inputs, then the state; the new state as output."""

    graph: fx.Graph
    invariants: dict[str, fx.Node]  # the cell's tensors by name, in the order in which a walk meets them
    learnt: frozenset[str]  # those of them that want gradients
    inputs: dict[str, fx.Node]  # the streams by name
    states: dict[str, fx.Node]  # the state's fields by name
    literals: dict[fx.Node, Tensor]  # what the step makes of numbers in its code
    outputs: list[fx.Node]  # the new state, field by field
    state_type: type  # of what the step gives
    world: private.StandIns  # of the stand-ins in every node's meta["val"]


def capture(cell: nn.Module, x: Any, state: Any) -> Trace:
    """Trace `cell.step(x, state)` for any number of rows, with the state in the dtypes that the step gives it.

    The cell is copied first, so that whatever the step does is done to the copy.

    Raises: StepError where the step fails; EngineError where the step draws random numbers, branches on values or on
    the number of rows, writes to its inputs or to the cell, has gradients of its own, or lets the rows of a batch see
    each other.
    """
    step = Copy(cell)
    private.StandIns()  # where torch lacks what tracing needs, that is no fault of the step's
    legality.rehearse(step, x, state)
    traced = _trace(step, x, state)
    for _ in range(2):
        # Under autocast a float32 initial state is followed by states of the products' dtype; and a step may give its
        # state another type than the first one has.
        dtypes = [node.meta["val"].dtype for node in traced.outputs]
        new = as_state(traced.state_type, [field.to(dtype) for field, dtype in zip(state, dtypes, strict=True)])
        if dtypes == [field.dtype for field in state] and type(new) is type(state):
            break
        state = new
        traced = _trace(step, x, state)
    else:
        raise EngineError("fused: the types or dtypes of the state change from step to step")
    for name, old, node in zip(traced.states, traced.states.values(), traced.outputs, strict=True):
        before, after = (tuple(some.meta["val"].shape[1:]) for some in (old, node))
        if before != after:
            raise EngineError(f"fused: the shape of the state's {name} changes from step to step, {before} to {after}")
        if not private.has_rows(node.meta["val"], old.meta["val"].shape[0]):
            raise EngineError(f"fused: the step fixes the number of rows: the new state's {name} has not the batch's")
    legality.check_graph(traced)
    trials.check_by_trial(step, traced, _exact(step, traced, x, state), x, state)
    return traced


def _exact(step: Copy, traced: Trace, x: Any, state: Any) -> Trace | None:
    """The same step traced in float64 where it computes in half precision, whose rounding would hide a wrong gradient.

    None where it computes in more, or where it insists on its dtypes.
    """
    values = [node.meta.get("val") for node in traced.graph.nodes]
    if not any(isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16) for value in values):
        return None
    x = {name: _double(leaf) for name, leaf in x.items()} if isinstance(x, dict) else _double(x)
    try:
        with torch.autocast(traced.outputs[0].meta["val"].device.type, enabled=False):
            exact = _trace(step, x, as_state(type(state), list(map(_double, state))), list(map(_double, step.tensors)))
    except EngineError:
        return None
    values = [node.meta.get("val") for node in exact.graph.nodes]
    low = any(isinstance(v, Tensor) and v.is_floating_point() and v.dtype != torch.float64 for v in values)
    return None if low else exact


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def unaware(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a thread of its own, which knows nothing of the caller's modes but autocast and the device.

    Inference mode and the hooks of saved tensors, which checkpointing sets, would show in what it does.
    """
    modes: list[Any] = [
        torch.autocast(kind, torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
        if torch.is_autocast_enabled(kind)
    ]
    if torch.get_default_device().type != "cpu":
        modes.append(torch.device(torch.get_default_device()))

    def call() -> Any:
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            return function(*arguments)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


def leaves(x: Any) -> dict[str, Tensor]:
    """The streams at one step, by name."""
    return x if isinstance(x, dict) else {"x": x}


def _trace(step: Copy, x: Any, state: Any, tensors: list[Tensor] | None = None) -> Trace:
    world, inputs, kinds = private.StandIns(), leaves(x), []
    names, fields = list(inputs), getattr(state, "_fields", None) or [f"state{i}" for i in range(len(state))]

    def flat(*values: Tensor) -> list[Tensor]:
        weights, rest = values[: len(step.tensors)], values[len(step.tensors) :]
        one_x: Any = dict(zip(names, rest, strict=False)) if isinstance(x, dict) else rest[0]
        new = step(weights, one_x, as_state(type(state), list(rest[len(names) :])))
        kinds.append(type(new))
        if len(new) != len(state):
            raise EngineError(f"fused: the step gives {len(new)} tensors for a state of {len(state)}")
        return list(new)

    stand_ins = [world.whole(tensor) for tensor in tensors or step.tensors]
    stand_ins += [world.rows(tensor) for tensor in (*inputs.values(), *state)]
    try:
        with torch.no_grad(), private.linear_apart():
            module = world.trace(flat, stand_ins)
            if passes.mutates(module.graph):  # what composite operations do to their own temporaries
                module = world.trace(module, [world.like(stand_in) for stand_in in stand_ins])
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(f"fused: the step cannot be traced: {in_a_line(error)}") from error
    graph, literals = passes.tidied(module)
    nodes = [node for node in graph.nodes if node.op == "placeholder"]
    first, last = len(stand_ins) - len(names) - len(fields), len(stand_ins) - len(fields)
    return Trace(
        graph=graph,
        invariants=dict(zip(step.names, nodes[:first], strict=True)),
        learnt=frozenset(n for n, tensor in zip(step.names, step.tensors, strict=True) if tensor.requires_grad),
        inputs=dict(zip(names, nodes[first:last], strict=True)),
        states=dict(zip(fields, nodes[last : len(stand_ins)], strict=True)),
        literals={node: literals[node.name] for node in nodes[len(stand_ins) :]},
        outputs=list(graph.output_node().args[0]),  # type: ignore[arg-type]
        state_type=kinds[-1],
        world=world,
    )
