"""A plan made ready to run: a schedule for each set of gradients that is wanted, and what runs its loops.

That is native code where there is some, else pieces. Either is proved when it is first asked for; see `proof.py`.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from multint.engines import tables
from multint.engines.by_autograd import Reach, reach
from multint.engines.capture import Trace, capture
from multint.engines.failures import FailedError, RefusedError
from multint.engines.guarded import Match
from multint.engines.kernel import compiles
from multint.engines.lowering import lower
from multint.engines.native import machine
from multint.engines.native.loop import Loop
from multint.engines.plan import Plan, plan
from multint.engines.proof import prove
from multint.engines.schedule import Call, Schedule
from multint.engines.sections import Executor, Pieces
from multint.engines.step import in_own_thread, match
from multint.engines.tables import TRACING, report
from multint.errors import EngineError, in_a_line


class Program:
    """A plan made ready to run.

    Attributes:
        failure: why it must not be run again.
        forward: the schedule without gradients.
        last: the last schedule that gave gradients.
        executors: what runs a schedule's forward or reverse section, by its identity and whether it is the reverse
            one; and why that is not native.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.failure = ""
        self.forward = lower(plan, None)
        self.last: Schedule | None = None
        self.executors: dict[tuple[int, bool], tuple[Executor, str]] = {}
        self._schedules: dict[frozenset[str], Schedule | str] = {}  # or why there is none

    @cached_property
    def reach(self) -> Reach:
        """The arguments that gradients reach over one step."""
        with TRACING:  # the stand-ins' world is all threads'
            found: Reach = in_own_thread(reach, self.forward, self.plan.world)
        return found

    def schedule(self, wanted: frozenset[str]) -> Schedule:
        """The schedule that gives gradients to the wanted arguments.

        Raises: EngineError where the step has no derivative.
        """
        kept = self._schedules.get(wanted)
        if kept is None:
            with TRACING:
                try:
                    kept = in_own_thread(lower, self.plan, wanted)
                except EngineError as error:
                    kept = str(error)
                self._schedules[wanted] = kept
        if isinstance(kept, str):
            raise EngineError(kept)
        return kept

    def whole(self) -> Schedule:
        """The schedule that gives all gradients, or the forward pass alone for a step without a derivative."""
        try:
            return self.schedule(self.forward.may_learn)
        except EngineError:
            return self.forward

    def executor(self, schedule: Schedule, reverse: bool) -> Executor:
        """What runs a section of one of its schedules, compiled and proved at the first use.

        Raises: EngineError where no random numbers tell whether it is right; UnprovedError where whatever runs it is
        wrong.
        """
        if not compiles():
            return Pieces(schedule, reverse, eager=True)
        key = id(schedule), reverse
        if key not in self.executors:
            with TRACING:
                if key not in self.executors:
                    try:
                        self.executors[key] = _proved(schedule, reverse)
                    except EngineError as error:
                        self.failure = str(error)
                        raise
        return self.executors[key][0]

    def how(self, schedule: Schedule, reverse: bool) -> str:
        """What runs a section, in words, and why that is not native code. Nothing is compiled for that."""
        if reason := self._why_pieces(schedule, reverse):
            return f"Python, step by step: {reason}"
        return "native code" + ("" if (id(schedule), reverse) in self.executors else ", once that is compiled")

    def is_native(self) -> bool:
        """Whether its loops are native, or would be when they are compiled."""
        return compiles() and self._native

    @cached_property
    def _native(self) -> bool:
        schedule = self.whole()
        sections = [False, True] if schedule.reverse else [False]
        return not any(self._why_pieces(schedule, reverse) for reverse in sections)

    def _why_pieces(self, schedule: Schedule, reverse: bool) -> str:
        """Why a section is run by pieces; empty where it has native code, or will have."""
        if not compiles():
            return "nothing is to be compiled"
        if (id(schedule), reverse) in self.executors:
            return self.executors[id(schedule), reverse][1]
        try:
            Loop(schedule, reverse)
            machine.compiler()
        except RefusedError as error:
            return str(error)
        return ""


def _judge(schedule: Schedule) -> None:
    """Raise unless each piece works on every row by itself: what can be written as a function of one row does.

    All else that a step does with rows is products of them with matrices.
    """
    for instruction in [*schedule.once, *schedule.prologue, *schedule.entry, *schedule.forward]:
        if isinstance(instruction, Call) and any(schedule.buffers[at.buffer].has_rows for at in instruction.writes):
            try:
                instruction.kernel.cpp()
            except RefusedError as error:
                reason = str(error).replace("it ", "the step ", 1)
                raise EngineError(f"fused: rows may interact: {reason}") from None


def _proved(schedule: Schedule, reverse: bool) -> tuple[Executor, str]:
    """The first of the executors that can be made and is right, and why it is not native."""
    reason = ""
    ways = (
        (Loop, "its native loop", "its steps are run from Python"),
        (Pieces, "its compiled pieces", "they run op by op"),
    )
    for make, name, instead in ways:
        try:
            executor: Executor = make(schedule, reverse)
            executor.build()
            in_own_thread(prove, schedule, reverse, executor)
        except EngineError:
            raise
        except RefusedError as error:
            reason = reason or str(error)
        except Exception as error:
            reason = reason or f"it failed by {in_a_line(error)}"
            report(f"{name} failed by {in_a_line(error)}", instead)
        else:
            return executor, reason
    executor = Pieces(schedule, reverse, eager=True)
    in_own_thread(prove, schedule, reverse, executor)  # where that fails, no other way to run it helps
    return executor, reason


def program_of(cell: nn.Module, x: Any, state: Any, by_name: bool) -> tuple[Program, list[Tensor]]:
    """The program for such a cell and such inputs, traced where there is none yet, and the cell's tensors for it.

    Args: as `step.match` has them.

    Raises: as `step.match`; EngineError for a program that must not be run again; FailedError.
    """
    found = match(cell, x, state, by_name)
    graph = found.graph
    made = graph.program  # another thread may drop it
    if not (made or graph.failure):
        with TRACING:
            try:
                made = graph.program = build(found, cell)
            except EngineError as error:  # its message alone: the traceback would hold the inputs
                graph.failure = str(error)
            except Exception as error:
                raise FailedError(error, graph) from error
    if graph.failure:
        raise EngineError(graph.failure)
    tables.graphs.keep(graph, graph)
    program, places = made
    if program.failure:
        raise EngineError(program.failure)
    return program, [found.arguments[place] for place in places]


def build(found: Match, cell: nn.Module) -> tuple[Program, list[int]]:
    """The program of a traced step, or one of the same graph; and which of the call's arguments it takes.

    Raises: EngineError where there can be none.
    """
    trace, places = in_own_thread(capture, found, cell)
    signature = _signature(trace)
    program: Program | None = tables.programs.get(signature)
    if program is None or program.failure:
        program = in_own_thread(Program, plan(trace))
        _judge(program.forward)
        tables.programs[signature] = program
    return program, places


def _signature(trace: Trace) -> Hashable:
    """Everything in a trace, without the symbol for the number of rows."""
    symbol = str(next(iter(trace.states.values())).meta["val"].shape[0])
    given = [node.meta["val"] for node in trace.graph.nodes if node.op == "placeholder"]
    kinds = tuple((value.dtype, value.device, str(value.shape).replace(symbol, "B")) for value in given)
    literals = [repr(value.tolist()) for value in trace.literals.values()]
    names = (tuple(trace.invariants), trace.learnt, tuple(trace.inputs), tuple(trace.states), trace.state_type)
    return str(trace.graph), kinds, tuple(literals), names
