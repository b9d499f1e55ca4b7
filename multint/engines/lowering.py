"""From a plan to a schedule: a name and a buffer for every value, an instruction for every piece and product."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from multint.engines import private
from multint.engines.kernel import Kernel
from multint.engines.plan import Piece, Plan
from multint.engines.private import StandIns, has_rows
from multint.engines.schedule import At, Buffer, Call, Contraction, Extent, Product, Rows, RowSum, Schedule, check
from multint.errors import EngineError, in_a_line


class Kernels:
    """The kernels of a plan, each made once and shared by its schedules."""

    def __init__(self, world: StandIns) -> None:
        self._world = world
        self._kept: dict[Any, Kernel] = {}
        self._vjps: dict[Any, tuple[Kernel, list[int]]] = {}

    def of(self, piece: Piece) -> Kernel:
        """The kernel that runs a piece."""
        if id(piece) not in self._kept:
            results = [node.meta["val"] for node in piece.outputs]
            inputs = [node.meta["val"] for node in piece.roots]
            self._kept[id(piece)] = Kernel(piece.module, inputs, results, [False] * len(results), self._world)
        return self._kept[id(piece)]

    def vjp_of(
        self, piece: Piece, wanted: list[fx.Node], apart: list[fx.Node], results: list[Tensor], adds: list[bool]
    ) -> tuple[Kernel, list[int]]:
        """The kernel that runs a piece's `vjp`, and which of its arguments it uses.

        Args:
            results: stand-ins for what it gives, which it adds to what is there where `adds` says so.

        Raises: EngineError for a piece without a derivative.
        """
        key = id(piece), tuple(wanted), frozenset(apart).intersection(wanted), tuple(adds)
        if key not in self._vjps:
            try:
                module, used = vjp(piece, wanted, apart, self._world)
            except Exception as error:
                raise EngineError(f"fused: the step cannot be differentiated: {in_a_line(error)}") from error
            arguments = [*piece.roots, *(n for n in piece.outputs if n.meta["val"].is_floating_point())]
            inputs = [arguments[i].meta["val"] for i in used]
            self._vjps[key] = Kernel(module, inputs, results, adds, self._world), used
        return self._vjps[key]


def lower(plan: Plan, kernels: Kernels, wanted: frozenset[str] | None) -> Schedule:
    """The schedule that gives gradients to the wanted arguments and to the state; forward only where that is None.

    The schedule's arguments are named here, so the first call is one with `wanted=None`.
    """
    lowering = _Lowering(plan, kernels)
    lowering.forward()
    if wanted is not None:
        lowering.reverse(wanted)
    lowering.shorten()
    check(lowering.schedule)
    return lowering.schedule


class _Lowering:
    def __init__(self, plan: Plan, kernels: Kernels) -> None:
        self.plan, self.kernels = plan, kernels
        self.schedule = Schedule()
        self.names: dict[fx.Node, str] = {}
        self._left: dict[int, str] = {}  # the buffers of the left-hand sides of the products, by the product's identity

    def _buffer(self, name: str, like: Tensor, extent: Extent, rows: bool = True, **more: Any) -> str:
        """A new buffer for values like the stand-in, of that name or, where a user has taken it, the next free one."""
        free = str(name)  # a stream's may be any key of a dictionary
        while free in self.schedule.buffers:
            free += "'"
        shape = tuple(int(n) for n in (like.shape[1:] if rows else like.shape))
        kind = Rows.YES if rows else Rows.NO
        self.schedule.buffers[free] = Buffer(free, shape, like.dtype, like.device, extent, kind, **more)
        return free

    def _name(self, node: fx.Node, name: str, extent: Extent, **more: Any) -> str:
        """The buffer of a node's value."""
        if node not in self.names:
            value = node.meta["val"]
            rows = extent is not Extent.ONE or self._lasts(node)
            self.names[node] = self._buffer(name, value, extent, rows, **more)
        return self.names[node]

    def _lasts(self, node: fx.Node) -> bool:
        """Whether a value has rows and is the same at every step."""
        return node in self.plan.unchanged.values() or node in self.plan.lasting

    def _at(self, nodes: Iterable[fx.Node], later: int | None = 0) -> tuple[At, ...]:
        """Where the values of some roots are: those that change with t at this step, or at all of them."""
        extents = [(self.names[n], self.schedule.buffers[self.names[n]].extent) for n in nodes]
        return tuple(At(name, 0 if extent is Extent.ONE else later) for name, extent in extents)

    def forward(self) -> None:
        """What is given; what is before the loop; one step."""
        plan, schedule = self.plan, self.schedule
        schedule.inputs = {name: self._name(n, name, Extent.EACH, given=True) for name, n in plan.inputs.items()}
        schedule.states = [self._name(node, name, Extent.STATES) for name, node in plan.states.items()]
        schedule.invariants = [self._name(n, name, Extent.ONE, given=True) for name, n in plan.invariants.items()]
        for i, (node, value) in enumerate(plan.literals.items()):
            schedule.literals[self._name(node, f"literal{i}", Extent.ONE, given=True)] = value
        for name, node in plan.unchanged.items():
            self._name(node, name, Extent.ONE, given=True)
        schedule.fields = [self.names[node] for node in plan.fields]
        self._constants()
        for i, product in enumerate(plan.early + plan.hoisted):
            left = self._left[id(product)] = self._left_of(product, f"x{i}", schedule.prologue, None)
            result = self._name(product.result, f"{self.names[product.matrix]}{left}", Extent.EACH)
            section = schedule.prologue if product in plan.early else schedule.entry
            section.append(Product(At(result, None), At(left, None), At(self.names[product.matrix])))
        for i, stage in enumerate(plan.stages):
            left_name = self._left[id(stage)] = self._left_of(stage, f"z{i}", schedule.forward, 0)
            result = self._name(stage.result, f"{self.names[stage.matrix]}{left_name}", Extent.EACH)
            schedule.forward.append(Product(At(result), At(left_name), At(self.names[stage.matrix])))
        results = {At(name, 1): False for name in schedule.states}
        schedule.forward.append(Call(self.kernels.of(plan.final), self._at(plan.final.roots), results))
        named = [(node, self.names[node]) for node in [*plan.streams, *plan.matrices, *plan.vectors]]
        named += [(product.left, self._left[id(product)]) for product in plan.hoisted]
        schedule.arguments = list(dict.fromkeys([*(name for _, name in named), *schedule.states]))
        schedule.may_learn = frozenset(name for node, name in named if node in plan.may_learn)

    def _constants(self) -> None:
        """What is computed of the parameters: matrices are called W where the input meets them, and U in the loop."""
        plan = self.plan
        for letter, products in (("W", plan.early + plan.hoisted), ("U", plan.stages)):
            matrices = list(dict.fromkeys(p.matrix for p in products if p.matrix not in self.names))
            for i, node in enumerate(matrices):
                self._name(node, letter if len(matrices) == 1 else f"{letter}{i}", Extent.ONE)
        made = [node for node in plan.constants if node.op != "placeholder"]
        writes = {At(self._name(node, f"const{i}", Extent.ONE)): False for i, node in enumerate(made)}
        if made:
            self.schedule.prelude.append(Call(self.kernels.of(plan.prelude), self._at(plan.prelude.roots), writes))
        writes = {At(self._name(node, f"once{i}", Extent.ONE)): False for i, node in enumerate(plan.lasting)}
        if plan.lasting:
            self.schedule.beside.append(Call(self.kernels.of(plan.beside), self._at(plan.beside.roots), writes))

    def _left_of(self, product: Any, name: str, section: list[Any], later: int | None) -> str:
        """The buffer of a product's left-hand side, which a piece fills where it is no root itself."""
        if product.piece is None:
            return self.names[product.left]
        buffer = self._buffer(name, product.left.meta["val"], Extent.EACH)
        roots = self._at(product.piece.roots, later)
        section.append(Call(self.kernels.of(product.piece), roots, {At(buffer, later): False}))
        return buffer

    def reverse(self, wanted: frozenset[str]) -> None:
        """One step backward, last piece first, and what follows."""
        plan, schedule = self.plan, self.schedule
        self._gradients(wanted)
        d_new = [At(self._d[node], 1) for node in plan.states.values() if node in self._d]
        if next(iter(plan.states.values())) in self._d:
            d_new.append(At(schedule.output_gradient))
        self._vjp(plan.output, d_new)
        for stage in reversed(plan.stages):
            d_result, matrix = At(self._d[stage.result]), At(self.names[stage.matrix])
            if stage.piece is None:
                target = At(self._d[stage.left])
                schedule.reverse.append(Product(target, d_result, matrix, True, adds=target in self._written))
                self._written.add(target)
            else:
                d_left = At(self._buffer(f"d_{self._left[id(stage)]}", stage.left.meta["val"], Extent.NOW))
                schedule.reverse.append(Product(d_left, d_result, matrix, True))
                self._vjp(stage.piece, [d_left])
        schedule.cleared += [n for n in self._d.values() if At(n) not in self._written]
        self._epilogue(wanted)

    def _gradients(self, wanted: frozenset[str]) -> None:
        """The buffers of the gradients that the reverse section leaves or carries."""
        plan, schedule = self.plan, self.schedule
        states = list(plan.states.values())
        self._d: dict[fx.Node, str] = {}
        streams = [node for node in plan.streams if self.names[node] in wanted]
        read_by = {p.result: {self._left[id(p)], self.names[p.matrix]} for p in plan.hoisted}
        hoisted = [result for result, factors in read_by.items() if factors & wanted]
        results = [*hoisted, *(stage.result for stage in plan.stages)]
        places = {Extent.TURNS: states, Extent.EACH: streams, Extent.BLOCK: results}
        for extent, nodes in places.items():
            for node in nodes:
                if node.meta["val"].is_floating_point():
                    self._d[node] = self._buffer(f"d_{self.names[node]}", node.meta["val"], extent)
        schedule.output_gradient = self._buffer("d_output", states[0].meta["val"], Extent.EACH, given=True)
        # Vectors have one gradient for all steps, so every piece adds to it. It is summed in float32 at least, since
        # half precision would round at each step; and by row where that is enough, since a sum over rows in the
        # reverse loop costs more than one at the end.
        rows = states[0].meta["val"].shape[0]
        vectors = [n for n in plan.vectors if self.names[n] in wanted and n.meta["val"].is_floating_point()]
        plain = [node for node in vectors if node.meta["val"].ndim == 1 and not self._lasts(node)]
        self._apart = [node for node in plain if all(_is_broadcast(user, rows) for user in node.users)]
        self._vectors = set(vectors)
        for node in vectors:
            name = f"rows(d_{self.names[node]})" if node in self._apart else f"d_{self.names[node]}"
            by_row = node in self._apart or self._lasts(node)
            buffer = self._buffer(name, self._accumulator(node), Extent.ONE, rows=by_row)
            self._d[node] = buffer
            schedule.cleared.append(buffer)
        self._written = {At(name) for name in schedule.cleared}

    def _accumulator(self, node: fx.Node) -> Tensor:
        """A stand-in for the sum of a vector's gradients over the steps."""
        value = node.meta["val"]
        rows = next(iter(self.plan.states.values())).meta["val"].shape[0]
        shape = (rows, *value.shape) if node in self._apart else tuple(value.shape)
        return self.plan.world.new(value, shape, torch.promote_types(value.dtype, torch.float32))

    def _vjp(self, piece: Piece, cotangents: list[At]) -> None:
        """The instruction that gives the piece's roots their gradients."""
        roots = [n for n in piece.roots if n in self._d]
        if not roots or not cotangents:
            return
        writes = {At(self._d[node]): At(self._d[node]) in self._written for node in roots}
        self._written.update(writes)
        reads = [*self._at(piece.roots), *cotangents]
        results = [self._accumulator(n) if n in self._vectors else n.meta["val"] for n in roots]
        kernel, used = self.kernels.vjp_of(piece, roots, self._apart, results, list(writes.values()))
        self.schedule.reverse.append(Call(kernel, tuple(reads[i] for i in used), writes))

    def _epilogue(self, wanted: frozenset[str]) -> None:
        """Products for the factors of all products, and the sums of what was kept by row."""
        plan, schedule = self.plan, self.schedule
        for node in self._apart:
            total = self._buffer(f"d_{self.names[node]}", self._accumulator(node), Extent.ONE, rows=True)
            schedule.buffers[total] = replace(schedule.buffers[total], rows=Rows.NO)
            schedule.epilogue.append(RowSum(At(total), At(self._d[node])))
            self._d[node] = total
        gradients: dict[str, list[str]] = {name: [] for name in schedule.arguments}
        for node in dict.fromkeys([*plan.streams, *plan.vectors, *plan.states.values()]):
            if node in self._d:
                gradients[self.names[node]].append(self._d[node])
        for product in plan.hoisted + plan.stages:
            left, matrix = self._left[id(product)], self.names[product.matrix]
            if product in plan.hoisted and left in wanted:
                d_left = self._buffer(f"d_{left}", product.left.meta["val"], Extent.EACH)
                d_result = At(self._d[product.result], None)
                schedule.exit.append(Product(At(d_left, None), d_result, At(matrix), True))
                gradients[left].append(d_left)
            if matrix in wanted:
                d_matrix = self._buffer(f"d_{matrix}", product.matrix.meta["val"], Extent.ONE, rows=False)
                d_result = At(self._d[product.result], None)
                schedule.exit.append(Contraction(At(d_matrix), At(left, None), d_result))
                gradients[matrix].append(d_matrix)
        schedule.gradients = gradients

    def shorten(self) -> None:
        """Let what no later section reads be there for one step only, for two, or for a block of them."""
        schedule = self.schedule
        for name in set(schedule.states[1:]) - set(schedule.kept):  # the first is the output
            schedule.buffers[name] = replace(schedule.buffers[name], extent=Extent.TURNS)
        for section, extent in ((schedule.forward, Extent.NOW), (schedule.entry, Extent.BLOCK)):
            made = {write.buffer for instruction in section for write in instruction.writes}
            for name in made - set(schedule.kept) - set(schedule.states):
                schedule.buffers[name] = replace(schedule.buffers[name], extent=extent)


def vjp(piece: Piece, wanted: list[fx.Node], apart: list[fx.Node], world: StandIns) -> tuple[fx.GraphModule, list[int]]:
    """The piece's vector-Jacobian product, and which of its arguments it uses, by their place.

    Its arguments are the piece's roots and the cotangents of its floating-point results; it gives the gradients of the
    wanted roots.

    Args:
        apart: vectors whose gradient is given for each row apart, (B, V), and not summed.
    """
    places = [piece.roots.index(root) for root in wanted]
    outputs = [(i, node) for i, node in enumerate(piece.outputs) if node.meta["val"].is_floating_point()]
    unique = list(dict.fromkeys(node for _, node in outputs))

    def function(*arguments: Any) -> Any:
        values, cotangents = list(arguments[: len(piece.roots)]), arguments[len(piece.roots) :]
        # Where one value is two outputs, such as a state that a stage reads too, its cotangents add up.
        totals: dict[fx.Node, Any] = {}
        for (_, node), cotangent in zip(outputs, cotangents, strict=True):
            totals[node] = totals[node] + cotangent if node in totals else cotangent

        def of(*some: Any) -> Any:
            for place, value in zip(places, some, strict=True):
                values[place] = value
            results = piece.module(*values)
            by_node = {node: results[i] for i, node in outputs}
            return tuple(by_node[node] for node in unique)

        rows = cotangents[0].shape[0]
        for place, node in zip(places, wanted, strict=True):
            if node in apart:
                values[place] = values[place].expand(rows, -1)
        _, pull = torch.func.vjp(of, *(values[place] for place in places))  # type: ignore[misc]
        return list(pull(tuple(totals[node] for node in unique)))

    stand_ins = [world.like(node.meta["val"]) for node in [*piece.roots, *(node for _, node in outputs)]]
    module = world.trace(function, stand_ins)
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    used = [i for i, node in enumerate(placeholders) if node.users]
    for node in placeholders:
        if not node.users:
            module.graph.erase_node(node)
    module.recompile()
    return module, used


def _is_broadcast(user: fx.Node, rows: torch.SymInt) -> bool:
    """Whether a vector's user meets its entries with the columns of a matrix of rows."""
    return private.is_pointwise(user.target) and user.meta["val"].ndim == 2 and has_rows(user.meta["val"], rows)
