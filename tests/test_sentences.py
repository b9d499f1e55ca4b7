"""Sentence vectors: books become triples, a network writes the sentences beside, and its vectors are used."""

import json
import re
import shutil
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import seed_everything
from torch.testing import assert_close

import models.softmax_loss
from experiments import sentence_encoder
from experiments.__main__ import main
from experiments.core.errors import ExperimentError
from experiments.core.export import load_network
from experiments.core.loading import load_task
from experiments.core.module import DataModule, TaskModule
from experiments.core.trust import trusting
from experiments.data import Books
from experiments.data.books import read_book, works
from experiments.data.sentences import Batch, Sentences, read_sentences, sentences_of, words_of
from experiments.data.sentences.word_vectors import read_word_vectors
from experiments.data.text import WordVocabulary
from experiments.sentence_encoder import SentenceEncoder
from experiments.tasks import SentenceVectors
from models import SkipThought, Uniform
from multint import Additive, GRUCell, LSTMCell, MultiplicativeIntegration, Recurrent, RNNCell
from multint.errors import OptionError, ShapeError
from tests.resuming import Record, assert_together, last, stopped, trainer

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


def stack(integrator=Additive, cell=GRUCell, **settings):
    of_cell = {"reset_after": True, "recurrent_bias": None} if cell is GRUCell else {}
    return partial(Recurrent, cell=partial(cell, integrator=integrator, **of_cell), engine="loop", **settings)


ENCODER = stack(MultiplicativeIntegration, hidden_size=4)
NETWORK = partial(SkipThought, encoder=ENCODER, decoder=stack(), embedding_size=3)


def network_of(**settings):
    torch.manual_seed(0)
    network = NETWORK(9, **settings).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.uniform_(-1, 1)
    return network


def sentences(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(9, (max(lengths), len(lengths)), generator=generator)
    return Sentences(words, torch.tensor(lengths))


# The network


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def integrated(p, name, x, z):
    """W x + U z + b or, where there is α, α ⊙ W x ⊙ U z + β₁ ⊙ U z + β₂ ⊙ W x + b."""
    Wx, Uz = p[f"{name}.x_projection.weight"] @ x, p[f"{name}.z_projection.weight"] @ z
    if f"{name}.alpha" not in p:
        return Wx + Uz + p[f"{name}.bias"]
    return p[f"{name}.alpha"] * Wx * Uz + p[f"{name}.beta1"] * Uz + p[f"{name}.beta2"] * Wx + p[f"{name}.bias"]


def gru(p, name, xs, h):
    """The states of a GRU after each step: the reset comes after the product, z keeps the old state."""
    hs = []
    for x in xs:
        r, z = np.split(sigmoid(integrated(p, f"{name}.gates", x, h)), 2)
        without = integrated(p, f"{name}.candidate", x, np.zeros_like(h))
        n = np.tanh(without + r * (integrated(p, f"{name}.candidate", x, h) - without))
        h = (1 - z) * n + z * h
        hs.append(h)
    return hs


def vector_by_hand(p, encoders, words):
    """`encoders`: for each, how many directions."""
    e, v = p["embedding.weight"][words], []
    for i, directions in enumerate(encoders):
        for direction in range(directions):
            xs = e if direction == 0 else e[::-1]
            v.append(gru(p, f"encoders.{i}.directions.{direction}.cell", xs, np.zeros(4))[-1])
    return np.concatenate(v)


def losses_by_hand(p, conditioning, v, which, words):
    """−log of the softmax, of each word of the sentence beside."""
    e = np.concatenate([np.zeros((1, 3)), p["embedding.weight"][words[:-1]]])
    h = v if conditioning == "state" else np.zeros_like(v)
    if conditioning == "step":
        e = [np.concatenate([one, v]) for one in e]
    elif conditioning == "meet":
        e = [integrated(p, f"meets.{which}", one, v) for one in e]
    logits = np.stack(gru(p, f"decoders.{which}.directions.0.cell", e, h)) @ p["softmax.weight"].T + p["softmax.bias"]
    return [np.log(np.exp(row).sum()) - row[word] for row, word in zip(logits, words, strict=True)]


CASES = {
    "state": ({}, [1]),
    "step": ({"conditioning": "step"}, [1]),
    "meet": ({"conditioning": "step", "meet": MultiplicativeIntegration}, [1]),
    "bidirectional": ({"encoder": stack(hidden_size=4, bidirectional=True)}, [2]),
    "combine": ({"combine": stack(hidden_size=4, bidirectional=True)}, [1, 2]),
}


@pytest.mark.parametrize("case", CASES)
def test_the_network_is_that_of_the_equations(case):
    settings, encoders = CASES[case]
    network = network_of(**settings)
    p = {name: value.detach().numpy() for name, value in network.named_parameters()}
    triple = [sentences(5, 1, 3, seed=seed) for seed in range(3)]
    expected, losses = [], []
    for b in range(3):
        here, *beside = ([*words[: lengths[b], b].numpy()] for words, lengths in triple)
        expected.append(vector_by_hand(p, encoders, here))
        for which, words in enumerate(beside):
            conditioning = case if case in ("step", "meet") else "state"
            losses += losses_by_hand(p, conditioning, expected[-1], which, words)
    assert_close(network(*triple[0]).detach().numpy(), np.stack(expected))
    assert_close(network.loss(*triple).item(), np.mean(losses))


def test_a_vector_is_of_its_sentence_alone():
    network = network_of(combine=stack(hidden_size=4, bidirectional=True))
    words, lengths = sentences(5, 1, 3)
    v = network(words, lengths)
    padded = torch.where(torch.arange(5).unsqueeze(1) < lengths, words, 8)
    assert_close(network(torch.cat([padded, padded]), lengths), v)
    for b, length in enumerate(lengths):
        assert_close(network(words[:length, b : b + 1], lengths[b : b + 1]), v[b : b + 1])
    beside = sentences(2, 4, 1)
    longer = [Sentences(torch.cat([one.words, one.words]), one.lengths) for one in (beside, beside)]
    here = Sentences(words, lengths)
    assert_close(network.loss(here, *longer), network.loss(here, beside, beside))


@pytest.mark.parametrize(("cell", "layers"), [(LSTMCell, 1), (RNNCell, 2)])
def test_decoders_of_any_cell_start_from_the_vector(cell, layers):
    """In every layer, as what its cell gave out; the rest of a state starts as it always does."""
    network = network_of(decoder=stack(cell=cell, num_layers=layers))
    here, one = sentences(3, 2), Sentences(torch.tensor([[4, 5]]), torch.tensor([1, 1]))
    v, losses = network(*here), []
    for decoder in network.decoders:
        x = torch.zeros(2, 3, dtype=torch.double)
        for direction in decoder.directions:
            x = direction.cell.step(x, direction.cell.initial_state(2)._replace(h=v)).h
        losses.append(torch.nn.functional.cross_entropy(network.softmax(x), one.words[0]))
    assert_close(network.loss(here, one, one), torch.stack(losses).mean())


def test_the_loss_needs_no_logits_of_all_words(monkeypatch):
    network = network_of()
    triple = [sentences(5, 1, 3, seed=seed) for seed in range(3)]
    whole = torch.autograd.grad(network.loss(*triple), list(network.parameters()))
    monkeypatch.setattr(models.softmax_loss, "LOGITS_BYTES", 4 * 9 * 2)  # two rows at a time
    assert_close(torch.autograd.grad(network.loss(*triple), list(network.parameters())), whole)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"conditioning": "both"}, OptionError, "conditioning is 'both', expected 'state' or 'step'"),
        ({"meet": Additive}, OptionError, "expected conditioning 'step'"),
        ({"embedding_size": 0}, OptionError, "embedding_size is 0"),
        ({"decoder": stack(bidirectional=True)}, OptionError, "decoder.bidirectional is true"),
        ({"decoder": stack(batch_first=True)}, OptionError, "recurrent.batch_first is true"),
        (
            {"decoder": lambda X, D: stack()(X, D + 1)},
            ShapeError,
            "the decoder's outputs have 5 features, expected 4",
        ),
    ],
)
def test_networks_that_cannot_be_are_refused(settings, error, message):
    with pytest.raises(error, match=message):
        NETWORK(9, **settings)


def test_recurrent_matrices_start_orthogonal():
    network = NETWORK(9, initialise=Uniform(0.1, orthogonal=True))
    cell = network.encoders[0].directions[0].cell
    for U in (*cell.gates.z_projection.weight.split(4), cell.candidate.z_projection.weight):
        assert_close(U @ U.T, torch.eye(4))
    for matrix in (network.embedding.weight, network.softmax.weight, cell.gates.x_projection.weight):
        assert 0.05 < matrix.abs().max() <= 0.1
    assert_close(cell.gates.alpha, torch.ones(8))


# Sentences and words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("He ran. She sat.\nIt rained!", ["He ran.", "She sat.", "It rained!"]),
        ("Mr. Hill met Dr. J. Lee. They spoke.", ["Mr. Hill met Dr. J. Lee.", "They spoke."]),
        ("It was I. You too, e.g. Ann.", ["It was I.", "You too, e.g. Ann."]),
        ('"Who is it?" asked Ann. "Oh!" "I..." It was', ['"Who is it?" asked Ann.', '"Oh!"', '"I..."', "It was"]),
        ("It rose by 3.5. (So it did.) 'Yes.' 'No?'", ["It rose by 3.5.", "(So it did.)", "'Yes.'", "'No?'"]),
        ("He came.--She saw.  And went...then slept.", ["He came.", "--She saw.", "And went...then slept."]),
        ("CHAPTER I\n\n* * *\n\nIt was\nold.\n \nEnd", ["CHAPTER I", "It was old.", "End"]),
        ("", []),
    ],
)
def test_sentences_end_where_they_do(text, expected):
    assert [*sentences_of(text)] == expected


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Don't go, it's Ann's!", "do n't go , it 's ann 's !"),
        ("I can't; they'd've said “we’ll”...", "i ca n't ; they 'd 've said \" we 'll \" ..."),
        ("ca n't , it 's ``so'' - 'tis o'clock", "ca n't , it 's \" so \" - ' tis o'clock"),
        ("A well-known 1,000.50--it was 2nd—no…", "a well-known 1,000.50 -- it was 2nd -- no ..."),
        ("_Very_ É-t-é 'sailors' (50%)", "very é-t-é ' sailors ' ( 50 % )"),
        (" \x00 \ufeff", ""),
    ],
)
def test_words_are_split_alike(sentence, expected):
    assert " ".join(words_of(sentence)) == expected


@settings(max_examples=40)
@given(st.text(st.sampled_from("ns'tdvelm aAI.,-–’`\"“_3…é"), max_size=20) | st.text(max_size=20))
def test_words_that_were_split_stay_as_they_are(text):
    words = words_of(text)
    assert words_of(" ".join(words)) == words
    assert " ".join(words).split() == words
    assert "".join(words).replace("\u0130", "i") == "".join(words), "small letters"


def test_lines_are_sentences_with_empty_ones():
    assert [*read_sentences("a b.\n\nc. D\ne", "lines")] == ["a b.", "", "c. D", "e"]


NAMES = ("ann", "bob", "cid")
OLD = "The Project Gutenberg Etext of X\n\nProject Gutenberg asks.\n\n*END*THE SMALL PRINT*\n"
TODAY = "*** {} OF THE PROJECT GUTENBERG EBOOK X ***\n"


def test_licences_are_taken_out_and_part_works():
    end = "End of the Project Gutenberg Etext of X\n"
    assert [work.strip() for work in works(f"{OLD}One.\n{end}{OLD}Two.\n{end}")] == ["One.", "Two."]
    start, end = f"About this eBook.\n{TODAY.format('START')}", f"{TODAY.format('END')}The licence.\n"
    assert [work.strip() for work in works(f"{start}One.\n\n{end}{start}Two.\n{end}")] == ["One.", "Two."]
    assert works("No licence.\n") == ["No licence.\n"]


# Books


def paragraphs(name, count):
    return "\n\n".join(f"{name} went to place {i % 7}. It was so." for i in range(count))


@pytest.fixture
def shelf(tmp_path):
    folder = tmp_path / "shelf"
    (folder / "deep").mkdir(parents=True)
    (folder / "one.txt").write_text(
        f"{OLD}{paragraphs('Ann', 20)}\nEnd of Project Gutenberg's X\n{paragraphs('Bob', 20)}"
    )
    with zipfile.ZipFile(folder / "deep/two.zip", "w") as archive:
        archive.writestr("two", paragraphs("Cid", 20))
    return folder


def books_of(folder, *only, **settings):
    settings = {"books": [*only] or None, "valid": 0.2, "test": 0.2, "batch_size": 4, "seed": 0} | settings
    data = Books(str(folder), **settings)
    data.setup()
    return data


def told(data, split):
    """The triples of a split in words, in the order of the text."""
    triples = data.triples(split)
    batch = triples.batch(range(len(triples)))
    return [
        tuple(
            " ".join(data.vocabulary.words[i] for i in one.words[: one.lengths[b], b])
            for one in (batch.previous, batch.sentences, batch.following)
        )
        for b in range(len(triples))
    ]


def test_triples_are_of_one_document(shelf):
    data = books_of(shelf, max_vocabulary=None, min_count=1)
    triples = {split: told(data, split) for split in ("train", "valid", "test")}
    names = {name: sum(name in " ".join(triple) for of in triples.values() for triple in of) for name in NAMES}
    assert names == dict.fromkeys(NAMES, 34), "of 40 sentences, cut into three parts"
    assert len(triples["train"]) > 4 * len(triples["valid"]) > 0 < len(triples["test"])
    for of in triples.values():
        assert all(sum(name in " ".join(triple) for name in NAMES) == 1 for triple in of), "of one document"
    first = ("cid went to place 0 . <eos>", "it was so . <eos>", "cid went to place 1 . <eos>")
    assert triples["train"][0] == first, "deep/two.zip comes before one.txt"
    assert triples["test"][-1] == ("it was so . <eos>", "bob went to place 5 . <eos>", "it was so . <eos>")


def test_the_vocabulary_is_the_trainings(tmp_path):
    """14 paragraphs train, the next 4 are for the validation and the last 2 for the test."""
    text = ["He ran far. He sat. He ran."] * 16 + ["It fell. It fell. It fell."] * 4
    (tmp_path / "one.txt").write_text("\n\n".join(text))
    data = books_of(tmp_path, min_count=1, max_vocabulary=6, test=0.1)
    assert data.vocabulary.words == ("<eos>", ".", "he", "ran", "<unk>", "far")
    assert {*told(data, "test")} == {("<unk> <unk> . <eos>",) * 3}


def test_lines_are_sentences_and_an_empty_one_ends_a_document(tmp_path):
    (tmp_path / "one.txt").write_text("\n".join(["a b. C", "e", "f", "", "g", "h h h h h"] * 20))
    triples = [("g <eos>", "h h h h h <eos>", "a b . c <eos>"), ("h h h h h <eos>", "a b . c <eos>", "e <eos>")]
    triples += [("a b . c <eos>", "e <eos>", "f <eos>")]
    for max_length in (5, 4):
        data = books_of(tmp_path, layout="lines", max_length=max_length)
        assert {*told(data, "train")} == {*(triples if max_length == 5 else triples[2:])}


def test_batches_are_of_like_lengths_and_have_every_triple_once(shelf):
    data = books_of(shelf)
    loader = data.train_dataloader()
    epochs = [list(loader) for _ in range(2)]
    triples = sorted(told(data, "train"))
    for epoch in epochs:
        assert len(epoch) == len(loader)
        words = [
            tuple(" ".join(data.vocabulary.words[i] for i in one.words[: one.lengths[b], b]) for one in (p, s, f))
            for s, p, f in epoch
            for b in range(len(s.lengths))
        ]
        assert sorted(words) == triples
    shapes = [[batch.sentences.words.shape for batch in epoch] for epoch in epochs]
    assert shapes[0] != shapes[1]


def test_what_was_split_is_kept_until_it_changes(shelf):
    data = books_of(shelf)
    [folder] = shelf.glob(".multint-cache/sentences-*")
    assert len(told(data, "train")) == len(told(books_of(shelf), "train"))
    assert [*shelf.glob(".multint-cache/sentences-*")] == [folder]
    (folder / "train").write_text("damaged .\n" * 9)
    assert told(books_of(shelf), "train") == told(data, "train")
    (shelf / "one.txt").write_text(paragraphs("Dan", 30))
    assert "dan" in books_of(shelf).vocabulary.words
    assert len([*shelf.glob(".multint-cache/sentences-*")]) == 2


def test_what_was_split_is_kept_elsewhere_where_it_must(shelf, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.data.sentences.sentence_data.pooch.os_cache", lambda name: tmp_path / name)
    (shelf / ".multint-cache").write_text("no folder")
    data = books_of(shelf)
    assert [*tmp_path.glob("multint/sentences/sentences-*")]
    assert told(books_of(shelf), "test") == told(data, "test")
    shutil.rmtree(tmp_path / "multint")
    (tmp_path / "multint").write_text("no folder")
    with pytest.raises(
        ExperimentError, match=r"the words of the sentences cannot be kept: .* make one of these folders"
    ):
        books_of(shelf)


def test_books_that_change_while_they_are_read_are_refused(shelf, monkeypatch):
    def read(path, encoding):
        path.write_text(paragraphs("Eve", 9))
        return read_book(path, encoding)

    monkeypatch.setattr("experiments.data.sentences.tokens.read_book", read)
    with pytest.raises(ExperimentError, match="a text was changed while it was read"):
        books_of(shelf, "one.txt")
    assert not [*shelf.glob(".multint-cache/*")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "none"}, "none: no such file or directory"),
        ({"path": "latin.txt"}, "latin.txt: no text in utf-8 .* Name its encoding"),
        ({"path": "short.txt"}, "short.txt: the part for the split '.*' has no three sentences"),
        ({"path": "short.txt", "min_count": 9}, "no word occurs --data.min_count=9 times"),
        ({"books": ["three.txt"]}, "there is no three.txt in .* Choices: latin.txt, short.txt"),
        ({"encoding": "utf-9"}, "^encoding: got 'utf-9'"),
        ({"layout": "verse"}, "--data.layout: got 'verse', expected prose or lines"),
        ({"max_vocabulary": 2}, "--data.max_vocabulary: got 2, expected at least 3"),
        ({"max_length": 0}, "--data.max_length: got 0"),
        ({"valid": 0.5, "test": 0.5}, "--data.valid, --data.test: got 0.5 and 0.5"),
    ],
)
def test_bad_books_are_refused(options, message, tmp_path):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "short.txt").write_text("He ran. He ran. He ran.")
    with pytest.raises(ExperimentError, match=message):
        Books(**options | {"path": str(tmp_path / options.get("path", ""))}).setup()


@pytest.mark.skipif(not (SHARED / "books").is_dir(), reason="the books are not beside the project")
def test_the_sentences_of_a_novel(tmp_path):
    (tmp_path / "novel.txt").write_bytes((SHARED / "books/austen-persuasion.txt").read_bytes())
    data = books_of(tmp_path, valid=0.05, test=0.05, max_length=1000)
    first = told(data, "train")[0]
    assert first[1] == "chapter 1 <eos>"
    assert not {"gutenberg", "etext"} & {*data.vocabulary.words}


# The task


VOCABULARY = {"vocabulary": WordVocabulary(["<eos>", "<unk>", *"abcdefg"]).state_dict()}


def test_the_task_overfits_a_batch():
    seed_everything(1, verbose=False)
    task = SentenceVectors(partial(NETWORK, encoder=stack(hidden_size=16)), partial(torch.optim.Adam, lr=0.05))
    task.use(VOCABULARY, "the data")
    batch = Batch(*(sentences(4, 3, 2, seed=seed) for seed in range(3)))
    optimizer = task.optimizer()
    for _ in range(60):
        optimizer.zero_grad()
        loss = task.measure(batch, "train")["loss"]
        loss.value.backward()
        optimizer.step()
    assert loss.weight == 2 * (4 + 3 + 2)
    assert loss.value < 0.05
    assert_close(task.metrics({"loss": loss.value}, "val")["perplexity"], loss.value.exp())


def test_a_resumed_run_equals_an_uninterrupted_one(shelf, tmp_path):
    """Stopped in the middle of an epoch, and resumed by another seed."""

    def run(folder, *callbacks, ckpt_path=None, seed=1):
        seed_everything(seed, verbose=False)
        task, data = SentenceVectors(NETWORK, partial(torch.optim.Adam, lr=0.03)), books_of(shelf, seed=None)
        fit = trainer(folder, *callbacks, ckpt_path=ckpt_path, max_steps=12, max_epochs=-1, val_check_interval=4)
        fit.fit(TaskModule(task), DataModule(data), ckpt_path=ckpt_path, weights_only=True)
        return task.network.state_dict()

    def record():
        return Record(lambda batch: batch.sentences.words.tolist())

    whole, first, second = record(), record(), record()
    weights = run(tmp_path / "whole", whole)
    stopped(run, tmp_path / "parts", first, 6)
    resumed = run(tmp_path / "parts", second, ckpt_path=last(tmp_path / "parts"), seed=2)
    assert_together([first, second], whole)
    assert_close(resumed, weights, rtol=0, atol=0)


def test_other_data_are_refused():
    with pytest.raises(ExperimentError, match="the data are NoneType, expected Books"):
        SentenceVectors(NETWORK).describe(None)


# Vectors


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    vocabulary = WordVocabulary(["<eos>", "<unk>", "he", "ran", "sat", "far", "."])
    return SentenceEncoder(NETWORK(len(vocabulary)), vocabulary)


def test_long_sentences_are_in_small_batches(monkeypatch):
    monkeypatch.setattr(sentence_encoder, "_LARGEST", 20)
    assert sentence_encoder._batches([3, 50, 6, 7, 9, 1, 1], 4) == [[1], [4, 3], [2, 0, 5], [6]]
    assert sentence_encoder._batches([], 4) == []


SENTENCES = ["He ran far.", "", "He sat.", "He ran.", "Nobody ran!", "He ran far. " * 5]


def test_vectors_are_in_order_and_of_each_sentence(encoder):
    vectors = encoder.encode(SENTENCES, batch_size=2)
    assert (vectors.shape, vectors.dtype) == ((6, 4), np.float32)
    for sentence, vector in zip(SENTENCES, vectors, strict=True):
        assert_close(encoder.encode([sentence])[0], vector)
    words = torch.tensor([[2, 1, 0]]).T  # he <unk> <eos>
    assert_close(encoder.encode(["he knew"])[0], encoder.network(words, torch.tensor([3]))[0].detach().numpy())
    assert_close(encoder.encode(SENTENCES, batch_size=2), vectors, rtol=0, atol=0)
    assert_close(encoder.encode(sentence for sentence in SENTENCES), vectors)
    assert encoder.encode([]).shape == (0, 4)
    assert encoder.known(["He knew.", "Ran far"]) == 0.8
    with pytest.raises(ExperimentError, match="got a str, expected a list of texts"):
        encoder.encode("He ran.")
    with pytest.raises(ExperimentError, match="batch_size is 0"):
        encoder.encode(SENTENCES, batch_size=0)


def word_vectors(path, encoder, header=""):
    """Of which the model's embeddings are a linear map, and of two words that it does not know."""
    matrix = np.array([[1.0, 2.0], [0.0, 1.0], [-1.0, 0.5]])  # (E, D)
    numbers = np.linspace(-1, 1, 14).reshape(7, 2) ** 2
    with torch.no_grad():
        encoder.network.embedding.weight[2:] = torch.from_numpy(numbers[:5] @ matrix.T)
    words = ["He", "ran", "sat", "far", ".", "walked", "he"]
    lines = [" ".join([word, *map(str, row)]) for word, row in zip(words, numbers, strict=True)]
    path.write_text("\n".join([*([header] if header else []), *lines]) + "\n")
    return numbers[5] @ matrix.T


@pytest.mark.parametrize("header", ["", "7 2"], ids=["GloVe", "word2vec"])
def test_words_are_known_by_word_vectors(encoder, header, tmp_path):
    encoder = SentenceEncoder(NETWORK(7), encoder.vocabulary)
    embedding = word_vectors(tmp_path / "vectors.txt", encoder, header)
    before = encoder.encode(["He ran.", "He flew."])
    assert encoder.expand(tmp_path / "vectors.txt") == 5
    assert_close(encoder.encode(["He ran.", "He flew."]), before)
    table = encoder.network.embedding.weight
    e = torch.stack([table[2], torch.tensor(embedding).float(), table[6], table[0]]).detach()
    expected = encoder.network.vectors(e.unsqueeze(1), torch.tensor([4])).detach().numpy()
    assert_close(encoder.encode(["He walked."]), expected)
    assert encoder.known(["He walked."]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there are no word vectors"),
        ("he 1 2\nran 1\n", "line 2: got 2 fields, expected a word and 2 numbers"),
        ("he 1 2\nran 1 x\n", "line 2: expected 2 numbers after the word: .*'x'"),
        ("he 1 nan\n", "line 1: a number is not finite"),
        ("3 2\nhe 1 2\n", "1 words, expected 3 by its first line: it is truncated"),
        (b"\xff\xfe", "no text in UTF-8"),
        ("he 1 2\nwe 3 4\n", "1 of its words are known to the model, expected at least 2"),
        (None, "cannot be read: No such file"),
    ],
)
def test_bad_word_vectors_are_refused(encoder, text, message, tmp_path):
    path = tmp_path / "vectors.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ExperimentError, match=rf"vectors\.txt.*{message}"):
        encoder.expand(path)


def test_words_of_glove_may_have_spaces(tmp_path):
    (tmp_path / "vectors.txt").write_text("he 1 2\n. . . 3 4\nHe 5 6\n")
    given = read_word_vectors(tmp_path / "vectors.txt")
    assert given.rows == {"he": 0, ". . .": 1}
    assert_close(given.vectors, np.array([[1, 2], [3, 4]], np.float32))


@pytest.mark.runs
def test_a_run_is_trained_and_encodes(shelf, tmp_path, capsys):
    cell = {"class_path": "GRUCell", "init_args": {"integrator": "Additive", "reset_after": True}}
    layer = {"cell": cell, "engine": "loop"}
    network = {"encoder": {"hidden_size": 4, **layer}, "decoder": layer, "embedding_size": 3}
    data = {"path": str(shelf), "valid": 0.2, "test": 0.2, "batch_size": 16}
    settings = {
        "name": "tiny",
        "model": {"class_path": "SentenceVectors", "init_args": {"network": network}},
        "data": {"class_path": "Books", "init_args": data},
        "trainer": {"max_epochs": 1, "enable_progress_bar": False, "accelerator": "cpu"},
    }
    config, run = tmp_path / "tiny.yaml", tmp_path / "tiny/version_0"
    config.write_text(json.dumps(settings))
    assert main(["fit", "--config", str(config), f"--trainer.default_root_dir={tmp_path}"]) == 0
    assert "test perplexity" in capsys.readouterr().out
    (tmp_path / "lines.txt").write_text("Ann went.\n\nBob went to place 3.\n")
    files = [str(run), str(tmp_path / "lines.txt")]
    assert main(["encode", *files, "--output", str(tmp_path / "vectors.npy")]) == 0
    assert re.search(r"^3 sentences in .* s, .* a second; .* of their words are known$", capsys.readouterr().out, re.M)
    encoder = SentenceEncoder.load(run)
    with trusting():
        task = load_task(run / "checkpoints/best.ckpt")
    vectors = np.load(tmp_path / "vectors.npy")
    assert_close(encoder.encode(["Ann went.", "", "Bob went to place 3."]), vectors)
    assert main(["nearest", *files, "Bob went to place 3 .", "--count", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[1:][0] == "1.000  Bob went to place 3."
    assert main(["encode", *files, "--layout", "prose", "--output", str(tmp_path / "vectors.npy")]) == 0
    assert np.load(tmp_path / "vectors.npy").shape == (2, 4)
    assert main(["export", str(run), "--format", "safetensors", "--output", str(tmp_path / "tiny.safetensors")]) == 0
    call = torch.ones(3, 2, dtype=torch.long), torch.tensor([3, 2])
    assert_close(load_network(tmp_path / "tiny.safetensors")(*call), task.network.eval()(*call))
    capsys.readouterr()
    for command, message in (
        (["encode", *files, "--output", "vectors.txt"], "--output: got vectors.txt, expected a name that ends in .npy"),
        (["encode", *files, "--output", str(tmp_path / "none/v.npy")], "none is no folder, expected one to write to"),
        (["encode", str(run), str(tmp_path / "none.txt"), "--output", "v.npy"], "none.txt: cannot be read"),
        (["encode", str(config), files[1], "--output", "v.npy"], "tiny.yaml: damaged, or no checkpoint"),
        (["nearest", *files, "He ran.", "--count", "0"], "--count: got 0, expected at least 1"),
        (["nearest", *files, "He ran.", "--device", "nowhere"], "device: got nowhere"),
        (["nearest", *files, "He ran.", "--encoding", "utf-9"], "error: encoding: got 'utf-9'"),
    ):
        assert main(command) == 2
        assert message in capsys.readouterr().err
