"""Laws of the data in words: tokens as published, indices as counted, a cache that is right or made anew."""

import io
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from experiments.__main__ import main
from experiments.core.configs import CONFIGS
from experiments.core.errors import ExperimentError
from experiments.data import Vocabulary, Windows, WordData, WordVocabulary, vocabulary_from
from experiments.data.text import word_sources
from experiments.data.text.detokenise import detokenised
from experiments.data.text.word_encoding import WordText, checksum
from experiments.data.text.word_sources import Part
from experiments.tasks import LanguageModelling
from models import LanguageModel
from multint import Recurrent, RNNCell

pytestmark = pytest.mark.runs

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("MULTINT_DATA") or ROOT.parent / "shared" / "data")
SPLITS = ("train", "valid", "test")
TINY = {"batch_size": 2, "length": 3}


def ready(**settings):
    data = WordData(**settings)
    data.prepare_data()
    data.setup()
    return data


def words_of(data, split):
    """The words of a split, after the `<eos>` that its first word is predicted from."""
    first, *words = [data.vocabulary.words[i] for i in data._streams[split].tolist()]
    assert first == "<eos>"
    return words


def published(text):
    """The words of a text as the published results have them, by Python's own reading of lines."""
    text = text.removeprefix("\ufeff")
    return [word for line in io.StringIO(text, newline=None) for word in [*line.split(), "<eos>"]]


def caches(folder):
    return sorted(folder.rglob("words-*"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """The user's cache folder, for what cannot be written beside the text."""
    folder = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.setattr("experiments.data.text.word_data.pooch.os_cache", lambda name: folder / name)
    return folder


@pytest.fixture
def split(tmp_path):
    """A directory that holds a split, of which valid and test have words that train has not."""
    folder = tmp_path / "split"
    folder.mkdir()
    texts = {"train": "a b a c\n\nb a <unk> d\n" * 5, "valid": "a b\n\nnew c\n", "test": "d d other\n"}
    for name, text in texts.items():
        (folder / f"wiki.{name}.tokens").write_text(text)
    return folder


# Tokens


@pytest.mark.skipif(not (DATA / "ptb").is_dir(), reason=f"no Penn Treebank at {DATA / 'ptb'}: set MULTINT_DATA")
def test_penn_treebank_has_the_published_tokens_and_vocabulary(tmp_path):
    (tmp_path / "ptb").mkdir()
    for name in SPLITS:  # links, since the cache is written beside them
        (tmp_path / "ptb" / f"ptb.{name}.txt").symlink_to(DATA / "ptb" / f"ptb.{name}.txt")
    data = ready(root=str(tmp_path))
    assert [len(words_of(data, name)) for name in SPLITS] == [929_589, 73_760, 82_430]
    assert len(data.vocabulary) == 10_000
    assert data.vocabulary.words[:3] == ("the", "<unk>", "<eos>")
    assert words_of(data, "test") == published((DATA / "ptb" / "ptb.test.txt").read_text())
    assert sum(batch.targets.numel() for batch in data.test_dataloader()) == 82_430
    assert caches(tmp_path / "ptb")


@pytest.mark.skipif(
    not (DATA / "wikitext-2").is_dir(), reason=f"no WikiText-2 at {DATA / 'wikitext-2'}: set MULTINT_DATA"
)
def test_wikitext_2_has_the_published_tokens(tmp_path):
    for name, file in (("train", "valid"), ("valid", "valid"), ("test", "test")):  # its training text is not at hand
        (tmp_path / f"wiki.{name}.tokens").symlink_to(DATA / "wikitext-2" / f"{file}.txt")
    data = ready(path=str(tmp_path))
    assert [len(words_of(data, name)) for name in ("valid", "test")] == [217_646, 245_569]
    assert words_of(data, "valid") == published((DATA / "wikitext-2" / "valid.txt").read_text(encoding="utf-8"))


blanks = st.sampled_from(
    ["\ufeff", " ", "\n", "\r", "\r\n", "\t", "\u00a0", "\u2028", "\x0b", "é", "<unk>", "<eos>", "ab"]
)


@given(st.lists(st.text() | blanks).map("".join), st.integers(1, 9))
def test_words_are_what_published_scripts_split(text, block):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(word_sources, "_BLOCK", block)
        path = Path(folder) / "text.txt"
        path.write_text(text, encoding="utf-8", newline="")
        read = WordText([Part(path), Part(path)])
        assert [word for words in read for word in words] == 2 * published(text)
        assert read.checksum == checksum([Part(path), Part(path)])


# Vocabulary

texts = st.lists(st.sampled_from([*"abcdefgh", "<unk>", "\n"]), min_size=8).map(" ".join)


@given(texts, texts, st.none() | st.integers(3, 9), st.integers(1, 3))
def test_the_vocabulary_is_that_of_the_training_text_by_falling_counts(train, valid, max_vocabulary, min_count):
    with tempfile.TemporaryDirectory() as folder:
        for name, text in (("train", train), ("valid", valid), ("test", valid)):
            (Path(folder) / f"{name}.txt").write_text(text)
        settings = {"max_vocabulary": max_vocabulary, "min_count": min_count, "path": folder}
        source, words = WordData(**settings)._read()
    counts = Counter(published(train))
    others = sorted(counts.keys() - {"<unk>", "<eos>"}, key=lambda word: (-counts[word], word))
    kept = {word for word in others if counts[word] >= min_count}
    kept = {word for word in others[: max_vocabulary and max_vocabulary - 2] if word in kept} | {"<unk>", "<eos>"}
    assert set(words.vocabulary.words) == kept
    for split, text in (("train", train), ("valid", valid), ("test", valid)):
        expected = [word if word in kept else "<unk>" for word in published(text)]
        assert [words.vocabulary.words[i] for i in words.streams[split].tolist()] == ["<eos>", *expected]
        assert words.unknown[split] == expected.count("<unk>")
    got = words.streams["train"][1:].bincount(minlength=len(kept)).tolist()
    assert got == sorted(got, reverse=True)
    assert not source.is_cut


def test_a_stored_vocabulary_of_any_kind_is_the_same():
    for vocabulary in (WordVocabulary(["<eos>", "the", "<unk>", "é"]), Vocabulary("ab"), Vocabulary(b"ab")):
        file = io.BytesIO()
        torch.save(vocabulary.state_dict(), file)
        file.seek(0)
        assert vocabulary_from(torch.load(file, weights_only=True)) == vocabulary


def test_a_vocabulary_of_wikitext_103_is_small_in_a_checkpoint():
    vocabulary = WordVocabulary(["<eos>", "<unk>", *(f"word{i}" for i in range(267_733))])
    state = vocabulary.state_dict()
    assert isinstance(state["symbols"], str), "a list of as many words takes torch.load seconds"
    assert len(state["symbols"]) < 4e6
    assert WordVocabulary.from_state_dict(state) == vocabulary
    assert vocabulary.encode("word9 <unk>\nword267732").tolist() == [11, 1, 0, 267_734]


@pytest.mark.parametrize("words", [["a", "<eos>"], ["a", "<unk>"], ["a", "a", "<eos>", "<unk>"], ["a b"], [""]])
def test_words_that_are_no_vocabulary_are_refused(words):
    with pytest.raises(ExperimentError, match="WordVocabulary: "):
        WordVocabulary(words if len(words) > 1 else [*words, "<eos>", "<unk>"])


# Cache


def test_a_text_is_encoded_once_for_the_same_content_and_settings(split):
    first = ready(path=str(split), **TINY)
    [cache] = caches(split)
    written = cache.stat().st_mtime_ns
    second = ready(path=str(split), **TINY | {"length": 2})
    assert (caches(split), cache.stat().st_mtime_ns) == ([cache], written)
    assert second.vocabulary == first.vocabulary
    assert_close(second._streams, first._streams)
    ready(path=str(split), min_count=6, **TINY)
    assert len(caches(split)) == 2
    (split / "wiki.test.tokens").write_text("d a other\n")
    assert words_of(ready(path=str(split), **TINY), "test") == ["d", "a", "<unk>", "<eos>"]
    assert len(caches(split)) == 3


@pytest.mark.parametrize("damage", ["empty", "short", "header", "index", "word", "checksum", "foreign"])
def test_a_damaged_cache_is_made_anew(split, damage):
    streams = {name: stream.clone() for name, stream in ready(path=str(split), **TINY)._streams.items()}
    [cache] = caches(split)
    whole = cache.read_bytes()
    place = {"header": whole.index(b"55"), "index": 1025, "word": len(whole) - 66, "checksum": len(whole) - 1}
    if damage in place:
        i = place[damage]
        cache.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
    else:
        cache.write_bytes({"empty": b"", "short": whole[:-5], "foreign": b"{}" * 2000}[damage])
    again = ready(path=str(split), **TINY)
    assert caches(split) == [cache]
    assert cache.read_bytes() == whole
    assert_close(again._streams, streams)


def test_a_folder_that_cannot_be_written_leaves_the_users_own(split, elsewhere):
    (split / ".multint-cache").write_text("")  # permissions would not stop a superuser
    data = ready(path=str(split), **TINY)
    [cache] = caches(elsewhere)
    assert words_of(data, "test") == ["d", "d", "<unk>", "<eos>"]
    cache.unlink()
    cache.parent.rmdir()
    cache.parent.write_text("")
    with pytest.raises(ExperimentError, match=r"cannot be kept: .*\. Make room, or .*folders writable: .*cache.*words"):
        ready(path=str(split), **TINY)


CHILD = """
import resource, sys
from experiments.data import WordData

print("imported", flush=True)
input()  # both begin at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = WordData(path=sys.argv[1])
data.prepare_data()
data.setup()
print(len(data._streams["train"]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is told in KiB on Linux alone")
def test_two_processes_encode_a_text_at_once_and_in_little_memory(tmp_path):
    lines = "".join(f"word{i} is one of the words \n" for i in range(30_000))
    (tmp_path / "train.txt").write_text(12 * lines)
    for name in ("valid", "test"):
        (tmp_path / f"{name}.txt").write_text(lines)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([sys.executable, "-c", CHILD, tmp_path], cwd=ROOT, **pipes) for _ in range(2)]
    for child in children:
        assert child.stdout.readline() == "imported\n"
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    for child in children:
        out, errors = child.communicate()
        assert child.returncode == 0, errors
        tokens, kib = map(int, out.split())
        assert tokens == 1 + 12 * 30_000 * 7
        assert kib < 100_000, "a list of all words takes some 140,000"
    assert len(caches(tmp_path)) == 1
    assert not list(tmp_path.rglob("*.part"))


# Windows


def test_windows_read_the_mapped_file_and_copy_no_text(split):
    data = ready(path=str(split), **TINY)
    stream = data._streams["train"]
    assert stream.dtype == torch.int32
    windows = data.train_dataloader()
    assert windows._inputs.untyped_storage().data_ptr() == stream.untyped_storage().data_ptr()
    assert windows._targets.untyped_storage().data_ptr() == stream.untyped_storage().data_ptr()
    ranks = [Windows(stream, 2, 3, rank=rank, processes=2) for rank in range(2)]
    for whole, *parts in zip(windows, *ranks, strict=True):
        assert_close(torch.cat([part.inputs for part in parts], 1), whole.inputs)
        assert_close(torch.cat([part.targets for part in parts], 1), whole.targets)


# Where texts lie


def test_a_file_is_cut_at_ends_of_lines(tmp_path):
    lines = [f"line {i:02} of twenty\n" for i in range(20)]
    (tmp_path / "text.txt").write_text("".join(lines))
    with pytest.warns(UserWarning, match="<unk>, which training has none of"):
        data = ready(path=str(tmp_path / "text.txt"), valid=0.2, test=0.3, **TINY)
    cuts = [lines[:10], lines[10:14], lines[14:]]
    known = set(published("".join(cuts[0])))
    for name, part in zip(SPLITS, cuts, strict=True):
        assert words_of(data, name) == [w if w in known else "<unk>" for w in published("".join(part))]


def test_a_text_without_lines_is_cut_at_words(tmp_path):
    (tmp_path / "text.txt").write_text("word " * 1000)
    data = ready(path=str(tmp_path / "text.txt"), valid=0.1003, test=0.1, **TINY)
    assert all(set(words_of(data, name)) == {"word", "<eos>"} for name in SPLITS)
    assert sum(len(words_of(data, name)) for name in SPLITS) == 1003


def test_a_directory_without_a_split_is_joined_by_path(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_bytes(b"a b\r\n" * 30)
    (tmp_path / "b" / "a.txt").write_text("b a\n" * 30 + "a")
    (tmp_path / "notes.md").write_bytes(b"\xff")
    data = ready(path=str(tmp_path), valid=0.3, test=0.1, **TINY)
    whole = [word for name in SPLITS for word in words_of(data, name)]
    assert whole == published("a b\n" * 30 + "b a\n" * 30 + "a")


@pytest.mark.parametrize("names", ["ptb.{}.txt", "{}.txt", "wiki.{}.raw", "{}", "my-text_{}_1.tokens"])
@pytest.mark.parametrize("valid", ["valid", "val", "dev", "validation"])
def test_a_split_is_known_by_its_names(tmp_path, names, valid):
    for name in ("train", valid, "test"):
        (tmp_path / names.format(name)).write_text(f"{name.replace(valid, 'valid')}\n")
    (tmp_path / "other.char.test.txt").write_text("of no whole split\n")
    (tmp_path / "README.md").write_text("not read\n")
    source = word_sources.at(tmp_path, 0.1, 0.1)
    assert not source.is_cut
    for split, [part] in source.splits.items():
        assert b"".join(part.blocks()).decode() == f"{split}\n"


# Mistakes


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        ({}, {}, r"holds no \*\.txt file"),
        ({"train.txt": "a", "test.txt": "a"}, {}, "but there is no valid.txt. Add what is missing"),
        ({"valid.txt": "a"}, {}, "valid.txt is a part of a split by its name, but there is no train.txt, test.txt"),
        ({f"{n}.txt": "a" for n in ("train", "valid", "dev", "test")}, {}, "more than one split: .*dev.txt"),
        ({"a.txt": ""}, {}, "the training text is empty, expected words"),
        ({"a.txt": "\n \n" * 99}, {}, "the training text is empty, expected words"),
        (
            {"a.txt": "a a a a"},
            {},
            r"to train on, expected at least 6: .*Lower --data.batch_size or --data.length",
        ),
        ({"a.txt": "a b c d\n" * 9}, {"min_count": 50}, r"No word occurs --data.min_count=50 times: lower it"),
        (
            {"a.txt": "a b\n" * 20},
            {"eval_batch_size": 9},
            r"\d words held out by --data.valid, .*Raise --data.valid",
        ),
        (
            {"train.txt": "a b\n" * 9, "valid.txt": "", "test.txt": "a"},
            {},
            "0 words in the valid text, expected at least 1. Use a longer text",
        ),
        ({"a.txt": b"good\n" * 9 + b"go\xffod" * 9}, {}, r"a.txt: byte 0xff at offset 47 is not UTF-8.*Convert"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(tmp_path, monkeypatch, files, settings, message):
    monkeypatch.setattr(word_sources, "_BLOCK", 7)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ExperimentError, match=message) as error:
        ready(path=str(tmp_path), **TINY, **settings)
    assert str(tmp_path) in str(error.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ExperimentError, match=r"no such file or directory\. Check --data.path"):
        ready(path=str(tmp_path / "text.txt"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_vocabulary": 2}, "--data.max_vocabulary: got 2, expected at least 3"),
        ({"min_count": 0}, "--data.min_count: got 0, expected at least 1"),
        ({"batch_size": 0}, "--data.batch_size: got 0"),
        ({"valid": 0.5, "test": 0.5}, "whose sum is below 1"),
        ({"path": ""}, "--data.path: got an empty text"),
    ],
)
def test_a_setting_out_of_range_is_refused_at_construction(settings, message):
    with pytest.raises(ExperimentError, match=message):
        WordData(**settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"path": "text.txt", "root": "data"}, "--data.root"),
        ({"valid": 0.1}, "--data.valid"),
    ],
)
def test_a_setting_without_effect_warns(settings, named):
    with pytest.warns(UserWarning, match=f"{named}.*: no effect"):
        WordData(**settings)


def test_fractions_of_a_text_with_a_split_warn(split):
    with pytest.warns(UserWarning, match="--data.valid.*no effect together with a directory that holds a split"):
        ready(path=str(split), valid=0.2, **TINY)


# Writing


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("<eos> = Title = <eos> It was , he said , late . <eos>", "\n= Title =\nIt was, he said, late.\n"),
        ("a state @-@ of @-@ the @-@ art 1 @,@ 000 @.@ 5 % share", "a state-of-the-art 1,000.5% share"),
        ('the " red lobster " ( or " blue " ) ; it does n\'t', 'the "red lobster" (or "blue"); it doesn\'t'),
        ("a share of $ N million , the company 's <unk>", "a share of $N million, the company's <unk>"),
        ('open " quote <eos> " next "', 'open "quote\n"next"'),
        ("cities\\/abc 5 – 6", "cities/abc 5 – 6"),
    ],
)
def test_words_are_put_together_as_one_writes_them(words, text):
    assert detokenised(words.split()) == text


def writer(*words):
    torch.manual_seed(0)
    task = LanguageModelling(lambda size: LanguageModel(size, lambda x: Recurrent(x, 4, RNNCell), 4))
    task.use({"vocabulary": WordVocabulary(words).state_dict()}, "the test's")
    return task


def test_unk_is_drawn_only_when_asked():
    task = writer("the", "<unk>", ",", "<eos>")
    with torch.no_grad():
        task.network.decoder.bias[1] = 50.0  # nearly certain
    assert "<unk>" not in task.text("the ,", 50)
    assert task.text("the ,", 3, unk=True) == "the, <unk> <unk> <unk>"
    assert task.text("<unk>", 5).count("<unk>") == 1
    for blank in ("", "  "):
        assert len(task.text(blank, 5, temperature=0.0)) > 0


@pytest.mark.parametrize("word", ["The", "thee,"])
def test_a_prompt_with_a_word_outside_the_vocabulary_is_refused(word):
    message = rf"'{word}' is not among the 5 words.*Did you mean 'the'\?.*<unk> stands"
    with pytest.raises(ExperimentError, match=message):
        writer("he", "the", "<unk>", ",", "<eos>").text(f"the {word}", 1)


def test_words_train_as_awd_lstm_does_and_write_by_config(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the cat , which sat on the mat .\n" * 200)
    stack = "{hidden_size: 8, cell: LSTMCell, num_layers: 2, input_dropout: 0.2, state_dropout: 0.2, weight_drop: 0.5}"
    network = f"{{embedding_size: 8, output: Bilinear, locked: true, word_dropout: 0.1, recurrent: {stack}}}"
    optimizer = "{class_path: ASGD, init_args: {lr: 1, lambd: 0, weight_decay: 1.0e-6}}"
    schedule = "activation_penalty: 2, change_penalty: 1, average_after: 1"
    model = f"model: {{network: {network}, optimizer: {optimizer}, {schedule}}}"
    base = ["fit", "--config", str(CONFIGS / "words/_task.yaml"), "--config", model]
    options = [f"--data.path={text}", f"--trainer.default_root_dir={tmp_path}", "--data.batch_size=4"]
    trainer = [
        "max_steps=5",
        "val_check_interval=2",
        "precision=bf16-mixed",
        "accelerator=cpu",
        "enable_model_summary=false",
    ]
    assert main([*base, *options, *(f"--trainer.{option}" for option in trainer)]) == 0
    assert "validation perplexity" in capsys.readouterr().out
    checkpoint = str(tmp_path / "run/version_0/checkpoints/last.ckpt")
    assert main(["sample", checkpoint, "--prompt=the cat ,", "--length=20"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("the cat,")
    assert "<unk>" not in out
