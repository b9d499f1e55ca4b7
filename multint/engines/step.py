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
from torch import Tensor, nn

from multint.engines import private, tables
from multint.engines.failures import InternalError, StepError
from multint.engines.guarded import ROWS, Kind, Mark, Met, NewError, Structure, unguarded
from multint.engines.tables import MOST, TRACING, Record
from multint.errors import EngineError

# A trace takes as long as some hundred calls. So many in a row are made at once, of a step that changes and of one that
# is refused; then the calls between two of them, which `auto` leaves to the loop, double up to 2 to that power.
_FREE_MISSES, _FREE_REFUSALS, _MOST_WAITS = 8, 2, 10


@dataclass
class _Calls:
    """What is known of a cell's calls of one kind.

    Attributes:
        stand_ins: for the streams and for the state, by which such a call is met.
        structure: in which they were traced; None as long as they were not.
    """

    stand_ins: tuple[Any, Any] = (None, None)
    structure: Structure | None = None
    misses: int = 0  # in a row: no graph was kept, or none could be made
    waits: int = 0  # calls that `auto` leaves to the loop before it traces again
    reason: str = ""


def meet(cell: nn.Module, x: Any, state: Any, asked: bool, make: Callable[[Met, nn.Module, Any, Any], Any]) -> Met:
    """A call of a cell's step, traced where no graph is kept for it.

    Args:
        x: the streams at one step, as the step takes them.
        asked: whether the engine was asked for by name: then every change of the cell is traced.
        make: (call, cell, stand-ins for x, stand-ins for the state) → what the call's graph keeps as `made`.

    Raises: EngineError where there is none; StepError where the step itself may have failed; InternalError.
    """
    record, (key, held) = tables.record_of(cell), unguarded(cell, type(state))
    if record.key != key:
        record.key, record.structure = key, _structure_of(key, held)
    kind = _kind(x), type(state), tuple(map(Kind.of, state)), len(state[0]) == 1, torch.is_grad_enabled(), cell.training
    calls = record.calls.get(kind)
    if calls is None:
        calls = record.calls[kind] = _Calls()
    try:
        if calls.structure is None or calls.structure is not record.structure:
            raise NewError
        try:
            met = calls.structure.meet(cell, *calls.stand_ins, False)
        except Exception as error:  # as where another thread traces just now
            raise NewError from error
        if met.graph.is_changed() or record.structure.is_changed():
            _renew(record)
            raise NewError
        if met.graph.made is None:  # it was dropped
            raise NewError
        calls.misses = 0
    except NewError:
        if calls.waits and not asked:
            calls.waits -= 1
            raise EngineError(calls.reason) from None
        met = _new(record, calls, cell, x, state, make)
    tables.graphs.move_to_end(met.graph)
    if isinstance(met.graph.made, str):
        raise EngineError(met.graph.made)
    return met


def _new(record: Record, calls: _Calls, cell: nn.Module, x: Any, state: Any, make: Callable[..., Any]) -> Met:
    """Trace the step. Where it is refused, or each call needs that anew, `auto` does so ever more rarely."""
    again, free = calls.structure is not None, _FREE_MISSES
    reason = "fused: the attributes of the cell's modules change from call to call"
    try:
        with TRACING:
            return _trace_for(record, calls, cell, x, state, make)
    except EngineError as error:
        again, free, reason = True, _FREE_REFUSALS, str(error)
        raise
    finally:
        if again:
            calls.misses, calls.reason = calls.misses + 1, reason
            calls.waits = 2 ** min(calls.misses, _MOST_WAITS) if calls.misses > free else 0


def _kind(x: Any) -> Hashable:
    return tuple((name, Kind.of(leaf)) for name, leaf in x.items()) if isinstance(x, dict) else Kind.of(x)


def _structure_of(key: Hashable, held: list[Any]) -> Structure:
    found: Structure = tables.structures.get(key) or Structure(held)
    tables.structures.keep(key, found)
    return found


def _renew(record: Record) -> None:
    """Begin anew with what a record's cell has in common with others of its key."""
    if tables.structures.get(record.key) is record.structure:
        tables.structures.pop(record.key).forget()
    record.structure = _structure_of(record.key, record.structure.held)


def _trace_for(record: Record, calls: _Calls, cell: nn.Module, x: Any, state: Any, make: Callable[..., Any]) -> Met:
    """Find or trace the graph for calls of a kind, and the stand-ins that such calls are met by.

    The loop's later steps get what the step itself gives: another dtype perhaps, and a gradient. The graph is theirs,
    and must be the first step's as well.

    Raises: as `meet`.
    """

    def trace(state_type: type, kinds: list[Kind], rows: int = ROWS) -> tuple[Met, Any, str]:
        fields = as_state(state_type, [kind.stand_in(rows) for kind in kinds])
        some = streams if rows == ROWS else _streams(x, rows)
        met = _traced(record, cell, some, fields)
        return met, fields, met.text([*(some.values() if isinstance(some, dict) else [some]), *fields])

    given, streams = list(map(Kind.of, state)), _streams(x, ROWS)
    state_type, kinds = type(state), given
    for _ in range(3):
        met, fields, text = trace(state_type, kinds)
        after = _new_kinds(met, fields)
        if after == kinds and type(met.new) is state_type:
            break
        state_type, kinds = type(met.new), after
    else:
        raise EngineError("fused: the types or dtypes of the state change from step to step")
    first = [g._replace(shape=k.shape, dtype=k.dtype, device=k.device) for g, k in zip(given, kinds, strict=True)]
    if (first != kinds or type(state) is not state_type) and trace(type(state), first)[2] != text:
        raise EngineError(
            "fused: the step goes by its state's type, by whether that wants a gradient, or by its strides"
        )
    # Of an open number of rows the tracer takes for granted that it is not 1.
    if len(state[0]) == 1 and trace(state_type, kinds, 1)[2] != text:
        raise EngineError("fused: the step branches on the number of rows")
    if met.graph.made is None:
        try:
            met.graph.keep(make(met, cell, streams, fields))
        except EngineError as error:  # its message alone: the traceback would hold the inputs
            met.graph.keep(str(error))
        except Exception as error:
            raise InternalError(met.graph.keep) from error
    calls.stand_ins, calls.structure = (streams, fields), record.structure
    return met


def _streams(x: Any, rows: int) -> Any:
    """Stand-ins for the streams at one step."""
    if isinstance(x, Tensor):
        return Kind.of(x).stand_in(rows)
    return {name: Kind.of(leaf).stand_in(rows) for name, leaf in x.items()}


def _traced(record: Record, cell: nn.Module, x: Any, state: Any) -> Met:
    """Meet a call, and trace the step for it where no graph is kept."""
    if record.structure.graphs >= MOST or record.structure.is_changed():
        _renew(record)
    for restored in (False, True):
        try:
            with private.tracing_settings(side_effects=restored):
                met: Met = record.structure.meet(cell, x, state, True)
                if met.graph.is_changed():
                    _renew(record)
                    met = record.structure.meet(cell, x, state, True)
                return met
        except EngineError:
            raise
        except NewError:
            raise EngineError("fused: torch.compile is turned off, by a stance or TORCH_COMPILE_DISABLE") from None
        except Exception as error:
            if isinstance(inner := getattr(error, "inner_exception", None), EngineError):  # of our backend
                raise EngineError(str(inner)) from None
            if not restored and _are_restored(cell, private.changed_objects(error)):
                continue
            if private.is_steps_own(error):
                raise StepError from error
            raise EngineError(f"fused: {private.why_untraced(error)}") from None
    raise AssertionError


def _are_restored(cell: nn.Module, changed: list[str]) -> bool:
    """Whether all that a step was seen to change is what it puts back, as its `_restored_by_step` says."""
    places = tuple(f"L['cell'].{name}[" for name in getattr(cell, "_restored_by_step", ()))
    return bool(changed) and all(source.startswith(places) for source in changed)


def _new_kinds(met: Met, state: Any) -> list[Kind]:
    """The kinds of the new state's fields.

    Raises: EngineError for a new state that is none, or of another shape.
    """
    new = met.new
    if not isinstance(new, tuple | list) or not all(isinstance(value, Mark | Tensor) for value in new):
        raise EngineError(f"fused: the step gives a {type(new).__name__}, and not a tuple of tensors")
    if len(new) != len(state):
        raise EngineError(f"fused: the step gives {len(new)} tensors for a state of {len(state)}")
    found = []
    for name, value, old in zip(field_names(state), new, state, strict=True):
        made = met.graph.results[value.place].meta["example_value"] if isinstance(value, Mark) else value
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
