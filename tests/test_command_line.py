"""The command line: a run from a config to a sample, mistakes in one message, and what a config may name."""

import io
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.__main__ import main
from experiments.core.configs import CONFIGS
from experiments.core.errors import ExperimentError
from experiments.core.loading import read_checkpoint

pytestmark = pytest.mark.runs

ROOT = Path(__file__).parent.parent
QUICKSTART = str(CONFIGS / "characters/quickstart.yaml")
INTEGRATOR = "--model.network.recurrent.cell.integrator"
SMALL = (
    "--config",
    QUICKSTART,
    "--model.network.recurrent.hidden_size=16",
    "--data.batch_size=4",
    "--data.length=20",
    "--trainer.enable_model_summary=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
    "--trainer.log_every_n_steps=5",
)


@pytest.fixture(scope="module")
def run_folder(text, tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("runs")
    swap = (f"{INTEGRATOR}=LowRank", f"{INTEGRATOR}.rank=3")
    limits = ("--trainer.max_epochs=2", f"--trainer.default_root_dir={folder}")
    assert main(["fit", *SMALL, *swap, *limits, f"--data.path={text}", "--name=small"]) == 0
    return folder / "small" / "version_0"


def message(capsys, *argv):
    """The one message of a command that fails with the exit code 2."""
    assert main(argv) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert "Traceback" not in text
    assert "usage:" not in text
    return text


def test_a_run_keeps_its_config_metrics_and_checkpoints(run_folder):
    assert (run_folder / "config.yaml").is_file()
    header = (run_folder / "metrics.csv").read_text().partition("\n")[0].split(",")
    assert {"train/bpc", "train/loss", "val/bpc", "val/loss", "val/perplexity", "test/bpc"} <= set(header)
    for name in ("best.ckpt", "last.ckpt"):
        checkpoint = torch.load(run_folder / "checkpoints" / name, weights_only=True)
        cell = checkpoint["hyper_parameters"]["network"]["init_args"]["recurrent"]["init_args"]["cell"]
        assert cell["init_args"]["integrator"]["class_path"].endswith("LowRank")


def test_fit_ends_with_what_came_of_it(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *SMALL, f"--data.path={text}", "--trainer.max_epochs=1"]) == 0
    out = capsys.readouterr().out
    for shown in ("validation bpc", "test bpc", "parameters", "runs/quickstart/version_0/checkpoints/best.ckpt"):
        assert shown in out


def test_fit_without_a_validation_keeps_and_names_the_last_checkpoint(text, tmp_path, capsys):
    limits = ("--trainer.limit_val_batches=0", "--trainer.max_steps=3", f"--trainer.default_root_dir={tmp_path}")
    assert main(["fit", *SMALL, *limits, f"--data.path={text}"]) == 0
    last = tmp_path / "quickstart" / "version_0" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 3
    assert str(last) in capsys.readouterr().out


def test_a_trial_run_leaves_no_files(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *SMALL, f"--data.path={text}", "--trainer.fast_dev_run=true"]) == 0
    assert not list(tmp_path.iterdir())


def test_the_report_is_of_the_best_checkpoint_beside_others_and_names_only_what_is_there(text, tmp_path, capsys):
    own = ("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val/perplexity")
    run = (f"--data.path={text}", f"--trainer.default_root_dir={tmp_path}", "--trainer.max_epochs=1")
    assert main(["fit", *SMALL, *run, *own]) == 0
    out = capsys.readouterr().out
    [shown] = [line.split()[-1] for line in out.splitlines() if line.startswith("validation bpc")]
    best = torch.load(tmp_path / "quickstart/version_0/checkpoints/best.ckpt", weights_only=True)["callbacks"]
    score = best["Checkpoints"]["best_score"]
    assert shown == f"{score:.4f}"


@pytest.mark.parametrize("command", ["validate", "test"])
def test_a_checkpoint_is_evaluated_with_its_runs_config(command, run_folder, capsys):
    options = ("--config", str(run_folder / "config.yaml"), "--ckpt_path", str(run_folder / "checkpoints/best.ckpt"))
    assert main([command, *options]) == 0
    assert "bpc" in capsys.readouterr().out


def sampled(capsys, run_folder, *options):
    assert main(["sample", str(run_folder / "checkpoints/last.ckpt"), "--length=30", *options]) == 0
    return capsys.readouterr().out


def test_sample_goes_on_from_its_prompt(run_folder, capsys):
    first = sampled(capsys, run_folder, "--prompt=line ", "--seed=1")
    assert first.startswith("line ")
    assert len(first.rstrip("\n")) > 25
    assert sampled(capsys, run_folder, "--prompt=line ", "--seed=1") == first
    assert sampled(capsys, run_folder, "--prompt=line ", "--seed=2") != first
    greedy = sampled(capsys, run_folder, "--temperature=0")
    assert greedy == sampled(capsys, run_folder, "--top_k=1")
    assert sampled(capsys, run_folder) != sampled(capsys, run_folder)


def test_a_runs_folder_means_its_best_checkpoint(run_folder, capsys, tmp_path):
    outputs = []
    for place in (run_folder, run_folder / "checkpoints/best.ckpt"):
        assert main(["sample", str(place), "--seed=1"]) == 0
        outputs.append(capsys.readouterr().out)
        assert main(["export", str(place), "--format=safetensors", f"--output={tmp_path}/net.safetensors"]) == 0
        assert "parameters" in capsys.readouterr().out
        assert main(["show", str(place)]) == 0
        capsys.readouterr()
    assert main(["sample", str(run_folder.parent), "--seed=1"]) == 0  # it holds this run alone
    assert outputs[0] == outputs[1] == capsys.readouterr().out


OWN_CELL = """
from multint import Additive, Integrator, RNNCell


class OwnCell(RNNCell):
    def __init__(self, input_size: int, hidden_size: int, integrator: type[Integrator] = Additive) -> None:
        super().__init__(input_size, hidden_size, integrator)
"""


def test_a_factory_may_be_annotated_as_a_class(capsys, tmp_path, monkeypatch):
    (tmp_path / "owncells.py").write_text(OWN_CELL)
    monkeypatch.syspath_prepend(tmp_path)
    cell = "--model.network.recurrent.cell"
    options = [f"{cell}=OwnCell", f"{cell}.integrator=LowRank", f"{cell}.integrator.rank=3", "--trust", "owncells"]
    assert main(["summary", "--config", QUICKSTART, "--vocabulary_size=9", *options]) == 0
    assert re.search(r"OwnCell.*\n.*LowRank", capsys.readouterr().out)


def test_sample_refuses_symbols_outside_the_vocabulary(run_folder, capsys):
    assert "é" in message(capsys, "sample", str(run_folder / "checkpoints/last.ckpt"), "--prompt=é")


@pytest.mark.parametrize("seed", [2**64, -(2**64)])
def test_sample_refuses_a_seed_out_of_range(seed, run_folder, capsys):
    assert str(seed) in message(capsys, "sample", str(run_folder / "checkpoints/last.ckpt"), f"--seed={seed}")


def test_a_resumed_run_with_other_settings_is_refused(run_folder, text, capsys):
    options = ("--config", str(run_folder / "config.yaml"), "--ckpt_path", str(run_folder / "checkpoints/last.ckpt"))
    shown = message(capsys, "fit", *options, "--model.optimizer.lr=0.5")
    assert "model.optimizer.init_args.lr (saved 0.004, asked 0.5)" in shown


def test_early_stopping_on_a_metric_that_is_not_there_is_one_message(text, capsys, tmp_path):
    stopping = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/bcp")
    run = (f"--data.path={text}", f"--trainer.default_root_dir={tmp_path}", "--trainer.max_epochs=1")
    assert "`val/bcp`" in message(capsys, "fit", *SMALL, *run, *stopping)


@pytest.mark.parametrize(
    "name", ["../escape", "a/../../b", "/absolute", ".", "./", "..", "two\nlines", "\x00", "\udcff"]
)
def test_a_name_that_is_no_place_below_the_runs_is_refused(name, capsys, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert f"name: got {name!r}" in message(capsys, "fit", *SMALL, f"--name={name}")
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_the_output_cannot_encode_is_replaced(encoding, text, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(text.read_text().replace("e", "\u03b5"))
    folder = tmp_path / "runs"
    run = (f"--data.path={tmp_path}/text.txt", f"--trainer.default_root_dir={folder}", "--trainer.max_steps=2")
    checkpoint = folder / "small/version_0/checkpoints/last.ckpt"
    for argv in (["--help"], ["fit", *SMALL, *run, "--name=small"], ["sample", str(checkpoint), "--prompt=\u03b5"]):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", out)
        assert main(argv) == 0
        assert b"?" in out.buffer.getvalue()


def test_each_run_has_a_folder_of_its_own(text, tmp_path):
    run = (f"--data.path={text}", f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=2")
    (tmp_path / "quickstart" / "version_7").mkdir(parents=True)
    for _ in range(2):
        assert main(["fit", *SMALL, *run]) == 0
    assert {path.name for path in (tmp_path / "quickstart").iterdir()} == {"version_7", "version_8", "version_9"}


def test_an_unknown_command_is_one_message(capsys):
    assert "Did you mean 'fit'" in message(capsys, "fitt")
    assert "RUN" in message(capsys, "sample")
    assert "no such checkpoint" in message(capsys, "sample", "nowhere")


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """A module outside the trusted ones; importing it leaves a mark. Returns the mark."""
    mark = tmp_path / "imported"
    (tmp_path / "stranger.py").write_text(
        f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
        "from lightning import Callback\nfrom experiments.core.task import Data\n"
        "from experiments.core.task import Task\n"
        "from models import LanguageModel\nfrom multint import Additive, LSTMCell\n"
        "class Mine(Additive): pass\nclass MyCell(LSTMCell): pass\nclass MyNetwork(LanguageModel): pass\n"
        "class MyTask(Task): pass\nclass MyData(Data): pass\n"
        "class MyCallback(Callback): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield mark
    sys.modules.pop("stranger", None)


@pytest.mark.parametrize(
    "yaml",
    [
        "model: {class_path: stranger.MyTask}",
        "model: {network: {class_path: stranger.MyNetwork}}",
        "model: {network: {recurrent: {cell: stranger.MyCell}}}",
        "model: {network: {recurrent: {cell: {class_path: stranger.MyCell, init_args: {peepholes: true}}}}}",
        "model: {network: {recurrent: {cell: {class_path: LSTMCell, init_args: {integrator: stranger.Mine}}}}}",
        "data: {class_path: stranger.MyData}",
        "data: stranger.MyData",
        "trainer: {callbacks: [{class_path: stranger.MyCallback}]}",
        "trainer: {callbacks: stranger.MyCallback}",
        "trainer: {plugins: [{class_path: stranger.MyCallback}]}",
        "trainer: {strategy: {class_path: stranger.MyCallback}}",
    ],
)
def test_a_stranger_in_a_config_is_refused_before_it_is_imported(yaml, stranger, capsys, tmp_path):
    path = tmp_path / "strange.yaml"
    path.write_text(yaml)
    shown = message(capsys, "fit", "--config", QUICKSTART, "--config", str(path))
    assert "--trust stranger" in shown
    assert not stranger.exists()


@pytest.mark.parametrize(
    "path",
    [
        "stranger.Mine",
        "torch.os.system",
        "torch.hub.load",
        "torch.utils.collect_env.run",
        "lightning.pytorch.cli.sys.exit",
    ],
)
def test_a_stranger_on_the_command_line_is_refused_before_it_is_imported(path, stranger, capsys):
    assert "refused" in message(capsys, "fit", "--config", QUICKSTART, f"{INTEGRATOR}={path}")
    assert not stranger.exists()


def test_trust_is_not_advised_for_what_a_trusted_module_leads_to(capsys):
    shown = message(capsys, "fit", "--config", QUICKSTART, f"{INTEGRATOR}=torch.os.system")
    assert "--trust" not in shown


def test_a_stranger_in_a_checkpoint_is_refused_before_it_is_imported(run_folder, stranger, capsys, tmp_path):
    checkpoint = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    cell = checkpoint["hyper_parameters"]["network"]["init_args"]["recurrent"]["init_args"]["cell"]
    cell["init_args"]["integrator"] = {"class_path": "stranger.Mine"}
    torch.save(checkpoint, tmp_path / "strange.ckpt")
    assert "--trust stranger" in message(capsys, "sample", str(tmp_path / "strange.ckpt"))
    assert not stranger.exists()


def test_a_checkpoint_that_holds_code_is_refused(run_folder, capsys, tmp_path):
    torch.save({"state_dict": {}, "hook": os.system}, tmp_path / "code.ckpt")
    shown = message(capsys, "sample", str(tmp_path / "code.ckpt"))
    assert "more than values (posix.system)" in shown
    assert "weights_only" not in shown, "nobody is to switch this off"
    options = ("--config", str(run_folder / "config.yaml"), "--ckpt_path", str(tmp_path / "code.ckpt"))
    assert "more than values" in message(capsys, "test", *options)


def test_a_damaged_checkpoint_is_refused(run_folder, capsys, tmp_path):
    whole = (run_folder / "checkpoints" / "last.ckpt").read_bytes()
    damaged, chance = tmp_path / "damaged.ckpt", random.Random(0)
    for content, part in ((whole[: len(whole) // 2], "damaged"), (b"no checkpoint", "damaged"), (b"", "empty")):
        damaged.write_bytes(content)
        assert f"{damaged}: {part}" in message(capsys, "sample", str(damaged))
    assert f"{tmp_path}: a folder" in message(capsys, "sample", str(tmp_path))
    right = read_checkpoint(run_folder / "checkpoints" / "last.ckpt")
    refused = 0
    for place in [chance.randrange(len(whole)) for _ in range(200)]:
        damaged.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :])
        try:  # what stands between the archive's parts is padding
            read = read_checkpoint(damaged)
        except ExperimentError:
            refused += 1
        else:
            torch.testing.assert_close(read["state_dict"], right["state_dict"], rtol=0, atol=0)
            assert read["hyper_parameters"] == right["hyper_parameters"]
    assert refused > 100


def test_a_file_that_is_no_checkpoint_of_a_language_model_is_refused(run_folder, capsys, tmp_path):
    def refused(content):
        torch.save(content, tmp_path / "other.ckpt")
        return message(capsys, "sample", str(tmp_path / "other.ckpt"))

    whole = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert "not a checkpoint" in refused(torch.zeros(3))
    assert "do not fit the network" in refused(
        whole | {"state_dict": {key: value[:1] for key, value in whole["state_dict"].items() if value.ndim}}
    )
    settings = whole["hyper_parameters"] | {"_class_path": "os.system"}
    assert "--trust os" in refused(whole | {"hyper_parameters": settings})
    settings["_class_path"] = "multint.Gone"
    assert "no task multint.Gone" in refused(whole | {"hyper_parameters": settings})


@pytest.mark.parametrize(
    ("settings", "part"), [({"class_path": "multint.GoneCell"}, "'GoneCell'"), ({"init_args": {"gone": 1}}, "'gone'")]
)
def test_a_checkpoint_of_what_is_gone_is_one_line(settings, part, run_folder, capsys, tmp_path):
    checkpoint = torch.load(run_folder / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["network"]["init_args"]["recurrent"]["init_args"]["cell"] |= settings
    torch.save(checkpoint, tmp_path / "gone.ckpt")
    shown = message(capsys, "sample", str(tmp_path / "gone.ckpt"))
    assert part in shown
    assert len(shown.splitlines()) == 1


def test_evaluation_needs_a_checkpoint(capsys):
    assert "--ckpt_path" in message(capsys, "test", "--config", QUICKSTART)


def test_a_trusted_stranger_is_imported_and_trust_ends_with_the_command(stranger, capsys):
    argv = ["fit", "--config", QUICKSTART, f"{INTEGRATOR}=stranger.Mine"]
    assert main([*argv, "--trust", "stranger", "--print_config"]) == 0
    assert stranger.exists()
    assert "--trust stranger" in message(capsys, *argv)


def test_a_reader_that_goes_away_is_no_failure():
    """As `head` does, at the end of a pipe."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "--help"], stdout=write, stderr=subprocess.PIPE, cwd=ROOT
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
