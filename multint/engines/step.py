"""The calls of a cell's step for which a graph is kept, and how it is traced where there is none.

The step is called on stand-ins for its streams and its state: tensors of the same kind without numbers, whose number of
rows is open.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from multint.engines import private, tables
from multint.engines.failures import StepError
from multint.engines.guarded import ROWS, GuardedStep, Kind, Match, NewError, Structure
from multint.engines.tables import MOST, TRACING
from multint.errors import EngineError

# A trace takes as long as some hundred calls. So many in a row are made at once, of a step that changes and of one that
# is refused; then the calls between two of them double up to 2 to that power. Who has asked for the engine may have
# repaired the step in a way that no guard tells, so there they are few.
_FREE_MISSES, _FREE_REFUSALS, _MOST_WAITS, _MOST_WAITS_BY_NAME = 8, 2, 10, 3


@dataclass
class _Calls:
    """What is known of a cell's calls of one kind.

    Attributes:
        stand_ins: for the streams and for the state, by which such a call is matched.
        step: which traced them; None as long as none has.
    """

    stand_ins: tuple[Any, Any] = (None, None)
    step: GuardedStep | None = None
    misses: int = 0  # in a row: no graph was kept, or none could be made
    waits: int = 0  # calls that get the same refusal before it is traced again
    reason: str = ""
    refused_by: GuardedStep | None = None  # where the reason is one that tracing has found


def match(cell: nn.Module, x: Any, state: Any, by_name: bool) -> Match:
    """A call of a cell's step, traced where no graph is kept for it.

    Args:
        x: the streams at one step, as the step takes them.
        by_name: whether the engine was asked for by name: then every change of the cell is traced; but of a step that
            was refused only those of its classes are, and others some calls later.

    Raises: EngineError where there is none; StepError where the step itself may have failed.
    """
    record, structure = tables.record_of(cell), Structure.of(cell, state)
    if record.structure != structure:
        record.structure, record.step = structure, _guarded(structure)
    step: GuardedStep = record.step
    kind = _kinds(x), type(state), _kinds(state), len(state[0]) == 1, torch.is_grad_enabled(), cell.training
    calls = record.calls.setdefault(kind, _Calls())
    try:
        found = None if calls.step is not step else step.match(cell, *calls.stand_ins, trace=False)
    except Exception:  # none is kept, or another thread traces just now
        found = None
    if found is None or step.is_changed():
        if calls.waits and (not by_name or (calls.refused_by is step and not step.is_changed())):
            calls.waits -= 1
            raise EngineError(calls.reason)
        return _new(step, calls, cell, x, state, _MOST_WAITS_BY_NAME if by_name else _MOST_WAITS)
    calls.misses = 0
    return found


def _kinds(tensors: Any) -> Hashable:
    if isinstance(tensors, dict):
        return tuple([(name, Kind.of(tensor)) for name, tensor in tensors.items()])
    return Kind.of(tensors) if isinstance(tensors, Tensor) else tuple([Kind.of(tensor) for tensor in tensors])


def _guarded(structure: Structure) -> GuardedStep:
    step = tables.steps.get(structure) or GuardedStep(structure)
    tables.steps.keep(structure, step)
    return step


def _new(step: GuardedStep, calls: _Calls, cell: nn.Module, x: Any, state: Any, most_waits: int) -> Match:
    """Trace the step. Where it is refused, or each call needs that anew, do so ever more rarely."""
    again, free = calls.step is not None, _FREE_MISSES
    calls.refused_by, calls.reason = None, "fused: the attributes of the cell's modules change from call to call"
    try:
        with TRACING:
            found = _find(step, cell, x, state)
        calls.step, calls.stand_ins = step, (found.x, found.state)
        return found
    except EngineError as error:
        again, free, calls.refused_by, calls.reason = True, _FREE_REFUSALS, step, str(error)
        raise
    finally:
        if again:
            calls.misses += 1
            calls.waits = 2 ** min(calls.misses, most_waits) if calls.misses > free else 0


def _find(step: GuardedStep, cell: nn.Module, x: Any, state: Any) -> Match:
    """Find or trace the graph for calls of a kind.

    The loop's later steps get what the step itself gives: another dtype perhaps, and a gradient. The graph is theirs,
    and must be the first step's as well.

    Raises: as `match`.
    """

    def trace(state_type: type, kinds: list[Kind], rows: int = ROWS) -> Match:
        fields = as_state(state_type, [kind.stand_in(rows) for kind in kinds])
        return _traced(step, cell, streams if rows == ROWS else _streams(x, rows), fields)

    given, streams = list(map(Kind.of, state)), _streams(x, ROWS)
    state_type, kinds = type(state), given
    for _ in range(3):
        found = trace(state_type, kinds)
        after = _new_kinds(found.new, found.state)
        if after == kinds and type(found.new) is state_type:
            break
        state_type, kinds = type(found.new), after
    else:
        raise EngineError("fused: the types or dtypes of the state change from step to step")
    first = [g._replace(shape=k.shape, dtype=k.dtype, device=k.device) for g, k in zip(given, kinds, strict=True)]
    if (first != kinds or type(state) is not state_type) and trace(type(state), first).text() != found.text():
        raise EngineError(
            "fused: the step goes by its state's type, by whether that wants a gradient, or by its strides"
        )
    # Of an open number of rows the tracer takes for granted that it is not 1.
    if len(state[0]) == 1 and trace(state_type, kinds, 1).text() != found.text():
        raise EngineError("fused: the step branches on the number of rows")
    return found


def _streams(x: Any, rows: int) -> Any:
    """Stand-ins for the streams at one step."""
    if isinstance(x, Tensor):
        return Kind.of(x).stand_in(rows)
    return {name: Kind.of(leaf).stand_in(rows) for name, leaf in x.items()}


def _traced(step: GuardedStep, cell: nn.Module, x: Any, state: Any) -> Match:
    """Match a call, and trace the step for it where no graph is kept."""
    if step.graphs >= MOST or step.is_changed():
        step.forget()
    for restored in (False, True):
        try:
            with private.tracing_settings(side_effects=restored):
                return step.match(cell, x, state, trace=True)
        except EngineError:
            raise
        except NewError:
            raise EngineError("fused: torch.compile is turned off, by a stance or TORCH_COMPILE_DISABLE") from None
        except Exception as error:
            if isinstance(inner := getattr(error, "inner_exception", None), EngineError):  # of our backend
                raise EngineError(str(inner)) from None
            # What a step changes and puts back itself, it may: a class says so in `_restored_by_step`.
            places = tuple(f"L['cell'].{name}[" for name in getattr(cell, "_restored_by_step", ()))
            changed = private.changed_objects(error)
            if not restored and changed and all(place.startswith(places) for place in changed):
                continue
            if private.is_steps_own(error):
                raise StepError(error) from error
            raise EngineError(f"fused: {private.why_untraced(error)}") from None
    raise AssertionError


def _new_kinds(new: Any, state: Any) -> list[Kind]:
    """The kinds of the new state's fields.

    Raises: EngineError for a new state that is none, or of another shape.
    """
    if not isinstance(new, tuple | list) or not all(isinstance(value, fx.Node | Tensor) for value in new):
        kind = "Tensor" if isinstance(new, fx.Node) else type(new).__name__
        raise EngineError(f"fused: the step gives a {kind}, and not a tuple of tensors")
    if len(new) != len(state):
        raise EngineError(f"fused: the step gives {len(new)} tensors for a state of {len(state)}")
    found = []
    for name, value, old in zip(field_names(state), new, state, strict=True):
        made = value.meta["example_value"] if isinstance(value, fx.Node) else value
        if made.ndim != old.ndim or tuple(made.shape[1:]) != tuple(old.shape[1:]):
            before, after = (tuple(some.shape[1:]) for some in (old, made))
            raise EngineError(f"fused: the shape of the state's {name} changes from step to step, {before} to {after}")
        found.append(Kind.of(made)._replace(is_contiguous=True))
    return found


def field_names(state: Any) -> list[str]:
    """The names of a state's fields."""
    return list(getattr(state, "_fields", None) or (f"state{i}" for i in range(len(state))))


def as_state(kind: type, fields: list[Any]) -> Any:
    """A state of that type, a named tuple or a plain one."""
    return kind._make(fields) if hasattr(kind, "_make") else kind(fields)


def in_own_thread(function: Callable[..., Any], *arguments: Any) -> Any:
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
