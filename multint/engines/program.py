"""A plan made ready to run: a schedule for each set of gradients that is wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING

from multint.engines.capture import TRACING, unaware
from multint.engines.lowering import Kernels, lower
from multint.engines.plan import Plan
from multint.engines.reach import Reach
from multint.engines.schedule import Schedule
from multint.errors import EngineError

if TYPE_CHECKING:
    from multint.engines.native import Loop


class Program:
    """A plan made ready to run: its schedules, by which gradients are wanted, and its kernels, which they share."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.failure = ""  # why it must not be run again
        self.is_native: bool | None = None  # whether its loops are, once that is known
        self.loops: dict[tuple[int, bool], Loop | str] = {}  # by schedule and direction, or why there is none
        self._kernels = Kernels(plan.world)
        self.forward = lower(plan, self._kernels, None)
        nodes = [*plan.streams, *plan.lefts, *plan.matrices, *plan.vectors]
        named = zip(nodes, self.forward.arguments, strict=False)
        self.may_learn = frozenset(name for node, name in named if node in plan.may_learn)
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
            return self.schedule(self.may_learn)
        except EngineError:
            return self.forward
