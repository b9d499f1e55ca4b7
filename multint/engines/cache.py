"""Programs that are kept: by what the step reads, so that cells of one structure share one, and by the graph itself."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, MutableMapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn

from multint.engines import private
from multint.engines.failures import InternalError, StepError
from multint.engines.reads import Walk, contents_of
from multint.engines.witness import Witness
from multint.errors import EngineError

if TYPE_CHECKING:
    from multint.engines.capture import Trace
    from multint.engines.program import Program

# Programs that are kept; the one that was used longest ago goes first.
MOST_PROGRAMS = 64

# How often `auto` traces a cell without asking whether its attributes will be the same at the next call.
_MOST_AT_ONCE = 4


class _Hashed:
    """A walk's key, whose hash is taken once: that of a tuple goes through all that is in it at every look-up."""

    def __init__(self, key: Hashable) -> None:
        self._key, self._hash = key, hash(key)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Hashed) and self._key == other._key)

    def __hash__(self) -> int:
        return self._hash


class _Walked(NamedTuple):
    """What is kept of a walk; the walk itself holds on to the cell."""

    key: _Hashed
    tensors: list[Tensor]
    witness: Witness
    types: tuple[type, type]  # of the cell and of its state


@dataclass
class _History:
    """What a cell was traced for, and its last walk where that can be looked at again."""

    traces: int = 0
    last: Hashable = None
    walked: _Walked | None = None

    def walk(self, cell: nn.Module, state_type: type) -> _Walked:
        """Walk the cell, unless the last walk's witness tells that a new one would give the same."""
        last, types = self.walked, (type(cell), state_type)  # read once: another thread may walk
        if last is not None and last.types == types and last.witness.holds(contents_of):
            return last
        walk = Walk(cell, state_type)
        walked = _Walked(_Hashed(walk.key), walk.tensors, walk.witness, types)
        self.walked = walked if walk.witness.is_complete else None
        return walked


_programs: OrderedDict[Hashable, Program | str] = OrderedDict()  # or why there is none
_by_graph: WeakValueDictionary[Hashable, Program] = WeakValueDictionary()
_histories: MutableMapping[nn.Module, _History] = private.kept_by_identity()


def program_of(cell: nn.Module, xs: dict[str, Tensor], x: Any, state: Any, asked: bool) -> tuple[Program, list[Tensor]]:
    """The program for such a cell and such inputs, traced where there is none yet, and the cell's tensors for it.

    Args:
        xs: the streams by name.
        x: them at one step, as the step takes them.
        asked: whether the engine was asked for by name: then every change of an attribute is traced.

    Raises: EngineError where there can be none; StepError where the step itself fails; InternalError where the engine
    does.
    """
    history = _histories.get(cell)
    if history is None:
        history = _histories[cell] = _History()
    walked = history.walk(cell, type(state))
    kind = next(iter(xs.values())).device.type
    key = (
        walked.key,
        tuple((name, tensor.dtype, tensor.device, tensor.shape[2:]) for name, tensor in xs.items()),
        isinstance(x, dict),
        tuple((field.dtype, field.device, field.shape[1:]) for field in state),
        type(state),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        torch.get_default_dtype(),
        torch.get_default_device(),
    )
    again, history.last = history.last == key, key
    kept = _programs.get(key)
    if kept is None:
        if history.traces >= _MOST_AT_ONCE and not asked and not again:
            raise EngineError("fused: the attributes of the cell's modules change from call to call")
        from multint.engines.capture import TRACING

        with TRACING:
            kept = _programs.get(key)
            if kept is None:
                history.traces += 1
                try:
                    kept = build(cell, x, state)
                except EngineError as error:  # its message alone: the traceback would hold the inputs
                    kept = str(error)
                except StepError:  # of these inputs, perhaps
                    raise
                except Exception as error:
                    raise InternalError(partial(_programs.__setitem__, key)) from error
                _programs[key] = kept
    _programs.move_to_end(key)
    while len(_programs) > MOST_PROGRAMS:
        _programs.popitem(last=False)
    if isinstance(kept, str) or kept.failure:
        raise EngineError(kept if isinstance(kept, str) else kept.failure)
    return kept, walked.tensors


def build(cell: nn.Module, x: Any, state: Any) -> Program:
    """Trace the step and make a program of it, or take one of the same graph: in training and evaluation, say."""
    # Imported here because the tracer is slow to import, and most uses never need it.
    from multint.engines.capture import capture, unaware
    from multint.engines.plan import plan
    from multint.engines.program import Program

    if _has_hooks(cell):
        raise EngineError("fused: a module of the cell has hooks, which would not be called at every step")
    if any(parameter.is_meta for parameter in cell.parameters()):
        raise EngineError("fused: parameters on the meta device hold no numbers to check the step by")
    trace = unaware(capture, cell, x, state)
    signature = _signature(trace)
    program = _by_graph.get(signature)
    if program is None or program.failure:
        program = _by_graph[signature] = unaware(Program, plan(trace))
    return program


def _has_hooks(cell: nn.Module) -> bool:
    """Whether the user has put a hook on any module of the cell; the library's own are part of the step."""
    hooks = [hook for module in cell.modules() for hook in private.hooks(module)]
    return not all((getattr(hook, "__module__", None) or "").startswith("multint.") for hook in hooks)


def _signature(trace: Trace) -> Hashable:
    """Everything in a trace, without the names of its nodes and of the symbol for the number of rows."""
    index = {node: f"%{i}" for i, node in enumerate(trace.graph.nodes)}
    symbol = str(next(iter(trace.states.values())).meta["val"].shape[0])

    def shown(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{value.dtype} {value.device} {list(value.shape)}".replace(symbol, "B")
        if isinstance(value, tuple | list):
            return f"({', '.join(map(shown, value))})"
        return str(value).replace(symbol, "B")

    nodes = []
    for node in trace.graph.nodes:
        arguments = fx.node.map_arg((node.args, node.kwargs), index.__getitem__)
        target = node.target if node.op == "call_function" else None
        nodes.append((node.op, target, repr(arguments), shown(node.meta.get("val"))))
    literals = [(index[node], str(v.dtype), repr(v.tolist())) for node, v in trace.literals.items()]
    names = (tuple(trace.invariants), trace.learnt, tuple(trace.inputs), tuple(trace.states), trace.state_type)
    return tuple(nodes), tuple(literals), names
