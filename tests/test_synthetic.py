"""Made data against closed forms, and the networks that solve them by construction."""

import gzip
import itertools
import sys
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from experiments.core.errors import ExperimentError
from experiments.data import (
    Adding,
    AffineTasks,
    CopyMemory,
    Recall,
    RegularLanguage,
    Sequences,
    SequentialDigits,
    StateMachine,
    Teacher,
)
from experiments.data.functions.image_files import read_labels
from experiments.data.synthetic import digits
from models import MultiHead, SequenceLabeller
from multint import Additive, Bilinear, Recurrent, RNNCell, scan
from multint.errors import OptionError


def form(x_features, z_features, out_features):
    return Bilinear(x_features, z_features, out_features, z_term=False, x_term=False, bias=None)


def ready(data):
    data.setup()
    return data


def batches(loader):
    return list(itertools.islice(loader, 3))


def test_a_teacher_of_pure_interaction_is_a_bilinear_form_of_unit_variance():
    data = ready(Teacher(form, 5, 3, 2, batch_size=4096, seed=1))
    batch = next(iter(data.test_dataloader()))
    A = data.teacher.terms().W
    expected = (torch.einsum("bx,ozx,bz->bo", batch.x, A, batch.z) - data.mean) / data.deviation
    assert_close(batch.y, expected)
    # The closed form of its moments: mean 0, and variance ‖A‖².
    assert_close(data.deviation, A.square().sum((1, 2)).sqrt(), rtol=0.05, atol=0)
    assert_close(data.mean / data.deviation, torch.zeros(2), rtol=0, atol=0.05)
    assert_close(batch.y.square().mean(0), torch.ones(2), rtol=0.1, atol=0)


def test_affine_tasks_are_affine_and_contradict_each_other():
    data = ready(AffineTasks(tasks=6, x_features=3, out_features=2, batch_size=8192, seed=1))
    x, z, y = next(iter(data.test_dataloader()))
    task = z.argmax(1)
    assert_close(z.square().mean(), torch.tensor(1.0))
    for k in range(6):
        inputs = torch.cat([x[task == k], torch.ones(int((task == k).sum()), 1)], 1)
        solution = torch.linalg.lstsq(inputs, y[task == k]).solution
        assert_close(solution, torch.cat([data.A[k].T, data.b[k : k + 1]]) / 2**0.5, rtol=1e-4, atol=1e-4)
    # Who does not see the task does hardly better than predicting 0.
    blind = torch.cat([x, torch.ones(len(x), 1)], 1)
    error = y - blind @ torch.linalg.lstsq(blind, y).solution
    assert error.square().mean() > 0.6 * y.square().mean()


def test_the_machines_are_what_they_are_called():
    for states in (2, 5):
        symbols, q = ready(StateMachine("addition", states, length=9, seed=1)).draw(7, "train", torch.Generator())
        assert_close(q, symbols.cumsum(0) % states)
    for machine in ("maps", "permutations"):
        data = ready(StateMachine(machine, 6, symbols=3, length=9, seed=1))
        symbols, q = data.draw(7, "train", torch.Generator())
        assert symbols.max() == 2
        before = torch.cat([torch.zeros(1, 7, dtype=torch.long), q[:-1]])
        assert_close(q, data.transitions[symbols, before])
        bijective = [len(row.unique()) == 6 for row in data.transitions]
        assert all(bijective) if machine == "permutations" else not all(bijective)


def test_a_random_machine_reaches_all_its_states():
    """Of the first draws of these seeds every fourth does not, and three never leave state 0."""
    for seed in range(60):
        data = ready(StateMachine("permutations", 5, symbols=2, length=64, seed=seed))
        _, q = data.draw(64, "train", torch.Generator().manual_seed(0))
        assert_close(q.unique(), torch.arange(5))


def test_maps_of_too_few_symbols_are_refused():
    with pytest.raises(ExperimentError, match=r"--data.symbols: got 1, expected more.*reaches all 30 states"):
        ready(StateMachine("maps", 30, symbols=1, seed=0))


def cycle_navigation(word):
    place = 0
    for symbol in word:
        place += {0: 0, 1: 1, 2: -1}[symbol]
    return place % 5


def even_pairs(word):
    text = "".join("ab"[symbol] for symbol in word)
    pairs = [text[i : i + 2] for i in range(len(text) - 1)]
    return int((pairs.count("ab") + pairs.count("ba")) % 2 == 0)


def arithmetic(word):
    return eval("".join("01234+-*"[symbol] for symbol in word)) % 5


def parity(word):
    return word.count(1) % 2


@pytest.mark.parametrize("answer", [cycle_navigation, even_pairs, arithmetic, parity], ids=lambda f: f.__name__)
def test_the_answers_of_regular_languages(answer):
    data = ready(RegularLanguage(answer.__name__, batch_size=8, epoch=120, eval_examples=96, seed=1))
    kinds = data.learnt()
    for loader, longest, shortest in ((data.train_dataloader(), 40, 3), (data.test_dataloader(), 256, 40)):
        lengths, answers = set(), set()
        for xs, [found] in loader:
            lengths.add(len(xs))
            assert_close(xs.square().sum(-1), torch.full(xs.shape[:2], float(kinds["inputs"])))
            words = xs.argmax(-1).T.tolist()
            assert_close(found, torch.tensor([answer(word) for word in words]))
            answers |= set(found.tolist())
        assert lengths <= set(range(shortest, longest + 1))
        assert answers == set(range(kinds["outputs"]))
        if longest == 40:
            assert len(lengths) > 0.9 * len(data.lengths["train"]), "all are as often"
    assert answer is not arithmetic or all(length % 2 for length in lengths)


def test_the_lengths_of_a_machines_training():
    data = ready(StateMachine("addition", 3, shortest=2, length=5, test_length=9, epoch=60, eval_examples=64, seed=1))
    train, valid, test = (getattr(data, f"{split}_dataloader")() for split in ("train", "val", "test"))
    assert {len(batch.symbols) for batch in train} == {2, 3, 4, 5}
    assert [len(batch.symbols) for batch in (*valid, *test)] == [5, 9]


@pytest.mark.parametrize("length", [2, 9])
def test_one_number_in_each_half_is_added(length):
    xs, answers = ready(Adding(length, seed=1)).draw(4096, "train", torch.Generator().manual_seed(0))
    numbers, marks = xs.unbind(-1)
    for half in (marks[: length // 2], marks[length // 2 :]):
        assert_close(half.sum(0), torch.ones(4096))
        assert (half.sum(1) > 0).all(), "a place is never marked"
    assert set(marks.unique().tolist()) <= {0.0, 1.0}
    assert_close(answers[0], torch.where(marks == 1, numbers, 0).sum(0))
    assert_close((answers - 1).square().mean(), torch.tensor(1 / 6), rtol=0.1, atol=0)


def test_a_word_comes_before_the_delay_and_is_asked_for_after_the_bell():
    xs, answers = ready(CopyMemory(symbols=3, length=4, delay=5, seed=1)).draw(50, "train", torch.Generator())
    assert_close(xs.square().mean(), torch.tensor(1.0))
    read, blank, bell = xs.argmax(-1), 3, 4
    assert_close(read[:4], answers)
    assert answers.unique().tolist() == [0, 1, 2]
    after = torch.tensor([*[blank] * 4, bell, *[blank] * 4])  # the word is asked for at the four blanks
    assert_close(read[4:], after.unsqueeze(1).expand(-1, 50))


def test_every_digit_is_held_out_once_whatever_the_seed():
    pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed (extra dev)")
    data, other = (ready(SequentialDigits(read, batch_size=64, seed=s)) for read, s in (("pixels", 1), ("rows", 2)))
    seen = []
    for split in ("val_dataloader", "test_dataloader"):
        pixels, rows = (list(getattr(d, split)()) for d in (data, other))
        assert [batch.xs.shape[1] for batch in pixels] == [64, 64, 64, 64, 44]
        for one, two in zip(pixels, rows, strict=True):
            assert (one.xs.shape[0], two.xs.shape[0]) == (64, 8)
            assert_close(one.xs.squeeze(-1).T, two.xs.transpose(0, 1).flatten(1))
            assert_close(one.answers, two.answers)
        seen += [tuple(image) for batch in pixels for image in batch.xs.squeeze(-1).T.tolist()]
    assert len(set(seen)) == 600
    assert 0 <= min(map(min, seen)) < max(map(max, seen)) == 1
    drawn, theirs = (next(iter(d.train_dataloader())) for d in (data, other))
    assert not set(seen) & {tuple(image) for image in drawn.xs.squeeze(-1).T.tolist()}
    assert drawn.answers.tolist() != theirs.answers.tolist()
    assert drawn.answers.unique().tolist() == list(range(10))


def idx(path, magic, array):
    header = b"".join(int(number).to_bytes(4, "big") for number in (magic, *array.shape))
    path.write_bytes(gzip.compress(header + array.to(torch.uint8).numpy().tobytes(), 1))


def mnist(folder, images=(13, 10), size=(28, 28)):
    """Files like MNIST's, with a class that stands in the first pixel."""
    for name, count in zip(("train", "t10k"), images, strict=True):
        classes = torch.arange(count) % 10
        of = torch.zeros(count, *size, dtype=torch.int)
        of[:, 0, 0], of[:, 0, 1] = classes, 255
        idx(folder / f"{name}-images-idx3-ubyte.gz", 0x0803, of)
        idx(folder / f"{name}-labels-idx1-ubyte.gz", 0x0801, classes)
    return str(folder)


def test_digits_are_read_from_mnists_files(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "_MNIST_HELD_OUT", 10)
    path = mnist(tmp_path)
    data, rows = (ready(SequentialDigits(read, path=path, batch_size=6, seed=1)) for read in ("pixels", "rows"))
    assert [data.learnt()["inputs"], rows.learnt()["inputs"]] == [1, 28]
    for split in ("val_dataloader", "test_dataloader"):
        first, second = getattr(data, split)()
        assert (first.xs.shape, len(second.answers[0])) == ((784, 6, 1), 4)
        assert_close(first.xs[0, :, 0] * 255, first.answers[0].float())
        assert_close(first.xs[1:3, :, 0], torch.tensor([1.0, 0.0]).unsqueeze(1).expand(-1, 6))
    assert data.draw(50, "train", torch.Generator()).answers.unique().tolist() == [0, 1, 2]  # 3 images are left
    [xs, _], *_ = rows.val_dataloader()
    assert_close(xs.transpose(0, 1).flatten(1), next(iter(data.val_dataloader())).xs.squeeze(-1).T)
    for sizes, message in (
        ({"images": (10, 10)}, "has 10 images to train on"),
        ({"images": (30, 30), "size": (8, 8)}, "got 30 images of 8 × 8"),
    ):
        with pytest.raises(ExperimentError, match=message):
            ready(SequentialDigits(path=mnist(tmp_path, **sizes), seed=1))
    (tmp_path / "train-images-idx3-ubyte.gz").rename(tmp_path / "train-labels-idx1-ubyte.gz")
    with pytest.raises(ExperimentError, match="no such file, expected an IDX file of images"):
        ready(SequentialDigits(path=str(tmp_path), seed=1))
    with pytest.raises(ExperimentError, match="got the magic number 0x0803, expected an IDX file of labels"):
        read_labels(tmp_path / "train-labels-idx1-ubyte.gz")


def test_permuted_digits_are_read_in_one_other_order():
    pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed (extra dev)")
    plain, one, other = (ready(SequentialDigits(permuted=p, seed=s)) for p, s in ((False, 1), (True, 1), (True, 2)))
    sets = [next(iter(data.test_dataloader())) for data in (plain, one, other)]
    assert_close(sets[1], sets[2])
    assert not torch.equal(sets[0].xs, sets[1].xs)
    assert_close(sets[0].xs.sort(0).values, sets[1].xs.sort(0).values)
    with pytest.raises(ExperimentError, match=r"permuted: got true with --data\.read=rows"):
        SequentialDigits("rows", permuted=True)


def test_digits_need_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ExperimentError, match=r"\[digits\]"):
        SequentialDigits(seed=1).setup()


MADE = [
    lambda seed: Teacher(form, 3, 4, 1, batch_size=6, epoch=3, eval_examples=15, seed=seed),
    lambda seed: AffineTasks(3, 2, 2, batch_size=6, epoch=3, eval_examples=15, seed=seed),
    lambda seed: StateMachine("maps", 9, length=4, test_length=8, batch_size=6, epoch=3, eval_examples=15, seed=seed),
    lambda seed: RegularLanguage("arithmetic", 3, 9, 15, batch_size=6, epoch=3, eval_examples=15, seed=seed),
    lambda seed: Adding(9, batch_size=6, epoch=3, eval_examples=15, seed=seed),
    lambda seed: CopyMemory(6, 8, delay=3, batch_size=6, epoch=3, eval_examples=15, seed=seed),
]
TIME_MAJOR = (Sequences, Recall)


@pytest.mark.parametrize("make", MADE)
def test_the_seed_decides_all_and_evaluation_is_always_the_same(make):
    data, again, other = (ready(make(seed)) for seed in (1, 1, 2))
    for split in ("val_dataloader", "test_dataloader"):
        first = batches(getattr(data, split)())
        assert sum(batch.share(0, 1)[0].shape[isinstance(batch, TIME_MAJOR)] for batch in first) == 15
        assert_close(first, batches(getattr(data, split)()), rtol=0, atol=0)
        assert_close(first, batches(getattr(again, split)()), rtol=0, atol=0)
        assert not torch.equal(first[0][-1], batches(getattr(other, split)())[0][-1])
    train = batches(data.train_dataloader())
    assert_close(train, batches(again.train_dataloader()), rtol=0, atol=0)
    seen = [tuple(batch[0].flatten().tolist()) for batch in [*train, *batches(data.val_dataloader())]]
    assert len(set(seen)) == len(seen), "a batch came twice"


@pytest.mark.parametrize("make", MADE)
def test_processes_share_a_batch(make):
    batch = batches(ready(make(1)).train_dataloader())[0]
    halves = [batch.share(rank, 2) for rank in (0, 1)]
    dim = 1 if isinstance(batch, TIME_MAJOR) else 0
    for whole, *parts in zip(batch, *halves, strict=True):
        assert_close(torch.stack(parts, dim + 1).flatten(dim, dim + 1), whole)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Teacher(form, x_features=0), "--data.x_features: got 0"),
        (lambda: AffineTasks(tasks=0), "--data.tasks: got 0"),
        (lambda: AffineTasks(batch_size=0), "--data.batch_size: got 0"),
        (lambda: StateMachine(states=3, symbols=2), "--data.symbols: got 2, expected null or 3"),
        (lambda: Adding(length=1), "--data.length: got 1, expected at least 2"),
        (lambda: CopyMemory(delay=0), "--data.delay: got 0"),
        (lambda: StateMachine(length=8, test_length=4), "--data.test_length: got 4, expected at least"),
        (lambda: StateMachine(shortest=9), "--data.shortest: got 9, expected at most --data.length, which is 8"),
        (lambda: StateMachine(shortest=0), "--data.shortest: got 0"),
        (lambda: RegularLanguage(shortest=9, length=8), "--data.length: got 8, expected at least 9"),
        (lambda: RegularLanguage(length=8, test_length=7), "--data.test_length: got 7, expected at least 8"),
        (lambda: RegularLanguage("arithmetic", 4, 4), "words of odd lengths, and 4 to 4 has none"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ExperimentError, match=message):
        make()


def bilinear_machine(transitions):
    """h' = A_x h with the machine's own matrices, h_0 the first unit vector, and the state read off."""
    symbols, states = transitions.shape

    def cell(input_size, hidden_size):
        return RNNCell(input_size, hidden_size, form, activation=torch.nn.functional.normalize, start=1.0)

    def recurrent(input_size):
        return Recurrent(input_size, states, cell, learnt_state=True)

    network = SequenceLabeller(symbols, states, recurrent).requires_grad_(False)
    [direction] = network.recurrent.directions
    direction.start["h"].copy_(torch.eye(states)[:1] - 1)
    # W[o, i, s]: symbol s takes state i to o. RNNCell calls f(x, h), so that the symbol is x and the state z.
    direction.cell.integrator.interaction.weight.copy_(torch.eye(states)[transitions].permute(2, 1, 0))
    network.decoder.weight.copy_(torch.eye(states))
    network.decoder.bias.zero_()
    return network


def test_a_bilinear_recurrence_with_identity_and_swap_computes_parity_at_any_length():
    network = bilinear_machine(torch.tensor([[0, 1], [1, 0]]))
    [direction] = network.recurrent.directions
    A_0, A_1 = direction.cell.integrator.terms().W.unbind(-1)
    assert_close(A_0, torch.eye(2))
    assert_close(A_1, torch.eye(2).flip(0))
    symbols = torch.randint(2, (3000, 4), generator=torch.Generator().manual_seed(0))
    assert_close(network(symbols).argmax(-1), symbols.cumsum(0) % 2)


@pytest.mark.parametrize("machine", ["addition", "maps", "permutations"])
def test_a_bilinear_recurrence_is_any_finite_state_machine(machine):
    data = ready(StateMachine(machine, 5, length=4, test_length=300, eval_examples=8, seed=3))
    [batch] = data.test_dataloader()
    assert_close(bilinear_machine(data.transitions)(batch.symbols).argmax(-1), batch.states)


def test_random_diagonal_recurrences_learn_parity_from_two_words():
    """Theorem of Ebrahimi and Memisevic 2025: but for one of 2^H draws, frozen weights and a linear read-out do.

    Where a unit's multipliers for the two symbols differ in sign, its own sign tells the parity of every word of one
    length, or of even lengths. Where none does, all words look alike.
    """
    torch.manual_seed(0)
    draws, H = 2000, 3
    units = partial(Bilinear, z_term=False, x_term=False, bias=None, blocks=draws * H)
    cell = RNNCell(2, draws * H, units, activation=torch.sign, start=1.0).double().requires_grad_(False)

    def states(words):
        xs = torch.nn.functional.one_hot(words, 2).double()
        _, last = scan(cell, xs, cell.initial_state(xs.shape[1]), engine="loop")
        return last.h.unflatten(1, (draws, H)).transpose(0, 1)  # (draws, B, H)

    parities = 1.0 - 2 * torch.tensor([[0], [1]]).double()  # of the words 00 and 01, as 1 and −1
    readout = torch.linalg.pinv(states(torch.tensor([[0, 0], [0, 1]]))) @ parities
    words = torch.randint(2, (100, 32))
    error = (states(words) @ readout).squeeze(-1) - (1 - 2 * (words.sum(0) % 2))
    of_0, of_1 = cell.integrator.interaction.weight.squeeze(1).sign().unflatten(0, (draws, H)).unbind(-1)
    learnt = error.abs().amax(1) < 1e-9
    assert_close(learnt, (of_0 != of_1).any(1))
    assert_close(learnt.double().mean(), torch.tensor(1 - 2.0**-H).double(), rtol=0, atol=0.03)


def test_a_cell_starts_where_it_is_told():
    assert_close(RNNCell(2, 3, Additive).initial_state(4).h, torch.zeros(4, 3))
    assert_close(RNNCell(2, 3, form, start=0.5).initial_state(4).h, torch.full((4, 3), 0.5))


def test_heads_see_their_own_task_only():
    network = MultiHead(4, 3, 2, hidden=5).double()
    x, z = torch.randn(6, 4, dtype=torch.double), torch.eye(3, dtype=torch.double)
    features = 2**0.5 * network.shared(x).relu()
    for k, code in enumerate(z):
        head = torch.nn.functional.linear(features, network.heads.terms().W[:, k], network.heads.terms().U[:, k])
        assert_close(network(x, code), head)


def test_a_shared_layer_without_features_is_refused():
    with pytest.raises(OptionError, match="MultiHead: hidden is -1, expected a whole number of at least 1"):
        MultiHead(4, 3, 2, hidden=-1)
