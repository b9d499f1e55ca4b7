"""A plan made ready to run: a schedule for each set of gradients that is wanted."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor, fx, nn

from multint.engines import tables
from multint.engines.capture import Trace, capture
from multint.engines.failures import RefusedError
from multint.engines.guarded import Met
from multint.engines.lowering import Kernels, lower
from multint.engines.plan import Plan, plan
from multint.engines.reach import Reach
from multint.engines.schedule import Call, Schedule
from multint.engines.step import meet, unaware
from multint.engines.tables import TRACING
from multint.errors import EngineError


class Program:
    """A plan made ready to run: its schedules, by which gradients are wanted, and its kernels, which they share."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.failure = ""  # why it must not be run again
        self.is_native: bool | None = None  # whether its loops are, once that is known
        self.executors: dict[tuple[int, bool], tuple[Any, str]] = {}  # by schedule and direction; why it is not native
        self._kernels = Kernels(plan.world)
        self.forward = lower(plan, self._kernels, None)
        self._kept: dict[frozenset[str], Schedule | str] = {}  # or why there is none
        self._last: Schedule | None = None  # that gave gradients
        self._reaches: dict[frozenset[str], Reach] = {}

    def schedule(self, wanted: frozenset[str] | None) -> Schedule:
        """The schedule that gives gradients to the wanted arguments; forward only where that is None.

        Raises: EngineError where the step has no derivative.
        """
        if wanted is None:
            return self.forward
        kept = self._kept.get(wanted)
        if kept is None:
            with TRACING:
                try:
                    kept = unaware(lower, self.plan, self._kernels, wanted)
                except EngineError as error:
                    kept = str(error)
                self._kept[wanted] = kept
        if isinstance(kept, str):
            raise EngineError(kept)
        return kept

    def reach(self, wanted: frozenset[str]) -> Reach:
        """Which results have a gradient, and what it reaches, where the arguments of these names want one."""
        return self._reaches.setdefault(wanted, Reach(self.forward, wanted, self.plan.world))

    def scheduled(self, wanted: frozenset[str] | None) -> Schedule:
        """The schedule that is about to run."""
        schedule = self.schedule(wanted)
        if wanted is not None:
            self._last = schedule
        return schedule

    def shown(self) -> Schedule:
        """The last schedule that gave gradients or, before there was one, the whole."""
        return self._last or self.whole()

    def whole(self) -> Schedule:
        """The schedule that gives all gradients, or the forward pass alone for a step without a derivative."""
        try:
            return self.schedule(self.forward.may_learn)
        except EngineError:
            return self.forward


def _judge(schedule: Schedule) -> None:
    """Raise unless each piece works on every row by itself: what can be written as a function of one row does.

    All else that a step does with rows is products of them with matrices.
    """
    for instruction in [*schedule.beside, *schedule.prologue, *schedule.entry, *schedule.forward]:
        if isinstance(instruction, Call):
            try:
                instruction.kernel.cpp()
            except RefusedError as error:
                reason = str(error).replace("it ", "the step ", 1)
                raise EngineError(f"fused: rows may interact: {reason}") from None


def program_of(cell: nn.Module, x: Any, state: Any, asked: bool) -> tuple[Program, list[Tensor]]:
    """The program for such a cell and such inputs, traced where there is none yet, and the cell's tensors for it.

    Args: as `step.meet` has them.

    Raises: as `step.meet`; EngineError for a program that must not be run again.
    """
    met = meet(cell, x, state, asked, build)
    program, places = met.graph.made
    if program.failure:
        raise EngineError(program.failure)
    return program, [met.arguments[place] for place in places]


def build(met: Met, cell: nn.Module, x: Any, state: Any) -> tuple[Program, list[int]]:
    """The program of a traced step, or one of the same graph; and which of the call's arguments it takes.

    Raises: EngineError where there can be none.
    """
    trace, places = unaware(capture, met, cell, x, state)
    signature = _signature(trace)
    program: Program | None = tables.programs.get(signature)
    if program is None or program.failure:
        program = unaware(Program, plan(trace))
        _judge(program.forward)
        tables.programs[signature] = program
    return program, places


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
