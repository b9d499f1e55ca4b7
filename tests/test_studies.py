"""Studies: what a file may say, which runs are made, kept, gone on with and redone, and what stops them."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import experiments.core.curves
import experiments.data
import experiments.study.command
import experiments.study.over_x
import experiments.study.pool
import experiments.study.report
import experiments.study.search
import experiments.tasks
from experiments.__main__ import main
from experiments.core.configs import CONFIGS
from experiments.core.errors import ExperimentError
from experiments.core.run_folder import write_result
from experiments.core.task import Monitor
from experiments.study.arms import Arm, key_of, resolved
from experiments.study.candidates import read_search
from experiments.study.definition import read_study
from experiments.study.jobs import Process, run_all
from experiments.study.lock import locked
from experiments.study.outcomes import compared, outcomes
from experiments.study.over_x import draw_over_x, goal_csv, up_to_goal
from experiments.study.pool import Here, workers
from experiments.study.runs import Run, leave_result, next_command

pytestmark = pytest.mark.runs

STUDIES = CONFIGS.parent / "studies"
LR = "model.optimizer.init_args.lr"
INTEGRATOR = "model.network.recurrent.cell.integrator"
GOOD = {"base": str(CONFIGS / "characters/quickstart.yaml"), "arms": {"MI": None}, "seeds": [0, 1]}


def written(folder, **changes):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes, sort_keys=False))
    return path


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"seed": [3]}, ["'seed'", "Did you mean 'seeds'", "published"]),
        ({"base": "no.yaml"}, ["base", "'no.yaml'"]),
        ({"base": None}, ["'base' is missing"]),
        ({"arms": {}}, ["arms", "name for each arm"]),
        ({"arms": [{INTEGRATOR: "Additive"}]}, ["arms", "name for each arm"]),
        ({"arms": {None: {INTEGRATOR: "Additive"}}}, ["arms", "None is no name"]),
        ({"arms": {"MI": "Additive"}}, ["arms: MI", "'Additive'", "NAME: VALUE"]),
        ({"arms": {"MI": {"seed_everything": 3}}}, ["arms: MI", "seed_everything", "the study itself"]),
        ({"settings": {"trainer": {"default_root_dir": "x"}}}, ["settings", "trainer.default_root_dir"]),
        ({"seeds": 3}, ["seeds", "got 3", "list"]),
        ({"seeds": [0, 1, 0]}, ["seeds", "0 stands twice"]),
        ({"seeds": [True]}, ["seeds", "True"]),
        ({"seeds": [2**32]}, ["seeds", str(2**32)]),
        ({"metric": "bpc"}, ["metric", "'bpc'", "test/NAME"]),
        ({"metric": {"name": "test/bpc", "mode": "low"}}, ["mode", "'low'", "min or max"]),
        ({"metric": {"nam": "test/bpc"}}, ["metric", "'nam'", "'name'"]),
        ({"published": {"IM": {"value": 1, "source": "x"}}}, ["published: IM", "Did you mean 'MI'"]),
        ({"published": {"MI": {"value": 1}}}, ["published: MI", "source"]),
        ({"published": {"MI": {"value": "1", "source": "x"}}}, ["published: MI", "NUMBER"]),
        ({"draw": "val/loss"}, ["draw", "'val/loss'", "list"]),
        ({"draw": ["test/loss"]}, ["draw", "'test/loss' is no curve", "val/NAME"]),
        ({"search": {"settings": {LR: [1, 2]}, "seed": [7]}}, ["search", "'seed'", "'seeds'"]),
        ({"search": {"seeds": [7]}}, ["search: settings", "None"]),
        ({"search": {"settings": {"seed_everything": [1, 2]}, "seeds": [7]}}, ["search", "the study itself"]),
        ({"search": {"settings": {LR: [0.1]}, "seeds": [7]}}, [f"search: {LR}", "[0.1]", "two or more"]),
        ({"search": {"settings": {LR: [1, 1]}, "seeds": [7]}}, [f"search: {LR}", "different"]),
        ({"search": {"settings": {LR: [0.1, "0.1"]}, "seeds": [7]}}, ["[0.1, '0.1']", "different, as text"]),
        ({"search": {"settings": {LR: [1, None]}, "seeds": [7]}}, [f"search: {LR}", "numbers or names"]),
        ({"search": {"settings": {LR: [1, 2]}}}, ["search: seeds", "None"]),
        ({"search": {"settings": {LR: [1, 2]}, "seeds": [7, 1]}}, ["search: seeds: 1", "other seeds"]),
        ({"search": {"settings": {LR: [1, 2]}, "seeds": [7], "max_steps": 0}}, ["search: max_steps", "got 0"]),
        (
            {"search": {"settings": {"trainer.max_steps": [1, 2]}, "seeds": [7], "max_steps": 9}},
            ["search: it searches for trainer.max_steps", "no max_steps of its own"],
        ),
        ({"search": {"settings": {LR: {"uniform": [0, 1]}}, "seeds": [7]}}, [f"search: {LR}", "with draws: N"]),
        ({"search": {"settings": {LR: {"normal": [0, 1]}}, "draws": 2, "seeds": [7]}}, ["'normal'", "log_uniform"]),
        ({"search": {"settings": {LR: {"uniform": [1, 0]}}, "draws": 2, "seeds": [7]}}, ["[1, 0]", "[LOW, HIGH]"]),
        ({"search": {"settings": {LR: {"log_uniform": [0, 1]}}, "draws": 2, "seeds": [7]}}, ["expected positive"]),
        ({"search": {"settings": {LR: {"uniform": [1, 1.001]}}, "draws": 9, "seeds": [7]}}, ["draws: 9", "fewer"]),
        ({"search": {"settings": {LR: [1, 2]}, "draws": 2, "seeds": [7]}}, ["draws: got 2", "below the 2"]),
        ({"axis": {LR: [1, 2]}}, ["axis: the key 'x' is missing"]),
        ({"panels": {"a": None, "b": {LR: 1}}}, ["panels: the key 'x' is missing"]),
        ({"metric": "test/accuracy_*"}, ["metric: a *: the key 'x' is missing"]),
        ({"metric": "test/accuracy_*", "x": "length", "axis": {LR: [1, 2]}}, ["metric", "no axis"]),
        ({"axis": {LR: [1, 1]}, "x": "rate"}, ["MI: axis", "[1, 1]", "different"]),
        ({"axis": {LR: 4}, "x": "rate"}, ["MI: axis", "one setting with a list of values"]),
        ({"axis": {"name": ["a", "b"]}, "x": "rate"}, ["MI: axis: name", "the study itself"]),
        ({"axis": {INTEGRATOR: ["Additive", "LowRank"]}, "x": "rate"}, ["MI: got 'Additive' for x", "numbers"]),
        ({"x": "rate"}, ["MI: got None for x", "numbers"]),
        ({"x": 3}, ["x: got 3", "a name"]),
        ({"x": "parameters", "goal": 1}, ["goal: got 1", "an axis"]),
        ({"x": "rate", "axis": {LR: [1, 2]}, "goal": "a"}, ["goal: got 'a'", "a number"]),
        ({"x": "rate", "axis": {LR: [1, 2]}, "goal": 1, "panels": {"a": None}}, ["panels: got 'a'", "numbers"]),
        ({"x": "rate", "axis": {LR: [1, 2]}, "published": {"MI": {"value": 1, "source": "x"}}}, ["published", "no x"]),
        ({"panels": {"a": 3}, "x": "parameters"}, ["panels: a", "got 3", "NAME: VALUE"]),
        ({"keep": "no"}, ["keep: got 'no'", "true or false"]),
        ({"keep": False, "draw": ["val/loss"]}, ["draw", "no keep: false"]),
        ({"cluster": {"cpu": 1}}, ["cluster", "'cpu'", "'cpus'"]),
        ({"cluster": {"cpus": 0}}, ["cpus", "got 0", "at least 1"]),
        ({"cluster": {"retries": 1.5}}, ["retries", "1.5"]),
    ],
)
def test_a_mistake_in_a_study_is_one_message(changes, parts, tmp_path):
    with pytest.raises(ExperimentError) as caught:
        read_study(written(tmp_path, **changes))
    for part in parts:
        assert part in str(caught.value)


def test_a_folder_is_no_study():
    with pytest.raises(ExperimentError, match="is no file"):
        read_study(STUDIES)


def test_a_mistake_of_any_arm_is_found_before_anything_runs(tmp_path, capsys):
    arms = {"MI": None, "low rank": {INTEGRATOR: "LowRank", f"{INTEGRATOR}.rnk": 3}}
    assert main(["study", str(written(tmp_path, arms=arms)), "--output", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    for part in ("error: study: arm 'low rank'", f"{INTEGRATOR}.rnk", "'rank'"):
        assert part in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("study", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_ready_studies_can_be_read(study):
    definition = read_study(study)
    assert study.read_text().startswith("# ")
    assert len(definition.arms) > 1
    assert len(definition.seeds) > 1


@pytest.mark.parametrize("name", ["affine_tasks", "bilinear_form", "state_tracking", "teacher_student"])
def test_the_networks_of_the_short_studies_can_be_built_and_their_results_are_taken_over(name):
    study = read_study(STUDIES / f"{name}.yaml")
    last = {(of.panel, of.arm): of for of in study.conditions() if of.panel == list(study.panels)[-1]}.values()
    arms = resolved(study, {of: parts for of, parts in study.conditions().items() if of in last}, [])
    runs = [Run(arm, seed, STUDIES.parent / "results" / name) for arm in arms for seed in study.seeds]
    made = [run for run in runs if run.result is not None]
    assert len(made) == len(runs)


RECURRENT = {
    "RNN": ("RNNCell", "Additive"),
    "MI-RNN": ("RNNCell", "MultiplicativeIntegration"),
    "LSTM": ("LSTMCell", "Additive"),
    "MI-LSTM, 1 1 1 0": ("LSTMCell", "MultiplicativeIntegration"),
    "MI-LSTM, 1 .5 .5 0": ("LSTMCell", "MultiplicativeIntegration"),
    "multiplicative LSTM": ("LSTMCell", "Krause"),
    "GRU": ("GRUCell", "Additive"),
    "MI-GRU": ("GRUCell", "MultiplicativeIntegration"),
    "Mogrifier LSTM": ("Mogrifier", "Additive"),
}


def test_the_arms_of_the_memory_studies_are_what_they_are_called():
    adding, *others = (read_study(STUDIES / f"memory_{name}.yaml") for name in ("adding", "copy", "digits"))
    found = {}
    for arm in resolved(adding, adding.conditions(), []):
        recurrent = arm.settings["model"]["init_args"]["network"]["init_args"]["recurrent"]["init_args"]
        assert recurrent["engine"] == "fused"
        cell = outer = recurrent["cell"]
        if outer["class_path"].endswith("Mogrifier"):
            cell = outer["init_args"]["cell"]
        integrator = cell["init_args"]["integrator"]
        names = outer["class_path"], integrator["class_path"] if isinstance(integrator, dict) else integrator
        found[arm.name] = tuple(name.rpartition(".")[2] for name in names)
    assert found == RECURRENT
    size = "model.init_args.network.recurrent.hidden_size"
    for study in others:
        assert study.settings == adding.settings
        assert [arm | {size: 0} for arm in study.arms.values()] == [arm | {size: 0} for arm in adding.arms.values()]


def test_the_arms_of_the_speech_study_are_what_they_are_called():
    found = {}
    study = read_study(STUDIES / "speech_an4.yaml")
    for arm in resolved(study, study.conditions(), []):
        recurrent = arm.settings["model"]["init_args"]["network"]["init_args"]["recurrent"]["init_args"]
        integrator = recurrent["cell"]["init_args"]["integrator"]
        found[arm.name] = (integrator["class_path"], *integrator.get("init_args", {}).values())
    assert {name: words[0].rpartition(".")[2] for name, words in found.items()} == {
        "LSTM": "Additive",
        "MI-LSTM, 1 1 1 0": "MultiplicativeIntegration",
        "MI-LSTM, 1 .5 .5 0": "MultiplicativeIntegration",
    }
    assert found["MI-LSTM, 1 1 1 0"][1:] == (1, 1, 1, 0)
    assert found["MI-LSTM, 1 .5 .5 0"][1:] == (1, 0.5, 0.5, 0)


def test_the_arms_of_batch_normalisation_differ_in_gamma_alone():
    study = read_study(STUDIES / "memory_batch_norm.yaml")
    gains = {}
    for arm in resolved(study, study.conditions(), []):
        recurrent = arm.settings["model"]["init_args"]["network"]["init_args"]["recurrent"]["init_args"]
        cell = recurrent["cell"]["init_args"]
        norms = [cell["memory_norm"], cell["integrator"].get("init_args", {}).get("norm")]
        gains[arm.name] = [norm and norm["init_args"]["gain"] for norm in norms]
        statistics = [c for c in arm.settings["trainer"]["callbacks"] if "PopulationStatistics" in c["class_path"]]
        assert len(statistics) == (arm.name != "without")
    assert gains == {"γ = 0.1": [0.1, 0.1], "γ = 1": [1.0, 1.0], "without": [None, None]}


def test_the_cloze_has_an_arm_whose_steps_are_normalised():
    """Its statistics are kept for as many steps as a document has at most, and are estimated anew."""
    study = read_study(STUDIES / "reading_novels.yaml")
    [arm] = resolved(study, {of: one for of, one in study.conditions().items() if "normalisation" in of.arm}, [])
    cell = arm.settings["model"]["init_args"]["network"]["init_args"]["recurrent"]["init_args"]["cell"]["init_args"]
    assert cell["integrator"]["init_args"]["integrator"]["class_path"].endswith(".MultiplicativeIntegration")
    length = arm.settings["data"]["init_args"]["length"]
    norms = cell["integrator"]["init_args"]["norm"], cell["memory_norm"]
    assert [norm["init_args"]["max_steps"] for norm in norms] == [length, length]
    callbacks = [callback["class_path"].rpartition(".")[2] for callback in arm.settings["trainer"]["callbacks"]]
    assert callbacks == ["LearningRate", "PopulationStatistics"]


SETTINGS = {"name": "a", "data": {"init_args": {"root": "x", "length": 3}}, "trainer": {"max_steps": 2, "logger": None}}


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ({"name": "b", "threads": 3, "save_every": 1.0, "seed_everything": 4}, True),
        ({"data": {"init_args": {"root": "y", "length": 3}}}, True),
        ({"trainer": {"logger": True, "max_steps": 2}}, True),
        ({"data": {"init_args": {"root": "x", "length": 4}}}, False),
        ({"trainer": {"max_steps": 3, "logger": None}}, False),
    ],
)
def test_the_key_is_of_what_changes_results(changes, is_same):
    assert (key_of(SETTINGS | changes) == key_of(SETTINGS)) is is_same


def test_equal_settings_are_the_same_run_however_they_are_written(tmp_path):
    config = (CONFIGS / "regression/affine_tasks.yaml").read_text()
    commented = config.replace("_task.yaml", str(CONFIGS / "regression/_task.yaml")) + "# a comment\n"
    (tmp_path / "base.yaml").write_text(commented)
    settings = {"data": {"init_args": {"tasks": 4}}}, {"data.tasks": 4, "data.root": "elsewhere"}
    settings[1].pop("data.root")
    keys = set()
    for base, of_arm in zip(("base.yaml", str(CONFIGS / "regression/affine_tasks.yaml")), settings, strict=True):
        study = read_study(written(tmp_path, base=base, arms={"A": of_arm}))
        [arm] = resolved(study, study.conditions(), [])
        keys.add(arm.key)
    assert len(keys) == 1


def test_arms_with_equal_settings_are_refused(tmp_path):
    panels = {"a": None, "b": {"data.init_args.tasks": 8}}  # as the config has it
    base = str(CONFIGS / "regression/affine_tasks.yaml")
    study = read_study(written(tmp_path, base=base, panels=panels, x="parameters"))
    with pytest.raises(ExperimentError, match="arms 'a, MI' and 'b, MI' have the same settings"):
        resolved(study, study.conditions(), [])


def started(out):
    """The runs that a study says it starts."""
    return [line.partition(": ")[2] for line in out.splitlines() if line.startswith("started: ")]


def test_missing_runs_are_made_finished_ones_kept_and_failed_ones_reported(text, tmp_path, capsys, monkeypatch):
    # In this process, which is faster than one of its own.
    monkeypatch.setattr(experiments.study.command, "Process", lambda job, lock: Here(job.argv(), job.run.log, None))
    # Of each run: it takes a second.
    monkeypatch.setattr(experiments.core.curves, "draw_metrics", lambda runs, output: None)
    settings = {
        "model.network.recurrent": {"hidden_size": 4, "engine": "loop"},
        "data": {"path": str(text), "batch_size": 4, "length": 20},
        "trainer": {"max_time": None, "max_epochs": -1, "limit_val_batches": 1, "limit_test_batches": 1},
        "trainer.accelerator": "cpu",
        "trainer.enable_model_summary": False,
        "trainer.max_steps": 50,
    }
    options = ["--output", str(tmp_path / "out"), "--set", "trainer.max_steps=2"]
    arms = {"absent": {"data.path": str(tmp_path / "absent.txt")}, "MI": None}
    assert main(["study", str(written(tmp_path, settings=settings, arms=arms, seeds=[0])), *options]) == 1
    shown = capsys.readouterr()
    assert started(shown.out) == ["absent, seed 0", "MI, seed 0"]
    assert "failed: absent, seed 0 (exit code 2" in shown.err
    assert "absent.txt" in shown.err
    assert "Not finished, and in no number here: absent, seed 0." in shown.out
    [finished] = (tmp_path / "out").rglob("result.yaml")
    before = finished.read_bytes()
    assert yaml.safe_load(before)["steps"] == 2, "--set is in force over the study"

    # Another name of an arm, another place of data, and more seeds.
    path = written(tmp_path, settings=settings, arms={"multiplicative": None}, seeds=[1, 0])
    with pytest.warns(UserWarning, match="no effect"):
        assert main(["study", str(path), *options, "--set", "data.root=elsewhere"]) == 0
    shown = capsys.readouterr()
    assert started(shown.out) == ["multiplicative, seed 1"]
    assert finished.read_bytes() == before
    assert len(list((tmp_path / "out").rglob("result.yaml"))) == 2
    assert "2 runs: 1 finished, 1 to run" in shown.out


class MadeUp:
    """A job that ends at once: its score is what the test says of its learning rate; of none it fails.

    That with the integrator Failing fails too, and that with Diverging diverges.
    """

    scores = {}  # noqa: RUF012
    started = []  # noqa: RUF012

    def __init__(self, job, lock):
        run = job.run
        config = yaml.safe_load((run.of_arm / "config.yaml").read_text())
        rate, integrator = config[LR], config.get(INTEGRATOR)
        self.started.append((run.seed, rate))
        score = None if integrator == "Failing" else self.scores.get(rate)
        self._code = 1 if score is None else 0
        run.log.write_text("it began\nout of memory\n")
        if score is not None:
            run.folder.checkpoints.mkdir(parents=True)
            metrics = {"val/bpc": score, "test/bpc": score + 0.5}
            diverged = 1 if rate == 0.3 or integrator == "Diverging" else None
            rest = {
                "best_step": 1,
                "steps": 1,
                "diverged_at": diverged,
                "parameters": round(1000 * rate),
                "seconds_per_step": None,
            }
            write_result(run.folder.result, {"metrics": metrics, "seconds_per_step": None} | rest)

    def poll(self):
        return self._code


@pytest.fixture
def made_up(monkeypatch):
    """Runs whose scores are made up, by learning rate, and what is started of them."""

    def resolved(study, conditions, changes):  # as they are: to parse the settings takes a second for each
        common = {"trainer": {"max_time": None}, "threads": 1}
        settings = {
            of: {key: value for part in parts for key, value in part.items()} for of, parts in conditions.items()
        }
        return [
            Arm(of.arm, key_of(given), common | given, Monitor("bpc", "min"), of.panel, of.level)
            for of, given in settings.items()
        ]

    monkeypatch.setattr(experiments.study.command, "resolved", resolved)
    monkeypatch.setattr(experiments.study.search, "resolved", resolved)
    monkeypatch.setattr(experiments.study.command, "Process", MadeUp)
    monkeypatch.setattr(MadeUp, "started", [])
    monkeypatch.setattr(MadeUp, "scores", {0.001: 3.0, 0.3: 1.0})
    for name in ("draw_curves", "draw_dots", "draw_over_x"):  # they take a second
        monkeypatch.setattr(experiments.study.report, name, lambda *given: given[-1].with_suffix(".svg").touch())
    return MadeUp


def test_every_arm_gets_what_was_best_for_it_with_other_seeds(tmp_path, capsys, made_up):
    scores, started = made_up.scores, made_up.started
    search = {"settings": {LR: [0.001, 0.02, 0.3]}, "seeds": [7, 8]}
    path = written(tmp_path, search=search)
    command = ["study", str(path), "--output", str(tmp_path / "out")]
    assert main([*command, "--set", f"{LR}=1"]) == 2
    assert "the study searches for it" in capsys.readouterr().err

    assert main(command) == 2
    assert started == [(seed, rate) for rate in (0.001, 0.02, 0.3) for seed in (7, 8)]
    assert "failed: MI, 0.02, seed 7" in capsys.readouterr().err
    assert main(["report", *command[1:]]) == 2
    said = "no arm has a value. MI: MI, 0.02, seed 7 is not finished (out of memory); MI, 0.02, seed 8 is not finished"
    assert said in capsys.readouterr().err

    scores[0.02] = 2.0
    started.clear()
    assert main(command) == 0
    assert started == [(7, 0.02), (8, 0.02), (0, 0.02), (1, 0.02)], "that of 0.3 diverged"
    said = f"{LR} of each arm is the best of 0.001, 0.02, 0.3 by val/bpc with seeds 7, 8: MI 0.02."
    assert said in capsys.readouterr().out
    table = (tmp_path / "out/search.csv").read_text().splitlines()
    assert table == [
        f"arm,{LR},metric,score,chosen",
        "MI,0.001,val/bpc,3.0,0",
        "MI,0.02,val/bpc,2.0,1",
        "MI,0.3,val/bpc,nan,0",
    ]
    page = (tmp_path / "out/report.html").read_text()
    assert main(["report", *command[1:]]) == 0
    assert (tmp_path / "out/report.html").read_text() == page
    assert page.count("--seed_everything=7") == 3


def test_values_that_are_nearly_equal_are_searched_each(tmp_path, made_up):
    search = {"settings": {LR: [0.12345671, 0.12345672]}, "seeds": [7]}
    of_trials = experiments.study.search.trials(read_study(written(tmp_path, search=search)), [], tmp_path)
    assert [trial.runs[0].label for trial in of_trials] == ["MI, 0.12345671, seed 7", "MI, 0.12345672, seed 7"]
    assert len({trial.arm.key for trial in of_trials}) == 2


def test_a_search_of_two_settings_tries_their_grid(tmp_path, capsys, made_up):
    made_up.scores[0.02] = 2.0
    search = {"settings": {INTEGRATOR: ["LowRank", "Additive"], LR: [0.001, 0.02]}, "seeds": [7]}
    path = written(tmp_path, arms={"A": {"a": 1}, "B": {"a": 2}}, search=search)
    assert main(["study", str(path), "--output", str(tmp_path / "out")]) == 0
    assert made_up.started[:8] == [(7, rate) for rate in (0.001, 0.02) * 4]
    said = (
        f"{INTEGRATOR} and {LR} of each arm are the best of LowRank, 0.001; LowRank, 0.02; Additive, 0.001; Additive, "
        "0.02 by val/bpc with seed 7: A LowRank, 0.02 (the maximum tried); B LowRank, 0.02 (the maximum tried)."
    )
    assert said in capsys.readouterr().out
    table = (tmp_path / "out/search.csv").read_text().splitlines()
    assert table[0] == f"arm,{INTEGRATOR},{LR},metric,score,chosen"
    assert table[1:3] == ["A,LowRank,0.001,val/bpc,3.0,0", "A,LowRank,0.02,val/bpc,2.0,1"]


def test_drawn_candidates_are_the_same_in_every_call_and_more_of_them_begin_with_fewer():
    settings = {"a": [1, 2], "b": {"log_uniform": [1e-4, 1e-1]}, "c": {"uniform": [0, 0.5]}}
    few, many = (
        read_search({"settings": settings, "draws": draws, "seeds": [7]}, [0]).candidates for draws in (5, 400)
    )
    assert many[:5] == few
    a, b, c = zip(*many, strict=True)
    assert set(a) == {1, 2}
    assert len(set(many)) == 400
    assert 1e-4 <= min(b) < 2e-4 < 5e-2 < max(b) <= 1e-1
    assert 150 < sum(rate < 10**-2.5 for rate in b) < 250, "half of them are below the geometric mean"
    assert 0 <= min(c) < 0.02 < 0.48 < max(c) <= 0.5
    whole = read_search({"settings": {"a": [1, 2, 3], "b": [4, 5]}, "draws": 5, "seeds": [7]}, [0]).candidates
    assert len(set(whole)) == 5


def test_a_search_may_have_shorter_runs_than_the_study(tmp_path, capsys, made_up):
    arms = {"MI": {"trainer": {"max_steps": 500, "max_time": None}}}
    path = written(tmp_path, arms=arms, search={"settings": {LR: [0.001, 0.02]}, "seeds": [7], "max_steps": 50})
    study = read_study(path)
    for trial in experiments.study.search.trials(study, [], tmp_path):
        assert list(trial.arm.settings)[-2:] == ["trainer.max_steps", LR], "after the arm's own, over which they are"
        assert trial.arm.settings["trainer.max_steps"] == 50
    made_up.scores[0.02] = 2.0
    assert main(["study", str(path), "--output", str(tmp_path / "out")]) == 0
    assert "with seed 7 in 50 steps: MI 0.02" in capsys.readouterr().out
    written_out = [yaml.safe_load(file.read_text()) for file in (tmp_path / "out/runs").glob("*/config.yaml")]
    assert sorted(config.get("trainer.max_steps", 500) for config in written_out) == [50, 50, 500]


def test_arms_whose_search_gives_no_value_are_left_out_and_no_others(tmp_path, capsys, made_up):
    arms = {name: {INTEGRATOR: name} for name in ("Failing", "Diverging", "A", "B")}
    search = {"settings": {LR: [0.001, 0.01]}, "seeds": [7]}
    made_up.scores[0.01] = 2.0
    path = written(tmp_path, arms=arms, search=search)
    command = ["study", str(path), "--output", str(tmp_path / "out")]
    assert main(command) == 1
    assert made_up.started[8:] == [(seed, 0.01) for _ in "AB" for seed in (0, 1)]
    shown = capsys.readouterr()
    assert "search: 8 runs: 0 finished, 8 to run" in shown.out
    assert (
        "[search: 8 of 8, 2 failed] B, 0.01, seed 7: 2.0000 after 0:00:00; about 0:00:00 left of the search\n"
        in shown.out
    )
    assert "\n4 runs: 0 finished, 4 to run" in shown.out
    assert "\n[4 of 4] B, seed 1: 2.5000 after 0:00:00; about 0:00:00 left\n" in shown.out
    assert "failed: Failing, 0.001, seed 7 (exit code 1" in shown.err
    why = {
        "Failing": "Failing, 0.001, seed 7 is not finished (out of memory); Failing, 0.01, seed 7 is not finished",
        "Diverging": f"it diverged with every value of {LR}.",
    }
    for arm, text in why.items():
        assert f"left out: {arm}: {text}" in shown.err
        assert f"its search gave no value: {arm}: {text}" in shown.out
    assert "Failing, the study's first arm, is left out: A stands in its place." in shown.out
    assert [line.split(",")[0] for line in (tmp_path / "out/table.csv").read_text().splitlines()] == ["arm", "A", "B"]
    page = (tmp_path / "out/report.html").read_text()
    assert "Not finished: Failing, 0.01, seed 7" in page
    assert main(["report", *command[1:]]) == 0
    assert (tmp_path / "out/report.html").read_text() == page


def test_an_axis_is_left_where_the_goal_is_reached(tmp_path, capsys, made_up):
    made_up.scores = {0.5: 2.0, 0.001: 3.0, 0.002: 1.5, 0.003: 0.5, 0.004: 0.1}
    arms = {"one": {LR: 0.5}, "many": {"axis": {LR: [0.001, 0.002, 0.003, 0.004]}}}
    asked = {"arms": arms, "x": "parameters", "goal": 2.0, "panel": "size", "panels": {2: {"a": 1}, 4: {"a": 2}}}
    out = tmp_path / "out"
    command = ["study", str(written(tmp_path, **asked)), "--output", str(out)]
    assert main(command) == 0
    first, second = (
        [(seed, rate) for rate in rates for _ in (2, 4) for seed in (0, 1)] for rates in ([0.5, 0.001], [0.002])
    )
    assert sorted(made_up.started[:8]) == sorted(first)
    assert made_up.started[8:] == second, "with 1.5 in validation it has 2.0 in the test"
    assert (out / "goal.csv").read_text().splitlines()[:3] == [
        "size,arm,parameters,first_seed,last_seed,largest_tried",
        "2,one,,,,500",
        "2,many,2,2,2,2",
    ]
    table = (out / "table.csv").read_text()
    # Nothing is made again for other names, nor where folders are no longer to be kept.
    made_up.started.clear()
    asked |= {"arms": {"some": arms["many"], "one": arms["one"]}, "keep": False}
    for name in ("study", "report"):
        assert main([name, str(written(tmp_path, **asked)), *command[2:]]) == 0
        assert made_up.started == []
        again = (out / "table.csv").read_text().replace("some", "many")
        assert sorted(again.splitlines()) == sorted(table.splitlines())
    # More seeds, and what another goal asks for, are made alone. A value that fails ends the curve.
    made_up.scores[0.003] = None
    asked |= {"goal": 0.7, "seeds": [1, 2], "keep": True, "panels": {2: {"a": 1}}}
    assert main(["study", str(written(tmp_path, **asked)), *command[2:]]) == 1
    assert made_up.started == [(2, 0.001), (2, 0.5), (2, 0.002), (1, 0.003), (2, 0.003)]
    assert "Not finished, and in no number here: 2, some, 0.003, seed 1" in capsys.readouterr().out


def test_a_metric_that_no_run_has_is_told_at_once_and_hides_no_error(tmp_path, capsys, made_up):
    arms = {name: {INTEGRATOR: name, LR: 0.001} for name in ("A", "Failing")}
    path = written(tmp_path, arms=arms, metric={"name": "test/bpb", "mode": "min"})
    assert main(["study", str(path), "--output", str(tmp_path / "out")]) == 2
    first, failed, last = capsys.readouterr().err.strip().partition("failed: Failing, seed 0 (exit code 1")
    assert failed
    assert first.count("metric: 'test/bpb' was not logged by A, seed 0. Did you mean 'test/bpc'?") == 1
    assert "out of memory" in last
    assert last.splitlines()[-1].startswith("error: study: metric: 'test/bpb' was not logged by A, seed 0.")


def test_a_broken_run_is_gone_on_with_from_its_checkpoint_or_redone(tmp_path):
    run = Run(Arm("MI", "key", {}, Monitor("bpc", "min")), 3, tmp_path)
    assert next_command(run) == run.command
    assert "--seed_everything=3" in run.command
    run.folder.checkpoints.mkdir(parents=True)
    torch.save({"state_dict": {}}, run.folder.last)
    assert next_command(run) == [*run.command, "--ckpt_path", str(run.folder.last)]
    run.folder.last.write_bytes(run.folder.last.read_bytes()[:100])  # as no run leaves it, but a full disk may
    run.log.write_text("of before")
    assert next_command(run) == run.command
    assert not run.folder.path.exists()
    assert not run.log.exists()


def measured(folder, values, **changes):
    """A study whose runs have made these values: by (panel, arm, level) a list by seed, the level as parameters."""
    path = written(folder, **{"arms": {"MLP": None, "MI": None}, "x": "parameters", "metric": "test/bpc"} | changes)
    runs = []
    for i, ((panel, arm, level), of_seeds) in enumerate(values.items()):
        for seed, value in enumerate(of_seeds):
            run = Run(Arm(arm, f"key{i}", {}, Monitor("bpc", "min"), panel, level), seed, folder)
            run.folder.checkpoints.mkdir(parents=True)
            metrics = value if isinstance(value, dict) else {"test/bpc": value}
            lost = 1 if not metrics or any(map(math.isnan, metrics.values())) else None
            rest = {"best_step": 1, "steps": 1, "diverged_at": lost, "parameters": level or 9, "seconds_per_step": None}
            write_result(run.folder.result, {"metrics": metrics} | rest)
            leave_result(run)
            runs.append(run)
    return read_study(path), runs


def rows_of(study, runs, metric="test/bpc"):
    return compared(study, list({run.arm.key: run.arm for run in runs}.values()), outcomes(runs, metric))


def test_what_reached_the_goal_is_the_smallest_by_the_mean(tmp_path):
    lost = math.nan
    values = {
        ("2", "MLP", 10): [0.3, 0.3], ("2", "MLP", 20): [0.05, 0.2], ("2", "MLP", 40): [0.05, 0.13],
        ("2", "MLP", 80): [0.0, 0.1], ("2", "MI", 5): [0.0, 0.0], ("4", "MLP", 10): [0.3, 0.3],
        ("4", "MLP", 20): [lost, 0.05], ("4", "MLP", 40): [0.05, lost], ("4", "MI", 9): [0.0, 0.0],
    }  # fmt: skip
    panels = {"panel": "size", "panels": {2: None, 4: None}}
    study, runs = measured(tmp_path, values, goal=0.1, axis={LR: [1, 2]}, **panels)
    rows = rows_of(study, runs)
    assert list(csv.reader(goal_csv(study, rows, "min").splitlines())) == [
        ["size", "arm", "parameters", "first_seed", "last_seed", "largest_tried"],
        ["2", "MLP", "40", "20", "80", "80"],
        ["2", "MI", "5", "5", "5", "5"],
        ["4", "MLP", "", "20", "", "40"],
        ["4", "MI", "9", "9", "9", "9"],
    ]
    left = [run.label for run in runs if run not in up_to_goal(study, runs, ("test/bpc", "min"))]
    assert left == ["2, MLP, 80, seed 0", "2, MLP, 80, seed 1"]
    draw_over_x(study, rows, "test/bpc", "min", tmp_path / "curves")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    best = goal_csv(study._replace(goal=0.2), rows, "max").splitlines()
    assert best[1:3] == ["2,MLP,10,10,10,80", "2,MI,,,,5"], "of a metric that is to be high"


def test_a_star_gives_x_its_values_and_a_run_that_diverged_is_in_none(tmp_path):
    curves = [{"test/bpc_8": 1.0, "test/bpc_16": 0.5}, {"test/bpc_8": 2.0, "test/bpc_16": 0.7}, {}]
    values = {("", "MLP", None): curves, ("", "MI", None): [{"test/bpc_8": 3.0, "test/bpc_of": 1.0}] * 2}
    study, runs = measured(tmp_path, values, metric={"name": "test/bpc_*", "mode": "min"}, x="length", seeds=[0, 1, 2])
    rows = rows_of(study, runs, "test/bpc_*")
    assert [(row.arm.name, row.x, row.values) for row in rows] == [
        ("MLP", 8, [1.0, 2.0]), ("MLP", 16, [0.5, 0.7]), ("MI", 8, [3.0, 3.0]), ("MI", 16, []),
    ]  # fmt: skip
    assert [row.are_all for row in rows] == [False, False, True, False]
    assert [row.difference and row.difference.estimate.mean for row in rows[:3]] == [None, None, 1.5]
    with pytest.raises(ExperimentError, match=r"'test/bpd_\*' was not logged by MI, seed 0"):
        outcomes(runs[3:], "test/bpd_*")


@pytest.mark.parametrize("low", [0.0, 0.1, 1e-14])
def test_no_point_lies_on_the_frame(low, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(experiments.study.over_x, "save", lambda figure, stem: drawn.append(figure))
    study, runs = measured(tmp_path, {("", "MLP", 10): [low, 1.0], ("", "MLP", 20): [0.5, 0.7], ("", "MI", 5): [0.2]})
    draw_over_x(study, rows_of(study, runs), "test/bpc", "min", tmp_path / "curves")
    [axes] = drawn[0].axes
    bottom, top = (axes.transAxes.inverted().transform(axes.transData.transform((10, y)))[1] for y in (low, 1.0))
    assert (bottom, top) == (pytest.approx(0.05 / 1.1), pytest.approx(1.05 / 1.1))


def test_short_runs_leave_their_results_alone(tmp_path, capsys):
    """And one that diverges is no end, nor is it run again."""
    settings = {
        "model.network": {"class_path": "Conditional", "init_args": {"layers": 2, "integrator": None, "hidden": 4}},
        "trainer": {"max_steps": 2, "accelerator": "cpu"},
        "data.init_args": {"batch_size": 8, "eval_examples": 8, "epoch": 2},
    }
    arms = {"MLP": None, "wild": {"model.optimizer": {"class_path": "SGD", "init_args": {"lr": 1e30}}}}
    base, out = str(CONFIGS / "regression/affine_tasks.yaml"), tmp_path / "out"
    study = written(tmp_path, base=base, settings=settings, arms=arms, seeds=[0], x="parameters", keep=False)
    assert main(["study", str(study), "--output", str(out)]) == 0
    mlp, wild = csv.DictReader((out / "runs.csv").read_text().splitlines())
    # 8 inputs and 8 tasks into 4, and 4 into 8 outputs, with their biases.
    assert (mlp["state"], mlp["parameters"], wild["state"]) == ("finished", str(17 * 4 + 5 * 8), "diverged")
    assert 0.1 < float(mlp["value"]) < 10
    assert sorted(path.name for path in (out / "runs").rglob("*") if path.is_file()) == ["config.yaml"] * 2
    capsys.readouterr()
    assert main(["study", str(study), "--output", str(out)]) == 0
    assert "2 runs: 2 finished, 0 to run" in capsys.readouterr().out


def test_a_damaged_file_of_results_is_told(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"key": "a"')
    with pytest.raises(ExperimentError, match=r"results.jsonl: not what a study wrote there"):
        _ = Run(Arm("MI", "key", {}, Monitor("bpc", "min")), 3, tmp_path).result


class Child:
    """A job that is an interpreter of its own, without this project."""

    def __init__(self, job):
        code = (
            "import pathlib, signal, sys, time\n"
            f"def stop(*_): pathlib.Path({str(job)!r}).write_text('saved'); sys.exit(130)\n"
            "signal.signal(signal.SIGINT, stop)\n"
            "print('ready', flush=True)\n"
            "time.sleep(60)"
        )
        pipe = {"stdout": subprocess.PIPE, "start_new_session": True}
        self.process = subprocess.Popen([sys.executable, "-S", "-c", code], **pipe)
        self.process.stdout.readline()
        self.process.stdout.close()

    def poll(self):
        return self.process.poll()

    def stop(self, number):
        self.process.send_signal(number)


class Interrupted:
    """Presses Ctrl-C while the jobs run."""

    def __init__(self):
        self.seen = []

    def started(self, index):
        self.seen.append(index)

    def ended(self, index, code):
        raise AssertionError

    def waiting(self):
        raise KeyboardInterrupt


def test_ctrl_c_lets_every_run_save_and_starts_no_more(tmp_path):
    jobs = [tmp_path / str(i) for i in range(3)]
    observer = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        run_all(jobs, Child, 2, observer)
    assert observer.seen == [0, 1]
    assert [job.read_text() for job in jobs if job.exists()] == ["saved", "saved"]


class Log:
    def __init__(self, path):
        self.log = path


class Given:
    """A job with the arguments given."""

    def __init__(self, path, *argv):
        self.run, self._argv = Log(path), argv

    def argv(self):
        return self._argv


def test_a_job_is_a_process_with_its_output_in_its_log(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    with locked(tmp_path) as lock:
        job = Process(Given(tmp_path / "log.txt", "--help"), lock)
        # Its own group: a terminal's Ctrl-C reaches this process alone, which passes it on once.
        assert os.getpgid(job._process.pid) == job._process.pid
        assert job._process.wait(60) == 0
    assert "usage: python -m experiments" in (tmp_path / "log.txt").read_text()


def test_processes_of_a_pool_make_one_run_after_the_other(tmp_path, monkeypatch):
    """And where one dies, the study ends with a message."""
    monkeypatch.chdir(Path(__file__).parent.parent)

    def ended(argv, log):
        job = Here(argv, tmp_path / log, pool)
        while (code := job.poll()) is None:
            time.sleep(0.05)
        return code

    def until_refused(argv, log):
        """The job may have ended before it was stopped, and the pool learns later that its processes are gone."""
        for _ in range(200):
            Here(argv, tmp_path / log, pool)
            time.sleep(0.05)

    with workers(2) as pool:
        assert ended(["--help"], "first") == ended(["--help"], "second") == 0
        assert ended(["--trust"], "third") == 2
        job = Here(["--help"], tmp_path / "fourth", pool)
        job.stop(signal.SIGKILL)
        while job.poll() is None:
            time.sleep(0.05)
        with pytest.raises(ExperimentError, match=r"has died, .* fewer --jobs"):
            until_refused(["--help"], "fifth")
    assert "usage: python -m experiments" in (tmp_path / "second").read_text()
    assert "error: argument --trust" in (tmp_path / "third").read_text()


def test_a_run_in_this_process_that_is_interrupted_ends_the_study(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments.study.pool, "run_here", lambda argv, log: 130)
    with pytest.raises(SystemExit) as stopped:
        Here([], tmp_path / "log.txt", None)
    assert stopped.value.code == 130


def test_a_folder_is_held_by_one_study_and_by_what_it_left_running(tmp_path):
    with locked(tmp_path) as lock:
        left = subprocess.Popen(
            [sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock.fileno(),)
        )
        with pytest.raises(ExperimentError, match="in use"), locked(tmp_path):
            pass
    with pytest.raises(ExperimentError, match="in use"), locked(tmp_path):
        pass
    left.send_signal(signal.SIGKILL)
    left.communicate()
    with locked(tmp_path):
        pass
