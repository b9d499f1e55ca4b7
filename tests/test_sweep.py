"""Sweeps: what is run, what is kept, and what is told of it."""

import csv
import math
from pathlib import Path

import pytest
import torch

from experiments.__main__ import main
from experiments.core.errors import ExperimentError
from experiments.core.parsed import Parsed
from experiments.core.trust import trusting
from experiments.sweep import command
from experiments.sweep import report as sweep_report
from experiments.sweep.definition import cells, read_sweep
from experiments.sweep.report import curve, draw, half_width, reached

SWEEPS = sorted((Path(__file__).parent.parent / "experiments/sweeps").glob("*.yaml"))
CONFIG = SWEEPS[0].parent.parent / "configs/regression/affine_tasks.yaml"

SMALL = f"""
base: {CONFIG}
settings:
  trainer: {{max_steps: 2, accelerator: cpu}}
  data.init_args: {{batch_size: 8, eval_examples: 8, epoch: 2}}
arms:
  MI: {{model.network: Bilinear}}
  MLP:
    model.network: {{class_path: Conditional, init_args: {{layers: 2, integrator: null}}}}
    sweep: {{model.network.init_args.hidden: [4, 8]}}
x: parameters
metric: test/nmse
seeds: [0, 1]
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def rows(panel, arm, values):
    """A row for each seed, by x."""
    return [
        {"panel": panel, "arm": arm, "size": str(x), "x": float(x), "value": value, "seed": seed}
        for x, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]


def test_the_interval_is_students():
    # By hand: deviation 1, so 4.303 / √3 and 3.182 · √(5/3) / 2.
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(2.484, abs=1e-3)
    assert half_width([1.0, 2.0, 3.0, 4.0]) == pytest.approx(2.054, abs=1e-3)
    assert half_width([1.0]) != half_width([1.0]), "one seed has no interval"


def test_a_curve_is_of_its_arm_and_from_left_to_right():
    made = [*rows("8", "MLP", {20: [3.0, 5.0], 10: [1.0, 3.0]}), *rows("8", "MI", {9: [0.0, 0.0]})]
    points = curve(made, "8", "MLP")
    assert [(point.x, point.mean) for point in points] == [(10, 2.0), (20, 4.0)]


def test_sizes_with_the_same_x_are_no_seeds_of_each_other():
    narrow, wide = rows("", "MLP", {10: [1.0, 3.0]}), rows("", "MLP", {10: [5.0, 7.0]})
    points = curve([*narrow, *({**row, "size": "wide"} for row in wide)], "", "MLP")
    assert [(point.x, point.values) for point in points] == [(10, [1.0, 3.0]), (10, [5.0, 7.0])]


def test_a_run_that_diverged_counts_at_every_x():
    of_run = [{**row, "size": "None"} for row in rows("", "MLP", {8: [1.0, 0.5], 16: [0.5, 0.5]})]
    lost = {**of_run[0], "x": math.nan, "value": math.nan, "seed": 2}
    points = curve([*of_run, lost], "", "MLP")
    assert [(point.x, point.values[:-1]) for point in points] == [(8, [1.0, 0.5]), (16, [0.5, 0.5])]
    assert all(math.isnan(point.mean) and math.isnan(point.values[-1]) for point in points)
    [point] = curve([lost], "", "MLP")
    assert math.isnan(point.x)


def test_what_reached_the_goal_is_the_smallest_by_the_mean(tmp_path):
    path = tmp_path / "goal.yaml"
    path.write_text(f"{SMALL}\npanel: size\npanels: {{2: {{}}, 4: {{}}}}\ngoal: 0.1\n")
    sweep = read_sweep(path)
    made = [
        *rows("2", "MLP", {10: [0.3, 0.3], 20: [0.05, 0.2], 40: [0.05, 0.13], 80: [0.0, 0.1]}),
        *rows("4", "MLP", {10: [0.3, 0.3], 20: [math.nan, 0.05], 40: [0.05, math.nan]}),
        *rows("2", "MI", {5: [0.0, 0.0]}),
        *rows("4", "MI", {9: [0.0, 0.0]}),
    ]
    assert list(csv.reader(reached(sweep, made).splitlines())) == [
        ["size", "arm", "parameters", "first_seed", "last_seed", "largest_tried"],
        ["2", "MI", "5", "5", "5", "5"],
        ["2", "MLP", "40", "20", "80", "80"],
        ["4", "MI", "9", "9", "9", "9"],
        ["4", "MLP", "", "20", "", "40"],
    ]
    for drawn in (made, [row | {"value": math.nan} if row["panel"] == "4" else row for row in made]):
        draw(sweep, drawn, tmp_path / "curves.png")
        assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("low", [0.0, 0.1, 1e-14])
def test_no_point_lies_on_the_frame(low, small, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(sweep_report, "write_figure", lambda path, figure, dpi: drawn.append(figure))
    made = [*rows("", "MLP", {10: [low, 1.0], 20: [0.5, 0.7]}), *rows("", "MI", {5: [0.2, 0.9]})]
    draw(read_sweep(small), made, tmp_path / "curves.png")
    [axes] = drawn[0].axes
    bottom, top = (axes.transAxes.inverted().transform(axes.transData.transform((10, y)))[1] for y in (low, 1.0))
    assert (bottom, top) == (pytest.approx(0.05 / 1.1), pytest.approx(1.05 / 1.1))


def test_a_run_is_told_by_its_size_and_its_metric(small, tmp_path):
    small.write_text(
        SMALL.replace("[0, 1]", "[0]").replace("  MI: {model.network: Bilinear}\n", "").replace("[4, 8]", "[4]")
    )
    assert main(["sweep", str(small), "--out", str(tmp_path / "out")]) == 0
    [row] = csv.DictReader((tmp_path / "out/runs.csv").read_text().splitlines())
    assert (row["arm"], row["size"], row["seed"]) == ("MLP", "4", "0")
    # 8 inputs and 8 tasks into 4, and 4 into 8 outputs, with their biases.
    assert int(row["parameters"]) == float(row["x"]) == 17 * 4 + 5 * 8
    assert 0.1 < float(row["value"]) < 10
    assert (tmp_path / "out/curves.csv").read_text().splitlines()[1].startswith(",MLP,108,1,")
    assert (tmp_path / "out/curves.png").is_file()


@pytest.mark.parametrize("metric", ["test/nmse", "test/nmse_*"])
def test_a_run_that_diverges_is_a_row_and_no_end(metric, small, tmp_path):
    """Nor is it run again, and it reaches no goal."""
    rate = "{class_path: SGD, init_args: {lr: 1.0e+30}}"
    text = SMALL.replace("settings:\n", f"settings:\n  model.optimizer: {rate}\n").replace("[0, 1]", "[0]")
    text = text.replace("  MI: {model.network: Bilinear}\n", "").replace("[4, 8]", "[4]").replace("test/nmse", metric)
    small.write_text(f"{text}\npanel: size\npanels: {{2: {{}}}}\ngoal: 1.0e+9\n")
    argv = ["sweep", str(small), "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    written = (tmp_path / "out/runs.csv").read_text()
    [row] = csv.DictReader(written.splitlines())
    assert (row["value"], row["parameters"]) == ("nan", str(17 * 4 + 5 * 8))
    assert main(argv) == 0
    assert (tmp_path / "out/runs.csv").read_text() == written
    assert (tmp_path / "out/reached.csv").read_text().splitlines()[1].startswith("2,MLP,,,,")


@pytest.fixture
def ran(monkeypatch):
    """The runs that a sweep asks for: of small MLPs they give 0.5, of others 0."""
    ran = []

    def run(sweep, cell, trusted):
        ran.append((cell.arm, cell.size, cell.seed))
        value = 0.5 if cell.size in (4, 8) else 0.0
        return [command._typed({**cell._asdict(), "x": 1, "value": value, "parameters": 1, "seconds": 0.0})]

    monkeypatch.setattr(command, "_run", run)
    monkeypatch.setattr(command, "draw", lambda *_: None)
    return ran


def test_a_sweep_runs_what_is_missing_and_keeps_the_rest(small, tmp_path, ran):
    """And it stops where the goal is reached: here by the third size of the MLP."""
    argv = ["sweep", str(small), "--out", str(tmp_path / "out")]
    whole = f"{SMALL}\npanel: size\npanels: {{2: {{}}}}\ngoal: 0.1\n".replace("[4, 8]", "[4, 8, 16, 32]")
    small.write_text(whole)
    assert main(argv) == 0
    assert ran == [("MI", None, 0), ("MI", None, 1), *(("MLP", size, seed) for size in (4, 8, 16) for seed in (0, 1))]
    first = (tmp_path / "out/runs.csv").read_text().splitlines()
    ran.clear()
    assert main(argv) == 0
    assert ran == []
    assert (tmp_path / "out/runs.csv").read_text().splitlines() == first
    small.write_text(whole.replace("[0, 1]", "[0, 2]").replace("[4, 8, 16, 32]", "[16]"))
    assert main(argv) == 0
    assert ran == [("MI", None, 2), ("MLP", 16, 2)]
    kept = (tmp_path / "out/runs.csv").read_text().splitlines()
    assert len(kept) == 5
    assert len(set(kept) & set(first)) == 3, "the head, and seed 0 of two arms"


def test_what_is_kept_goes_by_the_names_of_now(small, tmp_path, ran):
    argv = ["sweep", str(small), "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    assert len(ran) == 6
    small.write_text(SMALL.replace("  MLP:", "  perceptron:").replace("arms:", "panels: {all: {}}\narms:"))
    assert main(argv) == 0
    assert len(ran) == 6
    kept = list(csv.DictReader((tmp_path / "out/runs.csv").read_text().splitlines()))
    assert [(row["panel"], row["arm"]) for row in kept] == [("all", "MI")] * 2 + [("all", "perceptron")] * 4


@pytest.mark.parametrize("change", [("metric: test/nmse", "metric: val/nmse"), ("x: parameters", "x: hidden")])
def test_another_metric_or_axis_takes_nothing_over(change, small, tmp_path, ran):
    text = SMALL.replace("  MI: {model.network: Bilinear}\n", "")
    for small_text in (text, text.replace(*change)):
        small.write_text(small_text)
        assert main(["sweep", str(small), "--out", str(tmp_path / "out")]) == 0
    assert len(ran) == 8
    assert len((tmp_path / "out/runs.csv").read_text().splitlines()) == 5


def test_arms_with_equal_settings_share_their_runs(small, tmp_path, ran):
    small.write_text(SMALL.replace("arms:", "arms:\n  form: {model.network: Bilinear}"))
    for _ in range(2):
        assert main(["sweep", str(small), "--out", str(tmp_path / "out")]) == 0
        assert ran == [("form", None, 0), ("form", None, 1), *(("MLP", n, seed) for n in (4, 8) for seed in (0, 1))]
        kept = list(csv.DictReader((tmp_path / "out/runs.csv").read_text().splitlines()))
        assert [row["arm"] for row in kept] == ["form"] * 2 + ["MI"] * 2 + ["MLP"] * 4
        assert [row["seed"] for row in kept] == ["0", "1"] * 4


def test_a_swept_null_is_a_value(small):
    small.write_text(SMALL.replace("[4, 8]", "[null, 8]"))
    [[first, _], [second, _]] = cells(read_sweep(small), "", "MLP")
    assert (first.options[-1], first.size) == ("--config={model.network.init_args.hidden: null}", None)
    assert (second.options[-1], second.size) == ("--config={model.network.init_args.hidden: 8}", 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("metric: test/nmse", "metric: test/accuracy"), "nothing was logged as test/accuracy, but "),
        (("x: parameters", ""), "the key 'x' is missing"),
        (("seeds:", "seed:"), "there is no key 'seed'"),
        (("[0, 1]", "3"), "seeds: got 3, expected a list of different whole numbers"),
        (("x: parameters", "x: parameters\ngoal: 0.1\npanels: {small: {}}"), "panels: got 'small', expected numbers"),
        (("x: parameters", "x: parameters\ngoal: 0.1\npanels: {0: {}}"), "panels: got '0', expected numbers"),
        (("x: parameters", "x: parameters\ngoal: a"), "goal: got 'a', expected a number"),
        (("x: parameters", "x: 3"), "x: got 3, expected a name"),
        (("x: parameters", "x: hidden"), "MI: got None for x, expected numbers to be swept"),
        (("metric: test/nmse", "metric: 3"), "metric: got 3, expected a name"),
        (("metric: test/nmse", "metric: test/*"), r"nothing was logged as test/\*, but "),
        (("[0, 1]", "[[1]]"), r"seeds: got \[\[1\]\], expected a list of different whole numbers"),
        (("settings:", "panel: x\nsettings: x\npanels:\n all:"), "settings: got 'x', expected lines of NAME: VALUE"),
        (("[4, 8]", "[4, 4]"), "MLP: got .*expected different values"),
        (("[4, 8]", "4"), "MLP: got .*expected one setting with a list of values"),
        ((f"base: {CONFIG}", "base: none.yaml"), "'none.yaml' does not exist"),
        (("{model.network: Bilinear}", "Bilinear"), "expected names, with the settings of each"),
        (("model.network: Bilinear", "model.network: Bilinaer"), "Bilinaer"),
    ],
)
def test_a_mistake_is_one_message(change, message, small, tmp_path, capsys):
    small.write_text(SMALL.replace(*change))
    assert main(["sweep", str(small), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(error)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_ready_sweep_parses_and_its_networks_build(path):
    sweep = read_sweep(path)
    assert path.read_text().startswith("# ")
    last = list(sweep.panels)[-1]
    for arm in sweep.arms:
        *_, [cell, *_] = cells(sweep, last, arm)
        with trusting():
            parsed = Parsed(["fit", "--config", str(sweep.base), *cell.options], [])
        with torch.device("meta"):
            parsed.model.build(parsed.model.imagined(parsed.datamodule, {}))


def test_no_file_is_no_sweep():
    with pytest.raises(ExperimentError, match="does not exist"):
        read_sweep(Path("nowhere.yaml"))
    with pytest.raises(ExperimentError, match="is no file"):
        read_sweep(Path(__file__).parent)
