"""Sentence vectors on other tasks: the readers, the linear models against other computations, and the command."""

import csv
import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from experiments.__main__ import main
from experiments.core.errors import ExperimentError
from experiments.data import Books
from experiments.sentence_encoder import SentenceEncoder
from experiments.transfer import evaluation
from experiments.transfer.bigram_shift import bigram_shift
from experiments.transfer.encoders import arms
from experiments.transfer.evaluation import Vectors
from experiments.transfer.tasks import published_sizes, read_task

linear_model = pytest.importorskip("sklearn.linear_model", reason="scikit-learn is not installed (extra transfer)")
metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed (extra transfer)")

SHARED = Path(__file__).parent.parent.parent / "shared" / "data"


def unit_entries(features):
    return Vectors(lambda rows: np.array([features[int(row)] for row in rows]), "x")([*map(str, range(len(features)))])


# The linear models


def test_cross_validation_separates_what_can_be_and_guesses_noise(monkeypatch):
    monkeypatch.setattr(evaluation, "FOLDS", 5)
    generator = np.random.default_rng(0)
    labels = np.arange(200) % 2
    noise = generator.standard_normal((200, 5))
    told = noise + 9 * np.outer(2 * labels - 1, np.ones(5))
    [score] = evaluation.cross_validated(unit_entries(told), labels)
    assert_close(score[1:], (100.0, 100.0, 100.0))
    [score] = evaluation.cross_validated(unit_entries(noise), labels)
    assert 40 < score.value < 60
    assert score.low < 50 < score.high
    for part in evaluation.tested((told, labels), (told[:99], labels[:99]), 5, {"F1": evaluation.f1}):
        assert_close(part[1:], (100.0, 100.0, 100.0))


def accuracies(features, labels, train, test, strengths):
    """Of models that are each trained from the start."""
    for strength in strengths:
        model = linear_model.LogisticRegression(C=strength / features.shape[1], tol=1e-8, max_iter=9999)
        yield 100 * model.fit(features[train], labels[train]).score(features[test], labels[test])


def test_cross_validation_is_nested(monkeypatch):
    monkeypatch.setattr(evaluation, "FOLDS", 4)
    monkeypatch.setattr(evaluation, "_TOLERANCE", 1e-8)
    generator = np.random.default_rng(0)
    labels = generator.integers(2, size=90)
    features = unit_entries(generator.standard_normal((90, 12)) + 0.3 * labels[:, None])
    folds = evaluation._folds(labels)
    assert_close(np.bincount(folds), np.array([23, 23, 22, 22]))
    strengths = [2.0**power for power in range(9)]
    reached = []
    for outer in range(4):
        inner = [
            list(accuracies(features, labels, (folds != outer) & (folds != one), folds == one, strengths))
            for one in set(range(4)) - {outer}
        ]
        best = strengths[int(np.mean(inner, 0).argmax())]
        reached += accuracies(features, labels, folds != outer, folds == outer, [best])
    [score] = evaluation.cross_validated(features, labels)
    interval = stats.t.interval(0.95, 3, np.mean(reached), stats.sem(reached))
    assert_close(tuple(score[1:]), (np.mean(reached), *interval))

    # And with a test of its own.
    train, train_labels, folds = features[:60], labels[:60], evaluation._folds(labels[:60])
    inner = [list(accuracies(train, train_labels, folds != one, folds == one, strengths)) for one in range(4)]
    best = strengths[int(np.mean(inner, 0).argmax())]
    [expected] = accuracies(features, labels, slice(60), slice(60, None), [best])
    given = (train, train_labels), (features[60:], labels[60:])
    [score] = evaluation.tested(*given, 12, {"accuracy": evaluation.accuracy})
    assert_close(score.value, expected)
    assert score.low < expected < score.high


def test_ratings_become_distributions_and_their_model_is_softmax_regression(monkeypatch):
    ratings = np.array([1, 1.5, 3.6, 4, 5])
    expected = [[1, 0, 0, 0, 0], [0.5, 0.5, 0, 0, 0], [0, 0, 0.4, 0.6, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]
    assert_close(evaluation.rating_targets(ratings), np.array(expected), rtol=0, atol=1e-12)

    monkeypatch.setattr(evaluation, "_STRENGTHS_OF_RATINGS", strengths := (0.5, 8.0))
    monkeypatch.setattr(evaluation, "_TOLERANCE", 1e-9)
    generator = np.random.default_rng(0)
    features = {part: generator.standard_normal((40, 6)) for part in ("train", "trial", "test")}
    ratings = {part: np.clip(3 + x[:, 0] + generator.standard_normal(40), 1, 5) for part, x in features.items()}
    best = -1.0
    for strength in strengths:
        predicted = by_softmax_regression(features, evaluation.rating_targets(ratings["train"]), strength / 3)
        if (r := stats.pearsonr(predicted["trial"], ratings["trial"]).statistic) > best:
            best, chosen = r, predicted["test"]
    scores = {score.metric: score for score in evaluation.rated(features, ratings, 3)}
    of_test = ratings["test"]
    assert_close(scores["r"].value, float(stats.pearsonr(chosen, of_test).statistic), rtol=1e-4, atol=0)
    assert_close(scores["ρ"].value, float(stats.spearmanr(chosen, of_test).statistic), rtol=1e-4, atol=0)
    assert_close(scores["MSE"].value, float(((chosen - of_test) ** 2).mean()), rtol=1e-4, atol=0)
    assert all(score.low < score.value < score.high for score in scores.values())


def by_softmax_regression(features, targets, strength):
    """The minimum of C Σ −log-likelihood + ½ ‖W‖², by torch; the mean rating of each part's pairs."""
    x, y = torch.from_numpy(features["train"]), torch.from_numpy(targets)
    weight = torch.zeros(5, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -strength * (y * (x @ weight.T + bias).log_softmax(-1)).sum() + 0.5 * (weight**2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        logits = {part: torch.from_numpy(x) @ weight.T + bias for part, x in features.items()}
        return {
            part: (of.softmax(-1) @ torch.arange(1.0, 6, dtype=torch.float64)).numpy() for part, of in logits.items()
        }


def test_metrics_and_their_bootstrap():
    generator = np.random.default_rng(0)
    expected, predicted = generator.integers(2, size=(2, 400))
    assert_close(evaluation.accuracy(predicted, expected), 100 * metrics.accuracy_score(expected, predicted))
    assert_close(evaluation.f1(predicted, expected), 100 * metrics.f1_score(expected, predicted))
    assert_close(evaluation.f1(0 * predicted, 0 * expected), 0.0)
    assert_close(evaluation.spearman(predicted, 0 * expected), 0.0)  # and not NaN
    [score] = evaluation.bootstrapped({"accuracy": evaluation.accuracy}, predicted, expected)
    half = 196 * np.sqrt(score.value / 100 * (1 - score.value / 100) / 400)  # of a binomial
    assert_close(np.array(score[2:]), np.array([score.value - half, score.value + half]), rtol=0, atol=0.5)


def test_an_encoder_is_asked_once_for_each_sentence():
    asked = []
    vectors = Vectors(lambda new: asked.extend(new) or np.array([[3.0 * len(s), 4 * len(s)] for s in new]), "x")
    assert_close(
        vectors(["a", "", "bb", "a"]), np.float32(2**0.5) * np.float32([[0.6, 0.8], [0, 0], [0.6, 0.8], [0.6, 0.8]])
    )
    vectors(["bb", "c"])
    assert asked == ["a", "", "bb", "c"]
    assert vectors.dimensions == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros(2), r"x: got float64 of shape \(2,\) for 2 sentences"),
        (np.zeros((3, 4)), r"of shape \(3, 4\) for 2 sentences"),
        (np.zeros((2, 0)), r"of shape \(2, 0\)"),
        (np.array([["a"], ["b"]]), "got <U1"),
        ([[1.0], [2.0, 3.0]], "x: what it gave is no array: .*inhomogeneous"),
        (torch.ones(2, 3, requires_grad=True), "x: what it gave is no array: .*requires grad"),
        (np.array([[1.0], [np.nan]]), "1 of 2 vectors have numbers that are not finite"),
    ],
)
def test_what_are_no_vectors_is_refused(given, message):
    with pytest.raises(ExperimentError, match=message):
        Vectors(lambda sentences: given, "x")(["a", "b"])


# The readers


def many(line, count=12):
    return "".join(line.format(i) + "\n" for i in range(count))


SICK_HEADER = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment\n"
SICK = {f"SICK_{name}.txt": SICK_HEADER + many("{0}\tA man\tMen {0}\t4.5\tNEUTRAL") for name in ("train", "trial")}
SICK["SICK_test_annotated.txt"] = SICK["SICK_train.txt"]
MSRP = {
    f"msr_paraphrase_{part}.txt": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    + many('1\t{0}\t2\tHe said "no.\tNo, {0}\r')
    + many("0\t{0}\t2\tYes\tNo\r")
    for part in ("train", "test")
}
TREC = {
    "train_5500.label": many("DESC:manner How {0} ?") + many("NUM:date When {0} ?"),
    "TREC_10.label": "NUM:x When ?\n",
}


def written(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def test_published_formats_are_read(tmp_path):
    root = written(tmp_path, {f"deep/{name}": content for name, content in (SICK | MSRP | TREC).items()})
    sick = read_task("sick", root, root)
    assert sick.sizes == (12, 12, 12)
    assert [side[1] for side in sick.parts["trial"].sentences] == ["A man", "Men 1"]
    assert_close(sick.parts["trial"].answers, np.full(12, 4.5))
    msrp = read_task("msrp", root, root)
    assert msrp.sizes == (24, 24)
    assert [side[0] for side in msrp.parts["test"].sentences] == ['He said "no.', "No, 0"]
    assert msrp.parts["test"].answers.tolist() == [1] * 12 + [0] * 12
    trec = read_task("trec", root, root)
    assert trec.sizes == (24, 1)
    assert trec.parts["test"].sentences == (["When ?"],)
    assert trec.parts["test"].answers.tolist() == [1]


def test_tasks_with_a_test_of_their_own_are_scored(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "FOLDS", 3)
    root = written(tmp_path, MSRP | TREC)
    scores = read_task("msrp", root, root).scores(Vectors(by_letters, "x"))
    assert [score.metric for score in scores] == ["accuracy", "F1"]
    scores += read_task("trec", root, root).scores(Vectors(by_letters, "x"))
    assert_close(np.array([score[1:] for score in scores]), np.full((3, 3), 100.0))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1252", "latin-1"])
def test_sentences_of_either_encoding_are_read(tmp_path, encoding):
    # A byte that Windows' encoding lacks, and characters that would end a line by `str.splitlines`.
    odd = {"latin-1": "\x81", "cp1252": "’"}.get(encoding, "\x85\u2028")
    yes = f"a café {odd} b\n" + many("\n  yes {} ", 10)
    root = written(tmp_path, {"custrev.pos": yes.encode(encoding), "custrev.neg": many("no {}", 11).encode(encoding)})
    [[sentences], labels] = read_task("cr", root, root).parts["all"]
    assert sentences[:3] == [f"a café {odd} b", "yes 0", "yes 1"]
    assert labels.tolist() == [1] * 11 + [0] * 11


def test_nltk_has_its_sentences_in_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "subjectivity.zip", "w") as archive:
        archive.writestr("subjectivity/README.txt", "plot")
        archive.writestr("subjectivity/plot.tok.gt9.5000", many("plot {}", 10))
        archive.writestr("subjectivity/quote.tok.gt9.5000", many("quote {}", 10))
    [[sentences], labels] = read_task("subj", tmp_path, tmp_path).parts["all"]
    assert (sentences[0], labels[0], sentences[-1], labels[-1]) == ("quote 0", 1, "plot 9", 0)


CR = {"custrev.pos": many("yes {}"), "custrev.neg": many("no {}")}
RATING = SICK["SICK_trial.txt"].replace("4.5", "5.5")


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("mr", {}, "there is no rt-polarity.pos, nor sentence_polarity.zip with it, here or below. Give the folder"),
        ("subj", {}, "there is no quote.tok.gt9.5000 or subj.subjective"),
        ("cr", {"custrev.pos": "a\n"}, "there is no custrev.neg"),
        ("cr", CR | {"custrev.neg": " \n\n"}, "custrev.neg: the file is empty"),
        ("cr", CR | {"b/custrev.neg": "a\n"}, "are both there, expected one"),
        ("cr", CR | {"custrev.neg": many("no", 9)}, "cr: 9 examples of a class, expected at least 10"),
        (
            "mr",
            {"sentence_polarity.zip": "no archive"},
            "sentence_polarity.zip: cannot be read: File is not a zip",
        ),
        ("sick", SICK | {"SICK_trial.txt": "a\tb\n"}, "its first line names no sentence_A"),
        ("sick", SICK | {"SICK_trial.txt": SICK_HEADER + "1\tA\tB\n"}, "line 2: 3 columns between tabs, expected 5"),
        ("sick", SICK | {"SICK_trial.txt": RATING}, "line 2: got the rating '5.5', expected a number from 1 to 5"),
        ("sick", SICK | {"SICK_trial.txt": SICK_HEADER}, "SICK_trial.txt: no examples"),
        ("msrp", MSRP | {"msr_paraphrase_test.txt": "Quality\n2\t1\t2\ta\tb\n"}, "line 2: got '2', expected 0 or 1"),
        (
            "trec",
            TREC | {"TREC_10.label": "HUM:ind Who ?\n"},
            "line 1: got 'HUM:ind Who ?', expected CLASS:kind",
        ),
        ("trec", TREC | {"train_5500.label": "What ?\n"}, "line 1: got 'What ?'"),
        ("bshift", {"a.txt": "One two three four five six.\n"}, "bshift: 0 examples of a class"),
        ("bshift", {"a.md": ""}, "the folder has no .txt and no .zip, expected a text"),
    ],
)
def test_missing_and_wrong_files_are_told(tmp_path, name, files, message):
    with pytest.raises(ExperimentError, match=re.escape(message)):
        read_task(name, written(tmp_path, files), tmp_path)


def test_places_that_are_not_there_are_told(tmp_path):
    with pytest.raises(ExperimentError, match=r"--data\.root: there is no folder"):
        read_task("mr", tmp_path / "no", tmp_path)
    with pytest.raises(ExperimentError, match=r"bshift: there is no .*--data\.text"):
        read_task("bshift", tmp_path, tmp_path / "no")


WORDS = ("Ann", "saw", "the", "grey", "cat", "near", "a", "house", "with", "old", "Bob", "and", "left", "it", "there")


def prose(count, between="\n\n"):
    drawn = np.random.default_rng(0).integers(len(WORDS), size=(count, 8))
    return between.join(" ".join(WORDS[i] for i in row).capitalize() + ", £ again." for row in drawn)


def test_half_of_the_sentences_have_two_neighbours_swapped(tmp_path):
    written(tmp_path, {"a.txt": prose(1000).encode("cp1252")})
    sentences, labels = bigram_shift(tmp_path)
    assert labels == [0, 1] * (len(labels) // 2)
    assert 90 < len(labels) < 110
    originals = [line.lower().replace(",", " ,").replace(".", " .") for line in prose(1000).split("\n\n")]
    held_out = [line.split() for line in originals[880:]]
    for sentence, label in zip(sentences, labels, strict=True):
        words = sentence.split()
        swapped = [[*words[:i], words[i + 1], words[i], *words[i + 2 :]] for i in range(len(words) - 1)]
        assert (words in held_out) != bool(label)
        assert label == 0 or any(one in held_out for one in swapped)
        assert words[-4:] == [",", "£", "again", "."]  # of which none has a word beside it
    assert bigram_shift(tmp_path) == (sentences, labels)


def test_no_sentence_that_books_train_on_is_asked(tmp_path):
    """Of texts in paragraphs, with spaces in the lines between them, and all in one paragraph."""
    betweens = {"again": "\n\n", "then": " \n \n", "now": "\n"}
    written(tmp_path, {f"{word}.txt": prose(400, between).replace("again", word) for word, between in betweens.items()})
    data = Books(str(tmp_path), seed=0)
    data.setup()
    train = data.triples("train")
    read = {
        " ".join(data.vocabulary.words[i] for i in one.words[: one.lengths[b] - 1, b])
        for one in train.batch(range(len(train)))
        for b in range(len(train))
    }
    sentences, labels = bigram_shift(tmp_path)
    asked = {sentence for sentence, label in zip(sentences, labels, strict=True) if not label}
    assert len(read) > 1000
    assert not read & asked
    assert min(sum(word in one for one in asked) for word in betweens) > 10


@pytest.mark.parametrize("name", ["sick", "mr", "subj"])
def test_the_published_data_have_their_sizes(name):
    if not (SHARED / "sick").is_dir():
        pytest.skip(f"the data are not in {SHARED}")
    assert read_task(name, SHARED, SHARED / "books").sizes == published_sizes(name)


# The command


def by_letters(sentences):
    return np.array([[sentence.count(letter) + 0.5 for letter in "yesnoab"] for sentence in sentences])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on a small book."""
    folder = tmp_path_factory.mktemp("run")
    written(folder, {"book/a.txt": prose(100)})
    stack = {"engine": "loop", "cell": {"class_path": "multint.GRUCell"}}
    network = {"embedding_size": 3, "encoder": {"hidden_size": 6, **stack}, "decoder": stack}
    settings = {
        "name": "book",
        "model": {"class_path": "SentenceVectors", "init_args": {"network": network}},
        "data": {"class_path": "Books", "init_args": {"path": str(folder / "book"), "batch_size": 16}},
        "trainer": {"max_steps": 3, "enable_progress_bar": False, "accelerator": "cpu"},
    }
    (folder / "book.yaml").write_text(json.dumps(settings))
    assert main(["fit", "--config", str(folder / "book.yaml"), f"--trainer.default_root_dir={folder}"]) == 0
    return folder / "book/version_0"


def data_of(folder):
    return written(folder, SICK | {"rt-polarity.pos": many("Bob left {}"), "rt-polarity.neg": many("the cat {}")})


def test_transfer_tells_and_writes_what_each_encoder_reaches(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluation, "FOLDS", 3)
    monkeypatch.setattr(evaluation, "_RESAMPLES", 20)
    root, output = data_of(tmp_path / "data"), tmp_path / "out" / "transfer.csv"
    arguments = [f"net={run}", "tests.test_transfer:by_letters", "--data.root", str(root), "--untrained=2"]
    assert main(["transfer", *arguments, "--tasks=sick,mr", f"--output={output}"]) == 0
    shown = capsys.readouterr()
    assert "sick: 12 + 12 + 12 examples, but 4,500 + 500 + 4,927 are published" in shown.out
    assert "mr, tests.test_transfer:by_letters: encoded in" in shown.err
    with open(output, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    encoders = {"net": [str(run)], "net (bag)": [str(run)], "tests.test_transfer:by_letters": [""]}
    encoders |= {f"net ({what})": ["0", "1"] for what in ("untrained", "untrained bag")}
    for metric in ("r", "ρ", "MSE", "accuracy"):
        of_metric = [(row["encoder"], row["run_or_seed"]) for row in rows if row["metric"] == metric]
        assert sorted(of_metric) == sorted((name, one) for name, of in encoders.items() for one in of)
    [by_function] = [row for row in rows if row["encoder"].endswith("by_letters") and row["task"] == "mr"]
    assert (by_function["value"], by_function["dimensions"]) == ("100.0", "7")
    assert re.search(r"^mr +accuracy +100\.0  100\.0 to 100\.0 +7  tests", shown.out, re.MULTILINE)
    both = [float(row["value"]) for row in rows if row["encoder"] == "net (untrained)" and row["task"] == "mr"]
    low, high = stats.t.interval(0.95, 1, np.mean(both), stats.sem(both)) if both[0] != both[1] else both
    line = f"mr accuracy {np.mean(both):.1f} {low:.1f} to {high:.1f} 6 net (untrained), 2"
    assert line in [" ".join(line.split()) for line in shown.out.splitlines()]


def test_untrained_encoders_differ_by_their_seed_alone(run):
    sentences = ["Ann saw the grey cat.", "Bob left.", ""]
    made = {arm.name: arm.encoders for arm in arms([str(run), str(run)], 2, "cpu")}
    assert list(made) == [str(run), f"{run} (bag)", f"{run} (untrained)", f"{run} (untrained bag)"]
    trained = SentenceEncoder.load(run)
    assert_close(made[str(run)][str(run)]()(sentences), trained.encode(sentences))
    for name, size in (("untrained", 6), ("untrained bag", 3)):
        first, again, second = (made[f"{run} ({name})"][seed]()(sentences) for seed in "001")
        assert first.shape == (3, size)
        assert_close(first, again, rtol=0, atol=0)
        assert np.abs(first[:2] - second[:2]).min() > 0
    words = [trained.vocabulary.words.index(word) for word in ("bob", "left", ".")]
    mean = trained.network.embedding.weight[words].mean(0)
    assert_close(made[f"{run} (bag)"][str(run)]()(sentences)[1:], torch.stack([mean, 0 * mean]).detach().numpy())


BESIDE = (" (bag)", " (untrained)", " (untrained bag)")


def test_runs_of_one_network_are_one_encoder(run, tmp_path):
    shutil.copytree(run, again := tmp_path / "again")
    made = [*arms([f"both={run},{again}", str(again)], 1, "cpu")]
    assert [arm.name for arm in made] == [*(f"both{of}" for of in ("", *BESIDE)), str(again), f"{again} (bag)"]
    assert list(made[0].encoders) == list(made[1].encoders) == [str(run), str(again)]
    checkpoint = torch.load(path := again / "checkpoints/best.ckpt", weights_only=True)
    vocabulary = checkpoint["task"]["description"]["vocabulary"]
    vocabulary["symbols"] = vocabulary["symbols"].replace("bob", "rob")
    torch.save(checkpoint, path)
    with pytest.raises(ExperimentError, match="differ in more than weights"):
        list(arms([f"{run},{again}"], 1, "cpu"))


def test_mistakes_are_one_message(tmp_path, capsys, monkeypatch):
    root = data_of(tmp_path / "data")
    (tmp_path / "there.csv").write_text("")
    function = "tests.test_transfer:by_letters"
    for arguments, message in (
        ([function, "--tasks", "mr,sik"], "--tasks: there is no task 'sik'. Did you mean 'sick'?"),
        ([function, "--untrained=-1"], "--untrained: got -1, expected at least 0"),
        ([function, "--tasks=mr", f"--output={tmp_path / 'there.csv'}"], "there.csv is there already"),
        ([function, "--tasks=cr"], "there is no custrev.pos"),
        (["tests.test_transfer:no"], "module 'tests.test_transfer' has no attribute 'no'"),
        (["no_such_module:encode"], "No module named 'no_such_module'"),
        (["tests.test_transfer:SICK"], "a dict, expected a function"),
        ([str(tmp_path / "none")], "none: no such checkpoint"),
    ):
        assert main(["transfer", *arguments, "--data.root", str(root)]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    assert main(["transfer", function, "--data.root", str(root)]) == 2
    assert '".[transfer]"' in capsys.readouterr().err
