"""Training a language model: exact metrics, the schedule, checkpoints, and runs that go on where they stopped."""

import math
from functools import partial

import pytest
import torch
from lightning import Callback, seed_everything
from torch.testing import assert_close

from experiments.core.errors import ExperimentError
from experiments.core.module import DataModule, TaskModule
from experiments.data import TextData
from experiments.tasks import LanguageModelling
from models import LanguageModel
from multint import LSTMCell, Recurrent, RNNCell
from tests.resuming import Interrupt, Record, assert_together, last, stopped, trainer

pytestmark = [pytest.mark.runs, pytest.mark.usefixtures("interruptible")]


def data(text, **settings):
    return TextData(path=str(text), **({"batch_size": 4, "length": 20, "eval_length": 50} | settings))


def task(lr=0.2, cell=LSTMCell, hidden_size=12, optimizer=torch.optim.Adam, tied=False, **settings):
    seed_everything(1, verbose=False)

    def network(symbols):
        stack = partial(Recurrent, hidden_size=hidden_size, cell=cell, state_dropout=0.1)
        return LanguageModel(symbols, stack, 8, output_size=8 if tied else None, dropout=0.2, tied=tied)

    return LanguageModelling(network, partial(optimizer, lr=lr), **settings)


class SaveFirst(Callback):
    """Saves before the first batch."""

    def __init__(self, path):
        self.path = path

    def on_train_start(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


def run(folder, *callbacks, text, ckpt_path=None, **settings):
    record = Record()
    of_run = trainer(folder, record, *callbacks, ckpt_path=ckpt_path, max_epochs=2, **settings)
    of_run.fit(TaskModule(task(halve_after=1)), DataModule(data(text)), ckpt_path=ckpt_path, weights_only=True)
    record.best = of_run.checkpoint_callback.best_score
    return record


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    """The records of two whole runs, by the interval of their validations in steps or epochs."""
    records = {every: run(tmp_path_factory.mktemp("whole"), text=text, val_check_interval=every) for every in (10, 1.0)}
    assert all(len(record.steps) == 46 for record in records.values())
    assert len({rate for _, rate, _ in records[10].steps}) > 1, "the schedule never acted"
    return records


def test_a_checkpoint_before_the_first_batch_can_be_gone_on_from(uninterrupted, text, tmp_path):
    first = tmp_path / "first.ckpt"
    run(tmp_path, SaveFirst(first), text=text, max_steps=1)
    assert run(tmp_path, text=text, ckpt_path=first, val_check_interval=10).steps == uninterrupted[10].steps


# An epoch has 23 steps. Ctrl-C comes within it, in the last step before a validation, in the validation, in the
# epoch's last step, in the next one's first, and in the validation at the epoch's end.
# The resumed run writes to the same folder, so that the best checkpoint of before still counts.
@pytest.mark.parametrize(
    ("every", "step", "in_validation"),
    [
        (10, 4, False),
        (10, 9, False),
        (10, 10, True),
        (10, 22, False),
        (10, 23, False),
        (10, 33, True),
        (1.0, 22, False),
        (1.0, 23, True),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(every, step, in_validation, uninterrupted, text, tmp_path):
    whole = uninterrupted[every]
    of_text = partial(run, text=text, val_check_interval=every)
    first = stopped(of_text, tmp_path, Record(), step, in_validation)
    second = of_text(tmp_path, ckpt_path=last(tmp_path))
    assert len(first.steps) == (step if in_validation else step + 1)
    assert_together([first, second], whole)
    assert second.best == whole.best == min(whole.validations)


@pytest.mark.parametrize("every", [10, 1.0])
def test_a_run_may_stop_at_an_epochs_end_and_again_within_the_next(every, uninterrupted, text, tmp_path):
    """Lightning by itself does not count the next epoch as begun there, and would begin it anew."""
    of_text, record = partial(run, text=text, val_check_interval=every), Record()
    stopped(of_text, tmp_path, record, 22)
    stopped(of_text, tmp_path, record, 27, ckpt_path=last(tmp_path))
    assert_together([record, of_text(tmp_path, ckpt_path=last(tmp_path))], uninterrupted[every])


def test_a_run_that_ends_without_a_validation_can_go_on(text, tmp_path):
    def steps(folder, epochs, ckpt_path=None):
        record = Record()
        of_run = trainer(folder, record, ckpt_path=ckpt_path, max_epochs=epochs, check_val_every_n_epoch=2)
        of_run.fit(TaskModule(task()), DataModule(data(text)), ckpt_path=ckpt_path, weights_only=True)
        return record.steps

    whole = steps(tmp_path / "whole", 4)
    first = steps(tmp_path / "split", 3)
    assert first + steps(tmp_path / "split", 4, last(tmp_path / "split")) == whole


def test_a_second_ctrl_c_stops_at_once_and_keeps_the_checkpoint_of_before(text, tmp_path):
    with pytest.raises(SystemExit):
        run(tmp_path, Interrupt(20, True), Interrupt(20, True), text=text, val_check_interval=10)
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 10


@pytest.mark.parametrize("cell", [LSTMCell, RNNCell])
def test_a_checkpoint_holds_values_only(cell, text, tmp_path):
    trained = task(cell=cell)
    trainer(tmp_path, max_steps=3).fit(TaskModule(trained), DataModule(data(text)))
    checkpoint = torch.load(last(tmp_path), weights_only=True)
    assert checkpoint["global_step"] == 3
    assert checkpoint["task"]["description"] == {"vocabulary": trained.vocabulary.state_dict()}
    assert len(checkpoint["task"]["saved"]["carried"]) == (2 if cell is LSTMCell else 1)


def test_evaluation_is_exact_over_one_stream(text, tmp_path):
    source = data(text)
    evaluated = task()
    [scores] = trainer(tmp_path).validate(TaskModule(evaluated), DataModule(source), verbose=False)
    ids = source._streams["valid"].long()
    evaluated.network.eval()
    with torch.no_grad():
        logits, _ = evaluated.network(ids[:-1, None])
    loss = torch.nn.functional.cross_entropy(logits[:, 0], ids[1:]).item()
    assert scores["val/loss"] == pytest.approx(loss, rel=1e-5)
    assert scores["val/bpc"] == pytest.approx(loss / math.log(2), rel=1e-5)
    assert scores["val/perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_validation_leaves_the_carried_state_of_training(text, tmp_path):
    class Watch(Callback):
        def on_validation_start(self, trainer, pl_module):
            self.before = pl_module.task._carried.get("train")

        def on_validation_end(self, trainer, pl_module):
            assert_close(pl_module.task._carried.get("train"), self.before, rtol=0, atol=0)

    trainer(tmp_path, Watch(), max_steps=4, val_check_interval=2).fit(TaskModule(task()), DataModule(data(text)))


def test_the_network_learns_a_tiny_text(tmp_path):
    path = tmp_path / "abc.txt"
    path.write_text("abcdefgh\n" * 400)
    trained = task(lr=0.02, hidden_size=32)
    of_run = trainer(tmp_path / "run", max_epochs=4)
    of_run.fit(TaskModule(trained), DataModule(data(path, batch_size=8)))
    [scores] = of_run.test(TaskModule(trained), DataModule(data(path)), verbose=False, weights_only=True)
    assert scores["test/bpc"] < 0.1
    assert trained.text("abc", 12, temperature=0.0) == "abcdefgh\nabcdef"


def test_another_vocabulary_than_the_checkpoints_is_refused(text, tmp_path):
    trainer(tmp_path, max_steps=2, val_check_interval=2).fit(TaskModule(task()), DataModule(data(text)))
    other = tmp_path / "other.txt"
    other.write_text(text.read_text().upper())
    with pytest.raises(ExperimentError, match="vocabulary"):
        trainer(tmp_path / "on").test(
            TaskModule(task()), DataModule(data(other)), ckpt_path=last(tmp_path), weights_only=True
        )


def test_a_checkpoint_of_another_task_is_refused():
    with pytest.raises(ExperimentError, match="of no task"):
        task().take_up({"state_dict": {}}, is_to_train=True)


def test_a_symbol_outside_the_vocabulary_is_refused_in_a_prompt(text, tmp_path):
    prompted = task()
    trainer(tmp_path).validate(TaskModule(prompted), DataModule(data(text)), verbose=False)
    with pytest.raises(ExperimentError, match="é"):
        prompted.text("é", 1)


@pytest.mark.parametrize("setting", ["halve_after", "average_after"])
def test_a_schedule_after_less_than_one_validation_is_refused(setting):
    with pytest.raises(ExperimentError, match=setting):
        task(**{setting: 0})


class Weights(Callback):
    """The weights after each step."""

    def __init__(self):
        self.of_step = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.of_step[trainer.global_step] = {k: v.clone() for k, v in pl_module.state_dict().items()}


def averaging_task():
    """With tied weights, which a checkpoint holds by two names, and a frozen vector, of which no mean is kept.

    It goes uphill, so that every validation is worse than those before, on any processor.
    """
    uphill = partial(torch.optim.ASGD, lambd=0, maximize=True)
    averaged = task(1.0, optimizer=uphill, average_after=2, tied=True)
    build = averaged._build_network

    def frozen(symbols):
        network = build(symbols)
        network.decoder.bias.requires_grad_(False)
        return network

    averaged._build_network = frozen
    return averaged


def averaging_run(folder, *callbacks, text, ckpt_path=None):
    record, averaged = Record(), averaging_task()
    settings = {"val_check_interval": 4, "check_val_every_n_epoch": None, "max_steps": 40, "gradient_clip_val": 0.5}
    of_run = trainer(folder, record, *callbacks, ckpt_path=ckpt_path, **settings)
    of_run.fit(TaskModule(averaged), DataModule(data(text)), ckpt_path=ckpt_path, weights_only=True)
    return record, averaged


def test_the_mean_of_the_weights_begins_where_validation_stops_to_improve(text, tmp_path):
    weights = Weights()
    record, averaged = averaging_run(tmp_path, weights, text=text)
    scores = record.validations
    assert scores == sorted(scores)
    begins = 4 * 4  # the first of which one stands more than two before; those after it must not begin the mean anew
    checkpoint = torch.load(last(tmp_path), weights_only=True)
    for name, value in weights.of_step[40].items():
        mean = torch.stack([weights.of_step[step][name] for step in range(begins + 1, 41)]).mean(0)
        assert_close(checkpoint["state_dict"][name], mean, rtol=1e-4, atol=1e-5)
        assert_close(checkpoint["trained_state_dict"][name], value, rtol=0, atol=0)
        assert_close(averaged.network.state_dict()[name.removeprefix("network.")], value, rtol=0, atol=0)
    on = trainer(tmp_path / "on")
    checkpointed = {"ckpt_path": last(tmp_path), "weights_only": True}
    [score] = on.validate(TaskModule(averaging_task()), DataModule(data(text)), verbose=False, **checkpointed)
    assert score["val/bpc"] == pytest.approx(scores[-1], abs=1e-5)
    TaskModule(averaged).load_state_dict(checkpoint["trained_state_dict"])
    [at_the_end] = trainer(tmp_path / "end").validate(TaskModule(averaged), DataModule(data(text)), verbose=False)
    assert at_the_end["val/bpc"] > score["val/bpc"] + 0.01, "the mean is what is validated, and not the weights"


def test_a_resumed_run_with_means_equals_an_uninterrupted_one(text, tmp_path):
    whole, _ = averaging_run(tmp_path / "whole", text=text)
    first = stopped(averaging_run, tmp_path, Record(), 34, text=text)
    second, _ = averaging_run(tmp_path, text=text, ckpt_path=last(tmp_path))
    assert_together([first, second], whole)


def test_means_of_an_optimizer_that_keeps_none_are_refused(text, tmp_path):
    with pytest.raises(ExperimentError, match="the optimizer is Adam, expected ASGD"):
        trainer(tmp_path, max_steps=1).fit(TaskModule(task(average_after=2)), DataModule(data(text)))
