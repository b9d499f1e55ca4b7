"""Speech: recordings become features and labels, a network learns them, and greedy decoding is scored."""

import csv
import io
import itertools
import json
import math
import random
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer, seed_everything
from torch.testing import assert_close

from experiments.__main__ import main
from experiments.core.callbacks import RandomState
from experiments.core.errors import ExperimentError
from experiments.core.loading import load_task
from experiments.core.module import DataModule, StreamMeans, TaskModule
from experiments.core.run_folder import RunFolder
from experiments.core.saving import Checkpoints
from experiments.core.trust import trusting
from experiments.data import AN4, Labelling, Recordings, Units, YesNo
from experiments.data.buckets import Buckets
from experiments.data.speech.audio import read_audio
from experiments.data.speech.batches import Batch, Utterance, collated
from experiments.data.speech.features import FrontEnd, log_mel, normalised, stacked, with_deltas
from experiments.data.speech.manifests import read_manifest
from experiments.data.speech.units import read_lexicon
from experiments.decoding import WFST, Greedy, align, alignment
from experiments.tasks import Speech
from models import AcousticModel
from multint import GRU

WORDS = {"GO": ["G OW"], "NO": ["N OW"], "ON": ["AA N", "AO N"]}
NETWORK = partial(AcousticModel, recurrent=partial(GRU, hidden_size=8, bidirectional=True, engine="loop"))
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


# AN4's files, with 9 + 1 speakers of two utterances each


@pytest.fixture(scope="session")
def an4(tmp_path_factory):
    """A corpus in AN4's format, unpacked: every word has its own frames."""
    root = tmp_path_factory.mktemp("corpus")
    lexicon = [
        f"{word}({i})  {one}" if i > 1 else f"{word}  {one}" for word in WORDS for i, one in enumerate(WORDS[word], 1)
    ]
    (root / "an4/etc").mkdir(parents=True)
    (root / "an4/etc/an4.dic").write_text("\n".join(lexicon))
    generator = np.random.default_rng(0)
    for split, speakers in {"train": "abcdefghi", "test": "z"}.items():
        ids, transcripts = [], []
        for speaker, take in itertools.product(speakers, "12"):
            words = generator.choice(list(WORDS), 2)
            name = f"an4_{split}/f{speaker}/{take}-{speaker}"
            frames = np.repeat([[list(WORDS).index(word) + 1.0] * 13 for word in words], 12, axis=0)
            path = root / "an4/feat" / f"{name}.mfc"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cepstra(frames + 0.1 * generator.standard_normal(frames.shape)))
            ids.append(name)
            transcripts.append(f"{'  '.join(words)} ({path.stem})")
        (root / f"an4/etc/an4_{split}.fileids").write_text("\n".join(ids))
        (root / f"an4/etc/an4_{split}.transcription").write_text("\n".join(transcripts))
    return root


def cepstra(frames):
    return frames.size.to_bytes(4, "big") + frames.astype(">f4").tobytes()


def data_of(an4, **settings):
    data = AN4(str(an4), **({"stack": 2, "batch_frames": 40, "seed": 0} | settings))
    data.setup()
    return data


def test_an4_is_read_unpacked_and_from_its_archive(an4, tmp_path):
    with tarfile.open(tmp_path / "an4.tar.xz", "w:xz") as archive:
        archive.add(an4 / "an4", "an4")
    unpacked, packed = data_of(an4), data_of(tmp_path)
    assert unpacked.learnt() == packed.learnt()
    for split, speakers in {"train": "abcdfghi", "valid": "e", "test": "z"}.items():
        one, other = unpacked.utterances(split), packed.utterances(split)
        assert [utterance.name for utterance in one] == [f"{n}-{s}" for s in speakers for n in "12"]
        for a, b in zip(one, other, strict=True):
            assert_close(a.features, b.features, rtol=0, atol=0)
            assert a.text == b.text
    assert unpacked.utterances("test")[0].features.shape == (12, 2 * 3 * 13)
    speaker = torch.cat([one.features for one in unpacked.utterances("valid")]).view(-1, 3 * 13)
    assert_close(speaker.mean(0), torch.zeros(39), atol=1e-5, rtol=0)
    assert_close(speaker.std(0, correction=0), torch.ones(39))


def test_cepstra_are_what_the_file_has(an4):
    data = AN4(str(an4), deltas=False, normalise="none", stack=1)
    data.setup()
    first = data.utterances("train")[0]
    raw = np.frombuffer((an4 / "an4/feat/an4_train/fa/1-a.mfc").read_bytes()[4:], ">f4").reshape(-1, 13)
    assert_close(first.features, torch.from_numpy(raw.astype("float32")), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (cepstra(np.ones((3, 13)))[:-4], "156 bytes, expected 160"),
        (cepstra(np.ones(14)), "frames of 13"),
        (cepstra(np.full(13, np.nan)), "no finite numbers"),
    ],
)
def test_a_damaged_file_of_cepstra_is_refused(an4, content, message):
    path = an4 / "an4/feat/an4_test/fz/1-z.mfc"
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        with pytest.raises(ExperimentError, match=message):
            data_of(an4)
    finally:
        path.write_bytes(before)


def test_a_corpus_that_is_not_there_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(ExperimentError, match=r"expected an4/etc and an4/feat, or an4/an4\.tar\.xz"):
        data_of(tmp_path)
    (tmp_path / "an4.tar.gz").write_bytes(b"no archive")
    with pytest.raises(ExperimentError, match="no archive that can be read"):
        data_of(tmp_path)


@pytest.mark.skipif(not (SHARED / "an4").is_dir(), reason="AN4 is not beside the project")
def test_the_published_corpus_has_its_numbers():
    data = AN4(str(SHARED))
    data.setup()
    counts = {split: len(data.utterances(split)) for split in ("train", "valid", "test")}
    assert (counts["train"] + counts["valid"], counts["test"]) == (948, 130)
    assert sum(len(one.text.split()) for one in data.utterances("test")) == 773
    assert "".join(data.learnt()["units"]["symbols"]) == " ABCDEFGHIJKLMNOPQRSTUVWXYZ"


# Units


def test_units_encode_and_decode():
    lexicon = {word: [one.split() for one in pronunciations] for word, pronunciations in WORDS.items()}
    characters = Units.of("characters", ["GO ON", "NO"], None)
    assert characters.symbols == [" ", "G", "N", "O"]
    assert characters.encode("NO ON", "x") == [3, 4, 1, 4, 3]
    assert characters.decode([1, 3, 4, 1, 1, 4, 3, 1]) == "NO ON"
    words = Units.of("words", ["GO ON", "NO"], None)
    assert words.encode("NO GO", "x") == [2, 1]
    assert words.decode([2, 1]) == "NO GO"
    phones = Units.of("phones", [], lexicon)
    assert phones.symbols == ["AA", "AO", "G", "N", "OW"]
    assert phones.reference("ON  GO") == "AA N G OW"
    for units in (characters, words, phones):
        again = Units.from_state(json.loads(json.dumps(units.state_dict())))
        assert vars(again) == vars(units)


@pytest.mark.parametrize(("kind", "what"), [("characters", "'X', not a symbol"), ("words", "'NOX', not a word")])
def test_a_transcript_with_unknown_symbols_is_refused(kind, what):
    units = Units.of(kind, ["GO ON NO"], None)
    with pytest.raises(ExperimentError, match=f"an1: the transcript has {what}"):
        units.encode("NO NOX", "an1")
    with pytest.raises(ExperimentError, match="an1: the transcript is empty"):
        units.encode("", "an1")


def test_phones_need_a_lexicon_that_can_be_read(tmp_path):
    with pytest.raises(ExperimentError, match=r"give --data.lexicon=FILE"):
        Units.of("phones", ["GO"], None)
    path = tmp_path / "lexicon.txt"
    path.write_text("ON AA N\nON(2) AO N\n\nGO G OW\n")
    assert read_lexicon(path) == {"ON": [["AA", "N"], ["AO", "N"]], "GO": [["G", "OW"]]}
    for text, message in {"": "the lexicon is empty", "GO G OW\nON\n": "line 2: 'ON' has no phones"}.items():
        path.write_text(text)
        with pytest.raises(ExperimentError, match=message):
            read_lexicon(path)


def test_labels_are_counted_with_blanks_between_and_around_them():
    labelling = Labelling.of(Units.of("words", ["A B"], None), [[1, 2, 2], [1]], ["A B B", "A"])
    assert labelling.counts == [4 + 2, 2, 2]
    assert vars(Labelling.from_state(labelling.state_dict()).units) == vars(labelling.units)


# Features


def test_slopes_are_those_of_a_line_through_five_frames():
    x = torch.randn(9, 2, dtype=torch.float64)
    features = with_deltas(x)
    assert_close(features[:, :2], x)
    padded = torch.cat([x[:1], x[:1], x, x[-1:], x[-1:]])
    time = torch.arange(-2.0, 3, dtype=torch.float64)
    line = torch.linalg.lstsq(torch.stack([torch.ones(5), time], 1), padded.unfold(0, 5, 1).reshape(-1, 5).T).solution
    assert_close(features[:, 2:4], line[1].view(9, 2))
    assert_close(features[:, 4:], with_deltas(features[:, 2:4])[:, 2:4])


def test_features_are_normalised_and_a_constant_one_is_zero():
    utterances = [torch.randn(5, 3) * 7 + 2, torch.randn(8, 3)]
    for utterance in utterances:
        utterance[:, 2] = 0.1
    whole = torch.cat(normalised(utterances))
    assert_close(whole.mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    assert_close(whole.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]))


def test_frames_are_joined_and_the_last_one_filled():
    frames = torch.arange(10.0).view(5, 2)
    assert_close(stacked(frames, 2), torch.tensor([[0.0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 8, 9]]))
    assert FrontEnd(None, 13, True, "none", 2).width == 78
    with pytest.raises(ExperimentError, match=r"--data.stack: got 0"):
        FrontEnd(stack=0)


# Batches


def test_batches_hold_at_most_so_many_frames_and_every_utterance_once():
    lengths = [random.Random(0).randint(1, 60) for _ in range(100)]
    buckets = Buckets(lengths, 120)
    orders = [buckets.batches(torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    for batches in (*orders, buckets.batches()):
        assert len(batches) == len(buckets)
        assert sorted(itertools.chain(*batches)) == list(range(100))
        assert max(len(batch) * max(lengths[i] for i in batch) for batch in batches) <= 120
        padding = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches) / sum(lengths)
        assert padding < 1.25
    assert orders[0] != orders[1]
    assert Buckets([5, 500], 120).batches() == [[1], [0]], "an utterance too long for a batch is one"


def test_a_batch_is_padded_with_lengths():
    short, long = (Utterance(f"u{n}", torch.ones(n, 2), [1] * (n - 1), "A" * n) for n in (2, 4))
    batch = collated([short, long])
    assert batch.names == ("u4", "u2")
    assert_close(batch.lengths, torch.tensor([4, 2]))
    assert_close(batch.xs.sum((0, 2)), torch.tensor([8.0, 4.0]))
    assert_close(batch.labels, torch.tensor([[1, 1, 1], [1, 0, 0]]))
    assert_close(batch.label_lengths, torch.tensor([3, 1]))


def test_labels_must_have_frames(an4):
    """ON NO has 5 characters, and NO ON 6 frames' worth of them with the blank between equal ones."""
    with pytest.raises(ExperimentError, match=r"labels take \d frames, and it has 4. Lower --data.stack"):
        data_of(an4, stack=6)


# Decoding


def test_greedy_decoding_joins_equal_neighbours_and_leaves_out_blanks():
    greedy = Greedy(Labelling.of(Units.of("characters", ["AB"], None), [], []))
    paths = torch.tensor([[1, 1, 0, 1, 2, 2, 0], [0, 2, 2, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    log_posteriors = torch.nn.functional.one_hot(paths.T, 3).float().log_softmax(-1)
    assert greedy(log_posteriors, torch.tensor([7, 5, 7])) == ["AAB", "B", "A"]


@pytest.mark.parametrize(
    ("reference", "hypothesis", "pairs"),
    [
        ("a b c", "a b c", [("a", "a"), ("b", "b"), ("c", "c")]),
        ("a b c", "a c", [("a", "a"), ("b", None), ("c", "c")]),
        ("a c", "a b c d", [("a", "a"), (None, "b"), ("c", "c"), (None, "d")]),
        ("a b", "a x", [("a", "a"), ("b", "x")]),
        ("", "a", [(None, "a")]),
    ],
)
def test_an_alignment_has_the_fewest_edits(reference, hypothesis, pairs):
    assert align(reference.split(), hypothesis.split()) == pairs


def test_an_alignment_is_printed_one_above_the_other():
    assert alignment("u1", "go to one", "go two one on").splitlines() == [
        "u1: 2 of 3 wrong",
        "  reference   go to  one **",
        "  hypothesis  go two one on",
    ]


def labelled(kind, texts):
    """A task that knows these transcripts, without a network."""
    units = Units.of(kind, texts, {word: [one.split() for one in WORDS[word]] for word in WORDS})
    task = Speech(NETWORK, metric="loss")
    task.labelling = Labelling.of(units, [units.encode(text, "x") for text in texts], texts)
    return task


def test_errors_are_exact_over_batches():
    task, means = labelled("characters", ["GO ON", "NO"]), StreamMeans()
    means.update(task._errors("", ["NO ON NO"], ["GO ON"], finds_words=True))
    means.update(task._errors("", ["GO", "ON NO"], ["NO", "ON NO"], finds_words=False))
    scores = means.compute()
    assert_close(scores["wer"], torch.tensor(3 / 5))
    assert_close(scores["cer"], torch.tensor((1 + 3 + 1) / 12))
    phones = labelled("phones", ["GO"])._errors("", ["N AO N"], ["ON GO"], finds_words=False)
    assert_close(phones["per"].value, torch.tensor(3 / 4))
    assert list(phones) == ["per"]
    words = labelled("phones", ["GO"])._errors("wfst_", ["ON"], ["ON GO"], finds_words=True)
    assert_close(words["wfst_wer"].value, torch.tensor(1 / 2))


def test_phones_are_compared_with_phones_by_whatever_greedy_decoder():
    task = labelled("phones", ["ON GO"])
    task.build_decoder = Greedy
    labels = task.labelling.units.encode("ON GO", "x")
    posteriors = torch.nn.functional.one_hot(torch.tensor([labels]).T, len(task.labelling.units)).float()
    task.network = lambda xs, lengths=None: (20 * posteriors).log_softmax(-1)
    count = torch.tensor([len(labels)])
    batch = Batch(torch.zeros(len(labels), 1, 1), count, torch.tensor([labels]), count, ("ON GO",), ("one",))
    scores = task.measure(batch, "test")
    assert {name: mean.value.item() for name, mean in scores.items() if name != "loss"} == {"per": 0, "greedy_per": 0}
    assert task.show().splitlines()[0] == "one: 0 of 4 wrong"


def test_the_metric_must_be_one_of_the_unit(an4):
    data = data_of(an4, unit="phones")
    with pytest.raises(ExperimentError, match="got wer for labels that are phones, expected per or loss"):
        Speech(NETWORK).build(data.learnt())


# The network and the task


def test_the_models_posteriors_do_not_depend_on_the_padding():
    torch.manual_seed(0)
    model = NETWORK(3, 4).double()
    xs = torch.randn(7, 2, 3, dtype=torch.float64)
    both = model(xs, torch.tensor([7, 5]))
    assert_close(both.exp().sum(-1), torch.ones(7, 2, dtype=torch.float64))
    assert_close(both[:, 0], model(xs[:, :1])[:, 0])
    assert_close(both[:5, 1], model(xs[:5, 1:])[:, 0])


def test_the_loss_is_that_of_all_paths():
    """−log of the summed probability of every path that comes to the labels, by enumeration."""
    task, lengths = labelled("words", ["GO NO"]), (4, 3)
    torch.manual_seed(0)
    posteriors = torch.randn(4, 2, 4).log_softmax(-1)
    task.network = lambda xs, lengths: posteriors
    labels = [[1, 2], [2, 2]]
    batch = Batch(torch.zeros(4, 2, 1), torch.tensor(lengths), torch.tensor(labels), torch.tensor([2, 2]), (), ())
    total = 0.0
    for row, length in enumerate(lengths):
        paths = itertools.product(range(4), repeat=length)
        right = [path for path in paths if [k for k, _ in itertools.groupby(path) if k] == labels[row]]
        total -= math.log(sum(math.exp(sum(posteriors[t, row, k] for t, k in enumerate(path))) for path in right))
    loss = task.measure(batch, "train")["loss"]
    assert_close(loss.value, torch.tensor(total / 7))
    assert loss.weight == 7


def test_the_task_overfits_a_batch(an4):
    seed_everything(1, verbose=False)
    task, data = Speech(NETWORK, partial(torch.optim.Adam, lr=0.03)), data_of(an4)
    batch = next(iter(data.train_dataloader()))
    task.use(task.describe(data), "the data")
    optimizer = task.optimizer()
    for _ in range(60):
        optimizer.zero_grad()
        task.measure(batch, "train")["loss"].value.backward()
        optimizer.step()
    with torch.no_grad():
        scores = task.measure(batch, "val")
    assert scores["loss"].value < 0.05
    assert (scores["wer"].value, scores["cer"].value) == (0, 0)


def test_a_resumed_run_equals_an_uninterrupted_one(an4, tmp_path):
    """Stopped in the middle of an epoch, with noise in the weights, and resumed by another seed."""
    noisy = partial(GRU, hidden_size=8, weight_noise=0.05, engine="loop")

    def run(folder, until, seed, checkpoint=None):
        seed_everything(seed, verbose=False)
        run_folder = RunFolder(folder, "run", checkpoint)
        run_folder.make()
        callbacks = [RandomState(), Checkpoints(run_folder)]
        trainer = Trainer(callbacks=callbacks, max_steps=until, max_epochs=-1, num_sanity_val_steps=0, **QUIET)
        task = Speech(partial(AcousticModel, recurrent=noisy))
        trainer.fit(TaskModule(task), DataModule(data_of(an4, seed=None)), ckpt_path=checkpoint, weights_only=True)
        return run_folder.last

    whole = run(tmp_path / "whole", 8, 1)
    stopped = run(tmp_path / "stopped", 6, 1)
    resumed = run(tmp_path / "stopped", 8, 2, stopped)
    states = [torch.load(path, weights_only=True)["state_dict"] for path in (whole, resumed)]
    assert_close(states[0], states[1], rtol=0, atol=0)


class Shouting(Greedy):
    """Another decoder: it hears everything twice."""

    def __call__(self, log_posteriors, lengths):
        return [f"{text} {text}" for text in super().__call__(log_posteriors, lengths)]


def test_another_decoder_has_errors_of_its_own_in_the_test(an4):
    task = Speech(NETWORK, decoder=Shouting)
    [scores] = Trainer(enable_checkpointing=False, **QUIET).test(
        TaskModule(task), DataModule(data_of(an4)), verbose=False
    )
    assert set(scores) == {f"test/{name}" for name in ("loss", "wer", "cer", "shouting_wer", "shouting_cer")}
    assert "reference" in task.show()
    assert len([line for line in task.show().splitlines() if "wrong" in line]) == 2


# Recordings


soundfile = pytest.importorskip("soundfile", reason="soundfile is not installed (extra speech)")
pytest.importorskip("kaldi_native_fbank", reason="kaldi-native-fbank is not installed (extra speech)")

RATE = 8000
PITCH = {"low": 400, "high": 1500}


def spoken(words, rate=RATE):
    """A tone of a quarter of a second for each word, and silence between them."""
    time = np.arange(rate // 4) / rate
    parts = [part for word in words for part in (0.5 * np.sin(2 * np.pi * PITCH[word] * time), np.zeros(rate // 10))]
    return np.concatenate(parts).astype("float32")


def encoded(samples, rate=RATE, form="WAV"):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype="PCM_16")
    return file.getvalue()


@pytest.fixture(scope="session")
def tones(tmp_path_factory):
    """A folder of ten files whose names hold their words, and manifests of them."""
    folder = tmp_path_factory.mktemp("tones")
    rows = []
    for number, words in enumerate(itertools.islice(itertools.product(PITCH, repeat=4), 10)):
        path = folder / f"{'_'.join(words)}.{('wav', 'flac')[number % 2]}"
        path.write_bytes(encoded(spoken(words), form=path.suffix[1:].upper()))
        split = "test" if number == 4 else "valid" if number == 7 else "train"
        rows.append({"path": path.name, "text": " ".join(words), "split": split, "length": number})
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_audio_is_read_whole_and_lowered_to_the_rate(tmp_path):
    wave = spoken(["low", "high"], 16000)
    path = tmp_path / "stereo.wav"
    path.write_bytes(encoded(np.stack([wave, np.zeros_like(wave)], 1), 16000))
    same = read_audio(path, 16000)
    assert_close(same.samples, torch.from_numpy(wave / 2), atol=1e-4, rtol=0)
    lowered = read_audio(path, 8000)
    assert lowered.file_rate == 16000
    expected = torch.from_numpy(spoken(["low", "high"]) / 2)
    assert (lowered.samples - expected).abs().mean() < 0.005
    path = tmp_path / "wave.flac"
    path.write_bytes(encoded(wave, 16000, "FLAC"))
    assert_close(read_audio(path, 16000).samples, torch.from_numpy(wave), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"RIFF but no audio" * 9, "no audio file, or a truncated one"),
        (encoded(spoken(["low"]))[:-1000], "truncated: 4600 bytes of audio, expected 5600"),
        (
            encoded(np.random.default_rng(0).uniform(-1, 1, 9000), form="FLAC")[:5000],
            "no audio file, or a truncated one",
        ),
        (encoded(np.zeros(0)), "it has no samples"),
        (encoded(spoken(["low"], 4000), 4000), "4000 samples per second, expected at least 8000"),
        (None, "cannot be read: No such file"),
    ],
    ids=["empty", "junk", "truncated", "truncated_flac", "silent", "low", "missing"],
)
def test_a_bad_audio_file_says_what_is_wrong(content, message, tmp_path):
    path = tmp_path / "one.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExperimentError, match=message):
        read_audio(path, RATE)


def test_log_mel_energies_are_highest_where_the_tone_is():
    frames = log_mel(torch.from_numpy(spoken(["low", "high"])), RATE, 23, "tones")
    assert frames.shape == (68, 23)  # of 0.7 s: ⌊(700 − 25) / 10⌋ + 1
    low, high = frames[5].argmax(), frames[45].argmax()
    assert low < high
    again = log_mel(torch.from_numpy(spoken(["low", "high"])), RATE, 23, "tones")
    assert_close(frames, again, rtol=0, atol=0)
    with pytest.raises(ExperimentError, match="tones: it lasts 10 ms, expected 25 ms"):
        log_mel(torch.zeros(80), RATE, 23, "tones")
    with pytest.raises(ExperimentError, match="there are no 200 bands in 8000 samples per second"):
        log_mel(torch.zeros(800), RATE, 200, "tones")


def recordings(path, **settings):
    data = Recordings(str(path), **({"unit": "words", "sample_rate": RATE, "mels": 23, "seed": 0} | settings))
    data.setup()
    return data


def test_a_folder_and_its_manifests_are_read(tones):
    by_csv, by_json = recordings(tones / "manifest.csv"), recordings(tones / "manifest.jsonl")
    assert [one.name for one in by_csv.utterances("test")] == ["low_high_low_low.wav"]
    assert by_csv.utterances("test")[0].text == "low high low low"
    assert [one.name for one in by_csv.utterances("train")] == [one.name for one in by_json.utterances("train")]
    by_name = recordings(tones, words={"low": "NO", "high": "YES"})
    assert by_name.learnt()["units"]["symbols"] == ["NO", "YES"]
    counts = {split: len(by_name.utterances(split)) for split in ("train", "valid", "test")}
    assert counts == {"train": 8, "valid": 1, "test": 1}
    with pytest.raises(ExperimentError, match=r"its name has 'high'.*Choices: low"):
        recordings(tones, words={"low": "NO"})


def test_files_of_a_higher_rate_are_told(tones, tmp_path):
    for path in tones.glob("*.wav"):
        (tmp_path / path.name).write_bytes(encoded(spoken(path.stem.split("_"), 16000), 16000))
    with pytest.warns(UserWarning, match="files with 16000 samples per second were lowered to 8000"):
        recordings(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("m.csv", "", "the manifest is empty"),
        ("m.csv", "path,text\na.wav,\n", "row 1: it has no 'text'"),
        ("m.csv", "file,text\na.wav,GO\n", "row 1: it has no 'path'"),
        ("m.csv", "path,text,split\na.wav,GO,dev\n", "the split is 'dev', expected train, valid, test"),
        ("m.jsonl", '{"path": "a.wav"\n', "no JSON lines"),
        ("m.jsonl", "3\n", "row 1: it has no 'path'"),
    ],
)
def test_a_bad_manifest_says_what_is_wrong(name, text, message, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ExperimentError, match=message):
        read_manifest(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.csv", 'path,text\na.wav,"GO\nON"\n'),
        ("m.csv", "path,text\r\na.wav,GO\u2028ON\r\n"),
        ("m.jsonl", '{"path": "a.wav", "text": "GO\u2028ON"}\r\n'),
    ],
)
def test_lines_within_a_transcript_are_spaces(name, text, tmp_path):
    path = tmp_path / name
    path.write_text(text, newline="")
    assert [(row.path.name, row.text) for row in read_manifest(path)] == [("a.wav", "GO ON")]


def test_files_of_one_name_are_of_two_speakers(tmp_path):
    """Normalised by speaker, each is by itself where no speakers are named."""
    rows = ["path,text,split"]
    for number, split in enumerate(("train", "train", "valid", "test")):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "one.wav").write_bytes(encoded((number + 1) / 4 * spoken(["low", "high"])))
        rows.append(f"{number}/one.wav,low high,{split}")
    (tmp_path / "m.csv").write_text("\n".join(rows))
    by_speaker, by_utterance = (recordings(tmp_path / "m.csv", normalise=n) for n in ("speaker", "utterance"))
    for one, other in zip(by_speaker.utterances("train"), by_utterance.utterances("train"), strict=True):
        assert_close(one.features, other.features)


def test_whole_speakers_are_held_out(tones, tmp_path):
    files = sorted(tones.glob("*.wav"))
    manifest = tmp_path / "manifest.csv"

    def read(speakers):
        rows = [f"{path},{path.stem.replace('_', ' ')},{name}" for path, name in zip(files, speakers, strict=True)]
        manifest.write_text("\n".join(["path,text,speaker", *rows]))
        return recordings(manifest)

    data, speaker_of = read("aabbc"), dict(zip((path.name for path in files), "aabbc", strict=True))
    splits = [{speaker_of[one.name] for one in data.utterances(split)} for split in ("train", "valid", "test")]
    assert sorted(map(sorted, splits)) == [["a"], ["b"], ["c"]]
    with pytest.raises(ExperimentError, match="2 speakers, or recordings without one, expected at least 3"):
        read("aabbb")


def test_yesno_is_split_as_recipes_do(tmp_path):
    for number in range(60):
        bits = f"{number:06b}"
        wave = spoken(["high" if bit == "1" else "low" for bit in bits])
        (tmp_path / "yesno").mkdir(exist_ok=True)
        (tmp_path / "yesno" / f"{'_'.join(bits)}.wav").write_bytes(encoded(wave))
    data = YesNo(str(tmp_path))
    data.prepare_data()
    data.setup()
    names = {split: [int(one.name[:-4].replace("_", ""), 2) for one in data.utterances(split)] for split in data._sets}
    assert names["test"] == list(range(1, 60, 2))
    assert names["valid"] == [14, 44]
    assert sorted(names["train"] + names["valid"]) == list(range(0, 60, 2))
    assert data.utterances("test")[0].text == "NO NO NO NO NO YES"
    (tmp_path / "yesno" / "0_0_0_0_0_0.wav").unlink()
    with pytest.raises(ExperimentError, match="yesno has 59 files there, expected 60"):
        YesNo(str(tmp_path)).setup()


class Ear(torch.nn.Module):
    """Tells the two tones apart by the bands in which they are."""

    def forward(self, xs, lengths=None):
        low, high = (xs[..., band] for band in (5, 15))
        return torch.stack([torch.full_like(low, 10.0), high, low], -1).log_softmax(-1)


def test_files_are_transcribed_as_the_data_are_read(tones, tmp_path):
    plain = {"deltas": False, "normalise": "none", "stack": 1}
    data = recordings(tones / "manifest.csv", **plain)
    task = Speech(NETWORK)
    task.use(data.learnt(), "the data")
    task.network = Ear()
    first = data.utterances("test")[0]
    assert task.transcribe(tones / first.name) == first.text
    assert task.compare([first]).splitlines()[0] == f"{first.name}: 0 of 4 wrong"
    stereo = tmp_path / "stereo.wav"
    wave = spoken(["high", "high", "low"], 16000)
    stereo.write_bytes(encoded(np.stack([wave, 0 * wave], 1), 16000))
    with pytest.warns(UserWarning, match="16000 samples per second were lowered to 8000"):
        assert task.transcribe(stereo) == "high high low"


@pytest.fixture(scope="module")
def run(tones, tmp_path_factory):
    """A short run on the tones."""
    folder = tmp_path_factory.mktemp("run")
    config = folder / "tones.yaml"
    layer = {"class_path": "multint.GRU", "init_args": {"hidden_size": 8, "engine": "loop"}}
    data = {"path": str(tones / "manifest.csv"), "unit": "words", "sample_rate": RATE, "mels": 23, "stack": 4}
    settings = {
        "name": "tones",
        "model": {"class_path": "Speech", "init_args": {"network": {"recurrent": layer}, "metric": "loss"}},
        "data": {"class_path": "Recordings", "init_args": data},
        "trainer": {"max_epochs": 2, "enable_progress_bar": False, "accelerator": "cpu"},
    }
    config.write_text(json.dumps(settings))
    assert main(["fit", "--config", str(config), f"--trainer.default_root_dir={folder}"]) == 0
    return folder / "tones/version_0"


def test_a_checkpoint_transcribes_files(run, tones, tmp_path, capsys):
    checkpoint = run / "checkpoints/best.ckpt"
    paths = sorted(tones.glob("*.wav"))[:2]
    with trusting():
        task = load_task(checkpoint)
    assert main(["transcribe", str(checkpoint), *map(str, paths)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{path}: {task.transcribe(path)}" for path in paths]
    assert main(["transcribe", str(checkpoint), "--show", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["reference", "low", "high", "low", "low"]


def test_a_checkpoint_is_decoded_by_another_decoder(run, tones, capsys, tmp_path, monkeypatch):
    for name in ("kaldifst", "kaldilm", "kaldi_decoder"):
        pytest.importorskip(name, reason=f"{name} is not installed (extra decoding)")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    checkpoint, paths = run / "checkpoints/best.ckpt", sorted(tones.glob("*.wav"))[:2]
    with trusting():
        task = load_task(checkpoint)
    settings = {"order": 2, "acoustic_scale": 3.0}
    task.decode_with(partial(WFST, **settings))
    spec = json.dumps({"class_path": "WFST", "init_args": settings})
    assert main(["transcribe", str(run), *map(str, paths), "--decoder", spec]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{path}: {task.transcribe(path)}" for path in paths]
    assert main(["transcribe", str(run), "--show", "1", "--decoder", "WFST"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["reference", "low", "high", "low", "low"]
    config = ["--config", str(run / "config.yaml"), "--ckpt_path", str(checkpoint)]
    assert main(["test", *config, "--model.decoder=WFST", "--model.decoder.order=2"]) == 0
    assert "test/wfst_wer" in capsys.readouterr().out


def test_what_cannot_be_transcribed_is_one_message(run, tmp_path, capsys):
    checkpoint = str(run / "checkpoints/best.ckpt")
    damaged = tmp_path / "damaged.wav"
    damaged.write_bytes(encoded(spoken(["low"]))[:-1000])
    for arguments, message in (
        ([], "expected audio files, or --show N"),
        (["--show", "-1"], "--show: got -1, expected at least 1"),
        ([str(tmp_path / "none.wav")], "none.wav: cannot be read: No such file"),
        ([str(damaged)], "damaged.wav: truncated"),
        ([str(damaged), "--decoder", "WFTS"], "got WFTS, expected Greedy, WFST or PrefixBeam"),
        ([str(damaged), "--decoder", "{class_path: WFST, init_args: {beam: 0}}"], "beam is 0"),
    ):
        assert main(["transcribe", checkpoint, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1


def test_a_checkpoint_is_drawn(run, capsys):
    assert main(["show", str(run / "checkpoints/best.ckpt"), "--examples=2"]) == 0
    assert capsys.readouterr().out.count("hypothesis") == 1, "all that the test has"
    assert [path.name for path in run.glob("posteriors_*.png")] == ["posteriors_1.png"]


def test_features_without_a_waveform_cannot_transcribe(an4, tmp_path):
    task = Speech(NETWORK)
    task.use(data_of(an4).learnt(), "the data")
    with pytest.raises(ExperimentError, match="hears the features that its corpus came with"):
        task.transcribe(tmp_path / "one.wav")
