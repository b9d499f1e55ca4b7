"""The fused engine: a loop over stages and pieces, and its reverse, which carries the states' cotangents alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from multint.engines.kernel import Kernel
from multint.engines.plan import Piece, Plan, has_rows, vjp
from multint.engines.trace import TRACING, unaware
from multint.errors import EngineError, in_a_line
from multint.products import differentiable_product, prepared_product, untracked_transposed_product


class Call(NamedTuple):
    """A kernel and where its inputs and buffers stand among the values of one step."""

    kernel: Kernel
    places: list[int]

    def __call__(self, values: list[Any]) -> None:
        self.kernel([values[place] for place in self.places])


class Program:
    """A plan made ready to run: every value of one step has a place in a list, every piece a kernel."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.mode = plan.trace.mode
        states, stages = plan.trace.states, plan.stages
        # First what changes at no step, then what does: the roots known beforehand, the buffers, the products.
        self.place = {node: i for i, node in enumerate([*plan.vectors, *plan.streams, *states])}
        places = count(len(self.place))
        self.left = [next(places) if stage.piece else self.place[stage.left] for stage in stages]
        new_state = [next(places) for _ in states]
        self.place |= {stage.packed: next(places) for stage in stages}
        self.size = next(places)
        self.final = self._forward(plan.final, new_state)
        self.lefts = [
            self._forward(stage.piece, [place]) if stage.piece else None
            for stage, place in zip(stages, self.left, strict=True)
        ]
        self._reverses: dict[tuple[fx.Node, ...], Reverse | str] = {}  # or why there is none

    def _forward(self, piece: Piece, buffers: list[int]) -> Call:
        outputs = stand_ins(piece.outputs)
        kernel = Kernel(piece.module, stand_ins(piece.roots), outputs, [False] * len(outputs), self.mode)
        return Call(kernel, [self.place[root] for root in piece.roots] + buffers)

    def reverse(self, wanted: Iterable[fx.Node]) -> Reverse:
        """The backward pass that gives gradients to these streams and vectors.

        Raises: EngineError where the step has no derivative.
        """
        key = tuple(wanted)
        kept = self._reverses.get(key)
        if isinstance(kept, str):
            raise EngineError(kept)
        if kept is None:
            try:
                with TRACING:
                    kept = unaware(Reverse, self, key)
            except Exception as error:
                self._reverses[key] = f"fused: the step cannot be differentiated: {in_a_line(error)}"
                raise EngineError(self._reverses[key]) from error
            self._reverses[key] = kept
        return kept


class Reverse:
    """The reverse of one step, last piece first.

    The first piece to give a root its gradient writes it and the later ones add to it. Vectors have one gradient for
    all steps, so every piece adds to theirs.
    """

    def __init__(self, program: Program, wanted: tuple[fx.Node, ...]) -> None:
        self.program = program
        plan = program.plan
        states, qs = plan.trace.states, [stage.packed for stage in plan.stages]
        self.streams = [n for n in plan.streams if n in wanted]
        self.vectors = [n for n in plan.vectors if n in wanted]
        rows = states[0].meta["val"].shape[0]
        self.apart = {
            n for n in self.vectors if n.meta["val"].ndim == 1 and all(_is_broadcast(user, rows) for user in n.users)
        }
        self.wanted = [*self.vectors, *states, *self.streams, *qs]
        # First what changes at no step, as in the program; then the other gradients and the cotangents.
        self.place = {node: i for i, node in enumerate([*plan.vectors, *plan.streams, *states, *qs])}
        places = count(len(self.place))
        self.gradient = {node: next(places) for node in [*self.streams, *qs]}
        self.d_output = next(places)
        self.gradient |= {node: next(places) for node in [*states, *self.vectors]}
        self.d_new_state = [next(places) for _ in states]
        d_left = [next(places) for _ in qs]
        self.size = next(places)
        self.given: set[fx.Node] = set()
        self.final = self._vjp(plan.output, [*self.d_new_state, self.d_output])
        self.stages: list[tuple[int, bool, Call | None]] = []  # where a stage's product goes, if it adds, what follows
        for stage, place in reversed(list(zip(plan.stages, d_left, strict=True))):
            if stage.piece is not None:
                self.stages.append((place, False, self._vjp(stage.piece, [place])))
            else:
                self.stages.append((self.gradient[stage.left], stage.left in self.given, None))
                self.given.add(stage.left)

    def accumulator(self, node: fx.Node, vector: Tensor, rows: int) -> Tensor:
        """A buffer for the sum of a vector's gradients over the steps, which half precision would round at each."""
        shape = (rows, *vector.shape) if node in self.apart else vector.shape
        return vector.new_empty(shape, dtype=torch.promote_types(vector.dtype, torch.float32))

    def _vjp(self, piece: Piece, cotangents: list[int]) -> Call:
        mode = self.program.mode
        module, wanted = vjp(piece, self.wanted, self.apart, mode)
        adds = [node in self.given or node in self.vectors for node in wanted]
        self.given.update(wanted)
        with mode:
            rows = piece.outputs[0].meta["val"].shape[0]
            results = [
                self.accumulator(n, v, rows) if n in self.vectors else v
                for n, v in zip(wanted, stand_ins(wanted), strict=True)
            ]
        kernel = Kernel(module, stand_ins([*piece.roots, *piece.outputs]), results, adds, mode)
        return Call(kernel, [self.place[n] for n in piece.roots] + cotangents + [self.gradient[n] for n in wanted])


def run(
    program: Program, known: dict[fx.Node, Tensor], inputs: list[Tensor], state: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Run a program: the products of the inputs (T, B, ...) first, then the loop.

    Args:
        known: the values of the plan's constants.
    """
    plan = program.plan
    steps, rows = inputs[0].shape[:2]
    known = known | dict(zip(plan.trace.inputs, (x.flatten(0, 1) for x in inputs), strict=True))
    for hoisted in plan.hoisted:
        known[hoisted.packed] = differentiable_product(hoisted.left_of(known), hoisted.matrix(known))
    arguments = [
        *(known[node].unflatten(0, (steps, rows)).contiguous() for node in plan.streams),
        *(stage.matrix(known) for stage in plan.stages),
        *(known[node].contiguous() for node in plan.vectors),
        *state,
    ]
    reverse = None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in arguments):
        nodes = [*plan.streams, *plan.stages, *plan.vectors]
        wanted = [n for n, tensor in zip(nodes, arguments, strict=False) if tensor.requires_grad]
        reverse = program.reverse([node for node in wanted if isinstance(node, fx.Node)])
    output, *final = Scan.apply(program, reverse, steps, *arguments)  # type: ignore[no-untyped-call]
    return output, final


class Scan(torch.autograd.Function):
    """(program, streams, matrices, vectors, state) → (output, final state), as one operation of autograd."""

    @staticmethod
    def forward(ctx: Any, program: Program, reverse: Reverse | None, steps: int, *arguments: Tensor) -> Any:
        plan = program.plan
        streams, matrices, vectors, state = split(arguments, len(plan.streams), len(plan.stages), len(plan.vectors))
        rows = len(state[0])
        states = [s.new_empty(steps + 1, *s.shape) for s in state]
        for buffer, value in zip(states, state, strict=True):
            buffer[0] = value
        # The reverse needs what the stages multiplied, and their products.
        kept = steps if reverse else 1
        lefts = [m.new_empty(kept, rows, len(m)) for m, call in zip(matrices, program.lefts, strict=True) if call]
        qs = _run_forward(program, streams, matrices, vectors, states, lefts, reverse is not None)
        ctx.program, ctx.reverse = program, reverse
        ctx.counts = len(streams), len(matrices), len(vectors), len(state), len(states), len(lefts)
        if reverse:
            ctx.save_for_backward(*arguments, *states, *lefts, *qs)
        # The last state stands in the buffer that the output is a view of, so it is given as a copy.
        final = [buffer[steps].clone() for buffer in states]
        ctx.mark_non_differentiable(*(field for field in final if not field.is_floating_point()))
        return states[0][1:], *final

    @staticmethod
    def backward(ctx: Any, d_output: Tensor, *d_final: Tensor) -> Any:
        parts = split(ctx.saved_tensors, *ctx.counts)
        if torch.is_grad_enabled():
            arguments = [tensor for part in parts[:4] for tensor in part]
            return None, None, None, *_differentiable_backward(ctx.program, arguments, (d_output, *d_final))
        first = 3 + ctx.counts[0]
        needs_matrices = ctx.needs_input_grad[first : first + ctx.counts[1]]
        with torch.autocast(d_output.device.type, enabled=False):
            return None, None, None, *_run_backward(ctx.reverse, parts, d_output, d_final, needs_matrices)


def _run_forward(
    program: Program,
    streams: list[Tensor],
    matrices: list[Tensor],
    vectors: list[Tensor],
    states: list[Tensor],  # (T+1, B, ·), the first step's filled
    lefts: list[Tensor],  # (T, B, ·), or (1, B, ·) where they are not kept
    keep: bool,
) -> list[Tensor]:
    """Fill the states and lefts; the products (B, ·) of all stages and steps, stage by stage, where they are kept."""
    plan, final = program.plan, program.final
    steps, rows = len(states[0]) - 1, states[0].shape[1]
    values: list[Any] = [*vectors, *([None] * (program.size - len(vectors)))]
    qs: list[list[Tensor]] = [[] for _ in plan.stages]
    stages = [
        (call, left, prepared_product(matrix, rows, steps), program.place[stage.packed], kept)
        for stage, call, left, matrix, kept in zip(plan.stages, program.lefts, program.left, matrices, qs, strict=True)
    ]
    changing: list[Any] = [
        *streams,
        *(state[:-1] for state in states),
        *(left.expand(steps, -1, -1) for left in lefts),
        *(state[1:] for state in states),
    ]
    here = slice(len(vectors), program.size - len(stages))
    for values[here] in _by_step(changing, range(steps)):
        for call, left, times, packed, kept in stages:
            if call is not None:
                call(values)
            values[packed] = q = times(values[left])
            if keep:
                kept.append(q)
        final(values)
    return [q for kept in qs for q in kept]


def _run_backward(
    reverse: Reverse,
    parts: list[list[Tensor]],
    d_output: Tensor,
    d_final: tuple[Tensor, ...],
    needs_matrices: Iterable[bool],
) -> list[Tensor | None]:
    """The reverse loop, which leaves all cotangents but the recurrent matrices'; then theirs, one product for each."""
    plan = reverse.program.plan
    streams, matrices, vectors, _, states, lefts, qs = parts
    steps, rows = d_output.shape[:2]
    gradient, known = reverse.gradient, dict(zip([*plan.streams, *plan.vectors], [*streams, *vectors], strict=True))
    per_stage = [qs[i * steps : (i + 1) * steps] for i in range(len(plan.stages))]
    d_streams = {n: _buffer(known[n], n in reverse.given) for n in reverse.streams}
    d_qs = [
        _buffer(q[0].expand(steps, -1, -1), stage.packed in reverse.given)
        for stage, q in zip(plan.stages, per_stage, strict=True)
    ]
    d_vectors = {n: reverse.accumulator(n, known[n], rows).zero_() for n in reverse.vectors}
    values: list[Any] = [*vectors, *([None] * (reverse.size - len(vectors)))]
    for node, buffer in d_vectors.items():
        values[gradient[node]] = buffer
    # A state's gradient at one step is the new state's cotangent at the step before: two buffers take turns.
    carried = []
    for node, d, new in zip(plan.trace.states, d_final, reverse.d_new_state, strict=True):
        d = d.to(node.meta["val"].dtype)  # zeros of another dtype, where the field has no derivative
        values[gradient[node]] = d.contiguous()
        carried.append((new, gradient[node], [_buffer(d, node in reverse.given) for _ in range(2)]))
    stages = [
        (gradient[stage.packed], prepared_product(matrix.t(), rows, steps), target, adds, call)
        for stage, matrix, (target, adds, call) in zip(
            reversed(plan.stages), reversed(matrices), reverse.stages, strict=True
        )
    ]
    changing = [
        *streams,
        *(state[:-1] for state in states),
        *per_stage,
        *d_streams.values(),
        *d_qs,
        d_output.contiguous(),
    ]
    here = slice(len(vectors), reverse.d_output + 1)
    for t, values[here] in zip(range(steps), _by_step(changing, reversed(range(steps))), strict=True):
        for new, old, buffers in carried:
            values[new], values[old] = values[old], buffers[t % 2]
        reverse.final(values)
        for place, times, target, adds, call in stages:
            d_left = times(values[place])
            values[target] = values[target].add_(d_left) if adds else d_left
            if call is not None:
                call(values)
    d_vectors |= {n: d_vectors[n].sum(0) for n in reverse.apart}
    state_of = dict(zip(plan.trace.states, states, strict=True))
    rest = iter(lefts)
    d_matrices = []
    for stage, d_q, need in zip(plan.stages, d_qs, needs_matrices, strict=True):
        left = state_of[stage.left][:-1] if stage.piece is None else next(rest)
        d_matrices.append(untracked_transposed_product(left.flatten(0, 1), d_q.flatten(0, 1)) if need else None)
    return [
        *(d_streams.get(n) for n in plan.streams),
        *d_matrices,
        *(d_vectors[n].to(v.dtype) if n in d_vectors else None for n, v in zip(plan.vectors, vectors, strict=True)),
        *(values[gradient[n]] if n.meta["val"].is_floating_point() else None for n in plan.trace.states),
    ]


def _by_step(sequences: Iterable[Any], order: Iterable[int]) -> Iterator[list[Tensor]]:
    """What the sequences hold at each step.

    The views are made as they are needed: thousands of them alive at once set off Python's garbage collector, which
    costs more than they do.
    """
    for t in order:
        yield [sequence[t] for sequence in sequences]


def _is_broadcast(user: fx.Node, rows: Any) -> bool:
    """Whether a vector's user meets its entries with the columns of a matrix of rows."""
    pointwise = isinstance(user.target, torch._ops.OpOverload) and torch.Tag.pointwise in user.target.tags
    return pointwise and user.meta["val"].ndim == 2 and has_rows(user, rows)


def _buffer(like: Tensor, written: bool) -> Tensor:
    """A buffer for what is written at every step, or zeros where nothing is."""
    return (
        torch.empty_like(like, memory_format=torch.contiguous_format)
        if written
        else torch.zeros_like(like, memory_format=torch.contiguous_format)
    )


def stand_ins(nodes: list[fx.Node]) -> list[Tensor]:
    """Tensors without numbers in place of the nodes' values."""
    return [node.meta["val"] for node in nodes]


def _differentiable_backward(program: Program, arguments: list[Tensor], cotangents: tuple[Tensor, ...]) -> Any:
    """The gradients as a differentiable graph, by running the plan's pieces again op by op."""
    plan = program.plan
    # The saved arguments are still tied to the caller's graph, unlike the states and products kept beside them.
    # Views of them: where one depends on another, as a carried state on the weights, each has its own gradient here.
    arguments = [argument.view_as(argument) for argument in arguments]
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
    # A field without derivative, such as a counter, has no part in this.
    pairs = zip((torch.stack(outputs), *state), cotangents, strict=True)
    results, given = zip(*((result, cotangent) for result, cotangent in pairs if result.requires_grad), strict=True)
    gradients = iter(torch.autograd.grad(results, wanted, given, create_graph=True, allow_unused=True))
    return [next(gradients) if argument.requires_grad else None for argument in arguments]


def split(values: Any, *counts: int) -> list[list[Any]]:
    """Cut a flat sequence into parts of the given lengths, and the rest."""
    rest, parts = list(values), []
    for length in counts:
        parts.append(rest[:length])
        rest = rest[length:]
    return [*parts, rest]
