"""What a caller may write or pass: outputs, final state, what needs a gradient and every gradient are the loop's.

Nothing here goes by how an engine works: each line is a step or a call in a user's words. By name an engine may refuse
some of it, with an error that says why, and never gets it wrong; `auto` equals the loop on all of it.
"""

import contextlib
import dataclasses
import functools
import math
import re
import warnings
from collections import namedtuple

import pytest
import torch
from torch import nn

from multint import Cell, explain, scan
from multint.cells import HiddenState
from multint.errors import EngineError
from tests.both_engines import ENGINES, Free, close, fresh, weight
from tests.catalogue import HIDDEN_SIZE, INPUT_SIZE, normal

pytestmark = [pytest.mark.compiles, pytest.mark.usefixtures("poisoned", "eager", "worth_compiling")]

STEPS, ROWS = 5, 40  # more rows than a step is tried on before it is taken


def outcome(cell, xs, state, engine):
    """Outputs and final state, whether each has a gradient, and the gradients of all together and of each alone."""
    output, final = scan(cell, xs, state, engine)
    values, gradients = [output, *final], []
    streams = list(xs.values()) if isinstance(xs, dict) else [xs]
    leaves = [leaf for leaf in (*streams, *state, *cell.parameters(), *cell.buffers()) if leaf.requires_grad]
    results = [value for value in values if value.requires_grad]
    for some in [results, *([result] for result in results)] if leaves and results else []:
        given = [normal(*result.shape, seed=9).to(result) for result in some]
        gradients.append(torch.autograd.grad(some, leaves, given, retain_graph=True, allow_unused=True))
    return values, [value.requires_grad for value in values], gradients


def as_the_loop(cell, xs, state, engines=("auto", "auto"), refusal=None):
    """The engines give what the loop gives, one after the other; by name one may refuse, by a message that matches.

    The second call takes what the first one has kept.
    """
    expected = outcome(cell, xs, state, "loop")
    for engine in engines:
        try:
            actual = outcome(cell, xs, state, engine)
        except EngineError as error:
            if engine != "fused" or refusal is None or not re.search(refusal, str(error)):
                raise
        else:
            close(actual, expected, torch.float32)


def stream(rows=ROWS):
    return normal(STEPS, rows, INPUT_SIZE).float().requires_grad_()


def first_state(rows=ROWS):
    return HiddenState(normal(rows, HIDDEN_SIZE, seed=5).float().requires_grad_())


# ---- Names


class Named(Cell):
    """A cell whose parameters, buffers, parts, streams or fields of the state are called by the given names."""

    def __init__(self, parameters=("g",), buffers=("k",), parts=("part",), streams=("s",), fields=("h", "c")):
        super().__init__(INPUT_SIZE, HIDDEN_SIZE)
        self.A, self.B = weight(INPUT_SIZE, HIDDEN_SIZE), weight(HIDDEN_SIZE, HIDDEN_SIZE)
        self.names = parameters, buffers, parts
        for i, name in enumerate(parameters):
            self.register_parameter(name, nn.Parameter(1 + normal(HIDDEN_SIZE, seed=i) / 4))
        for i, name in enumerate(buffers):
            self.register_buffer(name, 1 + normal(HIDDEN_SIZE, seed=i) / 4)
        for name in parts:
            self.add_module(name, nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE))
        self.streams, self.State = streams, namedtuple("State", fields)

    def step(self, x, state):
        parameters, buffers, parts = ([getattr(self, name) for name in names] for names in self.names)
        y = sum(x[name] for name in self.streams) @ self.A + state[0] @ self.B
        for scale in (*parameters, *buffers):
            y = scale * y
        for part in parts:
            y = part(y.tanh())
        return type(state)(y.tanh(), *(0.5 * field + y.sin() for field in state[1:]))

    def initial_state(self, batch_size):
        return self.State(*(self.zeros(batch_size, HIDDEN_SIZE) for _ in self.State._fields))


@functools.cache
def buffers_names():
    """The name of every buffer in the schedule of a cell with usual names, and what names were made of before."""
    program = explain(Named().double(), {"s": normal(4, 3, INPUT_SIZE)}, engine="fused")._program
    names = [name.replace(".", "_") for name in program.whole().buffers]
    return [*names, "d_output'", "the memory of a pass", "x", "x0", "z0", "W", "U", "const0", "literal0", "t"]


@pytest.mark.parametrize("kind", ["parameters", "buffers", "parts", "streams", "fields"])
def test_no_name_of_an_engines_is_one_that_a_user_writes(kind):
    """All of a cell's parameters, say, are called as something in the engine is."""
    plain, names = Named(), dict.fromkeys(buffers_names())
    taken = [name for name in names if (kind != "fields" or name.isidentifier()) and not hasattr(plain, name)]
    cell = Named(**{kind: taken}).float()
    xs = {name: normal(STEPS, 3, INPUT_SIZE, seed=i).float() for i, name in enumerate(cell.streams)}
    state = [normal(3, HIDDEN_SIZE, seed=i).float().requires_grad_() for i in range(len(cell.State._fields))]
    as_the_loop(cell, {name: x.requires_grad_() for name, x in xs.items()}, cell.State(*state), engines=("auto",))
    assert explain(cell).engine == "fused", explain(cell)


def mixed(cell, x, h):
    return (x @ cell.W + h @ cell.U).tanh()


# The number of rows as a number: what is done for the rows of all steps at once would get another one.
NUMBER_OF_ROWS = {
    "arange": lambda cell, x, h: mixed(cell, x * (torch.arange(x.shape[0])[:, None] < 16), h),
    "arange-of-the-state": lambda cell, x, h: mixed(cell, x * (torch.arange(h.shape[0])[:, None] < 16), h),
    "arange-by-size": lambda cell, x, h: mixed(cell, x * (torch.arange(x.size(0)).unsqueeze(1) < 16), h),
    "arange-behind-the-product": lambda cell, x, h: mixed(cell, x, h) * (torch.arange(len(x))[:, None] < 16),
    "arange-as-an-index": lambda cell, x, h: mixed(cell, x[torch.arange(x.shape[0])], h),
    "floor-division": lambda cell, x, h: mixed(cell, x * (x.shape[0] // 16), h),
    "shift": lambda cell, x, h: mixed(cell, x * (x.shape[0] >> 3), h),
    "division": lambda cell, x, h: mixed(cell, x / x.shape[0], h),
    "power": lambda cell, x, h: mixed(cell, x * x.shape[0] ** 0.5, h),
    "root": lambda cell, x, h: mixed(cell, x * math.sqrt(x.shape[0]), h),
    "remainder": lambda cell, x, h: mixed(cell, x * (x.shape[0] % 7), h),
    "sym-max": lambda cell, x, h: mixed(cell, x * torch.sym_max(0, x.shape[0] - 9), h),
    "numel": lambda cell, x, h: mixed(cell, x * (x.numel() // 100), h),
    "len": lambda cell, x, h: mixed(cell, x * len(x), h),
    "linspace": lambda cell, x, h: mixed(cell, x * torch.linspace(0, 1, x.shape[0]).to(x)[:, None], h),
    "filled-with-it": lambda cell, x, h: mixed(cell, x * torch.full_like(x, x.shape[0]), h),
    "a-sum-of-ones": lambda cell, x, h: mixed(cell, x * torch.ones(x.shape[0], dtype=x.dtype).sum(), h),
    "a-sum-of-fewer-ones": lambda cell, x, h: mixed(cell, x * torch.ones(x.shape[0] // 16, dtype=x.dtype).sum(), h),
    "a-running-sum-of-ones": lambda cell, x, h: mixed(cell, x * torch.ones(x.shape[0], 1).cumsum(0).to(x), h),
    "padded-by-it": lambda cell, x, h: mixed(cell, nn.functional.pad(x, (x.shape[0] // 16, 0))[:, :INPUT_SIZE], h),
    "rolled-by-it": lambda cell, x, h: mixed(cell, x.roll(x.shape[0] // 16, 1), h),
    "fewer-columns": lambda cell, x, h: mixed(cell, x * x[:, : x.shape[0] // 16].sum(1, keepdim=True), h),
    "a-diagonal": lambda cell, x, h: mixed(cell, x.tril(x.shape[0] - 40), h),
    "a-slice-of-a-table": lambda cell, x, h: mixed(cell, x * cell.table[: x.shape[0]], h),
    "in-a-matrix": lambda cell, x, h: (x @ (cell.W * (x.shape[0] / 40)) + h @ cell.U).tanh(),
    "expanded-and-summed": lambda cell, x, h: mixed(cell, x[..., None].expand(-1, -1, x.shape[0]).sum(-1), h),
    "text": lambda cell, x, h: mixed(cell, x * {"40": 2.0}.get(str(x.shape[0]), 1.0), h),
    "text-of-the-shape": lambda cell, x, h: mixed(cell, x * (2.0 if "40" in f"{x.shape}" else 1.0), h),
    "text-of-a-format": lambda cell, x, h: mixed(cell, x * {"40": 2.0}.get(f"{h.shape[0]}", 1.0), h),
    "text-of-a-percent": lambda cell, x, h: mixed(cell, x * {"40": 2.0}.get("%s" % x.size(0), 1.0), h),  # noqa: UP031
    "branch": lambda cell, x, h: mixed(cell, x * (2.0 if x.shape[0] // 100 == 7 else 1.0), h),
    "in-a-part": lambda cell, x, h: mixed(cell, cell.part(x), h),
    "key": lambda cell, x, h: mixed(cell, x * {40: 2.0}.get(x.shape[0], 1.0), h),
}


class FirstRows(nn.Module):
    """A part of a cell that goes by the number of rows."""

    def forward(self, x):
        return x * (torch.arange(x.shape[0]) < x.size(0) // 2)[:, None]


REFUSALS = "the number of rows|rows may interact|cannot be traced|fails when it is traced"


@pytest.mark.parametrize("name", NUMBER_OF_ROWS)
def test_the_number_of_rows(name):
    cell = fresh(Free)(NUMBER_OF_ROWS[name])
    cell.register_buffer("table", normal(1000, INPUT_SIZE))
    cell.add_module("part", FirstRows())
    cell.float()
    for rows in (40, 700) if name == "branch" else (40, 17):
        as_the_loop(cell, stream(rows), first_state(rows), ENGINES, REFUSALS)


# ---- The first state, and how tensors lie in memory


class Two(Cell):
    """A cell with a second field in its state, which a line computes of x, y and both fields."""

    State = namedtuple("State", ["h", "k"])

    def __init__(self, line):
        super().__init__(INPUT_SIZE, HIDDEN_SIZE)
        self.W, self.U = weight(INPUT_SIZE, HIDDEN_SIZE), weight(HIDDEN_SIZE, HIDDEN_SIZE)
        self.a = nn.Parameter(normal(HIDDEN_SIZE))
        self.line = line

    def step(self, x, state):
        return type(state)(*self.line(self, x, state.h, state.k))

    def initial_state(self, batch_size):
        return self.State(self.zeros(batch_size, HIDDEN_SIZE), self.zeros(batch_size, HIDDEN_SIZE))


DTYPE_NAMES = ["bool", "uint8", "int32", "int64", "bfloat16", "float32", "float64"]
# Each is given where it is made, and to the two before it: 300 to uint8, a third to bfloat16 and float32, 2 to bool.
GIVEN = {made: [*DTYPE_NAMES[i:], *DTYPE_NAMES][:3] for i, made in enumerate(DTYPE_NAMES)}


@pytest.mark.parametrize("made", DTYPE_NAMES)
def test_a_first_state_of_another_dtype(made):
    """Every number stays what it is at the first step: 2 is no True, 300 no 44, and no digit is lost."""
    dtype = getattr(torch, made)

    def line(cell, x, h, k):
        y = mixed(cell, x, h) * (k > 1).to(x) + 0.1 * k.to(x)
        return y, (k.to(torch.float64) + 1 + x.detach()[:, :1]).to(dtype)

    kind = fresh(Two)
    for given in GIVEN[made]:
        cell = kind(line).float()
        k = torch.tensor([0, 1, 2, 3, 5, 100, 300, 1 + 2**-12, 1 / 3, 2**24 + 1], dtype=torch.float64)
        k = k.repeat(ROWS // 10)[:, None].to(getattr(torch, given))
        as_the_loop(cell, stream(), cell.State(first_state().h, k), engines=("auto",))
        assert ("first state's k is" in explain(cell).reason) == (given != made), explain(cell)


def test_a_first_state_that_autocast_would_round(worth_compiling):
    def line(cell, x, h, k):
        return (x @ cell.W + h @ cell.U).tanh(), (k @ cell.U).tanh()

    cell, state = fresh(Two)(line).float(), Two(None).float().initial_state(ROWS)
    third = state._replace(k=torch.full_like(state.k, 1 / 3))
    with torch.autocast("cpu", torch.bfloat16):
        for exact in (state, state._replace(k=torch.full_like(state.k, 0.5))):
            torch.testing.assert_close(*(scan(cell, stream(), exact, e)[1].k for e in ("fused", "loop")))
        with pytest.raises(EngineError, match=r"first state's k is torch\.float32"):
            scan(cell, stream(), third, "fused")


def negated(tensor):
    """The same numbers, whose sign is a mark."""
    numbers = torch.complex(tensor, -tensor).conj().imag
    assert numbers.is_neg()
    return numbers


def contiguously_negated(tensor):
    numbers = torch._neg_view(-tensor.contiguous())
    assert numbers.is_neg()
    return numbers


def real_of_conjugate(tensor):
    return torch.complex(tensor, -tensor).conj().real


def strided(tensor):
    return tensor.repeat_interleave(2, -1)[..., ::2]


def expanded(tensor):
    return tensor[:1].expand_as(tensor)


def transposed(tensor):
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def zeros_without_memory(tensor):
    return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype)


def sparse(tensor):
    return tensor.detach().to_sparse()


class Subclass(torch.Tensor):
    """A tensor of another class."""


def of_a_subclass(tensor):
    return tensor.as_subclass(Subclass)


def of_replaced(cell, x, h):
    return (x @ cell.V + h @ cell.U + cell.a * cell.table).tanh()


IN_MEMORY = [negated, contiguously_negated, real_of_conjugate, strided, expanded, transposed, zeros_without_memory, sparse, of_a_subclass]  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("place", ["stream", "state", "weight", "bias", "buffer", "gradient"])
@pytest.mark.parametrize("kind", IN_MEMORY, ids=lambda kind: kind.__name__)
def test_tensors_however_they_lie_in_memory(kind, place):
    """Those of a cell are computed of its parameters, as they are where a weight has a parametrization."""
    if kind is sparse and place not in ("stream", "weight"):
        pytest.skip("the loop cannot take it")
    # Of the streams, the state and a gradient the engine sees the numbers alone, never where they lie.
    cell = (Free if place in ("stream", "state", "gradient") else fresh(Free))(of_replaced).float()
    cell.V, cell.table = cell.W, normal(HIDDEN_SIZE).to(cell.W)
    xs, state = stream(rows=3), first_state(rows=3)
    if place == "stream":
        xs = kind(xs)
    elif place == "state":
        state = HiddenState(kind(state.h))
    elif place == "weight":
        del cell.V
        cell.V = kind(cell.W)
    elif place == "bias":
        del cell.a
        cell.a = kind(nn.Parameter(normal(HIDDEN_SIZE)).to(cell.W))
    elif place == "buffer":
        cell.table = kind(cell.table)
    if place != "gradient":
        as_the_loop(cell, xs, state)
        return
    gradients = []
    for which in ("loop", "auto"):
        output, final = scan(cell, xs, state, which)
        leaves = [xs, state.h, *(p for p in cell.parameters() if p is not cell.k)]
        given = [kind(normal(*r.shape).to(r)) for r in (output, final.h)]
        gradients.append(torch.autograd.grad([output, final.h], leaves, given, allow_unused=True))
    close(*gradients, torch.float32)


# ---- What has a gradient


def counter(cell, x, h, k):
    return mixed(cell, x, h), k + 1.0


def detached(cell, x, h, k):
    return mixed(cell, x, h), h.detach() * 0.5


def swapped(cell, x, h, k):
    return k.detach() + (x @ cell.W).tanh(), h


def of_the_stream(cell, x, h, k):
    return mixed(cell, x, h), x.sum(-1, keepdim=True) + 0.5 * k


def frozen_in_part(cell, x, h, k):
    return (x @ cell.W.detach() + h @ cell.U).tanh(), (k + cell.a).tanh()


def state_not_read(cell, x, h, k):
    return (x @ cell.W).tanh(), k * 0.5


def first_state_detached(cell, x, h, k):
    return (x @ cell.W + h.detach() @ cell.U).tanh(), k.detach() + h


def output_without(cell, x, h, k):
    return (x.detach() @ cell.W.detach() + h @ cell.U.detach()).tanh(), k * cell.a


def nothing_learnt(cell, x, h, k):
    return (x @ cell.W).detach().tanh(), k.detach() + 1


def by_comparison(cell, x, h, k):
    return mixed(cell, x, h) * (k > 0.5).to(x), (h > 0).to(x)


def like_zeros(cell, x, h, k):
    return mixed(cell, x, h), torch.zeros_like(h) + 1


def whole_numbers(cell, x, h, k):
    return mixed(cell, x, h), k + (h > 0)


def handed_on(cell, x, h, k):
    return mixed(cell, x, h), k


def twice_the_same(cell, x, h, k):
    y = mixed(cell, x, h) + k
    return y, y


def late(cell, x, h, k):
    """The first field has a gradient from the second step on, where the second one has."""
    return x.detach() + k if x.shape == k.shape else x.detach() @ cell.W.detach() + k, k * 0.9


def chain_of_two(cell, x, h, k):
    return (x.detach() @ cell.W.detach()).tanh() + k, h.detach() @ cell.U + cell.a


LEARNT = [counter, detached, swapped, of_the_stream, frozen_in_part, state_not_read, first_state_detached, output_without, nothing_learnt, by_comparison, like_zeros, whole_numbers, handed_on, twice_the_same, late, chain_of_two]  # fmt: skip  # noqa: E501


# Of the stream, both fields of the state, and the weights: all, none, and each alone. What one of them reaches does not
# depend on the others.
WANTING = [(True,) * 4, (False,) * 4, *(tuple(i == j for j in range(4)) for i in range(4))]


@pytest.mark.parametrize("line", LEARNT, ids=lambda line: line.__name__)
def test_what_has_a_gradient(line):
    """Whatever wants one: no zeros where the loop gives None, and no field that says it has one."""
    cell = fresh(Two)(line).float()
    k = normal(3, 1 if line is of_the_stream else HIDDEN_SIZE, seed=3)
    k = k.to(torch.int64 if line is whole_numbers else torch.float32)
    for x, h, f, w in WANTING:
        xs, first = stream(rows=3).detach().requires_grad_(x), first_state(rows=3).h.detach().requires_grad_(h)
        state = cell.State(first, k.clone().requires_grad_(f and k.is_floating_point()))
        cell.requires_grad_(w)
        as_the_loop(cell, xs, state, engines=("auto",))
        assert explain(cell).engine == "fused", explain(cell)


# ---- A call that fails by the caller's fault


def own():
    """A cell of a class that nobody has run, and what it runs on."""
    return fresh(Free)(mixed).float(), stream(3), first_state(3)


def inference_tensor(cell, xs, state):
    with torch.inference_mode():
        bad = xs * 1.0
    return scan(cell, bad, state, "auto")


def inference_tensor_of_frozen_weights(cell, xs, state):
    cell.W.requires_grad_(False)
    try:
        return inference_tensor(cell, xs, state)
    finally:
        cell.W.requires_grad_(True)


def features_of_another_number(cell, xs, state):
    return scan(cell, torch.cat([xs, xs], -1), state, "auto")


def under_anomaly_detection(cell, xs, state):
    with torch.autograd.set_detect_anomaly(True):
        output, _ = scan(cell, xs, state, "auto")
        return torch.autograd.grad(output.sum(), xs)


def backward_under_anomaly_detection(cell, xs, state):
    output, _ = scan(cell, xs, state, "auto")
    with torch.autograd.set_detect_anomaly(True):
        return torch.autograd.grad(output.sum(), xs)


def warnings_as_errors(cell, xs, state):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return torch.autograd.grad(scan(cell, xs, state, "auto")[0].sum(), xs)


def hook_that_fails(cell, xs, state):
    def fail(tensor):
        raise ZeroDivisionError

    with torch.autograd.graph.saved_tensors_hooks(fail, fail):
        return scan(cell, xs, state, "auto")


def hook_that_fails_backward(cell, xs, state):
    def fail(tensor):
        raise ZeroDivisionError

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, fail):
        output, _ = scan(cell, xs, state, "auto")
    return torch.autograd.grad(output.sum(), xs)


def state_overwritten(cell, xs, state):
    first = HiddenState(state.h * 1.0)
    output, _ = scan(cell, xs, first, "auto")
    with torch.no_grad():
        first.h.zero_()
    return torch.autograd.grad(output.sum(), xs)


def mode_that_fails(cell, xs, state):
    with torch.device("meta"):
        return scan(cell, xs, state, "auto")


BAD_CALLS = [inference_tensor, inference_tensor_of_frozen_weights, features_of_another_number, under_anomaly_detection, backward_under_anomaly_detection, warnings_as_errors, hook_that_fails, hook_that_fails_backward, state_overwritten, mode_that_fails]  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", BAD_CALLS, ids=lambda call: call.__name__)
def test_a_bad_call_does_not_count_for_the_next_one(call, when):
    """Neither for this cell nor for another one like it."""
    cell, xs, state = own()
    if when == "after":
        scan(cell, xs, state, "auto")
    with contextlib.suppress(Exception):
        call(cell, xs, state)
    for again in (cell, type(cell)(mixed).float()):
        as_the_loop(again, xs, state, engines=("auto",))
        assert explain(again).engine == "fused", explain(again)


def test_an_error_of_the_callers_is_raised_as_the_loop_raises_it():
    cell, xs, state = own()
    with torch.inference_mode():
        bad = xs * 1.0
    for engine in ("loop", "auto"):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
            scan(cell, bad, state, engine)
    with pytest.raises(EngineError, match="inference mode"):
        scan(cell, bad, state, "fused")


# ---- Cells and tensors that are told apart


@dataclasses.dataclass
class WithoutHash(Cell):
    """A cell that is a dataclass: it has a number of its own, and no hash."""

    scale: float = 0.5

    def __post_init__(self):
        super().__init__(INPUT_SIZE, HIDDEN_SIZE)
        self.W, self.U = weight(INPUT_SIZE, HIDDEN_SIZE), weight(HIDDEN_SIZE, HIDDEN_SIZE)

    def step(self, x, state):
        return HiddenState((x @ self.W + self.scale * (state.h @ self.U)).tanh())

    def initial_state(self, batch_size):
        return HiddenState(self.zeros(batch_size, HIDDEN_SIZE))


class WithoutHashWithin(Free):
    def __init__(self):
        super().__init__(lambda cell, x, h: cell.part.step(x, HiddenState(h)).h)
        self.part = WithoutHash()


@pytest.mark.parametrize("kind", [WithoutHash, WithoutHashWithin])
def test_a_cell_without_a_hash_is_looped(kind):
    cell, xs, state = kind(), stream(3).double(), HiddenState(first_state(3).h.double())
    expected = scan(cell, xs, state, "loop")
    close(scan(cell, xs, state, "auto"), expected, torch.float64)
    assert "no hash" in explain(cell).reason
    with pytest.raises(EngineError, match="no hash"):
        scan(cell, xs, state, "fused")


class EqualByWidth(Free):
    """Cells of one width are equal, whatever their weights."""

    def __eq__(self, other):
        return isinstance(other, EqualByWidth) and other.hidden_size == self.hidden_size

    def __hash__(self):
        return hash(self.hidden_size)


def test_cells_that_are_equal_have_their_own_weights():
    cells = [EqualByWidth(mixed).float() for _ in range(2)]
    with torch.no_grad():
        cells[1].W.mul_(-2)
    for cell in (*cells, *cells):
        as_the_loop(cell, stream(3), first_state(3), ENGINES)


class Keyed(Free):
    """A cell of tensors whose paths in it show alike."""

    def __init__(self, line=mixed):
        super().__init__(line)
        self.tables = {
            1: normal(HIDDEN_SIZE),
            "1": -normal(HIDDEN_SIZE),
            "a.b": self.W,
            "a": {"b": 2 * self.W.detach()},
        }


def test_tensors_whose_paths_show_alike():
    def line(cell, x, h):
        one, other = (cell.tables[key].to(x) for key in (1, "1"))
        return (x @ cell.tables["a"]["b"].to(x) * one + h @ cell.U * other.exp()).tanh()

    cell = fresh(Keyed)(line).float()
    as_the_loop(cell, stream(3), first_state(3), ENGINES)
    cell.tables[1].mul_(3)
    as_the_loop(cell, stream(3), first_state(3), ENGINES)


def test_what_a_step_changes_is_seen_where_paths_show_alike():
    def line(cell, x, h):
        cell.tables[1] = cell.tables[1] + 1
        return mixed(cell, x, h) * cell.tables[1].to(x)

    kind, xs, state = fresh(Keyed), stream(3), first_state(3)
    close(*(scan(kind(line).float(), xs, state, engine) for engine in ("auto", "loop")), torch.float32)
    with pytest.raises(EngineError, match="changes the cell"):
        scan(kind(line).float(), xs, state, "fused")


def test_streams_of_any_key():
    def line(cell, x, h):
        return (x[0] @ cell.W + (x["0"] * x[None]) @ cell.W + h @ cell.U).tanh()

    xs = {key: stream(3) * 0.5**i for i, key in enumerate((0, "0", None))}
    as_the_loop(fresh(Free)(line).float(), xs, first_state(3), ENGINES)
