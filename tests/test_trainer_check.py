"""What Lightning's trainer takes and a run does not."""

import pytest
from jsonargparse import Namespace
from lightning import Trainer
from lightning.pytorch import callbacks

from experiments.core.command_line import Command, run
from experiments.core.errors import ExperimentError, building
from experiments.core.training import check_numbers, check_trainer

NUMBERS = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": None,
    "gradient_clip_val": 0,
    "log_every_n_steps": 50,
    "val_check_interval": "00:01:00",
}


def trainer(**settings):
    return Trainer(logger=False, accelerator="cpu", enable_model_summary=False, enable_progress_bar=False, **settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("accumulate_grad_batches", 0),
        ("accumulate_grad_batches", -5),
        ("check_val_every_n_epoch", 0),
        ("log_every_n_steps", -5),
        ("val_check_interval", 0),
        ("val_check_interval", float("nan")),
        ("gradient_clip_val", -1),
        ("gradient_clip_val", float("nan")),
        ("gradient_clip_val", float("inf")),
    ],
)
def test_numbers_that_lightning_would_fail_at_or_ignore(name, value):
    check_numbers(Namespace(NUMBERS))
    with pytest.raises(ExperimentError, match=f"trainer.{name}: {value} does not fit"):
        check_numbers(Namespace(NUMBERS | {name: value}))


@pytest.mark.parametrize(
    "callback",
    [
        callbacks.BackboneFinetuning(),
        callbacks.BaseFinetuning(),
        callbacks.BatchSizeFinder(),
        callbacks.LearningRateFinder(),
        callbacks.ModelPruning("l1_unstructured"),
        callbacks.OnExceptionCheckpoint("."),
        callbacks.SpikeDetection(),
        callbacks.StochasticWeightAveraging(0.1),
    ],
    ids=lambda callback: type(callback).__name__,
)
def test_callbacks_that_a_run_cannot_go_on_with(callback):
    with pytest.raises(ExperimentError, match=f"trainer.callbacks: {type(callback).__name__} "):
        check_trainer(trainer(callbacks=[callback]))


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook", "ddp_spawn_find_unused_parameters_true"])
def test_strategies_whose_processes_are_no_commands(strategy):
    check_trainer(trainer(strategy="ddp", devices=2))
    with pytest.raises(ExperimentError, match=r"Give --trainer\.strategy=ddp"):
        check_trainer(trainer(strategy=strategy, devices=2))


def test_more_processes_than_a_machine_bears():
    with pytest.raises(ExperimentError, match=r"trainer\.devices: 9999 processes"):
        check_trainer(trainer(strategy="ddp", devices=9999))


@pytest.mark.parametrize(
    ("reasons", "shown"),
    [
        (
            ["Expected a <class 'list'>", "Invalid value for save_top_k=-5", "Expected a <class 'NoneType'>"],
            "save_top_k",
        ),
        (
            ["Not a valid subclass of Logger\n\n    - a path", "Problem with given class_path 'L':\n  it needs x"],
            "it needs x",
        ),
        (["Expected a <class 'list'>"], "Expected a <class 'list'>"),
    ],
)
def test_of_several_types_the_reason_of_the_one_that_was_meant(reasons, shown):
    listed = "".join(f"\n  - {reason}" for reason in reasons)
    message = f"Does not validate against any of the Union subtypes\nSubtypes: [A, B]\nErrors:{listed}\nGiven value: 1"
    with pytest.raises(ExperimentError) as failed, building("it"):
        raise ValueError(message)
    assert shown in str(failed.value)
    assert "Union" not in str(failed.value)
    assert "Given" not in str(failed.value)


def test_a_package_that_is_not_installed_is_one_message(capsys):
    assert run(["fit"], {"fit": Command("missing_package.training:main", "", "")}) == 2
    shown = capsys.readouterr().err
    assert "'missing_package' is not installed" in shown
    assert "pip install" in shown
