"""Laws of the text data: vocabularies are bijections, windows cover their text once, resumed passes are the same."""

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer

from experiments.core.errors import ExperimentError
from experiments.core.module import DataModule
from experiments.data import TextData, Vocabulary, Windows
from experiments.data.text import corpora

DATA = Path(os.environ.get("MULTINT_DATA") or Path(__file__).parents[2] / "shared" / "data")
PTB_STREAMS = {
    "train": (5_017_482, "5145926136ee9aef6f359b267ac09cc8a920879cd71725de17c490dd111d2998"),
    "valid": (393_042, "fadf6277290823f881b7bf39b84e88536c87a859cd629dcfd1d2dfdef06097cf"),
    "test": (442_423, "c2f8c16a611595d31da5acdb7a61d50e7d5e95f6b9c05fceda5f5ddc4383e791"),
}

texts = st.text(min_size=1) | st.binary(min_size=1)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 60))  # B, T, symbols beyond B


def ready(**settings: object) -> TextData:
    data = TextData(**settings)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup()
    return data


def windows_of(batch_size: int, length: int, extra: int) -> tuple[torch.Tensor, Windows]:
    ids = torch.arange(batch_size + extra, dtype=torch.int16)
    return ids, Windows(ids, batch_size, length)


# Vocabulary


@given(texts)
def test_decoding_undoes_encoding(text: str | bytes) -> None:
    vocabulary = Vocabulary.of(text)
    ids = vocabulary.encode(text)
    assert (ids.dtype, len(ids)) == (torch.int64, len(text))
    assert vocabulary.decode(ids) == (text if isinstance(text, str) else text.decode("utf-8", errors="replace"))
    torch.testing.assert_close(vocabulary.encode_compact(text).long(), ids)


@given(texts)
def test_indices_are_the_ranks_of_the_symbols(text: str | bytes) -> None:
    vocabulary = Vocabulary.of(text)
    assert list(vocabulary.symbols) == sorted(set(text))
    torch.testing.assert_close(vocabulary.encode(text), torch.tensor([vocabulary.symbols.index(s) for s in text]))


@given(texts)
def test_a_stored_vocabulary_is_the_same(text: str | bytes) -> None:
    vocabulary, file = Vocabulary.of(text), io.BytesIO()
    torch.save(vocabulary.state_dict(), file)
    file.seek(0)
    assert Vocabulary.from_state_dict(torch.load(file, weights_only=True)) == vocabulary


def test_a_long_text_is_encoded_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "abc😀" * 25
    whole = Vocabulary.of(text).encode(text)
    monkeypatch.setattr("experiments.data.text.vocabulary._CHUNK", 7)
    torch.testing.assert_close(Vocabulary.of(text).encode(text), whole)
    with pytest.raises(ExperimentError, match="'z'"):
        Vocabulary.of(text).encode(text + "z")


def test_more_than_256_symbols_are_stored() -> None:
    text = "".join(map(chr, range(40, 40_040)))
    text = text.encode("utf-8", "ignore").decode()  # without surrogates
    vocabulary = Vocabulary.of(text)
    torch.testing.assert_close(vocabulary.encode(text), torch.arange(len(vocabulary)))


def test_a_byte_vocabulary_reads_a_str_as_utf8() -> None:
    assert Vocabulary(range(256)).decode(Vocabulary(range(256)).encode("é€")) == "é€"


@pytest.mark.parametrize("stranger", ["z", "\U0010ffff", "\0"])
def test_an_unknown_symbol_is_named(stranger: str) -> None:
    with pytest.raises(ExperimentError, match="not among the 2 characters") as error:
        Vocabulary("ab").encode("ab" + stranger)
    assert repr(stranger) in str(error.value)


@pytest.mark.parametrize("symbols", [[], "aa", ["ab"], [256], ["a", 1]])
def test_symbols_that_are_no_vocabulary_are_refused(symbols: list[str]) -> None:
    with pytest.raises(ExperimentError, match="Vocabulary: "):
        Vocabulary(symbols)


def test_bytes_are_no_characters() -> None:
    with pytest.raises(ExperimentError, match="expected characters"):
        Vocabulary("ab").encode(b"ab")


# Windows


@given(shapes)
def test_every_symbol_but_the_first_is_predicted_once(shape: tuple[int, int, int]) -> None:
    ids, windows = windows_of(*shape)
    targets = torch.cat([batch.targets.flatten() for batch in windows]).sort().values
    torch.testing.assert_close(targets, torch.arange(1, 1 + len(targets)))
    assert 0 <= len(ids) - 1 - len(targets) < shape[0]


@given(shapes)
def test_windows_are_contiguous_in_every_stream(shape: tuple[int, int, int]) -> None:
    batch_size, length, _ = shape
    _, windows = windows_of(*shape)
    batches = list(windows)
    assert len(batches) == len(windows)
    assert [batch.starts for batch in batches] == [True] + [False] * (len(batches) - 1)
    assert all(batch.inputs.shape == (length, batch_size) for batch in batches[:-1])
    assert all(batch.inputs.is_contiguous() and batch.inputs.dtype == torch.int64 for batch in batches)
    inputs, targets = torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches])
    first = torch.arange(batch_size) * len(inputs)
    torch.testing.assert_close(inputs, first + torch.arange(len(inputs))[:, None])
    torch.testing.assert_close(targets, inputs + 1)


@given(shapes, st.integers(0, 60))
def test_a_resumed_pass_is_the_uninterrupted_one(shape: tuple[int, int, int], position: int) -> None:
    _, windows = windows_of(*shape)
    whole = list(windows)
    position %= len(whole) + 1
    interrupted = iter(windows)
    for _ in range(position):
        next(interrupted)
    _, resumed = windows_of(*shape)
    iter(resumed)  # as Lightning does before it loads
    resumed.load_state_dict(windows.state_dict())
    assert resumed.state_dict() == windows.state_dict()
    # A pass that was over starts anew; so does every pass after the resumed one.
    for batches in (whole[position % len(whole) :], whole):
        torch.testing.assert_close(list(resumed), batches)


def test_iterators_do_not_disturb_each_other() -> None:
    _, windows = windows_of(2, 3, 20)
    for one, other in zip(windows, windows, strict=True):
        torch.testing.assert_close(one, other)


def test_a_state_of_other_sizes_is_refused() -> None:
    with pytest.raises(ExperimentError, match=r"saved with stream=10, batch_size=2, length=3, got .*length=4"):
        Windows(torch.arange(21), 2, 4).load_state_dict(Windows(torch.arange(21), 2, 3).state_dict())


@pytest.mark.parametrize(("symbols", "batch_size", "length"), [(0, 1, 1), (1, 1, 1), (4, 4, 1), (9, 0, 1), (9, 1, 0)])
def test_windows_without_a_target_are_refused(symbols: int, batch_size: int, length: int) -> None:
    with pytest.raises(ExperimentError, match="expected at least"):
        Windows(torch.arange(symbols), batch_size, length)


# Resuming under Lightning


class Recorder(LightningModule):
    """Trains on nothing and remembers which batches it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.inputs[0].tolist())
        return self.weight * 1

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Saver(Callback):
    """Saves at every hook that a checkpoint callback saves at, with the number of batches seen by then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: list[tuple[Path, int]] = []

    def save(self, trainer, module, *_) -> None:
        path = self.folder / f"{len(self.saved)}.ckpt"
        trainer.save_checkpoint(path)
        self.saved.append((path, len(module.seen)))

    on_train_batch_end = on_validation_end = on_train_epoch_end = on_train_end = save


@pytest.mark.parametrize("limit", [{"max_epochs": 2}, {"max_epochs": -1, "max_steps": 9}], ids=["epochs", "steps"])
@pytest.mark.parametrize("limit_val_batches", [1.0, 0], ids=["validated", "unvalidated"])
@pytest.mark.parametrize("limit_train_batches", [1.0, 2], ids=["whole", "limited"])
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # Lightning's use of torch
def test_training_resumed_anywhere_sees_the_same_batches(
    tmp_path: Path, limit: dict[str, int], limit_val_batches: float, limit_train_batches: float
) -> None:
    def fit(callbacks: list[Callback], checkpoint: Path | None = None) -> list[list[int]]:
        module = Recorder()
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=limit_val_batches,
            limit_train_batches=limit_train_batches,
            callbacks=callbacks,
            **limit,
        )
        data = TextData(path=str(text), batch_size=2, length=10)
        trainer.fit(module, DataModule(data), ckpt_path=checkpoint, weights_only=True)
        return module.seen

    text = tmp_path / "text.txt"
    text.write_text("".join(map(chr, range(33, 123))))
    saver = Saver(tmp_path)
    whole = fit([saver])
    for path, seen in saver.saved:
        assert fit([], path) == whole[seen:], path


# Texts


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_bytes(b"first\r\n" * 100)
    (tmp_path / "b" / "a.txt").write_bytes("zweiß\n".encode() * 100)
    (tmp_path / "b" / "ignored.md").write_bytes(b"\xff")
    return tmp_path


def test_a_directory_is_joined_by_path_and_not_altered(folder: Path) -> None:
    whole = "first\r\n" * 100 + "zweiß\n" * 100
    data = ready(path=str(folder), batch_size=1, length=10, valid=0.1, test=0.2)
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    cuts = [0, round(0.7 * len(whole)), round(0.8 * len(whole)), len(whole)]
    for loader, start, stop in zip(loaders, cuts[:-1], cuts[1:], strict=True):
        ids = torch.cat([batch.targets[:, 0] for batch in loader])
        assert data.vocabulary.decode(ids) == whole[start + 1 : stop]


def test_a_byte_order_mark_is_no_symbol(folder: Path) -> None:
    for name in ("a.txt", "b/a.txt"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert ready(path=str(folder), batch_size=1, length=10).vocabulary == Vocabulary.of("first\r\nzweiß\n")


def test_bytes_of_a_file_are_its_own(folder: Path) -> None:
    data = ready(path=str(folder / "b" / "a.txt"), unit="bytes", batch_size=1, length=10)
    assert bytes(data.vocabulary.symbols) == bytes(sorted(set("zweiß\n".encode())))


@pytest.mark.parametrize("unit", ["characters", "bytes"])
def test_the_default_text_needs_no_download(unit: str) -> None:
    data = ready(unit=unit)
    assert data.vocabulary.unit == unit
    assert next(iter(data.train_dataloader())).inputs.shape == (50, 32)
    assert next(iter(data.val_dataloader())).inputs.shape == (500, 1)


def test_evaluation_does_not_depend_on_the_window() -> None:
    def stream(length: int) -> torch.Tensor:
        return torch.cat([batch.targets for batch in ready(eval_length=length).test_dataloader()])

    torch.testing.assert_close(stream(500), stream(77))


def test_a_config_builds_it() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TextData, "data")
    config = parser.parse_args(["--data.batch_size=4", "--data.unit=bytes", "--data.path=null"])
    assert parser.instantiate(config).data.batch_size == 4


@pytest.mark.skipif(not (DATA / "ptb").is_dir(), reason=f"no Penn Treebank at {DATA / 'ptb'}: set MULTINT_DATA")
def test_penn_treebank_is_the_published_character_stream() -> None:
    data = ready(corpus="ptb", root=str(DATA))
    assert len(data.vocabulary) == 50
    splits = corpora.load("ptb", DATA)
    for name, text in splits._asdict().items():
        assert (len(text), hashlib.sha256(text.encode()).hexdigest()) == PTB_STREAMS[name]
    assert sum(batch.targets.numel() for batch in data.test_dataloader()) == PTB_STREAMS["test"][0] - 1


# Mistakes


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        (None, {}, "no such file or directory"),
        (b"", {}, "empty, expected text"),
        (b"", {"unit": "bytes"}, "empty, expected text"),
        (
            b"short",
            {},
            r"4 symbols to train on, expected at least 1600: .*Lower --data.batch_size or --data.length",
        ),
        (
            b"x" * 2000,
            {"valid": 1e-4},
            r"0 symbols held out by --data.valid, expected at least 1. Raise --data.valid",
        ),
        (
            b"x" * 2000,
            {"test": 1e-3, "eval_batch_size": 2},
            r"1 symbols held out by --data.test, expected at least 2",
        ),
        (b"good\xffbad", {}, r"byte 0xff at offset 4 is not UTF-8.*--data.unit=bytes"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(
    tmp_path: Path, content: bytes | None, settings: dict[str, float], message: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExperimentError, match=message) as error:
        ready(path=str(path), **settings)
    assert str(path) in str(error.value)


def test_a_directory_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("text")
    with pytest.raises(ExperimentError, match=r"holds no \*\.txt file"):
        ready(path=str(tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "--data.batch_size: got 0, expected at least 1"),
        ({"length": -1}, "--data.length: got -1, expected at least 1"),
        ({"eval_batch_size": 0}, "--data.eval_batch_size: got 0"),
        ({"eval_length": 0}, "--data.eval_length: got 0"),
        ({"valid": 0.0}, "got 0.0 and 0.05, expected fractions above 0"),
        ({"test": -0.1}, "got 0.05 and -0.1, expected fractions above 0"),
        ({"valid": 0.5, "test": 0.5}, "whose sum is below 1"),
        ({"valid": float("nan")}, "expected fractions above 0"),
        ({"corpus": "enwik8", "unit": "characters"}, "enwik8 is split by bytes"),
    ],
)
def test_a_setting_out_of_range_is_refused_at_construction(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ExperimentError, match=message):
        TextData(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"path": "text.txt", "root": "data"}, "--data.root"),
        ({"root": "data"}, "--data.root"),
        ({"corpus": "ptb", "valid": 0.1}, "--data.valid"),
    ],
)
def test_a_setting_without_effect_warns(settings: dict[str, str], named: str) -> None:
    with pytest.warns(UserWarning, match=f"{named}.*: no effect"):
        TextData(**settings)  # type: ignore[arg-type]


def test_the_vocabulary_is_not_there_before_setup() -> None:
    with pytest.raises(RuntimeError, match="call setup"):
        TextData().vocabulary  # noqa: B018
