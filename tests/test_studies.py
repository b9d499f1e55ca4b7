"""Studies: what a file may say, which cells are run, kept, gone on with and redone, and what stops them."""

import os
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml

import experiments.core.curves
import experiments.data
import experiments.study.command
import experiments.study.report
import experiments.study.search
import experiments.tasks
from experiments.__main__ import main
from experiments.core.configs import CONFIGS
from experiments.core.errors import ExperimentError
from experiments.core.result_file import write_result
from experiments.core.task import Monitor
from experiments.study.cells import Arm, Cell, key_of, next_command, resolved
from experiments.study.definition import read_study
from experiments.study.jobs import Process, run_all
from experiments.study.lock import locked

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
        ({"search": {"setting": LR, "values": [1, 2], "seed": [7]}}, ["search", "'seed'", "'seeds'"]),
        ({"search": {"values": [1, 2], "seeds": [7]}}, ["search: setting", "None"]),
        ({"search": {"setting": "seed_everything", "values": [1, 2], "seeds": [7]}}, ["search", "the study itself"]),
        ({"search": {"setting": LR, "values": [0.1], "seeds": [7]}}, ["search: values", "[0.1]", "two or more"]),
        ({"search": {"setting": LR, "values": [1, 1], "seeds": [7]}}, ["search: values", "different"]),
        ({"search": {"setting": LR, "values": [0.1, "0.1"], "seeds": [7]}}, ["[0.1, '0.1']", "different, as text"]),
        ({"search": {"setting": LR, "values": [1, None], "seeds": [7]}}, ["search: values", "numbers or names"]),
        ({"search": {"setting": LR, "values": [1, 2]}}, ["search: seeds", "None"]),
        ({"search": {"setting": LR, "values": [1, 2], "seeds": [7, 1]}}, ["search: seeds: 1", "other seeds"]),
        ({"search": {"setting": LR, "values": [1, 2], "seeds": [7], "max_steps": 0}}, ["search: max_steps", "got 0"]),
        (
            {"search": {"setting": "trainer.max_steps", "values": [1, 2], "seeds": [7], "max_steps": 9}},
            ["search: it searches for trainer.max_steps", "no max_steps of its own"],
        ),
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
    assert len(definition.arms) > 1
    assert len(definition.seeds) > 1


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


@pytest.mark.parametrize("study", sorted(STUDIES.glob("memory_*.yaml")), ids=lambda path: path.stem)
def test_the_arms_of_the_memory_studies_are_what_they_are_called(study):
    cells = {}
    for arm in resolved(read_study(study), [], []):
        recurrent = arm.settings["model"]["init_args"]["network"]["init_args"]["recurrent"]["init_args"]
        assert recurrent["engine"] == "fused"
        cell = outer = recurrent["cell"]
        if outer["class_path"].endswith("Mogrifier"):
            cell = outer["init_args"]["cell"]
        integrator = cell["init_args"]["integrator"]
        names = outer["class_path"], integrator["class_path"] if isinstance(integrator, dict) else integrator
        cells[arm.name] = tuple(name.rpartition(".")[2] for name in names)
    assert cells == RECURRENT


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


class Here:
    """A job run in this process as soon as it starts, which is faster than one of its own."""

    started = []  # noqa: RUF012

    def __init__(self, job, lock):
        assert not lock.closed
        argv = job.argv()
        self.started.append(job.cell.label)
        with job.cell.log.open("a") as log, redirect_stdout(log), redirect_stderr(log):
            self._code = main(argv)

    def poll(self):
        return self._code


def test_missing_cells_are_run_finished_ones_kept_and_failed_ones_reported(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(experiments.study.command, "Process", Here)
    monkeypatch.setattr(Here, "started", started := [])
    monkeypatch.setattr(experiments.core.curves, "draw", lambda runs, output: None)  # of each run: it takes a second
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
    assert started == ["absent, seed 0", "MI, seed 0"]
    shown = capsys.readouterr()
    assert "failed: absent, seed 0 (exit code 2" in shown.err
    assert "absent.txt" in shown.err
    assert "Not finished, and in no number here: absent, seed 0." in shown.out
    [finished] = (tmp_path / "out").rglob("result.yaml")
    before = finished.read_bytes()
    assert yaml.safe_load(before)["steps"] == 2, "--set is in force over the study"

    # Another name of an arm, another place of data, and more seeds.
    started.clear()
    path = written(tmp_path, settings=settings, arms={"multiplicative": None}, seeds=[1, 0])
    with pytest.warns(UserWarning, match="no effect"):
        assert main(["study", str(path), *options, "--set", "data.root=elsewhere"]) == 0
    assert started == ["multiplicative, seed 1"]
    assert finished.read_bytes() == before
    assert len(list((tmp_path / "out").rglob("result.yaml"))) == 2
    assert "2 cells: 1 finished, 1 to run" in capsys.readouterr().out


class MadeUp:
    """A job that ends at once: its score is what the test says of its learning rate; of none it fails.

    That with the integrator Failing fails too, and that with Diverging diverges.
    """

    scores = {}  # noqa: RUF012
    started = []  # noqa: RUF012

    def __init__(self, job, lock):
        cell = job.cell
        config = yaml.safe_load((cell.of_arm / "config.yaml").read_text())
        rate, integrator = config[LR], config.get(INTEGRATOR)
        self.started.append((cell.seed, rate))
        score = None if integrator == "Failing" else self.scores.get(rate)
        self._code = 1 if score is None else 0
        cell.log.write_text("it began\nout of memory\n")
        if score is not None:
            cell.run.checkpoints.mkdir(parents=True)
            metrics = {"val/bpc": score, "test/bpc": score + 0.5}
            diverged = 1 if rate == 0.3 or integrator == "Diverging" else None
            rest = {"best_step": 1, "steps": 1, "diverged_at": diverged, "parameters": 1, "seconds_per_step": None}
            write_result(cell.run.result, {"metrics": metrics} | rest)

    def poll(self):
        return self._code


@pytest.fixture
def made_up(monkeypatch):
    """Runs whose scores are made up, by learning rate, and what is started of them."""

    def resolved(study, changes, trusted):  # as they are: to parse the settings takes a second for each
        common = {"trainer": {"max_time": None}, "threads": 1}
        return [Arm(name, key_of(s), common | s, Monitor("bpc", "min")) for name, s in study.arms.items()]

    monkeypatch.setattr(experiments.study.command, "resolved", resolved)
    monkeypatch.setattr(experiments.study.search, "resolved", resolved)
    monkeypatch.setattr(experiments.study.command, "Process", MadeUp)
    monkeypatch.setattr(MadeUp, "started", [])
    monkeypatch.setattr(MadeUp, "scores", {0.001: 3.0, 0.3: 1.0})
    for name in ("draw_curves", "draw_dots"):  # they take a second
        monkeypatch.setattr(experiments.study.report, name, lambda *given: given[-1].with_suffix(".svg").touch())
    return MadeUp


def test_every_arm_gets_what_was_best_for_it_with_other_seeds(tmp_path, capsys, made_up):
    scores, started = made_up.scores, made_up.started
    search = {"setting": LR, "values": [0.001, 0.02, 0.3], "seeds": [7, 8]}
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
    assert table[1:] == [
        f"MI,{LR},{rest}" for rest in ("0.001,val/bpc,3.0,0", "0.02,val/bpc,2.0,1", "0.3,val/bpc,nan,0")
    ]
    page = (tmp_path / "out/report.html").read_text()
    assert main(["report", *command[1:]]) == 0
    assert (tmp_path / "out/report.html").read_text() == page
    assert page.count("--seed_everything=7") == 3


def test_values_that_are_nearly_equal_are_searched_each(tmp_path, made_up):
    search = {"setting": LR, "values": [0.12345671, 0.12345672], "seeds": [7]}
    of_trials = experiments.study.search.trials(read_study(written(tmp_path, search=search)), [], [], tmp_path)
    assert [trial.cells[0].label for trial in of_trials] == ["MI, 0.12345671, seed 7", "MI, 0.12345672, seed 7"]
    assert len({trial.arm.key for trial in of_trials}) == 2


def test_a_search_may_have_shorter_runs_than_the_study(tmp_path, capsys, made_up):
    arms = {"MI": {"trainer": {"max_steps": 500, "max_time": None}}}
    path = written(tmp_path, arms=arms, search={"setting": LR, "values": [0.001, 0.02], "seeds": [7], "max_steps": 50})
    study = read_study(path)
    for trial in experiments.study.search.trials(study, [], [], tmp_path):
        assert list(trial.arm.settings)[-2:] == ["trainer.max_steps", LR], "after the arm's own, over which they are"
        assert trial.arm.settings["trainer.max_steps"] == 50
    made_up.scores[0.02] = 2.0
    assert main(["study", str(path), "--output", str(tmp_path / "out")]) == 0
    assert "with seed 7 in 50 steps: MI 0.02" in capsys.readouterr().out
    written_out = [yaml.safe_load(file.read_text()) for file in (tmp_path / "out/cells").glob("*/config.yaml")]
    assert sorted(config.get("trainer.max_steps", 500) for config in written_out) == [50, 50, 500]


def test_arms_whose_search_gives_no_value_are_left_out_and_no_others(tmp_path, capsys, made_up):
    arms = {name: {INTEGRATOR: name} for name in ("Failing", "Diverging", "A", "B")}
    search = {"setting": LR, "values": [0.001, 0.01], "seeds": [7]}
    made_up.scores[0.01] = 2.0
    path = written(tmp_path, arms=arms, search=search)
    command = ["study", str(path), "--output", str(tmp_path / "out")]
    assert main(command) == 1
    assert made_up.started[8:] == [(seed, 0.01) for _ in "AB" for seed in (0, 1)]
    shown = capsys.readouterr()
    assert "search: 8 cells: 0 finished, 8 to run" in shown.out
    assert (
        "[search: 8 of 8, 2 failed] B, 0.01, seed 7: 2.0000 after 0:00:00; about 0:00:00 left of the search\n"
        in shown.out
    )
    assert "\n4 cells: 0 finished, 4 to run" in shown.out
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
    cell = Cell(Arm("MI", "key", {}, Monitor("bpc", "min")), 3, tmp_path)
    assert next_command(cell) == cell.command
    assert "--seed_everything=3" in cell.command
    cell.run.checkpoints.mkdir(parents=True)
    torch.save({"state_dict": {}}, cell.run.last)
    assert next_command(cell) == [*cell.command, "--ckpt_path", str(cell.run.last)]
    cell.run.last.write_bytes(cell.run.last.read_bytes()[:100])  # as no run leaves it, but a full disk may
    cell.log.write_text("of before")
    assert next_command(cell) == cell.command
    assert not cell.run.path.exists()
    assert not cell.log.exists()


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
        self.cell, self._argv = Log(path), argv

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
