"""From a plan to a schedule: a name and a buffer for every value, an instruction for every piece and product."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from multint.engines.failures import RefusedError
from multint.engines.kernel import Kernel
from multint.engines.plan import Multiplication, Piece, Plan
from multint.engines.private import has_rows
from multint.engines.schedule import At, Buffer, Call, Contraction, Extent, Product, Schedule
from multint.errors import EngineError, in_a_line


def lower(plan: Plan, wanted: frozenset[str] | None) -> Schedule:
    """The schedule that gives gradients to the wanted arguments and to the state; forward only where that is None.

    The schedule's arguments are named here, so the first call is one with `wanted=None`.

    Raises: EngineError for a step without a derivative.
    """
    lowering = _Lowering(plan)
    lowering.forward()
    if wanted is not None:
        lowering.reverse(wanted)
    lowering.shorten()
    return lowering.schedule


class _Lowering:
    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.schedule = Schedule()
        self.names: dict[fx.Node, str] = {}
        self.lefts: dict[Multiplication, str] = {}  # the buffers of the left-hand sides
        self.gradients: dict[fx.Node, str] = {}  # the buffers that the reverse section leaves or carries
        self.written: set[At] = set()  # of these so far, or cleared: what comes next is added

    def _buffer(
        self, name: str, like: Tensor, extent: Extent, dtype: torch.dtype | None = None, by_row: bool = False
    ) -> str:
        """A new buffer for values like the stand-in, of that name or, where a user has taken it, the next free one."""
        free = str(name)  # a stream's may be any key of a dictionary
        while free in self.schedule.buffers:
            free += "'"
        rows = has_rows(like, self.plan.rows)
        shape = tuple(int(n) for n in like.shape[int(rows) :])
        self.schedule.buffers[free] = Buffer(free, shape, dtype or like.dtype, like.device, extent, rows or by_row)
        return free

    def _name(self, node: fx.Node, name: str, extent: Extent) -> str:
        """The buffer of a node's value."""
        if node not in self.names:
            self.names[node] = self._buffer(name, node.meta["val"], extent)
        return self.names[node]

    def _at(self, nodes: Iterable[fx.Node], later: int | None = 0) -> tuple[At, ...]:
        """Where the values of some roots are: those that change with t at this step, or at all of them."""
        extents = [(self.names[n], self.schedule.buffers[self.names[n]].extent) for n in nodes]
        return tuple(At(name, 0 if extent is Extent.ONE else later) for name, extent in extents)

    def forward(self) -> None:
        """What is given; what is before the loop; one step."""
        plan, schedule = self.plan, self.schedule
        schedule.inputs = {name: self._name(node, name, Extent.EACH) for name, node in plan.inputs.items()}
        schedule.states = [self._name(node, name, Extent.STATES) for name, node in plan.states.items()]
        schedule.invariants = [self._name(node, name, Extent.ONE) for name, node in plan.invariants.items()]
        for i, (node, value) in enumerate(plan.literals.items()):
            schedule.literals[self._name(node, f"literal{i}", Extent.ONE)] = value
        for name, node in plan.unchanged.items():
            self._name(node, name, Extent.ONE)
        schedule.fields = [self.names[node] for node in plan.fields]
        # Matrices are called W where the input meets them, and U in the loop.
        for letter, products in (("W", plan.early + plan.hoisted), ("U", plan.stages)):
            matrices = list(dict.fromkeys(p.matrix for p in products if p.matrix not in self.names))
            for i, node in enumerate(matrices):
                self._name(node, letter if len(matrices) == 1 else f"{letter}{i}", Extent.ONE)
        for (piece, results), name in zip(plan.once, ("const", "once"), strict=True):
            writes = {At(self._name(node, f"{name}{i}", Extent.ONE)): False for i, node in enumerate(results)}
            if writes:
                schedule.once.append(Call(piece.kernel, self._at(piece.roots), writes))
        for i, product in enumerate(plan.early + plan.hoisted):
            section = schedule.prologue if product in plan.early else schedule.entry
            self._product(product, f"x{i}", schedule.prologue, section, None)
        for i, stage in enumerate(plan.stages):
            self._product(stage, f"z{i}", schedule.forward, schedule.forward, 0)
        new = {At(name, 1): False for name in schedule.states}
        schedule.forward.append(Call(plan.final.kernel, self._at(plan.final.roots), new))
        matrices = [product.matrix for product in plan.hoisted + plan.stages]
        named = [(node, self.names[node]) for node in [*plan.streams, *matrices, *plan.vectors]]
        named += [(product.left, self.lefts[product]) for product in plan.hoisted]
        schedule.arguments = list(dict.fromkeys([*(name for _, name in named), *schedule.states]))
        schedule.may_learn = frozenset(name for node, name in named if node in plan.may_learn)

    def _product(
        self, product: Multiplication, name: str, before: list[Any], section: list[Any], later: int | None
    ) -> None:
        """A product in a section, and `before` it the piece that gives its left-hand side, where that is no root."""
        if product.piece is None:
            left = self.names[product.left]
        else:
            left = self._buffer(name, product.left.meta["val"], Extent.EACH)
            before.append(Call(product.piece.kernel, self._at(product.piece.roots, later), {At(left, later): False}))
        self.lefts[product] = left
        matrix = self.names[product.matrix]
        result = self._name(product.result, f"{matrix}{left}", Extent.EACH)
        section.append(Product(At(result, later), At(left, later), At(matrix)))

    def reverse(self, wanted: frozenset[str]) -> None:
        """One step backward, last piece first, and what follows."""
        plan, schedule = self.plan, self.schedule
        self._name_gradients(wanted)
        pairs = zip(plan.states.values(), plan.final.kernel.outputs, strict=True)
        cotangents = [(new, At(self.gradients[old], 1)) for old, new in pairs if old in self.gradients]
        if next(iter(plan.states.values())) in self.gradients:
            cotangents.append((plan.final.kernel.outputs[0], At(schedule.output_gradient)))
        self._vjp(plan.final, cotangents)
        for stage in reversed(plan.stages):
            d_result, matrix = At(self.gradients[stage.result]), At(self.names[stage.matrix])
            if stage.piece is None:
                target = At(self.gradients[stage.left])
                schedule.reverse.append(Product(target, d_result, matrix, True, adds=target in self.written))
                self.written.add(target)
            else:
                d_left = At(self._buffer(f"d_{self.lefts[stage]}", stage.left.meta["val"], Extent.NOW))
                schedule.reverse.append(Product(d_left, d_result, matrix, True))
                self._vjp(stage.piece, [(stage.piece.kernel.outputs[0], d_left)])
        for name in self.gradients.values():
            if At(name) not in self.written:
                schedule.cleared.append(name)
                buffer = schedule.buffers[name]
                if buffer.extent is Extent.TURNS:  # only the last step's is given then: the others are to stay 0
                    schedule.buffers[name] = replace(buffer, extent=Extent.STATES)
        self._factors(wanted)

    def _name_gradients(self, wanted: frozenset[str]) -> None:
        plan, schedule = self.plan, self.schedule
        states = list(plan.states.values())
        streams = [node for node in plan.streams if self.names[node] in wanted]
        hoisted = [p.result for p in plan.hoisted if {self.lefts[p], self.names[p.matrix]} & wanted]
        results = [*hoisted, *(stage.result for stage in plan.stages)]
        for extent, nodes in {Extent.TURNS: states, Extent.EACH: streams, Extent.BLOCK: results}.items():
            for node in nodes:
                if node.meta["val"].is_floating_point():
                    self.gradients[node] = self._buffer(f"d_{self.names[node]}", node.meta["val"], extent)
        schedule.output_gradient = self._buffer("d_output", states[0].meta["val"], Extent.EACH)
        # Vectors have one gradient for all steps, so every piece adds to it. It is summed in float32 at least, since
        # half precision would round at each step; and by row where that is enough, since a sum over rows in the
        # reverse loop costs more than one at the end.
        for node in plan.vectors:
            if self.names[node] in wanted and node.meta["val"].is_floating_point():
                by_row, value = node in plan.by_row, node.meta["val"]
                name = f"rows(d_{self.names[node]})" if by_row else f"d_{self.names[node]}"
                self.gradients[node] = self._buffer(name, value, Extent.ONE, _summed_in(value.dtype), by_row)
                schedule.cleared.append(self.gradients[node])
        self.written = {At(name) for name in schedule.cleared}

    def _vjp(self, piece: Piece, cotangents: list[tuple[fx.Node, At]]) -> None:
        """The instruction that computes the gradients of a piece's roots from those of its results."""
        roots = [n for n in piece.roots if n in self.gradients]
        if not roots or not cotangents:
            return
        writes = {At(self.gradients[node]): At(self.gradients[node]) in self.written for node in roots}
        self.written.update(writes)
        key = tuple(zip(roots, writes.values(), strict=True))
        if key not in piece.vjps:
            try:
                piece.vjps[key] = vjp(piece, [node for node, _ in cotangents], roots, list(writes.values()), self.plan)
            except Exception as error:
                raise EngineError(f"fused: the step cannot be differentiated: {in_a_line(error)}") from error
        kernel, used = piece.vjps[key]
        reads = [*self._at(piece.roots), *(at for _, at in cotangents)]
        self.schedule.reverse.append(Call(kernel, tuple(reads[i] for i in used), writes))

    def _factors(self, wanted: frozenset[str]) -> None:
        """The gradients of all products' factors, by products over many steps; and whose each gradient is."""
        plan, schedule = self.plan, self.schedule
        schedule.gradients = {name: [] for name in schedule.arguments}
        for node in dict.fromkeys([*plan.streams, *plan.vectors, *plan.states.values()]):
            if node in self.gradients:
                schedule.gradients[self.names[node]].append(self.gradients[node])
        for product in plan.hoisted + plan.stages:
            left, matrix = self.lefts[product], self.names[product.matrix]
            if product in plan.hoisted and left in wanted:
                d_left = self._buffer(f"d_{left}", product.left.meta["val"], Extent.EACH)
                d_result = At(self.gradients[product.result], None)
                schedule.exit.append(Product(At(d_left, None), d_result, At(matrix), True))
                schedule.gradients[left].append(d_left)
            if matrix in wanted:
                d_matrix = self._buffer(f"d_{matrix}", product.matrix.meta["val"], Extent.ONE)
                d_result = At(self.gradients[product.result], None)
                schedule.exit.append(Contraction(At(d_matrix), At(left, None), d_result))
                schedule.gradients[matrix].append(d_matrix)

    def shorten(self) -> None:
        """Let what no later section reads be there for one step only, for two, or for a block of them."""
        schedule = self.schedule
        for name in set(schedule.states[1:]) - set(schedule.kept):  # the first is the output
            schedule.buffers[name] = replace(schedule.buffers[name], extent=Extent.TURNS)
        for section, extent in ((schedule.forward, Extent.NOW), (schedule.entry, Extent.BLOCK)):
            written = {write.buffer for instruction in section for write in instruction.writes}
            for name in written - set(schedule.kept) - set(schedule.states):
                schedule.buffers[name] = replace(schedule.buffers[name], extent=extent)


def vjp(
    piece: Piece, results: list[fx.Node], wanted: list[fx.Node], adds: list[bool], plan: Plan
) -> tuple[Kernel, list[int]]:
    """The piece's vector-Jacobian product, and which of its arguments it uses, by their place.

    Its arguments are the piece's roots and cotangents of the results, where one that comes twice has the sum of both;
    it gives the gradients of the wanted roots, those of vectors in the dtype that they are summed in.
    """
    places = [piece.roots.index(root) for root in wanted]
    unique = list(dict.fromkeys(results))
    chosen = [piece.kernel.outputs.index(node) for node in unique]

    def function(*arguments: Any) -> Any:
        values, cotangents = list(arguments[: len(piece.roots)]), arguments[len(piece.roots) :]
        totals: dict[fx.Node, Any] = {}
        for node, cotangent in zip(results, cotangents, strict=True):
            totals[node] = totals[node] + cotangent if node in totals else cotangent

        def of(*some: Any) -> Any:
            for place, value in zip(places, some, strict=True):
                values[place] = value
            computed = piece.kernel.module(*values)
            return tuple(computed[i] for i in chosen)

        rows = cotangents[0].shape[0]
        given = [
            values[p].expand(rows, -1) if n in plan.by_row else values[p] for p, n in zip(places, wanted, strict=True)
        ]
        _, pull = torch.func.vjp(of, *given)  # type: ignore[misc]
        found = pull(tuple(totals[node] for node in unique))
        if any(value.layout is not torch.strided for value in found):
            raise RefusedError("a gradient is sparse")
        pairs = zip(wanted, found, strict=True)
        return [value.to(_summed_in(value.dtype)) if node in plan.vectors else value for node, value in pairs]

    module = plan.world.trace(function, [plan.world.like(node.meta["val"]) for node in [*piece.roots, *results]])
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    used = [i for i, node in enumerate(placeholders) if node.users]
    for node in placeholders:
        if not node.users:
            module.graph.erase_node(node)
    module.recompile()
    return Kernel(module, plan.world, adds), used


def _summed_in(dtype: torch.dtype) -> torch.dtype:
    """In which dtype gradients are summed over the steps."""
    return torch.promote_types(dtype, torch.float32)
