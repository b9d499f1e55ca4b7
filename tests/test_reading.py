"""Reading: questions become numbers, a network attends to the document, and its answers are scored."""

import io
import json
import lzma
import re
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import Trainer, seed_everything
from torch.testing import assert_close

from experiments.__main__ import main
from experiments.core.callbacks import RandomState
from experiments.core.configs import CONFIGS
from experiments.core.errors import ExperimentError
from experiments.core.export import load_network, trace
from experiments.core.loading import load_task
from experiments.core.module import DataModule, TaskModule
from experiments.core.run_folder import RunFolder
from experiments.core.saving import Checkpoints
from experiments.core.trust import trusting
from experiments.data import BAbI, NovelCloze, QuestionFiles
from experiments.data.buckets import Buckets
from experiments.data.reading import Batch, Question
from experiments.data.reading.babi import read_stories
from experiments.data.reading.entities import Mention, mentioning, merged, names_in, sentences
from experiments.data.reading.question_files import cut, read_question
from experiments.data.reading.questions import collated, renumbered
from experiments.data.reading.wording import Wording, encoded
from experiments.tasks import Reading
from models import AcousticModel, AttentiveReader, SequenceLabeller, SequenceReader
from multint import GRU, LSTM, RNN, Additive, Bilinear, Concat, LowRank, MultiplicativeIntegration
from multint.errors import OptionError

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
SHARED = Path(__file__).parent.parent.parent / "shared" / "data"
NETWORK = partial(
    AttentiveReader,
    recurrent=partial(GRU, hidden_size=8, bidirectional=True, engine="loop"),
    embedding_size=8,
    attention_size=8,
)


# The network


def reader(layer=GRU, **settings):
    torch.manual_seed(0)
    sizes = {"embedding_size": 3, "attention_size": 7} | settings
    recurrent = partial(layer, hidden_size=4, bidirectional=True, engine="loop")
    network = AttentiveReader(9, 5, sizes.pop("recurrent", recurrent), **sizes).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.uniform_(-1, 1)
    return network


def batch_of(T=6, L=4, words=9):
    torch.manual_seed(1)
    documents, queries = torch.randint(words, (T, 3)), torch.randint(words, (L, 3))
    return documents, torch.tensor([T, 2, 1]), queries, torch.tensor([1, L, 2])


ATTENTIONS = {
    "additive": {},
    "MI": {"attention": MultiplicativeIntegration},
    "bilinear": {"attention": Bilinear},
    "bilinear score": {"attention": Bilinear, "attention_size": None},
    "low rank score": {"attention": partial(LowRank, rank=2), "attention_size": None},
}


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_weights_are_of_the_document_alone(attention):
    """They sum to 1 over a document's words; what stands past its length has none, and changes nothing."""
    network = reader(**ATTENTIONS[attention])
    documents, lengths, queries, query_lengths = batch_of()
    logits, weights = network(documents, lengths, queries, query_lengths)
    assert_close(weights.sum(0), torch.ones(3, dtype=torch.float64))
    assert (weights >= 0).all()
    padding = torch.arange(6).unsqueeze(1) >= lengths
    assert not weights[padding].any()
    longer = [
        torch.cat([torch.where(torch.arange(len(words)).unsqueeze(1) >= length, 8, words), words[:2]])
        for words, length in ((documents, lengths), (queries, query_lengths))
    ]
    again, more = network(longer[0], lengths, longer[1], query_lengths)
    assert_close(again, logits)
    assert_close(more[:6], weights)
    alone, one = network(documents[:2, 1:2], lengths[1:2], queries[:, 1:2], query_lengths[1:2])
    assert_close(alone, logits[1:2])
    assert_close(one, weights[:2, 1:2])


def by_hand(network, document, query):
    """Hermann et al. 2015, section 3, word by word, from the parameters alone."""
    p = dict(network.named_parameters())

    def last_and_all(name, words):
        outputs = []
        for direction, order in enumerate((words, words[::-1])):
            W, U, b = (
                p[f"{name}.directions.{direction}.cell.integrator.{part}"]
                for part in ("x_projection.weight", "z_projection.weight", "bias")
            )
            h, hs = torch.zeros(4, dtype=torch.float64), []
            for word in order:
                h = torch.tanh(W @ p["embedding.weight"][word] + U @ h + b)
                hs.append(h)
            outputs.append(hs if direction == 0 else hs[::-1])
        y = [torch.cat(pair) for pair in zip(*outputs, strict=True)]
        return torch.cat([outputs[0][-1], outputs[1][0]]), y

    u, _ = last_and_all("query", query)
    _, y = last_and_all("document", document)
    W_ym, W_um, b_m, w_ms = (
        p[name]
        for name in ("attention.x_projection.weight", "attention.z_projection.weight", "attention.bias", "score.weight")
    )
    s = torch.stack([(w_ms @ torch.tanh(W_ym @ y_t + W_um @ u + b_m))[0] for y_t in y]).exp()
    s = s / s.sum()
    r = sum(s_t * y_t for s_t, y_t in zip(s, y, strict=True))
    W_rg, W_ug, b_g = (p[f"join.{part}"] for part in ("x_projection.weight", "z_projection.weight", "bias"))
    g = torch.tanh(W_rg @ r + W_ug @ u + b_g)
    return p["decoder.weight"] @ g + p["decoder.bias"], s


def test_the_reader_is_that_of_the_equations():
    network = reader(partial(RNN, integrator=Additive))
    documents, lengths, queries, query_lengths = batch_of()
    logits, weights = network(documents, lengths, queries, query_lengths)
    for b, (length, query_length) in enumerate(zip(lengths, query_lengths, strict=True)):
        expected, s = by_hand(network, documents[:length, b].tolist(), queries[:query_length, b].tolist())
        assert_close(logits[b], expected)
        assert_close(weights[:length, b], s)


def test_a_bilinear_score_is_a_product():
    """The terms without d are the same for all words, so they do not count."""
    network = reader(LSTM, attention=partial(Bilinear, x_term=False), attention_size=None)
    documents, lengths, queries, query_lengths = batch_of()
    _, weights = network(documents, lengths, queries, query_lengths)
    d, _ = network.document(network.embedding(documents), lengths=lengths)
    _, (h, _) = network.query(network.embedding(queries), lengths=query_lengths)
    q = torch.cat([h[0], h[1]], -1)
    scores = torch.einsum("bz,zx,tbx->tb", q, network.attention.interaction.weight[0], d)
    for b, length in enumerate(lengths):
        assert_close(weights[:length, b], scores[:length, b].softmax(0))


def test_a_score_that_is_a_sum_is_refused():
    with pytest.raises(OptionError, match="the weights would not depend on the query"):
        reader(attention=Concat, attention_size=None)


@pytest.mark.parametrize(
    "network",
    [
        partial(AttentiveReader, 9, 5),
        partial(AcousticModel, 3, 4),
        partial(SequenceReader, 3, 4),
        partial(SequenceLabeller, 3, 4),
    ],
    ids=lambda network: network.func.__name__,
)
def test_a_stack_that_takes_steps_for_sequences_is_refused(network):
    with pytest.raises(OptionError, match=f"{network.func.__name__}: recurrent.batch_first is true"):
        network(recurrent=partial(GRU, hidden_size=4, batch_first=True))


@pytest.mark.compiles
def test_a_reader_is_exported_for_any_lengths():
    task = Reading(partial(NETWORK, recurrent=partial(RNN, hidden_size=4)))
    task.use({"words": "<unk> @entity0 @entity1 x", "answers": "@entity0 @entity1"}, "the data")
    task.network.eval()
    program = trace(task.network, task.example()).module()
    documents, queries = torch.randint(4, (7, 5)), torch.randint(4, (2, 5))
    call = documents, torch.tensor([7, 3, 1, 2, 7]), queries, torch.tensor([2, 1, 1, 2, 2])
    assert_close(program(*call), tuple(task.network(*call)))


def test_a_reader_is_summed_up_without_its_data(capsys):
    command = ["summary", "--config", str(CONFIGS / "reading/novels.yaml")]
    assert main([*command, "--vocabulary_size=100"]) == 2
    assert "give --vocabulary_size V and --answers A" in capsys.readouterr().err
    assert main([*command, "--vocabulary_size=100", "--answers=10"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^decoder +Linear +2 × 10 +640 +650$", out, re.MULTILINE)
    assert main([*command, "--vocabulary_size=9", "--answers=5", "--model.network.attention_size=null"]) == 2
    assert "the weights would not depend on the query" in capsys.readouterr().err


def test_one_direction_reads_the_query_to_its_last_word():
    network = reader(recurrent=partial(LSTM, hidden_size=4, num_layers=2, engine="loop"))
    documents, lengths, queries, query_lengths = batch_of()
    logits, _ = network(documents, lengths, queries, query_lengths)
    h, _ = network.query(network.embedding(queries[:2, 2:3]))
    joined = network.join.x_projection.in_features
    assert joined == 4
    d, _ = network.document(network.embedding(documents[:1, 2:3]))  # a document of one word is read by that alone
    assert_close(logits[2], network.decoder(network.join(d[0, 0], h[-1, 0]).tanh()))


# Batches and words


def test_batches_of_a_number_of_questions():
    lengths = [7 * i % 100 + 1 for i in range(45)]
    buckets = Buckets(lengths, 4, "examples")
    batches = buckets.batches(torch.Generator().manual_seed(0))
    assert sorted(i for batch in batches for i in batch) == list(range(45))
    assert sorted(map(len, batches)) == [4] * 10 + [5], "none is left alone"
    assert len(batches) == len(buckets)
    spread = [max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches]
    assert max(spread) < 45
    for count, size, sizes in ((33, 4, [4] * 7 + [5]), (3, 1, [1] * 3), (1, 4, [1]), (6, 4, [2, 4])):
        buckets = Buckets(range(1, count + 1), size, "examples")
        assert sorted(map(len, buckets.batches())) == sizes
        assert len(buckets) == len(sizes)


def questions(split):
    """Of markers in the training and in the test, and of words that the test alone has."""
    high = "@entity99999"  # a number says nothing of how many there are
    yield Question(
        "one", ["@entity1", "saw", "@entity0", "."], ["who", "saw", "@entity0", "?", "@placeholder"], "@entity1"
    )
    if split == "test":
        yield Question("two", [high, "was", "heard", "."], ["@placeholder", "was"], high, "x")


def test_questions_become_numbers():
    wording, sets = encoded(questions, None, 1)
    assert wording.words[:4] == ["<unk>", "@entity0", "@entity1", "@entity99999"]
    assert wording.words[4:] == ["saw", ".", "who", "?", "@placeholder"]
    assert wording.answers == wording.words[1:4]
    assert Wording.from_state(json.loads(json.dumps(wording.state_dict()))) == wording
    two = sets["test"][1]
    assert [wording.words[i] for i in two.document] == ["@entity99999", "<unk>", "<unk>", "."]
    assert (wording.answers[two.answer], two.group) == ("@entity99999", "x")
    assert encoded(questions, 2, 1)[0].words[4:] == ["saw", "."]
    assert encoded(questions, None, 2)[0].words[4:] == ["saw"]


def test_an_answer_that_the_training_has_not_is_number_0():
    answers = {"train": ["a", "b", "b"], "valid": ["a"], "test": ["c"]}
    wording, sets = encoded(lambda split: [Question(a, ["x"], ["?"], a) for a in answers[split]], None, 1)
    assert wording.answers == ["<unk>", "b", "a"]
    assert [one.answer for one in sets["train"] + sets["test"]] == [2, 1, 1, 0]


def test_a_split_without_questions_is_refused():
    with pytest.raises(ExperimentError, match="the data have no questions for the split 'valid'"):
        encoded(lambda split: questions(split) if split == "train" else (), None, 1)


@pytest.mark.parametrize(("document", "query", "what"), [([], ["?"], "document"), (["x"], [], "query")])
def test_an_empty_question_is_refused(document, query, what):
    with pytest.raises(ExperimentError, match=f"q7: the {what} is empty"):
        encoded(lambda split: [Question("q7", document, query, "x")], None, 1)


def test_markers_are_permuted_and_nothing_else():
    _, sets = encoded(questions, None, 1)
    batch = collated(sets["test"] * 20)
    generator = torch.Generator().manual_seed(0)
    again = renumbered(batch, 3, generator)
    assert len({tuple(again.documents[:, b].tolist()) for b in range(40)}) == 3 * 2 + 3
    for b in range(40):
        words = torch.cat([batch.documents[:, b], batch.queries[:, b], batch.answers[b : b + 1] + 1])
        new = torch.cat([again.documents[:, b], again.queries[:, b], again.answers[b : b + 1] + 1])
        order = dict(zip(words.tolist(), new.tolist(), strict=True))
        assert [order[word] for word in words.tolist()] == new.tolist()
        assert len(set(order.values())) == len(order)
        assert all((1 <= new <= 3) if 1 <= old <= 3 else old == new for old, new in order.items())


# bAbI


STORY = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Mary took the milk, there.
5 What does she hold?\tmilk,apple\t4
1 The end.
2 Is it?\tyes\t1
"""


def test_stories_are_read_up_to_each_question():
    first, second, third = read_stories(STORY, "qa1", "1")
    assert first.document == [
        "mary",
        "moved",
        "to",
        "the",
        "bathroom",
        ".",
        "john",
        "went",
        "to",
        "the",
        "hallway",
        ".",
    ]
    assert (first.query, first.answer, first.name, first.group) == (
        ["where", "is", "mary", "?"],
        "bathroom",
        "qa1:3",
        "1",
    )
    assert second.document == [*first.document, *["mary", "took", "the", "milk", ",", "there", "."]]
    assert second.answer == "milk,apple"
    assert third.document == ["the", "end", "."]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "qa1: the file is empty"),
        ("\n\n", "qa1: the file is empty"),
        ("1 A b.\nMary went\n", "line 2: got 'Mary went', expected NUMBER SENTENCE"),
        ("1 A b.\n2\n", "line 2: got '2', expected NUMBER SENTENCE"),
        ("1 Where?\thome\t1\n", "line 1: .* after a story"),
        ("1 A b.\n2 Where?\t\t1\n", "expected a question, a tab and an answer"),
        ("1 A b.\n2 Where?\ta\u00a0b\t1\n", "expected a question, a tab and an answer"),
        ("1 A b.\n3 Where?\thome\t1\n", "line 2: got the number 3, expected 2: lines are missing"),
        ("4 A b.\n5 Where?\thome\t4\n", "line 1: got the number 4, expected 1: lines are missing"),
        ("1 A b.\n2 Where?\thome\t1\n3 Mary we", "the last line is no question: the file is truncated"),
    ],
)
def test_a_malformed_story_is_refused(text, message):
    with pytest.raises(ExperimentError, match=message):
        list(read_stories(text, "qa1"))


@pytest.fixture(scope="module")
def babi(tmp_path_factory):
    """Two tasks in bAbI's format."""
    folder = tmp_path_factory.mktemp("corpus") / "babi/en-valid"
    folder.mkdir(parents=True)
    people, places = ("Ann", "Bob"), ("hall", "yard", "loft")
    for task, split in ((task, split) for task in (1, 2) for split in ("train", "valid", "test")):
        lines = []
        for i in range(12 if split == "train" else 5):
            one, other, place, another = people[i % 2], people[1 - i % 2], places[i % 3], places[(i + task) % 3]
            lines += [
                f"1 {one} is in the {place}.",
                f"2 {other} is in the {another}.",
                f"3 Where is {one}? \t{place}\t1",
            ]
        (folder / f"qa{task}_{split}.txt").write_text("\n".join(lines))
    return folder.parent.parent


def babi_of(root, **settings):
    data = BAbI(str(root), **({"tasks": [1, 2], "batch_size": 8, "seed": 0} | settings))
    data.setup()
    return data


def test_babi_is_read_unpacked_and_from_its_archive(babi, tmp_path):
    (tmp_path / "babi").mkdir()
    with tarfile.open(tmp_path / "babi/babi-en.tar.xz", "w:xz") as archive:
        archive.add(babi / "babi", "babi")
    for data in (babi_of(tmp_path), babi_of(babi / "babi"), babi_of(babi / "babi/en-valid")):
        assert data.wording == babi_of(babi).wording
        assert len(data.questions("train")) == 24
    assert {one.group for one in babi_of(babi, tasks=2).questions("test")} == {"2"}


def test_babi_that_is_not_there_says_where_it_was_looked_for(babi, tmp_path):
    with pytest.raises(ExperimentError, match=r"there is no en-valid/qa1_train.txt of bAbI, nor an archive"):
        babi_of(tmp_path)
    (tmp_path / "babi.tar.xz").write_bytes(lzma.compress(b"no archive"))
    with pytest.raises(ExperimentError, match="no archive that can be read"):
        babi_of(tmp_path)
    for tasks in ([], [0], [1, 1], [21]):
        with pytest.raises(ExperimentError, match=r"--data.tasks: got \["):
            BAbI(str(babi), tasks)
    with pytest.raises(ExperimentError, match=r"--data.batch_size: got 0"):
        BAbI(str(babi), batch_size=0)


@pytest.mark.skipif(not (SHARED / "babi").is_dir(), reason="bAbI is not beside the project")
def test_the_published_babi_has_its_numbers():
    data = BAbI(str(SHARED), tasks=[8])
    data.setup()
    assert [len(data.questions(split)) for split in ("train", "valid", "test")] == [900, 100, 1000]
    assert [one.answer for one in data.questions("test")].count(0) == 1, "one list is not in the training"


# The published question files

FILE = """http://web.archive.org/web/2015id_/http://edition.cnn.com/2015/03/10/a/index.html

( @entity1 ) a former @entity0 officer spoke . he is 52 . @entity2 heard him

@placeholder spoke at 52

@entity0

@entity0:Vessel
@entity1:CNN
@entity2:Anna: B
"""


def test_a_question_file_is_read(tmp_path):
    path = tmp_path / "0a1b.question"
    path.write_text(FILE)
    question = read_question(path)
    assert question.name == "0a1b"
    assert question.document == FILE.split("\n\n")[1].split()
    assert question.query == ["@placeholder", "spoke", "at", "52"]
    assert question.answer == "@entity0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        (b"\xff\xfe", "no text in UTF-8"),
        (FILE.replace("\n\n", "\n"), "it has 1 parts with blank lines"),
        (FILE.replace("@placeholder", "who"), "the query is 'who spoke at 52', expected one with @placeholder"),
        (FILE.replace("\n@entity0\n", "\nVessel\n"), "the answer is 'Vessel', expected @entityN"),
        (FILE.replace("\n@entity0\n", "\n@entity7\n"), "the answer @entity7 is not in the document"),
    ],
)
def test_a_malformed_question_file_is_refused(text, message, tmp_path):
    path = tmp_path / "bad.question"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ExperimentError, match=rf"bad\.question: {message}"):
        read_question(path)


def test_question_files_are_found_and_cut(tmp_path):
    for split in ("training", "validation", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "one.question").write_text(FILE)
    data = QuestionFiles(str(tmp_path), renumber=False, seed=0)
    data.setup()
    assert data.wording.answers == ["@entity0", "@entity1", "@entity2"]
    [batch] = data.test_dataloader()
    words = [data.wording.words[i] for i in batch.documents[:, 0]]
    assert words == FILE.split("\n\n")[1].split()
    assert batch.answers.tolist() == [0]
    data = QuestionFiles(str(tmp_path), sentences=1, seed=0)
    data.setup()
    assert len(data.questions("test")[0].document) == 9, "the first of two sentences with one word of the query"
    with pytest.raises(ExperimentError, match=r"there are no \.question files. Give by --data.path"):
        QuestionFiles(str(tmp_path / "test")).setup()
    with pytest.raises(ExperimentError, match=r"--data.sentences: got 0"):
        QuestionFiles(str(tmp_path), sentences=0)


def test_sentences_are_chosen_by_the_words_of_the_query():
    document, query = ["a", "b", ".", "c", "d", ".", "a", "d", "!", "e"], ["a", "d"]
    assert cut(document, query, 1) == ["a", "d", "!"]
    assert cut(document, query, 2) == ["a", "b", ".", "a", "d", "!"]
    assert cut(document, query, 9) == document


# Novels


def test_sentences_end_where_they_do():
    text = (
        'Mr. Hill came. "Where is _she_?" asked Ann.\nSo it was!\n\nChapter 2\n\n'
        "Ann's cat -- it was\nold -- went home; 'Oh!'"
    )
    assert [" ".join(sentence) for sentence in sentences(text)] == [
        "Mr Hill came .",
        '" Where is she ? " asked Ann .',
        "So it was !",
        "Chapter 2",
        "Ann 's cat -- it was old -- went home ; ' Oh ! '",
    ]


def test_names_have_capitals_within_sentences():
    text = [
        ["We", "saw", "Ann", "and", "Rose", "."],
        ["Then", "Ann", "rose", ",", "and", "I'm", "told", "that", "Mr", "Ann", "saw", "Rose", "."],
        ["There", "Ann", "fell", ".", "But", "rose", "Rose", "?"],
        ['"', "There", "it", "is", ",", "There", "it", "was", ",", "there", '"'],
    ]
    assert names_in(text * 3) == {"Ann"}, "Rose is as often no name, and a title is none"


def test_mentions_are_names_with_titles():
    names = {"Ann", "Lee", "Hill"}
    assert mentioning(
        ["Then", "Miss", "Ann", "Lee", "and", "Mr", "and", "Mrs", "Hill", "saw", "the", "Captain"], names
    ) == [
        "Then",
        Mention("Miss", ("Ann", "Lee")),
        "and",
        "Mr",
        "and",
        Mention("Mrs", ("Hill",)),
        "saw",
        "the",
        "Captain",
    ]


@pytest.mark.parametrize(
    ("mentions", "entities"),
    [
        (["Ann Lee", "Ann", "Lee"], ["Ann Lee"] * 3),
        (["Miss Ann Lee", "Ann", "Ann Lee", "Miss Lee"], ["Miss Ann Lee"] * 4),
        (["Ann Lee", "Bob Lee", "Lee", "Bob"], ["Ann Lee", "Bob Lee", "Lee", "Bob Lee"]),
        (["Mr Hill", "Mrs Hill", "Hill"], ["Mr Hill", "Mrs Hill", "Hill"]),
        (["Mr Hill", "Hill"], ["Mr Hill"] * 2),
        (["Mr Hill", "Ann Hill"], ["Mr Hill", "Ann Hill"]),
        (["Ann May Lee", "May"], ["Ann May Lee", "May"]),
    ],
)
def test_mentions_of_one_entity_are_merged(mentions, entities):
    def mention(text):
        title, _, names = text.partition(" ")
        return (
            Mention(title, tuple(names.split())) if title in ("Mr", "Mrs", "Miss") else Mention("", tuple(text.split()))
        )

    fuller = merged(map(mention, mentions))
    assert [fuller[mention(one)] for one in mentions] == [mention(one) for one in entities]


LICENCE = "The Project Gutenberg Etext of Hills\n\nGutenberg wrote to Ann Hill.\n\n*END*THE SMALL PRINT*\n\n"


def novel(count):
    people = ["Ann", "Bob", "Cid", "Dot"]
    lines = []
    for i in range(count):
        a, b, c, d = (people[(i + k * (1 + i // 4 % 3)) % 4] for k in (0, 1, 2, 3))
        lines.append(f"So {a} met {b} and {c} there. Later that day {b} saw {c}. The day was over for {d}.")
    return "\n\n".join(lines)


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    (folder / "one.txt").write_text(LICENCE + novel(80))
    with zipfile.ZipFile(folder / "two.zip", "w") as archive:
        archive.writestr("two", novel(40))
    return folder


def novels_of(folder, only=None, **settings):
    data = NovelCloze(str(folder), only, **({"length": 30, "entities": 4, "batch_size": 8, "seed": 0} | settings))
    data.setup()
    return data


def test_novels_become_questions(books):
    data = novels_of(books)
    assert data.wording.answers == [f"@entity{n}" for n in range(4)]
    assert not {"gutenberg", "ann", "Ann"} & set(data.wording.words)
    for split in ("train", "valid", "test"):
        for one in data.questions(split):
            document, query = ([data.wording.words[i] for i in words] for words in (one.document, one.query))
            answer = data.wording.answers[one.answer]
            assert answer in document
            assert answer not in query
            assert "@placeholder" in query
            assert len(document) <= 30
            assert len({word for word in document if word.startswith("@entity")}) >= 3
    first = data.questions("train")[0]
    assert [data.wording.words[i] for i in first.document] == [
        "so",
        "@entity0",
        "met",
        "@entity1",
        "and",
        "@entity2",
        "there",
        ".",
    ]
    assert [data.wording.words[i] for i in first.query] == [
        "later",
        "that",
        "day",
        "@placeholder",
        "saw",
        "@entity2",
        ".",
    ]
    assert first.name == "one:1.1"
    names = [one.name for split in ("train", "valid", "test") for one in data.questions(split)]
    assert len({*names}) == len(names)
    counts = {split: len(data.questions(split)) for split in ("train", "valid", "test")}
    assert counts["train"] > 3 * counts["valid"] > 0 < counts["test"]
    again, alone = novels_of(books), novels_of(books, ["two.zip"])
    assert [one.name for one in again.questions("valid")] == [one.name for one in data.questions("valid")]
    assert len(alone.questions("train")) < counts["train"]
    # sentence i of 240 is in part i // 12 of 20, and parts 4, 14 | 9, 19 are held out
    parts = {
        split: {int(float(one.name[4:])) // 12 for one in data.questions(split) if one.name[:3] == "one"}
        for split in counts
    }
    assert (parts["valid"], parts["test"]) == ({4, 14}, {9, 19})


def test_markers_are_drawn_anew_in_training_alone(books):
    data = novels_of(books)
    assert data.renumber
    first, second = ([batch.documents for batch in data.val_dataloader()] for _ in range(2))
    assert_close(first, second, rtol=0, atol=0)
    train = data.train_dataloader()
    answers = [[batch.answers for batch in train] for _ in range(2)]
    counts = torch.cat(answers[0]).bincount(minlength=4)
    assert counts.min() > 0.15 * counts.sum()
    assert [a.tolist() for a in answers[0]] != [a.tolist() for a in answers[1]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "none.txt"}, "none.txt: cannot be read: No such file"),
        ({"path": "empty.txt"}, "empty.txt: the file is empty"),
        ({"path": "plain.txt"}, "plain: no sentence names an entity that was named shortly before"),
        ({"path": "latin.txt"}, "latin.txt: no text in utf-8 .* Name its encoding"),
        ({"path": "bad.zip"}, "bad.zip: no archive of one text"),
        ({"path": "spoilt.zip"}, "spoilt.zip: no archive of one text"),
        ({"path": "", "books": ["three.txt"]}, "there is no three.txt in .* Choices: bad.zip, empty.txt"),
        ({"path": "plain.txt", "books": ["three.txt"]}, "plain.txt is no folder of them"),
        ({"path": "folder"}, "the folder has no .txt and no .zip"),
        ({"path": "", "encoding": "utf-9"}, "encoding: got 'utf-9'"),
        ({"path": "", "entities": 1}, "--data.entities: got 1, expected at least 2"),
    ],
)
def test_a_bad_novel_is_refused(settings, message, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "plain.txt").write_text("Nobody is named here. It is all the same.")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "bad.zip").write_bytes(b"no archive")
    damaged = io.BytesIO()
    with zipfile.ZipFile(damaged, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("text", "Ann and Bob " * 99)
    (tmp_path / "spoilt.zip").write_bytes(damaged.getvalue()[:40] + b"\xff" * 9 + damaged.getvalue()[49:])
    (tmp_path / "folder").mkdir()
    with pytest.raises(ExperimentError, match=message):
        NovelCloze(**settings | {"path": str(tmp_path / settings["path"])}).setup()


@pytest.mark.skipif(
    not (SHARED / "books/austen-persuasion.txt").is_file(), reason="the novels are not beside the project"
)
def test_the_entities_of_a_novel():
    text = (SHARED / "books/austen-persuasion.txt").read_text()
    names = names_in(sentences(text))
    assert {"Anne", "Elliot", "Wentworth", "Kellynch", "Bath"} <= names
    assert not {"She", "The", "Captain", "Indeed", "But", "Yes"} & names


# The task


def test_scores_are_exact_over_groups_and_by_frequency():
    task = Reading(NETWORK)
    task.build({"words": "<unk> a b c x", "answers": "<unk> c b a"})
    documents = torch.tensor([[1, 1, 2], [2, 1, 0], [1, 2, 4], [4, 0, 3]])  # of lengths 4, 3, 4
    queries = torch.tensor([[4, 1, 3]])
    batch = Batch(
        documents,
        torch.tensor([4, 3, 4]),
        queries,
        torch.ones(3, dtype=torch.long),
        torch.tensor([3, 2, 0]),
        ("1", "2", "2"),
        ("p", "q", "r"),
    )
    chosen = torch.tensor([3, 1, 0])  # right, wrong, and no known answer
    logits = torch.nn.functional.one_hot(chosen, 4).float()
    task.network = lambda *_: (logits, torch.tensor([0.4, 0.3, 0.2, 0.1]).unsqueeze(1).expand(4, 3))
    scores = {name: (mean.value.item(), mean.weight) for name, mean in task.measure(batch, "test").items()}
    expected = torch.nn.functional.cross_entropy(logits, batch.answers).item()
    assert scores.pop("loss") == pytest.approx((expected, 3))
    thirds = {
        "accuracy": 1,  # p
        "maximum_frequency": 1,  # p: a, twice; q: a, twice, where b is right
        "exclusive_frequency": 2,  # of q, whose query has a: b
        "answerable": 2,
        "commonest_answer": 0,  # c
    }
    assert scores == {
        **{name: (pytest.approx(count / 3), 3) for name, count in thirds.items()},
        "accuracy_1": (1, 1),
        "accuracy_2": (0, 2),
    }
    shown = task.show().splitlines()
    assert shown[:2] == ["p: x", "  a, expected a; by a 0.40, b 0.30, a 0.20, x 0.10"]


@pytest.mark.parametrize("kind", ["babi", "novels"])
def test_the_task_overfits_a_batch(kind, babi, books):
    seed_everything(1, verbose=False)
    task = Reading(NETWORK, partial(torch.optim.Adam, lr=0.05))
    data = babi_of(babi) if kind == "babi" else novels_of(books, ["two.zip"], length=16)
    batch = next(iter(data.train_dataloader()))
    task.use(task.describe(data), "the data")
    optimizer = task.optimizer()
    for _ in range(40):
        optimizer.zero_grad()
        task.measure(batch, "train")["loss"].value.backward()
        optimizer.step()
    with torch.no_grad():
        scores = task.measure(batch, "val")
    assert scores["loss"].value < 0.05
    assert scores["accuracy"].value == 1


def test_a_resumed_run_equals_an_uninterrupted_one(books, tmp_path):
    """Stopped in the middle of an epoch, with dropout and markers drawn anew, and resumed by another seed."""

    def run(folder, until, seed, checkpoint=None):
        seed_everything(seed, verbose=False)
        run_folder = RunFolder(folder, "run", checkpoint)
        run_folder.make()
        callbacks = [RandomState(), Checkpoints(run_folder)]
        trainer = Trainer(callbacks=callbacks, max_steps=until, max_epochs=-1, num_sanity_val_steps=0, **QUIET)
        task, data = Reading(partial(NETWORK, dropout=0.2)), novels_of(books, ["two.zip"], seed=None)
        trainer.fit(TaskModule(task), DataModule(data), ckpt_path=checkpoint, weights_only=True)
        return run_folder.last, len(data.train_dataloader())

    (whole, batches), (stopped, _) = run(tmp_path / "whole", 8, 1), run(tmp_path / "stopped", 6, 1)
    assert 6 % batches
    resumed, _ = run(tmp_path / "stopped", 8, 2, stopped)
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (whole, resumed)]
    assert_close(states[0], states[1], rtol=0, atol=0)


@pytest.mark.runs
def test_a_run_is_tested_and_drawn(babi, tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    layer = {"class_path": "multint.GRU", "init_args": {"hidden_size": 4, "engine": "loop"}}
    network = {"recurrent": layer, "attention": "Bilinear", "attention_size": None}
    settings = {
        "name": "tiny",
        "model": {"class_path": "Reading", "init_args": {"network": network}},
        "data": {"class_path": "BAbI", "init_args": {"root": str(babi), "tasks": [1, 2]}},
        "trainer": {"max_epochs": 1, "enable_progress_bar": False, "accelerator": "cpu"},
    }
    config.write_text(json.dumps(settings))
    assert main(["fit", "--config", str(config), f"--trainer.default_root_dir={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "expected" in out
    assert "accuracy_2" in out
    show = ["show", str(tmp_path / "tiny/version_0"), "--examples"]
    assert main([*show, "2"]) == 0
    assert capsys.readouterr().out.count("expected") == 2
    pictures = sorted(path.name for path in tmp_path.glob("tiny/version_0/**/attention_*.png"))
    assert pictures == [f"attention_{number}.png" for number in (1, 2)]
    assert main([*show, "0"]) == 2
    assert "--examples: got 0, expected at least 1" in capsys.readouterr().err
    run, command = tmp_path / "tiny/version_0", ["--config", str(config), "--ckpt_path"]
    assert main(["validate", *command, str(run)]) == 0
    assert main(["fit", *command, str(run)]) == 2
    assert re.search(r"is a folder, expected .* as .*/checkpoints/last\.ckpt", capsys.readouterr().err)
    assert main(["export", str(run), "--format", "safetensors", "--output", str(tmp_path / "tiny.safetensors")]) == 0
    with trusting():
        network = load_task(run / "checkpoints/best.ckpt").network.eval()
    call = batch_of(words=network.embedding.num_embeddings)
    assert_close(load_network(tmp_path / "tiny.safetensors")(*call), network(*call))


def test_other_data_are_refused():
    with pytest.raises(ExperimentError, match="the data are NoneType, expected questions"):
        Reading(NETWORK).describe(None)
