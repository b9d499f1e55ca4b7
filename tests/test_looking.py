"""What a run shows while it goes on and afterwards: lines, curves, TensorBoard."""

import re
from contextlib import redirect_stdout
from io import StringIO

import pytest

from experiments.__main__ import main
from experiments.core import curves, training
from experiments.core.callbacks import _Bar
from experiments.core.configs import CONFIGS
from experiments.core.run_folder import read_metrics

pytestmark = pytest.mark.runs

SMALL = (
    "--config",
    str(CONFIGS / "characters/quickstart.yaml"),
    "--model.network.recurrent.hidden_size=16",
    "--data.batch_size=4",
    "--data.length=20",
    "--trainer.enable_model_summary=false",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=2",
    "--trainer.log_every_n_steps=5",
)
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def runs(text, tmp_path_factory):
    """The folder of two runs, and what the first of them printed to a place without a cursor."""
    folder = tmp_path_factory.mktemp("runs")
    command = ["fit", *SMALL, f"--data.path={text}", f"--trainer.default_root_dir={folder}", "--tensorboard=true"]
    with redirect_stdout(StringIO()) as out:
        assert main(command) == 0
    assert main([*command, "--model.optimizer.lr=1e-3"]) == 0
    return folder / "quickstart", out.getvalue()


def test_lines_tell_the_metrics_the_speed_and_the_time_left(runs):
    _, out = runs
    lines = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert lines[0].startswith("epoch 0  step 1  train/loss ")
    for line in lines[1:]:
        assert re.fullmatch(
            r"epoch \d  step \d+  train/loss [\d.]+  train/bpc [\d.]+  val/bpc [\d.]+  symbols/s [\d,]+  "
            r"left \d:\d\d:\d\d",
            line,
        )
    assert len(lines) == 3
    assert "\r" not in out


def test_a_run_has_its_curves(runs):
    folder, _ = runs
    assert (folder / "version_0" / "curves.png").read_bytes().startswith(PNG)


def test_the_curves_of_a_run_are_called_by_its_name(text, tmp_path, monkeypatch):
    drawn, write = [], curves.write_figure
    monkeypatch.setattr(curves, "write_figure", lambda path, figure, dpi: drawn.append(figure) or write(path, figure))
    run = (f"--data.path={text}", f"--trainer.default_root_dir={tmp_path}", "--name=_a$b$", "--trainer.max_steps=2")
    assert main(["fit", *SMALL, *run]) == 0
    shown = [label.get_text() for label in drawn[0].legends[0].get_texts()]
    assert [label.replace(r"\$", "$").strip("\u200b") for label in shown] == ["_a$b$/version_0 val"]


def test_the_parts_of_the_network_and_an_endless_run_are_told(text, tmp_path, capsys, monkeypatch):
    run = (f"--data.path={text}", f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=1")
    shown = (*run, "--trainer.enable_model_summary=true", "--trainer.max_epochs=-1", "--trainer.limit_val_batches=0")
    described, describe = [], _Bar._get_train_description
    monkeypatch.setattr(_Bar, "_get_train_description", lambda *a: described.append(describe(*a)) or described[-1])
    monkeypatch.setattr(training, "progress_bar", _Bar)
    assert main(["fit", *SMALL, *shown]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^recurrent +Recurrent +[\d,]+$", out, re.MULTILINE)
    assert re.search(r"^ +gates +\w+ +[\d,]+$", out, re.MULTILINE)
    assert re.search(r"^in all +[\d,]+ parameters$", out, re.MULTILINE)
    assert "FLOPs" not in out
    assert {text.strip() for text in described} == {"Epoch 0"}


def test_several_runs_are_drawn_in_one_picture(runs, tmp_path, capsys):
    folder, _ = runs
    shown = [str(folder / "version_0"), str(folder / "version_1" / "metrics.csv")]
    for name, head in (("both.png", PNG), ("both.svg", b"<?xml")):
        assert main(["plot", *shown, "--output", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(head)
    svg = (tmp_path / "both.svg").read_text()
    for path in shown:
        assert f"<!-- {path} val -->" in svg


@pytest.mark.parametrize(
    "options", [["nowhere"], ["{run}", "--output", "curves.xyz"], ["{run}", "--output", "/no/a.png"], []]
)
def test_a_picture_that_cannot_be_drawn_is_one_message(options, runs, capsys):
    assert main(["plot", *(option.format(run=runs[0] / "version_0") for option in options)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert "Traceback" not in shown


@pytest.mark.parametrize("name", ["curves.png", "curves.svg", "curves.pdf"])
def test_a_full_disk_leaves_the_picture_of_before(name, runs, tmp_path, capsys, full_disk):
    command = ["plot", str(runs[0] / "version_0"), "--output", str(tmp_path / name)]
    with full_disk():
        assert main(command) == 2
    assert not list(tmp_path.iterdir())
    assert main(command) == 0
    before = (tmp_path / name).read_bytes()
    with full_disk():
        assert main(command) == 2
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]
    assert "File too large" in capsys.readouterr().err


def test_a_picture_takes_no_place_but_a_files(runs, tmp_path, capsys):
    run, output = runs[0] / "version_0", tmp_path / "curves.png"
    output.symlink_to("/dev/null")
    assert main(["plot", str(run), "--output", str(output)]) == 2
    assert "no file" in capsys.readouterr().err
    assert output.is_symlink()
    output.unlink()
    (tmp_path / "precious").write_text("data")
    output.symlink_to(tmp_path / "precious")
    assert main(["plot", str(run), "--output", str(output)]) == 0
    assert (tmp_path / "precious").read_text() == "data"


def test_tensorboard_has_the_metrics_by_one_word(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = runs
    events = EventAccumulator(str(folder / "version_0" / "tensorboard"))
    events.Reload()
    assert {"train/loss", "val/bpc"} <= set(events.Tags()["scalars"])
    logged = [event.value for event in events.Scalars("val/bpc")]
    rows = [float(row["val/bpc"]) for row in read_metrics(folder / "version_0" / "metrics.csv") if "val/bpc" in row]
    assert logged == pytest.approx(rows)
