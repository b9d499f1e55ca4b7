"""The numbers of a study's report, against closed forms and against runs whose scores are made up."""

import csv
import math
import re

import pytest
import torch

import experiments.study.plots
import experiments.study.recorded
import experiments.study.report
from experiments.core.errors import ExperimentError
from experiments.core.intervals import estimate_of
from experiments.core.run_folder import Histogram, write_histograms, write_result
from experiments.core.task import Monitor
from experiments.study.arms import Arm
from experiments.study.definition import Cluster, Metric, Published, Study
from experiments.study.outcomes import State, chosen_metric, compared, outcomes
from experiments.study.plots import draw_curves, draw_dots
from experiments.study.recorded import draw_recorded
from experiments.study.report import write_report
from experiments.study.runs import Run
from experiments.study.statistics import difference, smallest_p
from experiments.study.tables import notes

close = torch.testing.assert_close


def t_975(degrees):
    """The 97.5 % point of Student's t with 1 or 2 degrees of freedom, in closed form."""
    return math.tan(math.pi * 0.475) if degrees == 1 else 0.95 * math.sqrt(2 / (4 * 0.975 * 0.025))


def test_the_interval_is_students():
    of_three = estimate_of([1.0, 2.0, 3.0])
    close(of_three.mean, 2.0)
    close((of_three.low, of_three.high), (2 - t_975(2) / math.sqrt(3), 2 + t_975(2) / math.sqrt(3)))
    of_two = estimate_of([1.0, 3.0])  # s = √2, s / √n = 1
    close((of_two.low, of_two.high), (2 - t_975(1), 2 + t_975(1)))
    assert of_two.count == 2


def test_one_value_has_no_interval_and_none_has_no_mean():
    assert estimate_of([5.0]) == (5.0, None, 1)
    assert estimate_of([]) is None
    assert difference({0: 1.0}, {0: 3.0}) == ((2.0, None, 1), None)
    assert difference({0: 1.0}, {1: 3.0}) == (None, None)


def test_a_difference_is_paired_by_seed():
    """A seed's effect, far larger than the arms', cancels; and only common seeds count."""
    first = {0: 10.0, 1: -50.0, 2: 200.0, 7: 1e6}
    arm = {2: 202.0, 1: -49.5, 0: 11.0, 8: -1e6}
    paired = difference(first, arm)
    mean, s = 3.5 / 3, math.sqrt(((1 - 3.5 / 3) ** 2 + (0.5 - 3.5 / 3) ** 2 + (2 - 3.5 / 3) ** 2) / 2)
    half = t_975(2) * s / math.sqrt(3)
    close(tuple(paired.estimate), (mean, half, 3))
    close(paired.p, 0.25)  # all three of one sign: 2 of 8 patterns


def test_p_counts_sign_patterns():
    # |±1 ± 2 ± 3 ± 1| ≥ |1 + 2 + 3 − 1| for all plus, for one of the two 1s turned, and for the mirrors: 6 of 16.
    close(difference(dict.fromkeys(range(4), 0.0), {0: 1.0, 1: 2.0, 2: 3.0, 3: -1.0}).p, 6 / 16)


@pytest.mark.parametrize("pairs", [2, 3, 5, 8, 20])
def test_no_p_is_below_the_smallest(pairs):
    arm = {seed: 1.0 + seed / 100 for seed in range(pairs)}
    close(difference(dict.fromkeys(arm, 0.0), arm).p, smallest_p(pairs))
    if pairs < 10:
        assert smallest_p(pairs) == 2 ** (1 - pairs)


def test_equal_differences_have_the_interval_of_no_spread():
    assert difference({0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.5}) == ((0.5, 0.0, 2), 0.5)
    assert difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}) == ((0.0, 0.0, 2), 1.0)


def test_differences_that_are_equal_but_for_rounding_give_no_warning():
    paired = difference({0: 0.3, 1: 0.7}, {0: 0.4, 1: 0.8})
    close(tuple(paired.estimate), (0.1, 0.0, 2))


# Fabricated runs: test/score by arm and seed. 'gone' diverged with seed 2, and 'few' has seeds 0 and 3 alone.
SCORES = {
    "first": {0: 1.0, 1: 2.0, 2: 3.0},
    "gone": {0: 2.0, 1: 2.5, 2: math.nan},
    "few": {0: 5.0, 3: 7.0},
    "one|<b>": {1: 4.0},
}
SEEDS = [0, 1, 2, 3]


def fabricate(run, score):
    """The files of a finished run."""
    run.folder.checkpoints.mkdir(parents=True)
    run.log.write_text("it began\n")
    result = {
        "metrics": {"test/score": score, "val/score": score},
        "best_step": 2,
        "steps": 4,
        "diverged_at": 3 if math.isnan(score) else None,
        "parameters": 1234567,
        "seconds_per_step": 0.001 * (1 + run.seed),
    }
    write_result(run.folder.result, result)
    rows = [f"0,{step},{'' if step == 4 else score + step},{score if step == 4 else ''}" for step in (2, 3, 4)]
    run.folder.metrics.write_text("\n".join(["epoch,step,train/score,val/score", *rows, ""]))


def made_up(folder):
    """A study with its arms and its runs, some of which have run."""
    path = folder / "made_up.yaml"
    path.write_text("# <made up> & not run\n")
    published = {"first": Published(1.25, "A & B <2020>")}
    study = Study(
        path, path, {}, {name: {} for name in SCORES}, SEEDS, None, published, [], None, Cluster(), {}, {"": {}}
    )
    arms = [Arm(name, f"key{i}", {}, Monitor("score", "max")) for i, name in enumerate(SCORES)]
    runs = [Run(arm, seed, folder / "out") for arm in arms for seed in SEEDS]
    for run in runs:
        run.of_arm.mkdir(parents=True, exist_ok=True)
        if run.seed in SCORES[run.arm.name]:
            fabricate(run, SCORES[run.arm.name][run.seed])
    return study, arms, runs


@pytest.fixture
def study(tmp_path):
    return made_up(tmp_path)


def report(study, arms, runs):
    command = ["study", "made_up.yaml"]
    return write_report(study, arms, runs, chosen_metric(study, arms), runs[0].root, command)


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """What a report prints, its folder, and the study."""
    study = made_up(tmp_path_factory.mktemp("study"))
    return report(*study), study[2][0].root, study


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_table_has_the_numbers_of_the_runs(reported):
    text, folder, _ = reported
    rows = {row["arm"]: row for row in read_csv(folder / "table.csv")}
    close(float(rows["first"]["mean"]), 2.0)
    close(float(rows["first"]["high"]), 2 + t_975(2) / math.sqrt(3))
    assert rows["first"]["n"] == "3"
    assert rows["first"]["difference"] == rows["first"]["p"] == ""
    assert rows["first"]["published"] == "1.25"
    # Without seed 2: differences 1 and 1/2, whose mean is 3/4 and whose s / √n is 1/4.
    close(float(rows["gone"]["mean"]), 2.25)
    close(float(rows["gone"]["difference"]), 0.75)
    close(float(rows["gone"]["difference_low"]), 0.75 - t_975(1) / 4)
    assert (rows["gone"]["n"], rows["gone"]["pairs"], rows["gone"]["p"]) == ("2", "2", "0.5")
    # Seed 0 alone is common: a difference, and neither an interval nor p.
    assert (rows["few"]["n"], rows["few"]["pairs"], rows["few"]["difference"]) == ("2", "1", "4.0")
    assert rows["few"]["difference_low"] == rows["few"]["p"] == ""
    assert (rows["one|<b>"]["n"], rows["one|<b>"]["mean"], rows["one|<b>"]["low"]) == ("1", "4.0", "")
    assert rows["first"]["parameters"] == "1234567"
    close(float(rows["first"]["ms_per_step"]), 2.0)  # the median of 1, 2 and 3
    assert "| 1,234,567 | 2 | 1.25 (A & B <2020>) |" in text
    assert "one\\|<b>" in text


def test_the_table_says_what_is_left_out_and_what_is_paired(reported):
    text, folder, _ = reported
    assert "higher is better" in text
    assert "Diverged, and in no number here: gone, seed 2 (its loss is no finite number at step 3)." in text
    assert "Not run: first, seed 3; gone, seed 3; few, seed 1; few, seed 2; one|<b>, seed 0;" in text
    assert "few has 2 seeds and first 3: the difference is over the 1 that both have" in text
    assert "With 2 pairs p is at least 0.5." in text
    assert "One seed has no interval" in text
    rows = read_csv(folder / "runs.csv")
    assert len(rows) == 16
    assert {row["state"] for row in rows} == {"finished", "diverged", "missing"}


def test_the_page_needs_no_other_file_and_shows_text_as_it_is(reported):
    _, folder, _ = reported
    page = (folder / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) == 2
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "<b>" not in page
    for shown in ("one|&lt;b&gt;", "# &lt;made up&gt; &amp; not run", "A &amp; B &lt;2020&gt;", "study made_up.yaml"):
        assert shown in page
    for name in ("seeds", "curves"):
        assert (folder / f"{name}.png").stat().st_size > 5000
    assert (folder / "table.md").read_text().startswith("| arm | test/score |")


@pytest.mark.usefixtures("undrawn")
def test_the_commands_are_whole_and_say_which_run_they_make(study):
    definition, arms, runs = study
    arms[1].settings["threads"] = 3
    chosen, trust = chosen_metric(definition, arms), ["--trust", "mine"]
    write_report(definition, arms, runs, chosen, runs[0].root, ["study", "s.yaml"], None, trust)
    page = (runs[0].root / "report.html").read_text()
    assert "<pre>python -m experiments study s.yaml --trust mine</pre>" in page
    place = f"--trainer.default_root_dir={runs[0].of_arm}"
    command = f"--seed_everything=0 --name=seed_0 {place} --threads={torch.get_num_threads()} --trust mine\n"
    [shown] = re.findall(r"# first, seed 0\npython -m experiments fit --config \S*config.yaml (.*\n)", page)
    assert shown == command
    for label in ("gone, seed 0", "first, seed 3"):  # the config says it, and not known
        [shown] = re.findall(rf"# {label}\n(.*)", page)
        assert "--threads" not in shown


def test_a_report_made_again_is_the_same(reported):
    _, folder, study = reported
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    report(*study)
    assert {path: path.read_bytes() for path in files} == files


def test_a_metric_that_was_not_logged_is_refused(study):
    _, _, runs = study
    with pytest.raises(ExperimentError, match=r"'test/scor' was not logged by first, seed 0\. .* 'test/score'"):
        outcomes(runs, "test/scor")


def test_a_run_without_the_metric_is_in_no_number_and_refuses_no_other(study):
    definition, arms, runs = study
    path = runs[0].folder.result
    path.write_text(path.read_text().replace("test/score", "test/other"))
    of_runs = outcomes(runs, "test/score")
    assert of_runs[0].state is State.WITHOUT
    first = compared(definition, arms, of_runs)[0]
    close((first.mean.mean, first.mean.count), (2.5, 2))
    said = " ".join(notes([first], of_runs, "test/score", "max"))
    assert "Finished without the metric, and in no number here: first, seed 0." in said


def test_an_arm_without_a_seed_has_no_sentence_on_its_pairs(study):
    definition, arms, runs = study
    of_runs = outcomes([run for run in runs if run.arm.name in ("first", "one|<b>")], "test/score")
    said = " ".join(notes(compared(definition, arms, of_runs), of_runs, "test/score", "max"))
    assert "one|<b> has 1 seeds and first 3" in said
    assert "few has" not in said


def test_a_run_without_a_result_and_one_with_a_damaged_one_are_unfinished(study):
    _, _, runs = study
    runs[0].folder.result.unlink()
    runs[1].folder.result.write_text("metrics: [")
    found = outcomes(runs, "test/score")
    states = [State.UNFINISHED, State.UNFINISHED, State.FINISHED, State.MISSING]
    assert [outcome.state for outcome in found[:4]] == states
    assert found[0].note == "it began"


def test_what_the_runs_recorded_is_drawn(study, monkeypatch):
    definition, arms, runs = study
    drawn = []
    monkeypatch.setattr(experiments.study.recorded, "save", lambda figure, stem: drawn.append(figure))
    by_run = {("first", 0): [1, 3], ("first", 1): [3, 1], ("first", 2): [4, 0], ("few", 0): [0, 2]}
    for run in runs:
        if counts := by_run.get((run.arm.name, run.seed)):
            histograms = [Histogram(2, "", [-1.0, 0.0, 1.0], [9, 9]), Histogram(4, "", [-1.0, 0.0, 1.0], counts)]
            write_histograms(run.folder.path / "activations.csv", histograms)
    of_runs = outcomes(runs, "test/score")
    rows = compared(definition, arms, of_runs)
    draw_recorded(["activations", "val/score"], rows, of_runs, runs[0].root / "recorded")
    [figure] = drawn
    histograms, curves = figure.axes[:2]
    means = {
        patch.get_label(): patch.get_data().values.tolist() for patch in histograms.patches if not patch.get_fill()
    }
    assert means == {"first (3)": [2 / 3, 1 / 3], "few (1)": [0.0, 1.0]}
    band = next(patch.get_data() for patch in histograms.patches if patch.get_fill())
    assert (band.values.tolist(), band.baseline.tolist()) == ([1.0, 0.75], [0.25, 0.0])
    lines = {line.get_label(): line.get_xydata().tolist() for line in curves.lines}
    assert lines["first (3)"] == [[4.0, 2.0]]
    [said] = draw_recorded(["activation", "val/score"], rows, of_runs, runs[0].root / "recorded")
    assert "no run has recorded 'activation'. Did you mean 'activations'" in said
    assert [axes.get_title() for axes in drawn[1].axes] == ["val/score"]


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without the pictures that every report has: they take a second."""
    for name in ("draw_curves", "draw_dots"):
        monkeypatch.setattr(experiments.study.report, name, lambda *given: given[-1].with_suffix(".svg").touch())


@pytest.mark.usefixtures("undrawn")
def test_what_is_not_recorded_is_a_note_of_the_report(study):
    definition, arms, runs = study
    runs[0].folder.path.joinpath("damaged.csv").write_text("step\n1\n")
    runs[0].root.joinpath("recorded.svg").touch()  # of a report before
    text = report(definition._replace(draw=["val/scor", "damaged"]), arms, runs)
    assert "Not drawn: no run has recorded 'val/scor'. Did you mean 'val/score'?" in text
    assert "damaged.csv: no file of histograms" in text
    assert "<h2>Recorded</h2>" not in (runs[0].root / "report.html").read_text()


def test_names_are_drawn_as_they_are(study, monkeypatch):
    definition, _, runs = study
    names = ["_first", r"$x_{$ \$5", "one $", "one|<b>"]
    arms = [runs[4 * i].arm._replace(name=name) for i, name in enumerate(names)]
    runs = [run._replace(arm=arms[i // 4]) for i, run in enumerate(runs)]
    of_runs = outcomes(runs, "test/score")
    rows = compared(definition, arms, of_runs)
    drawn = []
    for module in (experiments.study.plots, experiments.study.recorded):
        monkeypatch.setattr(module, "save", lambda figure, stem: drawn.append(figure))
    for draw in (draw_curves, draw_dots):
        draw(rows, of_runs, "test/score", runs[0].root / "picture")
    draw_recorded(["val/score"], rows, of_runs, runs[0].root / "picture")
    write_histograms(runs[0].folder.path / "$a$.csv", [Histogram(2, "", [-1.0, 0.0, 1.0], [1, 2])])
    draw_recorded(["$a$"], rows, of_runs, runs[0].root / "picture")
    for figure in drawn:
        figure.draw_without_rendering()  # which is where a formula would be read
    curves, dots, recorded, histograms = drawn
    ticks = [tick.get_text() for tick in dots.axes[0].get_xticklabels()]
    assert [tick.replace(r"\$", "$").strip("\u200b") for tick in ticks] == names
    for figure, count in ((curves, 5), (recorded, 4), (histograms, 1)):  # an arm each, and a run that diverged
        shown = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
        assert len(shown) == count
        assert shown[0].startswith("\u200b_first (")


def test_without_a_finished_run_there_is_no_report(study):
    definition, arms, runs = study
    with pytest.raises(ExperimentError, match="no run is finished"):
        report(definition, arms, [run for run in runs if run.seed == 3 and run.arm.name == "first"])


def test_the_direction_is_the_monitors_or_said(study):
    definition, arms, _ = study
    assert chosen_metric(definition, arms) == ("test/score", "max")
    assert chosen_metric(definition._replace(metric=Metric("val/loss", "min")), arms) == ("val/loss", "min")
    with pytest.raises(ExperimentError, match="mode: min"):
        chosen_metric(definition._replace(metric=Metric("val/loss", None)), arms)


def test_a_result_is_read_as_written(study):
    _, _, runs = study
    diverged = next(run for run in runs if run.label == "gone, seed 2").result
    assert math.isnan(diverged["metrics"]["test/score"])
    assert diverged["versions"]["torch"] == torch.__version__
