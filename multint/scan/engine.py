"""What a caller sees: one function that runs a cell over time, the choice of its engine, and the plan to be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from multint.errors import EngineError, OptionError, ShapeError
from multint.scan.loop import loop

if TYPE_CHECKING:
    from multint.scan.fused import Program

State = TypeVar("State", bound=tuple[Tensor, ...])
Streams = Tensor | dict[str, Tensor]

ENGINES = ("auto", "fused", "loop")


class Steppable(Protocol[State]):
    """What a scan needs of a cell: one step."""

    def step(self, x: Any, state: State, /) -> State: ...


def scan(
    cell: Steppable[State],
    xs: Streams,  # (T, B, X), or several streams by name, each (T, B, ...)
    state: State,  # of tensors (B, ...)
    engine: str = "auto",
) -> tuple[Tensor, State]:  # (T, B, H), and the state after step T
    """Run `state = cell.step(xs[t], state)` for t = 0 … T−1 and collect the first field of every state.

    Where `xs` is a dict, the step gets a dict of the same keys with each stream at t.

    Args:
        engine: "loop", the Python loop, which runs everything; "fused", the compiled scan; or "auto", which is the
            loop at present (`explain` says what an engine would do, and why).

    Raises: OptionError for an unknown engine; ShapeError for streams of no steps or of different lengths, and for a
    state that is no named tuple or of another batch size; EngineError where the engine asked for cannot run the cell.
    """
    _check(xs, state, engine)
    return loop(cell, xs, state) if engine == "loop" else _choose(cell, xs, state, engine)


def _choose(cell: Any, xs: Streams, state: State, engine: str) -> tuple[Tensor, State]:
    reason = _objection(cell, xs, state, engine)
    if reason is None:
        try:
            return _fused(cell, xs, state)
        except EngineError as error:
            reason = str(error)
    if engine == "fused":
        raise EngineError(reason)
    return loop(cell, xs, state)


# A graph break for torch.compile, which would unroll the loop or trace the tracer. This is the mark that
# torch.compiler.disable sets; that function itself would double the time that `import multint` takes.
_choose._torchdynamo_disable = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Explanation:
    """How a scan would run: `engine` and, where that is the loop, `reason`; printed, the plan of the step."""

    engine: str
    reason: str
    plan: str

    def __str__(self) -> str:
        return "\n".join(line for line in (f"engine: {self.engine}", self.reason, self.plan) if line)


def explain(
    cell: Steppable[State],
    xs: Streams,  # (T, B, X), or several streams by name
    state: State | None = None,
    engine: str = "auto",
) -> Explanation:
    """Say how `scan(cell, xs, state, engine)` would run, and by what plan: nothing is computed.

    Raises: OptionError and ShapeError as `scan` does.
    """
    if state is None:
        state = cell.initial_state(_size(xs)[1])  # type: ignore[attr-defined]
    _check(xs, state, engine)
    if engine == "loop":
        return Explanation("loop", "asked for", "")
    reason = _objection(cell, xs, state, engine)
    try:
        program, _ = _program(cell, xs, state)
    except EngineError as error:
        return Explanation("loop", str(error), "")
    return Explanation("loop" if reason else "fused", reason or "", program.plan.describe(_size(xs)))


_programs: WeakKeyDictionary[Any, dict[Any, Program | EngineError]] = WeakKeyDictionary()


def _program(cell: Any, xs: Streams, state: State) -> tuple[Program, State]:
    """The cell's program for inputs of this kind, traced at the first call, and the state in the dtypes it carries."""
    kept = _programs.setdefault(cell, {})
    leaves, spec = pytree.tree_flatten(xs)
    kinds = tuple((tensor.dtype, tensor.device, tensor.shape[2:]) for tensor in leaves)
    state_kinds = tuple((tensor.dtype, tensor.device, tensor.shape[1:]) for tensor in state)
    modes = tuple(module.training for module in cell.modules()) if isinstance(cell, nn.Module) else ()
    device = leaves[0].device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    key = (kinds, str(spec), state_kinds, type(state), modes, autocast)
    if key not in kept:
        try:
            kept[key] = _build(cell, pytree.tree_unflatten([leaf[0] for leaf in leaves], spec), state)
        except EngineError as error:
            kept[key] = error
    program = kept[key]
    if isinstance(program, EngineError):
        raise program
    carried = [node.meta["val"].dtype for node in program.plan.trace.states]
    return program, type(state)(*(field.to(dtype) for field, dtype in zip(state, carried, strict=True)))


def _build(cell: nn.Module, x: Any, state: Any) -> Program:
    # Imported here because the tracer is slow to import, and most uses never need it.
    from multint.scan.fused import Program
    from multint.scan.plan import plan
    from multint.scan.trace import trace

    return Program(plan(trace(cell, x, state)))


def _fused(cell: Any, xs: Streams, state: State) -> tuple[Tensor, State]:
    from multint.scan.fused import Scan
    from multint.scan.trace import tensors

    program, state = _program(cell, xs, state)
    the_plan = program.plan
    leaves = pytree.tree_leaves(xs)
    steps, rows = leaves[0].shape[:2]
    # What follows has the casts of autocast in its graphs already.
    with torch.autocast(leaves[0].device.type, enabled=False):
        known = dict(zip(the_plan.trace.invariants, tensors(cell).values(), strict=True))
        known |= zip(the_plan.constants, the_plan.prelude(known), strict=True)
        known |= zip(the_plan.trace.inputs, (leaf.flatten(0, 1) for leaf in leaves), strict=True)
        for product in the_plan.hoisted:
            known[product.packed] = product.left_of(known) @ product.matrix(known)
        arguments = [
            *(known[node].unflatten(0, (steps, rows)) for node in the_plan.streams),
            *(stage.matrix(known).contiguous() for stage in the_plan.stages),
            *(known[node] for node in the_plan.vectors),
            *state,
        ]
        differentiable = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments)
        output, *final = Scan.apply(  # type: ignore[no-untyped-call]
            program, differentiable, steps, *arguments
        )
    return output, type(state)(*final)


def _objection(cell: Any, xs: Streams, state: State, engine: str) -> str | None:
    """Why not `fused`, apart from what tracing would find; None where nothing speaks against it."""
    if not isinstance(cell, nn.Module):
        return "fused: the cell is no nn.Module, so its parameters are unknown"
    if torch._C._are_functorch_transforms_active():
        return "fused: a torch.func transform is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "fused: forward-mode differentiation is active"
    # No rule is known yet for when compilation pays.
    return "auto: the loop is the default; ask for fused by name" if engine == "auto" else None


def _size(xs: Streams) -> tuple[int, int]:
    first = next(iter(xs.values())) if isinstance(xs, dict) else xs
    return first.shape[0], first.shape[1]


def _check(xs: Streams, state: Any, engine: str) -> None:
    if engine not in ENGINES:
        raise OptionError(f"scan: engine is {engine!r}, expected one of {', '.join(map(repr, ENGINES))}")
    lengths = {len(stream) for stream in xs.values()} if isinstance(xs, dict) else {len(xs)}
    if len(lengths) != 1 or 0 in lengths:
        raise ShapeError(f"scan: xs has the lengths {sorted(lengths)} in time, expected one length of at least 1")
    if not (isinstance(state, tuple) and hasattr(state, "_fields")):
        raise ShapeError(f"scan: state is a {type(state).__name__}, expected a named tuple of tensors (B, ...)")
    _, rows = _size(xs)
    for name, field in zip(state._fields, state, strict=True):
        if field.shape[:1] != (rows,):
            got = tuple(field.shape)
            raise ShapeError(f"scan: state.{name} has the shape {got}, expected ({rows}, ...), the batch size of xs")
