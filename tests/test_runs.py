"""A run's life: killed, resumed, finished, diverged, out of room, and in several processes."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from experiments.__main__ import main
from experiments.core.configs import CONFIGS
from experiments.core.errors import ExperimentError
from experiments.core.network_size import refuse_beyond_memory
from experiments.core.run_folder import RunFolder, read_metrics
from experiments.core.saving import Checkpoints
from experiments.data import TextData

pytestmark = pytest.mark.runs

ROOT = Path(__file__).parent.parent
QUICKSTART = str(CONFIGS / "characters/quickstart.yaml")
SMALL = (
    "--config",
    QUICKSTART,
    "--model.network.recurrent.hidden_size=16",
    "--data.batch_size=4",
    "--data.length=20",
    "--data.eval_batch_size=3",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=5",
    "--trainer.max_time=null",
)


@pytest.fixture
def command(text, tmp_path):
    """The arguments of a `fit` whose folder is `tmp_path/quickstart`."""

    def arguments(*options):
        return ["fit", *SMALL, f"--data.path={text}", f"--trainer.default_root_dir={tmp_path}", *options]

    return arguments


FORKS = multiprocessing.get_context("forkserver")
PRELOADED = ["experiments.core.training", "experiments.tasks", "experiments.data", "matplotlib.pyplot"]
FORKS.set_forkserver_preload(PRELOADED)


class Command:
    """A command in a process of its own, forked from one that has imported everything, which takes seconds."""

    def __init__(self, arguments, log, largest_file=None):
        self.log = log
        self.process = FORKS.Process(target=self.run, args=(arguments, log, largest_file))
        self.process.start()

    @staticmethod
    def run(arguments, log, largest_file):
        with open(log, "w") as file:
            for output in (sys.stdout, sys.stderr):
                os.dup2(file.fileno(), output.fileno())
        torch.set_num_threads(1)
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        sys.exit(main(arguments))

    def wait_until(self, happened):
        """Whether it happens before the command is over."""
        deadline = time.monotonic() + 60
        while not happened() and self.process.is_alive():
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)
        return self.process.is_alive()

    def end(self):
        """Wait for its end.

        Returns its exit code, negative for the signal that killed it, and what it has printed.
        """
        self.process.join(60)
        return self.process.exitcode, self.log.read_text()


def test_a_run_that_is_killed_again_and_again_ends_as_an_uninterrupted_one(command, tmp_path):
    """Kills at random moments of real processes: in steps, validations, and while checkpoints are written."""
    limits = ("--trainer.max_epochs=7", "--trainer.val_check_interval=11", "--save_every=0.0003", "--name=killed")
    killed = tmp_path / "killed" / "version_0"
    last = killed / "checkpoints" / "last.ckpt"
    chance = random.Random(0)
    options, kills = [], 0
    for _ in range(3):
        before = last.stat().st_mtime_ns if last.exists() else 0
        fit = Command(command(*limits, *options), tmp_path / "log.txt")
        if fit.wait_until(lambda before=before: last.exists() and last.stat().st_mtime_ns > before):
            time.sleep(chance.uniform(0, 0.4))
        fit.process.kill()
        kills += fit.end()[0] == -signal.SIGKILL
        options = ["--ckpt_path", str(last)]
    assert kills >= 2, "the runs were over before they were killed"
    assert main(command(*limits, *options)) == 0
    assert main(command(*limits, "--name=whole", "--save_every=5")) == 0
    whole = tmp_path / "whole" / "version_0"
    assert read_metrics(killed / "metrics.csv") == read_metrics(whole / "metrics.csv")
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["version_0"]
    for name in ("best.ckpt", "last.ckpt"):
        saved = [torch.load(run / "checkpoints" / name, weights_only=True) for run in (killed, whole)]
        torch.testing.assert_close(saved[0]["state_dict"], saved[1]["state_dict"], rtol=0, atol=0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_says_how_to_go_on(number, code, command, tmp_path):
    fit = Command(command("--trainer.max_epochs=-1"), tmp_path / "log.txt")
    last = tmp_path / "quickstart" / "version_0" / "checkpoints" / "last.ckpt"
    assert fit.wait_until(last.exists), fit.end()
    written = last.stat().st_mtime_ns
    os.kill(fit.process.pid, number)
    ended, out = fit.end()
    assert ended == code, out
    assert last.stat().st_mtime_ns > written
    *_, how = [line for line in out.splitlines() if line.startswith("python -m experiments fit")]
    assert str(last) in how
    steps = torch.load(last, weights_only=True)["global_step"]
    assert main([*how.split()[3:], f"--trainer.max_steps={steps + 3}"]) == 0
    assert torch.load(last, weights_only=True)["global_step"] == steps + 3


def test_two_processes_equal_one(command, tmp_path):
    limits = ("--trainer.max_steps=15", "--trainer.val_check_interval=10", "--data.eval_batch_size=1")
    two_devices = ("--trainer.devices=2", "--trainer.strategy=ddp", "--name=two")
    python = [sys.executable, "-W", "ignore", "-m", "experiments", *command(*limits, *two_devices)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    two = subprocess.Popen(python, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)
    assert main(command(*limits, "--name=one")) == 0
    out, _ = two.communicate(timeout=120)
    assert two.returncode == 0, out
    assert out.count("validation bpc") == 1, "one process speaks"
    of_one, of_two = (read_metrics(tmp_path / name / "version_0" / "metrics.csv") for name in ("one", "two"))
    assert len(of_one) == 6
    for row, other in zip(of_one, of_two, strict=True):
        assert row.keys() == other.keys()
        for name in row:
            assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-5)


def test_streams_that_processes_cannot_share_are_refused(text):
    data = TextData(path=str(text), batch_size=3)
    data.trainer = SimpleNamespace(global_rank=0, world_size=2)
    with pytest.raises(ExperimentError, match="expected a multiple of 2"):
        data.setup()


@pytest.fixture(scope="module")
def two_epochs(text, tmp_path_factory):
    """The folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("runs")
    limits = (f"--data.path={text}", f"--trainer.default_root_dir={folder}", "--trainer.max_epochs=2")
    assert main(["fit", *SMALL, *limits]) == 0
    return folder / "quickstart" / "version_0"


@pytest.fixture
def finished(two_epochs, tmp_path):
    """A copy of it, to go on with."""
    return shutil.copytree(two_epochs, tmp_path / "quickstart" / "version_0")


def mistake(capsys, arguments):
    """The one message of a command that fails."""
    capsys.readouterr()
    assert main(arguments) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "Traceback" not in shown
    return shown


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_a_finished_run_says_so_and_leaves_no_folder(name, finished, command, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    checkpoint = finished / "checkpoints" / name
    assert "raise what ended it" in mistake(capsys, command("--trainer.max_epochs=2", "--ckpt_path", str(checkpoint)))
    assert {path: path.read_bytes() for path in finished.parent.rglob("*") if path.is_file()} == before
    assert [path.name for path in finished.parent.iterdir()] == ["version_0"]


def test_a_run_that_its_time_ended_says_so(command, tmp_path, capsys):
    limits = ("--trainer.max_epochs=1000", "--trainer.max_time=00:00:00:01")
    assert main(command(*limits)) == 0
    last = tmp_path / "quickstart" / "version_0" / "checkpoints" / "last.ckpt"
    assert "max_time" in mistake(capsys, command(*limits, "--ckpt_path", str(last)))


def best_of(checkpoints):
    """The score of the best checkpoint, as it was validated."""
    return torch.load(checkpoints / "best.ckpt", weights_only=True)["callbacks"]["Checkpoints"]["best_score"]


@pytest.mark.filterwarnings("ignore:.* streams take more bits than guessing")
def test_going_on_keeps_the_best_checkpoint_in_the_default_folder(tmp_path, monkeypatch, capsys):
    """A run that gets worse from epoch to epoch, by relative paths: its validation text is another language."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("ab" * 1000 + "ba" * 2 + "aabb" * 50)
    run = ("fit", *SMALL, "--data.path=text.txt", "--data.valid=0.05", "--data.test=0.05", "--name=worse")
    assert main([*run, "--trainer.max_epochs=2"]) == 0
    checkpoints = Path("runs/worse/version_0/checkpoints")
    best = (checkpoints / "best.ckpt").read_bytes()
    assert main([*run, "--trainer.max_epochs=4", "--ckpt_path", str(checkpoints / "last.ckpt")]) == 0
    rows = read_metrics(checkpoints.parent / "metrics.csv")
    scores = [float(row["val/bpc"]) for row in rows if "val/bpc" in row]
    assert len(scores) == 4
    assert min(scores[2:]) > min(scores[:2]), "the epochs after going on are no worse"
    assert (checkpoints / "best.ckpt").read_bytes() == best
    *_, shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("validation bpc")]
    assert shown.endswith(f" {min(scores):.4f}")


def test_a_run_that_is_stopped_in_its_test_goes_on_with_it(finished, command, capsys):
    rows = read_metrics(finished / "metrics.csv")
    last = finished / "checkpoints" / "last.ckpt"
    assert "test/bpc" in rows[-1]
    # As if it had been stopped there: without the test's row.
    lines = (finished / "metrics.csv").read_text().splitlines(keepends=True)
    (finished / "metrics.csv").write_text("".join(lines[:-1]))
    for name in ("curves.png", "result.yaml"):
        (finished / name).unlink()
    capsys.readouterr()
    assert main(command("--trainer.max_epochs=2", "--ckpt_path", str(last))) == 0
    assert "test bpc" in capsys.readouterr().out
    assert read_metrics(finished / "metrics.csv") == rows
    assert (finished / "curves.png").is_file()


@pytest.mark.parametrize(
    "place", ["experiments.core.run_report.curves.draw_metrics", "experiments.tasks.LanguageModelling.show"]
)
def test_a_signal_in_the_report_leaves_it_to_who_goes_on(place, command, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(place, lambda *_: signal.raise_signal(signal.SIGTERM))
        assert main(command("--trainer.max_epochs=1")) == 143
    *_, how = capsys.readouterr().out.strip().splitlines()
    assert main(how.split()[3:]) == 0
    assert "test bpc" in capsys.readouterr().out


def test_a_signal_while_the_last_checkpoint_is_written_stops_the_run(command, capsys, monkeypatch):
    save = Checkpoints._save

    def interrupted(self, trainer, is_best=False):
        save(self, trainer, is_best)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_save", interrupted)
        assert main(command("--trainer.max_steps=5", "--trainer.limit_val_batches=0")) == 143
    *_, how = capsys.readouterr().out.strip().splitlines()
    assert main(how.split()[3:]) == 0
    assert "last checkpoint" in capsys.readouterr().out


def test_averaged_weights_are_tested_saved_and_gone_on_from(command, tmp_path, capsys):
    """Every second epoch is validated, so that the run ends, and is resumed, after one that was not."""
    averaging = ("--trainer.callbacks=EMAWeightAveraging", "--trainer.callbacks.decay=0.9")
    run = ("--trainer.check_val_every_n_epoch=2", *averaging)
    assert main(command(*run, "--trainer.max_epochs=3", "--name=whole")) == 0
    assert main(command(*run, "--trainer.max_epochs=1", "--name=resumed")) == 0
    whole, resumed = (tmp_path / name / "version_0/checkpoints" for name in ("whole", "resumed"))
    assert main(command(*run, "--trainer.max_epochs=3", f"--ckpt_path={resumed / 'last.ckpt'}")) == 0
    for name in ("best.ckpt", "last.ckpt"):
        of_whole, of_resumed = (torch.load(folder / name, weights_only=True) for folder in (whole, resumed))
        for weights in ("state_dict", "current_model_state"):
            torch.testing.assert_close(of_resumed[weights], of_whole[weights])
        assert not torch.equal(
            *(of_whole[key]["network.decoder.bias"] for key in ("state_dict", "current_model_state"))
        )
    *_, reported = read_metrics(whole.parent / "metrics.csv")
    capsys.readouterr()
    assert main(["test", *command(f"--ckpt_path={whole / 'best.ckpt'}")[1:]]) == 0
    assert f"{float(reported['test/bpc']):.6f}" in capsys.readouterr().out


def test_early_stopping_goes_on_after_the_validation_that_ended_the_run(finished, command):
    stopping = ("--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor=val/bpc")
    last = finished / "checkpoints/last.ckpt"
    assert main(command(*stopping, "--trainer.max_epochs=3", f"--ckpt_path={last}")) == 0


def test_processes_that_are_not_commands_are_refused(command, tmp_path, capsys):
    processes = ("--trainer.strategy=ddp_spawn", "--trainer.devices=2")
    assert "--trainer.strategy=ddp" in mistake(capsys, command(*processes))
    assert not any((tmp_path / "quickstart").iterdir())


def test_an_interval_beyond_the_batches_is_one_message(command, capsys):
    assert "training batches (23)" in mistake(capsys, command("--trainer.val_check_interval=1000"))


@pytest.mark.parametrize("name", ["checkpoints/last.ckpt", "checkpoints/epoch=1.ckpt", "metrics.csv"])
def test_a_folder_with_something_in_it_is_not_discarded(name, finished, tmp_path):
    new = RunFolder(tmp_path, "quickstart", finished / "checkpoints/best.ckpt")
    new.make()
    assert new.metrics.is_file()
    new.discard()
    assert [path.name for path in finished.parent.iterdir()] == ["version_0"]
    new = RunFolder(tmp_path, "quickstart", finished / "checkpoints/best.ckpt")
    new.make()
    with (new.path / name).open("a") as file:
        file.write("1,2,3")
    new.discard()
    assert (new.path / name).read_text().endswith("1,2,3")


@pytest.mark.parametrize("arguments", [("fit",), ("validate",)])
def test_a_checkpoint_whose_weights_have_another_shape_is_one_message(arguments, finished, tmp_path, command, capsys):
    checkpoint = torch.load(finished / "checkpoints/last.ckpt", weights_only=True)
    checkpoint["state_dict"]["network.decoder.bias"] = torch.zeros(3)
    torch.save(checkpoint, tmp_path / "other.ckpt")
    shown = mistake(capsys, [*arguments, *command(f"--ckpt_path={tmp_path / 'other.ckpt'}")[1:]])
    assert "network.decoder.bias is (3,), expected (" in shown


def test_a_run_from_the_best_checkpoint_has_its_own_folder_and_the_best_of_before(finished, command, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    best = finished / "checkpoints" / "best.ckpt"
    assert main(command("--trainer.max_epochs=3", "--ckpt_path", str(best))) == 0
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before
    own = finished.parent / "version_1"
    assert best_of(own / "checkpoints") <= best_of(finished / "checkpoints")
    rows = [row for row in read_metrics(own / "metrics.csv") if "val/bpc" in row]
    assert len(rows) == 3


def test_a_diverged_run_is_reported(command, tmp_path, capsys):
    assert main(command("--model.optimizer.lr=1e30", "--trainer.max_epochs=1")) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: the run diverged: at step ")
    last = tmp_path / "quickstart" / "version_0" / "checkpoints" / "last.ckpt"
    for part in ("diverged", "at step ", "validation bpc", str(last)):
        assert part in out
    assert "diverged" in mistake(capsys, ["sample", str(last)])


def test_a_folder_that_cannot_be_made_is_one_message(command, tmp_path, capsys):
    (tmp_path / "quickstart").write_text("a file")
    assert "cannot be written" in mistake(capsys, command())


def test_a_full_disk_is_one_message_and_leaves_no_half_checkpoint(command, finished, tmp_path):
    last = finished / "checkpoints" / "last.ckpt"
    assert last.stat().st_size > 40_000
    whole = last.read_bytes()
    fit = command("--trainer.max_epochs=3", "--ckpt_path", str(last))
    code, out = Command(fit, tmp_path / "log.txt", largest_file=40_000).end()
    assert code == 2, out
    assert "Traceback" not in out
    assert f"Kept: {last}" in out
    assert f"--ckpt_path {last}" in out
    assert last.read_bytes() == whole
    assert {path.name for path in last.parent.iterdir()} == {"best.ckpt", "last.ckpt"}


def test_curves_that_cannot_be_drawn_leave_the_report(command, tmp_path, capsys):
    assert main(command("--trainer.max_epochs=1")) == 0
    capsys.readouterr()
    run = tmp_path / "quickstart" / "version_0"
    (run / "curves.png").unlink()
    (run / "curves.png").mkdir()
    assert main(command("--trainer.max_epochs=2", "--ckpt_path", str(run / "checkpoints" / "last.ckpt"))) == 0
    out = capsys.readouterr().out
    assert "test bpc" in out
    assert "curves           not drawn: " in out


@pytest.mark.parametrize(("size", "part"), [(10**7, "GiB of memory"), (10**9, "memory"), (10**21, "cannot be built")])
def test_a_network_beyond_the_machines_memory_is_refused_before_it_is_built(size, part, command, capsys):
    shown = mistake(capsys, command(f"--model.network.recurrent.hidden_size={size}"))
    assert part in shown
    assert len(shown.splitlines()) == 1


def test_a_checkpoint_of_a_network_beyond_the_machines_memory_is_refused(finished, tmp_path, capsys):
    checkpoint = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["network"]["init_args"]["recurrent"]["init_args"]["hidden_size"] = 10**7
    torch.save(checkpoint, tmp_path / "huge.ckpt")
    assert "memory" in mistake(capsys, ["sample", str(tmp_path / "huge.ckpt")])


@pytest.mark.parametrize(("width", "part"), [(1, "parameter tensors"), (10**5, "GiB of memory")])
def test_a_network_of_too_many_layers_is_refused_before_all_are_built(width, part):
    built = 0

    def build():
        nonlocal built
        layers = nn.ModuleList()
        for built in range(10**6):  # noqa: B007
            layers.append(nn.Linear(width, width))
        return layers

    with pytest.raises(ExperimentError, match=part):
        refuse_beyond_memory(build)
    assert built < 10**4
