"""The fused engine: a loop over stages and pieces, and a backward pass in two phases."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from multint.scan.kernel import Kernel
from multint.scan.plan import Piece, Plan, extract, vjp


class Call(NamedTuple):
    """A kernel and where its arguments and results stand among the values of one step."""

    kernel: Kernel
    reads: list[int]
    writes: list[int]


class Program:
    """A plan made ready to run: every root, result and gradient has a slot, every piece a kernel."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        trace = plan.trace
        self.mode = trace.mode
        qs = [stage.packed for stage in plan.stages]
        roots = [*plan.vectors, *plan.streams, *trace.states, *qs]
        self.slot = {node: index for index, node in enumerate(roots)}
        # After the roots: each stage's left-hand side, the cotangents of the new state and of those, and the roots'
        # gradients. The new state itself goes straight into the buffer of all states.
        self.size = len(roots)
        self.left = self._slots(len(qs))
        self.d_new_state = self._slots(len(trace.states))
        self.d_left = self._slots(len(qs))
        self.gradient = dict(zip([*trace.states, *qs], self._slots(len(trace.states) + len(qs)), strict=True))
        self.final = self._forward(plan.final, [])
        self.lefts = [
            self._forward(stage.piece, [slot]) if stage.piece else None
            for stage, slot in zip(plan.stages, self.left, strict=True)
        ]
        self._build_backward(qs)

    def _slots(self, count: int) -> list[int]:
        first = self.size
        self.size += count
        return list(range(first, self.size))

    def _forward(self, piece: Piece, writes: list[int]) -> Call:
        kernel = Kernel(
            piece.module, _values(piece.roots), _values(piece.outputs), [False] * len(piece.outputs), self.mode
        )
        return Call(kernel, [self.slot[root] for root in piece.roots], writes)

    def _build_backward(self, qs: list[fx.Node]) -> None:
        """The vjps of one step, last piece first; the first to give a gradient writes it, the later ones add to it."""
        plan, states = self.plan, self.plan.trace.states
        self.given: set[fx.Node] = set()  # roots that some piece or product gives a gradient
        self.final_vjp = self._vjp(plan.final, [*states, *qs], self.d_new_state)
        self.left_vjps: list[Call | None] = []
        self.product_adds: list[bool] = []  # whether a stage's product with its matrix adds to a state's gradient
        for stage, slot in reversed(list(zip(plan.stages, self.d_left, strict=True))):
            if stage.piece is not None:
                self.product_adds.append(False)
                self.left_vjps.append(self._vjp(stage.piece, [*states, *qs], [slot]))
            else:
                self.product_adds.append(stage.left in self.given)
                self.given.add(stage.left)
                self.left_vjps.append(None)
        # Phase 2: all of the step as one function of all rows, for what the products outside the loop and vectors need.
        outputs = [stage.left for stage in plan.stages if stage.piece] + plan.trace.outputs
        self.whole = extract(plan.trace.graph, set(self.slot), outputs)
        module, self.whole_wanted = vjp(self.whole, [*plan.streams, *plan.vectors], self.mode)
        self.whole_vjp = Kernel(
            module,
            _values([*self.whole.roots, *outputs]),
            _values(self.whole_wanted),
            [False] * len(self.whole_wanted),
            self.mode,
        )

    def _vjp(self, piece: Piece, wanted: list[fx.Node], cotangents: list[int]) -> Call:
        module, wanted = vjp(piece, wanted, self.mode)
        adds = [node in self.given for node in wanted]
        self.given.update(wanted)
        kernel = Kernel(module, _values([*piece.roots, *piece.outputs]), _values(wanted), adds, self.mode)
        reads = [self.slot[root] for root in piece.roots] + cotangents
        return Call(kernel, reads, [self.gradient[node] for node in wanted])


class Scan(torch.autograd.Function):
    """(program, streams, matrices, vectors, state) → (output, final state), as one operation of autograd."""

    @staticmethod
    def forward(ctx: Any, program: Program, needs_gradient: bool, steps: int, *arguments: Tensor) -> Any:
        plan = program.plan
        streams, matrices, vectors, state = split(arguments, len(plan.streams), len(plan.stages), len(plan.vectors))
        rows = len(state[0])
        states = [s.new_empty(steps + 1, *s.shape) for s in state]
        for buffer, value in zip(states, state, strict=True):
            buffer[0] = value
        kept = steps if needs_gradient else 1
        qs = [m.new_empty(kept, rows, m.shape[1]) for m in matrices]
        lefts = [m.new_empty(rows, m.shape[0]) for m in matrices]
        _run_forward(program, streams, matrices, vectors, states, qs, lefts)
        ctx.program = program
        ctx.counts = len(streams), len(matrices), len(vectors), len(state), len(states)
        if needs_gradient:
            ctx.save_for_backward(*arguments, *states, *qs)
        # The last state stands in the buffer that the output is a view of, so it is given as a copy.
        return states[0][1:], *(buffer[steps].clone() for buffer in states)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor, *d_final: Tensor) -> Any:
        parts = split(ctx.saved_tensors, *ctx.counts)
        if torch.is_grad_enabled():
            arguments = [tensor for part in parts[:4] for tensor in part]
            return None, None, None, *_differentiable_backward(ctx.program, arguments, (d_output, *d_final))
        needed = split(ctx.needs_input_grad[3:], *ctx.counts[:3])
        return None, None, None, *_two_phases(ctx.program, parts, d_output, d_final, needed)


def _run_forward(
    program: Program,
    streams: list[Tensor],
    matrices: list[Tensor],
    vectors: list[Tensor],
    states: list[Tensor],  # (T+1, B, ·), the first step's filled
    qs: list[Tensor],  # (T, B, ·), or (1, B, ·) where they are not kept
    lefts: list[Tensor],  # (B, ·)
) -> None:
    plan = program.plan
    values: list[Any] = [*vectors, *([None] * (program.size - len(vectors)))]
    stages = [
        (call, program.slot[stage.left] if call is None else slot, program.slot[stage.packed])
        for stage, call, slot in zip(plan.stages, program.lefts, program.left, strict=True)
    ]
    stream_steps = [stream.unbind(0) for stream in streams]
    state_steps = [state.unbind(0) for state in states]
    q_steps = [q.unbind(0) for q in qs]
    first_stream = len(vectors)
    first_state = first_stream + len(streams)
    for slot, buffer in zip(program.left, lefts, strict=True):
        values[slot] = buffer
    kernel, reads, _ = program.final
    for t in range(len(states[0]) - 1):
        for i, stream in enumerate(stream_steps):
            values[first_stream + i] = stream[t]
        for i, state in enumerate(state_steps):
            values[first_state + i] = state[t]
        for (call, left, packed), matrix, q in zip(stages, matrices, q_steps, strict=True):
            if call is not None:
                call.kernel([values[i] for i in call.reads], [values[left]])
            values[packed] = torch.mm(values[left], matrix, out=q[t if len(q) > 1 else 0])
        kernel([values[i] for i in reads], [state[t + 1] for state in state_steps])


def _two_phases(
    program: Program, parts: list[list[Tensor]], d_output: Tensor, d_final: tuple[Tensor, ...], needed: list[list[bool]]
) -> list[Tensor | None]:
    """Phase 1, the reverse loop, for the states' and stages' cotangents; phase 2, all rows at once, for the rest."""
    plan = program.plan
    streams, matrices, vectors, _, states, qs = parts
    steps, rows = d_output.shape[:2]
    # d_states[t] is the cotangent of the state before step t, without what the output adds to it.
    d_states = [
        torch.zeros_like(buffer) if node not in program.given else torch.empty_like(buffer)
        for node, buffer in zip(plan.trace.states, states, strict=True)
    ]
    for buffer, value in zip(d_states, d_final, strict=True):
        buffer[steps] = value
    d_qs = [
        torch.empty_like(q) if stage.packed in program.given else torch.zeros_like(q)
        for stage, q in zip(plan.stages, qs, strict=True)
    ]
    d_lefts = [
        m.new_empty(steps, rows, m.shape[0]) if stage.piece else None
        for stage, m in zip(plan.stages, matrices, strict=True)
    ]
    _reverse_loop(program, parts, d_output, d_states, d_qs, d_lefts)
    flat = dict(zip(plan.vectors, vectors, strict=True))
    flat |= {n: s.flatten(0, 1) for n, s in zip(plan.streams, streams, strict=True)}
    flat |= {n: s[:steps].flatten(0, 1) for n, s in zip(plan.trace.states, states, strict=True)}
    flat |= {stage.packed: q.flatten(0, 1) for stage, q in zip(plan.stages, qs, strict=True)}
    cotangents = [d.flatten(0, 1) for d in d_lefts if d is not None]
    cotangents += [d_states[0][1:].add_(d_output).flatten(0, 1), *(d[1:].flatten(0, 1) for d in d_states[1:])]
    gradients: dict[fx.Node, Tensor] = {n: torch.empty_like(flat[n]) for n in program.whole_wanted}
    if gradients:
        program.whole_vjp([*(flat[root] for root in program.whole.roots), *cotangents], list(gradients.values()))
    d_streams = [gradients[n].unflatten(0, (steps, rows)) if n in gradients else None for n in plan.streams]
    d_matrices: list[Tensor | None] = []
    for i, (stage, d_q) in enumerate(zip(plan.stages, d_qs, strict=True)):
        if not needed[1][i]:
            d_matrices.append(None)
            continue
        call = program.lefts[i]
        if stage.piece is None or call is None:
            left = flat[stage.left]
        else:
            left = matrices[i].new_empty(steps * rows, matrices[i].shape[0])
            call.kernel([flat[root] for root in stage.piece.roots], [left])
        d_matrices.append(left.t() @ d_q.flatten(0, 1))
    return [*d_streams, *d_matrices, *(gradients.get(n) for n in plan.vectors), *(d[0] for d in d_states)]


def _reverse_loop(
    program: Program,
    parts: list[list[Tensor]],
    d_output: Tensor,
    d_states: list[Tensor],
    d_qs: list[Tensor],
    d_lefts: list[Tensor | None],
) -> None:
    plan = program.plan
    streams, matrices, vectors, _, states, qs = parts
    values: list[Any] = [*vectors, *([None] * (program.size - len(vectors)))]
    moving = [
        *((program.slot[n], s.unbind(0)) for n, s in zip(plan.streams, streams, strict=True)),
        *((program.slot[n], s.unbind(0)) for n, s in zip(plan.trace.states, states, strict=True)),
        *((program.slot[s.packed], q.unbind(0)) for s, q in zip(plan.stages, qs, strict=True)),
        *((program.gradient[n], d.unbind(0)) for n, d in zip(plan.trace.states, d_states, strict=True)),
        *((program.gradient[s.packed], d.unbind(0)) for s, d in zip(plan.stages, d_qs, strict=True)),
        *((slot, d.unbind(0)) for slot, d in zip(program.d_left, d_lefts, strict=True) if d is not None),
    ]
    cotangents = [(slot, d.unbind(0)) for slot, d in zip(program.d_new_state, d_states, strict=True)]
    d_outputs = d_output.unbind(0)
    stages = []
    for stage, matrix, call, adds, slot in zip(
        reversed(plan.stages),
        reversed(matrices),
        program.left_vjps,
        program.product_adds,
        reversed(program.d_left),
        strict=True,
    ):
        target = slot if call is not None else program.gradient[stage.left]
        stages.append((program.gradient[stage.packed], matrix.t().contiguous(), call, adds, target))
    kernel, reads, writes = program.final_vjp
    for t in reversed(range(len(d_outputs))):
        for slot, sequence in moving:
            values[slot] = sequence[t]
        for slot, sequence in cotangents:
            values[slot] = sequence[t + 1]
        values[cotangents[0][0]] = cotangents[0][1][t + 1] + d_outputs[t]
        kernel([values[i] for i in reads], [values[i] for i in writes])
        for d_q, transposed, call, adds, target in stages:
            if adds:
                values[target].addmm_(values[d_q], transposed)
            else:
                torch.mm(values[d_q], transposed, out=values[target])
            if call is not None:
                call.kernel([values[i] for i in call.reads], [values[i] for i in call.writes])


def _differentiable_backward(program: Program, arguments: list[Tensor], cotangents: tuple[Tensor, ...]) -> Any:
    """The gradients as a differentiable graph, by running the plan's pieces again op by op."""
    plan = program.plan
    # The saved arguments are still tied to the caller's graph, unlike the states and products kept beside them.
    streams, matrices, vectors, state = split(arguments, len(plan.streams), len(plan.stages), len(plan.vectors))
    values = dict(zip(plan.vectors, vectors, strict=True))
    outputs = []
    for t in range(len(cotangents[0])):
        values |= {n: s[t] for n, s in zip(plan.streams, streams, strict=True)}
        values |= dict(zip(plan.trace.states, state, strict=True))
        for stage, matrix in zip(plan.stages, matrices, strict=True):
            values[stage.packed] = stage.left_of(values) @ matrix
        state = plan.final(values)
        outputs.append(state[0])
    wanted = [argument for argument in arguments if argument.requires_grad]
    found = torch.autograd.grad(
        (torch.stack(outputs), *state), wanted, cotangents, create_graph=True, allow_unused=True
    )
    gradients = iter(found)
    return [next(gradients) if argument.requires_grad else None for argument in arguments]


def _values(nodes: list[fx.Node]) -> list[Tensor]:
    return [node.meta["val"] for node in nodes]


def split(values: Any, *counts: int) -> list[list[Any]]:
    """Cut a flat sequence into parts of the given lengths, and the rest."""
    rest, parts = list(values), []
    for count in counts:
        parts.append(rest[:count])
        rest = rest[count:]
    return [*parts, rest]
