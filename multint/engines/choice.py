"""What a caller sees: one function that runs a cell over time, the choice of its engine, and the plan to be read."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from numbers import Number
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from multint.engines.loop import loop
from multint.errors import EngineError, OptionError, ShapeError, in_a_line

if TYPE_CHECKING:
    from multint.engines.fused import Program

State = TypeVar("State", bound=tuple[Tensor, ...])
Streams = Tensor | dict[str, Tensor]

ENGINES = ("auto", "fused", "loop")

# Bytes of streams and products that the fused engine keeps for a backward pass. A scan that needs more is cut in time,
# and the backward pass computes each part again.
MEMORY_BUDGET = 2**30

# The multiply-adds of a forward pass from which `auto` compiles: there the loop takes tens of milliseconds for both
# passes, so that a scan twice as fast repays the seconds of compilation within a thousand calls or so.
_WORTH_COMPILING = 10**8

# How many other sets of attributes a cell may have been traced with.
_MOST_SETTINGS = 4


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
        engine: "loop", the Python loop, which runs everything; "fused", the compiled scan; or "auto": fused where it
            can take the cell and has been measured to pay, on CPUs, in float32 and bfloat16, from 1e8 multiply-adds
            on (T · B · the cell's parameters); else the loop. `explain` tells the choice and why.

    Raises: OptionError for an unknown engine; ShapeError for streams of no steps or of different lengths, and for a
    state that is no named tuple or of another batch size; EngineError where the engine asked for cannot run the cell.
    """
    _check(xs, state, engine)
    return loop(cell, xs, state) if engine == "loop" else _choose(cell, xs, state, engine)


def _choose(cell: Any, xs: Streams, state: State, engine: str) -> tuple[Tensor, State]:
    reason, result = _objection(cell, xs, engine), None
    if reason is None:
        try:
            program = _program(cell, xs, state)
            result = _fused(program, cell, xs, state)
            _last[cell] = Explanation("fused", "", program, _size(xs))
        except EngineError as error:
            reason = str(error)
    if result is not None:
        return result
    if engine == "fused":
        raise EngineError(reason)
    if isinstance(cell, nn.Module):
        _last[cell] = Explanation("loop", reason or "")
    return loop(cell, xs, state)


# A graph break for torch.compile, which would unroll the loop or trace the tracer. This is the mark that
# torch.compiler.disable sets; that function itself would double the time that `import multint` takes.
_choose._torchdynamo_disable = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Explanation:
    """How a scan runs: `engine`; where that is the loop, the `reason`; the `plan` of the step. Printed, all three."""

    engine: str
    reason: str
    _program: Program | None = None
    _size: tuple[int, int] = (0, 0)

    @property
    def plan(self) -> str:
        """What is hoisted, the streams and their bytes, the stages and pieces; empty where the step was not traced."""
        return self._program.plan.describe(self._size, _chunk(self._program, self._size)) if self._program else ""

    def __str__(self) -> str:
        return "\n".join(line for line in (f"engine: {self.engine}", self.reason, self.plan) if line)


_last: WeakKeyDictionary[nn.Module, Explanation] = WeakKeyDictionary()


def explain(
    cell: Steppable[State],
    xs: Streams | None = None,  # (T, B, X), or several streams by name
    state: State | None = None,
    engine: str = "auto",
) -> Explanation:
    """Say how `scan(cell, xs, state, engine)` would run, and by what plan. Only the step is tried, on some rows.

    Without `xs`, say how the cell's last scan by "auto" or "fused" ran. `Recurrent.explain` does so for a layer.

    Raises: OptionError and ShapeError as `scan` does; OptionError for a cell that has not run.
    """
    if xs is None:
        if not isinstance(cell, nn.Module) or cell not in _last:
            raise OptionError("explain: this cell or layer has not run by 'auto' or 'fused'")
        return _last[cell]
    if state is None:
        state = cell.initial_state(_size(xs)[1])  # type: ignore[attr-defined]
    _check(xs, state, engine)
    if engine == "loop":
        return Explanation("loop", "asked for")
    reason = _objection(cell, xs, engine)
    if reason is not None and reason.startswith("fused"):
        return Explanation("loop", reason)
    try:
        program = _program(cell, xs, state)
    except EngineError as error:
        return Explanation("loop", str(error))
    return Explanation("loop" if reason else "fused", reason or "", program, _size(xs))


_programs: WeakKeyDictionary[Any, dict[Any, Program | str]] = WeakKeyDictionary()  # or why there is none


def _program(cell: Any, xs: Streams, state: State) -> Program:
    """The cell's program for inputs of this kind, traced at the first call."""
    kept = _programs.setdefault(cell, {})
    leaves, spec = pytree.tree_flatten(xs)
    kinds = tuple((tensor.dtype, tensor.device, tensor.shape[2:]) for tensor in leaves)
    state_kinds = tuple((tensor.dtype, tensor.device, tensor.shape[1:]) for tensor in state)
    device = leaves[0].device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    settings = _settings(cell)
    key = (kinds, str(spec), state_kinds, type(state), autocast, settings)
    if key not in kept:
        # Imported here because the tracer is slow to import, and most uses never need it.
        from multint.engines.trace import TRACING

        with TRACING:
            if sum(settings != other[-1] for other in kept) > _MOST_SETTINGS:
                raise EngineError("fused: the attributes of the cell's modules change from call to call")
            try:
                kept[key] = _build(cell, pytree.tree_unflatten([leaf[0] for leaf in leaves], spec), state)
            except EngineError as error:  # its message alone: the traceback would hold the inputs
                kept[key] = str(error)
    program = kept[key]
    if isinstance(program, str):
        raise EngineError(program)
    return program


def _build(cell: nn.Module, x: Any, state: Any) -> Program:
    from multint.engines.fused import Program
    from multint.engines.plan import plan
    from multint.engines.trace import trace

    traced = trace(cell, x, state)
    try:
        return Program(plan(traced))
    except Exception as error:
        raise EngineError(f"fused: the step cannot be planned: {in_a_line(error)}") from error


def _chunk(program: Program, size: tuple[int, int]) -> int:
    """How many steps at a time fit the memory budget."""
    steps, rows = size
    return max(1, min(steps, MEMORY_BUDGET // max(1, rows * program.plan.bytes_per_row())))


def _fused(program: Program, cell: nn.Module, xs: Streams, state: State) -> tuple[Tensor, State]:
    from multint.engines.fused import run
    from multint.engines.trace import tensors

    plan, leaves, size = program.plan, pytree.tree_leaves(xs), _size(xs)
    # What follows has the casts of autocast in its graphs already.
    with torch.autocast(leaves[0].device.type, enabled=False):
        known = dict(zip(plan.trace.invariants, tensors(cell).values(), strict=True))
        known |= zip(plan.constants, plan.prelude(known), strict=True)
        fields = [f.to(n.meta["val"].dtype) for f, n in zip(state, plan.trace.states, strict=True)]
        chunk = _chunk(program, size)
        if chunk == size[0]:
            output, fields = run(program, known, leaves, fields)
            return output, type(state)(*fields)
        from torch.utils.checkpoint import checkpoint

        outputs = []
        for parts in zip(*(leaf.split(chunk) for leaf in leaves), strict=True):
            output, fields = checkpoint(
                run, program, known, list(parts), fields, use_reentrant=False, preserve_rng_state=False
            )
            outputs.append(output)
        return torch.cat(outputs), type(state)(*fields)


def _objection(cell: Any, xs: Streams, engine: str) -> str | None:
    """Why not `fused`, apart from what tracing would find; None where nothing speaks against it."""
    if not isinstance(cell, nn.Module):
        return "fused: the cell is no nn.Module, so its parameters are unknown"
    if torch._C._are_functorch_transforms_active():
        return "fused: a torch.func transform is active"
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None:
        return "fused: the caller itself is being traced"
    if len({stream.shape[1] for stream in pytree.tree_leaves(xs)}) > 1:
        return "fused: the streams have different numbers of rows"
    if torch.autograd.forward_ad._current_level >= 0:
        return "fused: forward-mode differentiation is active"
    if engine == "fused":
        return None
    if _has_hooks(cell):
        return "auto: a module of the cell has hooks, which fused would not call at every step"
    parameters = list(cell.parameters())
    kinds = {(tensor.device.type, tensor.dtype) for tensor in parameters}
    if not kinds <= {("cpu", torch.float32), ("cpu", torch.bfloat16)}:
        found = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in kinds))
        return f"auto: fused is measured in float32 and bfloat16 on CPUs only, and this is {found}"
    steps, rows = _size(xs)
    work = steps * rows * sum(parameter.numel() for parameter in parameters)
    if work < _WORTH_COMPILING:
        return f"auto: at {work:.1e} multiply-adds the loop takes less time than compiling would repay"
    return None


def _has_hooks(cell: nn.Module) -> bool:
    """Whether the user has put a hook on any module of the cell; the library's own are part of the step."""
    every = nn.modules.module
    of_all = (every._global_forward_hooks, every._global_forward_pre_hooks, every._global_backward_hooks)
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for m in cell.modules() for kind in kinds for hook in getattr(m, kind).values()]
    return any(of_all) or any(not (getattr(hook, "__module__", None) or "").startswith("multint.") for hook in hooks)


def _settings(cell: nn.Module) -> tuple[Any, ...]:
    """What a step may read of its modules, and a trace has as constants: kinds of weights, and attributes."""
    found: list[Any] = []
    for module in cell.modules():
        found.append(type(module))
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                found += [(n, t.shape, t.dtype, t.device) for n, t in value.items() if t is not None]
            elif not name.startswith("_"):
                found.append((name, _mark(value)))
    return tuple(found)


def _mark(value: Any) -> Any:
    """What tells an attribute's value from another: the value itself where it is plain, else which object it is."""
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, dict):
        return tuple((key, _mark(entry)) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return tuple(_mark(entry) for entry in value)
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, Number):
        return repr(value)
    try:
        reference = weakref.ref(value)  # equal to another while both live, so no new object passes for a dead one
        hash(reference)
    except TypeError:
        return id(value)
    return reference


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
