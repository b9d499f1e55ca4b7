"""Training neural processes: tasks that are always the same or always new, and runs that go on where they stopped."""

import math
import struct
from functools import partial

import pytest
import torch
from lightning import seed_everything
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.testing import assert_close

from experiments.__main__ import main
from experiments.core.configs import CONFIGS
from experiments.core.errors import ExperimentError
from experiments.core.module import DataModule, TaskModule
from experiments.core.optimisation import LearningRate
from experiments.data import Curves, Images, Table, TextData
from experiments.tasks import NeuralProcesses
from experiments.tasks.task_scores import Scores, table
from models import (
    AttentiveEncoder,
    LatentEncoder,
    NeuralProcess,
    Points,
    PooledEncoder,
    elbo,
    importance_weighted,
    log_likelihood,
)
from models.neural_process import joined
from multint import Conditional, MultiplicativeIntegration
from tests.resuming import Record, assert_together, last, stopped, trainer

pytestmark = [pytest.mark.runs, pytest.mark.usefixtures("interruptible")]


def task():
    seed_everything(1, verbose=False)
    encoder = partial(PooledEncoder, hidden=8, layers=2, post_layers=0)
    latent = partial(LatentEncoder, features=4, hidden=8, layers=2, post_layers=1)
    network = partial(NeuralProcess, encoder=encoder, latent=latent)
    return NeuralProcesses(network, partial(torch.optim.Adam, lr=0.01), samples=2, bound="importance", eval_samples=3)


def data():
    return Curves(batch_size=4, epoch=5, valid_tasks=8, test_tasks=8, eval_batch_size=4)


def record():
    return Record(lambda batch: batch.target_y.sum().item())


def run(folder, *callbacks, ckpt_path=None, **settings):
    of_whole, rate = record(), LearningRate(partial(CosineAnnealingLR, T_max=-1))
    of_run = trainer(folder, of_whole, *callbacks, rate, ckpt_path=ckpt_path, max_steps=14, **settings)
    of_run.fit(TaskModule(task()), DataModule(data()), ckpt_path=ckpt_path, weights_only=True)
    return of_whole


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The records of two whole runs, by the interval of their validations in steps or epochs."""
    records = {every: run(tmp_path_factory.mktemp("whole"), val_check_interval=every) for every in (2, 1.0)}
    for record in records.values():
        assert len(record.steps) == 14
        assert len({tasks for _, _, tasks in record.steps}) == 14, "tasks came twice"
    return records


# An epoch has 5 steps. Ctrl-C comes in a validation within it, in its last step, in the next one's first, and in the
# validation at its end.
@pytest.mark.parametrize(
    ("every", "step", "in_validation"),
    [(2, 4, True), (2, 4, False), (2, 5, False), (1.0, 4, False), (1.0, 5, True)],
)
def test_a_resumed_run_equals_an_uninterrupted_one(every, step, in_validation, uninterrupted, tmp_path):
    of_interval = partial(run, val_check_interval=every)
    first = stopped(of_interval, tmp_path, record(), step, in_validation)
    assert_together([first, of_interval(tmp_path, ckpt_path=last(tmp_path))], uninterrupted[every])


@pytest.fixture
def image_file(tmp_path):
    """Twelve images of 6 × 6 pixels in MNIST's format."""
    pixels = torch.randint(256, (12, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    path = tmp_path / "images"
    path.write_bytes(struct.pack(">4I", 0x0803, *pixels.shape) + pixels.numpy().tobytes())
    return path


@pytest.fixture
def csv_file(tmp_path):
    """Sines of eight frequencies."""
    rows = [f"{t / 5},{math.sin(g * t / 5)},{g}" for g in range(1, 9) for t in range(10 + g)]
    path = tmp_path / "own.csv"
    path.write_text("\n".join(["t,v,g", *rows]))
    return path


SMALL = {"batch_size": 2, "context": (5, 5), "targets": (5, 5), "most": None, "seed": 0}
DATA = {
    "curves": lambda request: Curves(**SMALL),
    "images": lambda request: Images(path=str(request.getfixturevalue("image_file")), **SMALL),
    "table": lambda request: Table(str(request.getfixturevalue("csv_file")), "g", ["t"], ["v"], **SMALL),
}


@pytest.mark.parametrize(
    ("data", "is_latent"), [("curves", False), ("curves", True), ("images", False), ("table", True)]
)
def test_a_task_overfits_one_batch(data, is_latent, request):
    """Its likelihood nears what the smallest deviation allows."""
    source = DATA[data](request)
    source.setup()
    batch = next(iter(source.train_dataloader()))
    torch.manual_seed(0)
    decoder = partial(Conditional, hidden=32, integrator=MultiplicativeIntegration)
    encoder = partial(AttentiveEncoder, hidden=32, layers=3, self_attention=False)
    latent = partial(LatentEncoder, features=8, hidden=32, layers=2, post_layers=1) if is_latent else None
    trained = NeuralProcesses(partial(NeuralProcess, encoder=encoder, latent=latent, decoder=decoder))
    trained.network = trained.build(trained.describe(source))
    optimizer = torch.optim.Adam(trained.network.parameters(), fused=True)
    for rate in [5e-3] * 200 + [5e-4] * 50:
        optimizer.param_groups[0]["lr"] = rate
        loss = trained.measure(batch, "train")["loss"].value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    per_value = -math.log(0.1 * math.sqrt(2 * math.pi))
    assert -loss.item() > per_value - 0.6


OBJECTIVES = {
    "elbo": lambda net, context, targets, everything: elbo(net, context, targets, everything, 2),
    "importance": lambda net, context, targets, everything: importance_weighted(net, context, targets, everything, 2),
    "joint": lambda net, context, targets, everything: log_likelihood(net, context, targets, 2).joint,
}


@pytest.mark.parametrize("bound", OBJECTIVES)
@pytest.mark.parametrize("predict_context", [True, False])
def test_training_maximises_the_bound_that_was_asked_for(bound, predict_context):
    trained, source = task(), data()
    trained.bound, trained.predict_context = bound, predict_context
    trained.network = trained.build(trained.describe(source))
    source.setup()
    batch = next(iter(source.train_dataloader()))
    context, targets = Points(*batch[:3]), Points(*batch[3:6])
    everything = joined(context, targets)
    torch.manual_seed(0)
    loss = trained.measure(batch, "train")["loss"].value
    torch.manual_seed(0)
    expected = OBJECTIVES[bound](trained.network, context, everything if predict_context else targets, everything)
    assert_close(loss, -expected.mean())


def test_scores_have_the_intervals_of_means_over_independent_batches():
    values = torch.randn(12, dtype=torch.float64)
    alone = Scores(torch.arange(12), torch.arange(12), {"a": values})
    half_width = 2.200985160082949 * values.std() / math.sqrt(12)  # t of 11 degrees of freedom
    assert_close(torch.tensor(alone.estimate("a")[:2]), torch.stack([values.mean(), half_width]).float())
    of_batches = values.repeat_interleave(5)  # tasks of a batch that are all alike tell no more than one of them
    alike = Scores(torch.arange(12).repeat_interleave(5), torch.zeros(60), {"a": of_batches})
    assert_close(torch.tensor(alike.estimate("a")[:2]), torch.tensor(alone.estimate("a")[:2]))
    some = alone.where(3, 7)
    assert_close(some.values["a"], values[3:7])


def test_one_task_has_no_interval():
    alone = Scores(torch.tensor([-1]), torch.tensor([3]), {"a": torch.tensor([2.0], dtype=torch.float64)})
    assert alone.summary() == {"a": 2.0}
    assert table("set", alone, []).splitlines()[-1].split() == ["3–3", "1", "2.000"]


def test_an_evaluation_is_the_mean_over_its_tasks(tmp_path):
    """And the same whatever was drawn before it."""
    trained, source = task(), data()
    [first] = trainer(tmp_path).validate(TaskModule(trained), DataModule(source), verbose=False)
    torch.randn(7)
    assert trainer(tmp_path).validate(TaskModule(trained), DataModule(source), verbose=False) == [first]
    expected = []
    for batch in source.val_dataloader():
        context, targets = Points(*batch[:3]), Points(*batch[3:6])
        generator = torch.Generator().manual_seed(batch.index)
        with torch.no_grad():
            expected.append(log_likelihood(trained.network, context, targets, 3, generator).marginal)
    assert first["val/log_likelihood"] == pytest.approx(torch.cat(expected).mean().item(), rel=1e-5)


def test_other_data_than_functions_are_refused(text):
    with pytest.raises(ExperimentError, match="the data are TextData, expected functions"):
        task().describe(TextData(path=str(text)))


def test_a_run_is_fitted_reported_and_shown(tmp_path, monkeypatch, capsys):
    """By the command line: the report by context size, and a picture beside the metrics."""
    monkeypatch.chdir(tmp_path)
    small = [f"--model.network.{path}.hidden=8" for path in ("encoder", "latent", "decoder")]
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_model_summary=false", "--trainer.max_steps=2"]
    options = ["--data.valid_tasks=20", "--data.test_tasks=40", "--data.epoch=2", "--model.eval_samples=2"]
    config = ["--config", str(CONFIGS / "functions/curves.yaml"), "--model.network.latent=LatentEncoder"]
    assert main(["fit", *config, *small, *options, *quiet]) == 0
    out = capsys.readouterr().out
    for word in ("Nats per held-out target", "marginal_ceiling", "matern52", "test rbf importance"):
        assert word in out
    run = tmp_path / "runs/curves/version_0"
    best = str(run / "checkpoints/best.ckpt")
    assert main(["show", best]) == 0
    assert capsys.readouterr().out == f"{run / 'predictions.png'}\n"
    assert (run / "predictions.png").read_bytes().startswith(b"\x89PNG")
    assert (run / "curves.png").is_file()
    assert main(["show", best, "--examples=2"]) == 2
    assert "--examples: a NeuralProcesses shows no examples of the test" in capsys.readouterr().err
    (run / "config.yaml").unlink()
    assert main(["show", best]) == 2
    assert "--config CONFIG" in capsys.readouterr().err


@pytest.mark.parametrize("data", ["images", "table"])
def test_images_and_tables_are_drawn(data, request, tmp_path):
    source, shown = DATA[data](request), task()
    source.setup()
    shown.network = shown.build(shown.describe(source))
    [(name, figure)] = shown.pictures(source).items()
    assert name == "predictions"
    figure.savefig(tmp_path / "drawn.png", dpi=20)
