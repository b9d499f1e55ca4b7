"""Which of the two executors runs a section of a schedule: native code where there is some, else pieces.

Each is proved when it is first asked for; see `proof.py`.
"""

from __future__ import annotations

from multint.engines.failures import RefusedError
from multint.engines.kernel import compiles
from multint.engines.native import machine
from multint.engines.native.loop import Loop
from multint.engines.pieces import Pieces
from multint.engines.program import Program
from multint.engines.proof import prove
from multint.engines.schedule import Schedule
from multint.engines.sections import Executor
from multint.engines.step import unaware
from multint.engines.tables import TRACING, report
from multint.errors import EngineError, in_a_line


def executor_of(program: Program, schedule: Schedule, reverse: bool) -> Executor:
    """What runs a section of a program's schedule, compiled and proved at the first use.

    Raises: EngineError where no random numbers tell whether it is right; UnprovedError where whatever runs it is wrong.
    """
    if not compiles():
        return Pieces(schedule, reverse, eager=True)
    key = id(schedule), reverse
    if key not in program.executors:
        with TRACING:
            if key not in program.executors:
                try:
                    program.executors[key] = _proved(schedule, reverse)
                except EngineError as error:
                    program.failure = str(error)
                    raise
    return program.executors[key][0]


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
            unaware(prove, schedule, reverse, executor)
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
    unaware(prove, schedule, reverse, executor)  # where that fails, no other way to run it helps
    return executor, reason


def how(program: Program, schedule: Schedule, reverse: bool) -> str:
    """What runs a section, in words, and why that is not native code. Nothing is compiled for that."""
    if reason := _why_pieces(program, schedule, reverse):
        return f"Python, step by step: {reason}"
    return "native code" + ("" if (id(schedule), reverse) in program.executors else ", once that is compiled")


def is_native(program: Program) -> bool:
    """Whether a program's loops are native, or would be when they are compiled."""
    if not compiles():  # for now
        return False
    if program.is_native is None:
        schedule = program.whole()
        sections = [False, True] if schedule.reverse else [False]
        program.is_native = not any(_why_pieces(program, schedule, reverse) for reverse in sections)
    return program.is_native


def _why_pieces(program: Program, schedule: Schedule, reverse: bool) -> str:
    """Why a section is run by pieces; empty where it has native code, or will have."""
    if not compiles():
        return "nothing is to be compiled"
    made = program.executors.get((id(schedule), reverse))
    if made is not None:
        return made[1]
    try:
        Loop(schedule, reverse)
        machine.compiler()
    except RefusedError as error:
        return str(error)
    return ""
