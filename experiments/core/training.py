"""The commands `fit`, `validate` and `test`: Lightning's command line with this project's defaults."""

import logging
import shlex
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import SUPPRESS, ArgumentParser, Namespace
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from experiments.core import curves
from experiments.core.beginning import Beginning
from experiments.core.checkpoints import Checkpoints, SaveTheRest, read_checkpoint
from experiments.core.command_line import Invocation
from experiments.core.config_check import check_config
from experiments.core.configs import expanded
from experiments.core.divergence import Divergence
from experiments.core.errors import DivergedError, ExperimentError, WritingError, building, write_text
from experiments.core.metrics_file import MetricsFile, read_metrics
from experiments.core.model_table import ModelTable
from experiments.core.progress import progress_bar
from experiments.core.randomness import RandomState
from experiments.core.result_file import read_result, write_result
from experiments.core.run_folder import RunFolder
from experiments.core.step_time import StepTime
from experiments.core.task import NetworkFirst, Task
from experiments.core.trainer_check import check_numbers, check_trainer, most_threads, stop_early_after_validations

# Lightning's notes on devices and its advertisements; warnings and errors stay.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
# Lightning's own affair with torch 2.13.
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")

# How those of Lightning's and torch's errors begin that a setting causes once training is under way.
MISTAKES = ("Early stopping conditioned on metric", "`val_check_interval`", "Function '")


def main(invocation: Invocation) -> None:
    """Run `fit`, `validate` or `test`."""
    is_main_thread = threading.current_thread() is threading.main_thread()  # only there handlers can be set
    # Where no training is under way, nothing is to be saved. Lightning's own handler would end with success.
    previous = signal.signal(signal.SIGTERM, _terminate) if is_main_thread else None
    try:
        TrainingCommands(invocation.argv, invocation.trusted)
    finally:
        if is_main_thread:
            signal.signal(signal.SIGTERM, previous)


class TrainingCommands(LightningCLI):
    """Runs one command; everything it needs stands in YAML files and options.

    A run is kept below `runs/NAME/version_N`, see `RunFolder`. Checkpoints are loaded with `weights_only=True`.

    Raises: ExperimentError and MultintError for the user's mistakes, argparse.ArgumentError for a bad config.
    """

    def __init__(self, argv: list[str], trusted: list[str]) -> None:
        self._command, *options = argv
        self._trusted = trusted
        super().__init__(
            Task,
            subclass_mode_model=True,
            args=options,
            seed_everything_default=0,
            save_config_callback=None,
            trainer_defaults={"enable_autolog_hparams": False},
            parser_kwargs={"exit_on_error": False},
            auto_configure_optimizers=False,
        )

    def subcommands(self) -> dict[str, set[str]]:
        """The one command that is run: a parser takes time to make."""
        skipped = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders", "weights_only"}
        return {self._command: skipped}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str, default="run", help="The run's folder below runs/.")
        parser.add_argument(
            "--threads",
            type=PositiveInt | None,
            default=None,
            help="CPU threads of torch, its own choice if null. Small networks are fastest with one.",
        )
        parser.add_argument(
            "--save_every", type=PositiveFloat, default=5.0, help="Minutes between two writes of last.ckpt."
        )
        parser.add_argument(
            "--tensorboard", type=bool, default=False, help="Write for TensorBoard too: pip install tensorboard."
        )
        parser.add_argument("--base", type=str | None, default=None, help=SUPPRESS)  # read by `expanded`

    def parse_arguments(self, parser: ArgumentParser, args: Any) -> None:
        args = expanded(args)
        # By the command's own parser: the one above it would go through everything a second time. Where there is one
        # above, --print_config waits for it; and without it, the classes are built without Lightning's notes of them.
        own = self._subcommand_parsers[self._command]
        check_config(own, args)
        del own.parent_parser
        command = own.parse_args(args)
        own.parent_parser = parser
        self.config = Namespace({"subcommand": self._command, self._command: command})
        command.base = None  # its settings are here now
        check_numbers(command.trainer)
        if (command.threads or 1) > most_threads():
            raise ExperimentError(f"threads: {command.threads} does not fit: expected at most {most_threads()}")
        # A truth value asks Lightning for a random seed, or for none.
        if not 0 <= (command.seed_everything or 0) < 2**32:
            raise ExperimentError(
                f"seed_everything: {command.seed_everything} does not fit: expected 0 to {2**32 - 1}, true or false"
            )

    def _parse_ckpt_path(self) -> None:
        # Lightning would silently put the checkpoint's settings in place of those asked for. The config decides, and
        # the task refuses a checkpoint of another one.
        path = self.config[self.config.subcommand].ckpt_path
        if path is None and self.config.subcommand != "fit":
            raise ExperimentError(f"{self.config.subcommand} needs a checkpoint: --ckpt_path CKPT.")
        if path is not None:
            read_checkpoint(Path(path))

    def _dump_config(self) -> None:
        # What Lightning keeps of the config in checkpoints. Its own would validate once more what was parsed.
        if not hasattr(self, "config_dump"):
            text = self._parser(self._command).dump(
                self.config[self._command], skip_validation=True, skip_unset=False, skip_link_targets=False
            )
            self.config_dump = yaml.safe_load(text)

    def before_instantiate_classes(self) -> None:
        if threads := self._get(self.config, "threads"):
            torch.set_num_threads(threads)
        trainer = self._get(self.config, "trainer")
        callbacks: list[Callback] = [progress_bar()] if trainer.enable_progress_bar in (None, True) else []
        callbacks += [ModelTable()] if trainer.enable_model_summary in (None, True) else []
        if self.subcommand == "fit":
            loaded = self._get(self.config, "ckpt_path")
            root = Path(trainer.default_root_dir or "runs")
            self._folder = RunFolder(root, self._get(self.config, "name"), Path(loaded) if loaded else None)
            self._is_reported = False
            self._checkpoints = Checkpoints(self._folder, self._get(self.config, "save_every"))
            self._divergence, self._step_time = Divergence(), StepTime()
            metrics = MetricsFile(self._folder)
            self._beginning = Beginning(self._write_config, metrics.begin)
            callbacks += [RandomState(), self._divergence, self._step_time, self._checkpoints]
            if not trainer.fast_dev_run:
                callbacks += [self._beginning, metrics]
        self.trainer_defaults["callbacks"] = callbacks

    def instantiate_classes(self) -> None:
        with building("the classes of the config"):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        given = self._get(self.config_init, "trainer")
        if given.logger in (None, True):
            kwargs["logger"] = False
        if self.subcommand == "fit" and not given.fast_dev_run and rank_zero_only.rank == 0:
            self._folder.make()
            kwargs["default_root_dir"] = self._folder.path  # where other callbacks write
            if self._get(self.config, "tensorboard"):
                kwargs["logger"] = self._tensorboard()
        try:
            with building("the trainer"):
                trainer = super().instantiate_trainer(**kwargs)
            check_trainer(trainer)
            stop_early_after_validations(trainer)
            trainer.callbacks.insert(0, NetworkFirst())
            if self.subcommand == "fit":
                trainer.callbacks.insert(0, SaveTheRest(self._checkpoints))
            return trainer
        except BaseException:
            if self.subcommand == "fit":
                self._folder.discard()
            raise

    def fit(self, **kwargs: Any) -> None:
        """Train, then test the best checkpoint and say what came of it."""
        try:
            self.trainer.fit(weights_only=True, **kwargs)
            if self._beginning.was_reached or self._is_unreported():
                self._report(kwargs["model"])
            elif not self.trainer.fast_dev_run:
                self._refuse_to_go_on(kwargs["ckpt_path"])
        except SystemExit:
            # The other processes may not know the folder yet.
            if rank_zero_only.rank == 0 and not self.trainer.fast_dev_run and not self._is_reported:
                print(self._how_to_go_on())
            raise
        except WritingError as error:
            if rank_zero_only.rank == 0:
                raise WritingError(f"{error} {self._what_is_kept()}") from error
            raise
        except (RuntimeError, ValueError) as error:
            first_line = str(error).strip().partition("\n")[0]
            if first_line.startswith(MISTAKES):
                raise ExperimentError(first_line) from error
            raise
        finally:
            if rank_zero_only.rank == 0 and not self._beginning.was_reached:
                self._folder.discard()

    def validate(self, **kwargs: Any) -> None:
        """Print the metrics of the validation data."""
        with _callbacks_left_out():
            self.trainer.validate(weights_only=True, **kwargs)

    def test(self, **kwargs: Any) -> None:
        """Print the metrics of the test data."""
        with _callbacks_left_out():
            self.trainer.test(weights_only=True, **kwargs)

    def _is_unreported(self) -> bool:
        """Whether a run goes on that was stopped after its last step, before its report."""
        if self.trainer.fast_dev_run or not self._folder.is_resumed:
            return False
        return read_result(self._folder.result) is None

    def _refuse_to_go_on(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            raise ExperimentError("there is nothing to train: max_epochs, max_steps or limit_train_batches is 0.")
        raise ExperimentError(
            f"{checkpoint}: this run is finished. To go on, raise what ended it: --trainer.max_epochs, "
            "--trainer.max_steps or --trainer.max_time."
        )

    def _report(self, task: Task) -> None:
        if self.trainer.fast_dev_run:
            return
        rows, scores, name, shown = {}, {}, task.monitor.name, ""
        diverged = self._divergence.step  # before the best checkpoint is loaded, which may know less
        if (score := self._checkpoints.best_score) is not None:
            rows[f"validation {name}"] = f"{score:.4f}"
            scores = self._tested(task)
            rows |= {metric.replace("/", " "): f"{value:.4f}" for metric, value in scores.items()}
        elif task.monitored in self.trainer.callback_metrics:
            rows[f"validation {name}"] = f"{self.trainer.callback_metrics[task.monitored].item():.4f}"
        else:
            _say("No validation ran, so there is no best checkpoint to test.")
        if diverged is not None:
            rows["diverged"] = f"at step {diverged}: from there on the loss is no finite number"
        parameters = sum(p.numel() for p in task.parameters())
        rows["parameters"] = f"{parameters:,}"
        if score is not None:
            rows["best checkpoint"] = _shown(self._folder.best)
        rows["last checkpoint"] = _shown(self._folder.last)
        if rank_zero_only.rank > 0:
            return
        if read_metrics(self._folder.metrics):
            rows |= {"metrics": _shown(self._folder.metrics), "curves": self._curves()}
        if score is not None and diverged is None:
            shown = f"\n{task.show()}\n\n"
        width = max(map(len, rows))
        shown += "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
        # Last of all files, and at once with the report: whoever stops the run before gets it by going on.
        self._write_result(scores, diverged, parameters)
        _say(shown)
        self._is_reported = True
        if diverged is not None:
            raise DivergedError(
                f"the run diverged: at step {diverged} its loss is no finite number. Lower the learning rate, or limit "
                "the gradient: --trainer.gradient_clip_val=1"
            )

    def _tested(self, task: Task) -> dict[str, float]:
        """The metrics of the best checkpoint in the test, where there is one."""
        if not is_overridden("test_dataloader", task if self.datamodule is None else self.datamodule):
            return {}
        # Not by `ckpt_path`: callbacks would take their part of the checkpoint too, and `WeightAveraging` puts back the
        # weights that training went on with.
        best = read_checkpoint(self._folder.best)
        task.on_load_checkpoint(best)
        task.load_state_dict(best["state_dict"])
        scores = self.trainer.test(task, self.datamodule, verbose=False)
        return {name: value for of_loader in scores for name, value in of_loader.items()}

    def _write_result(self, scores: dict[str, float], diverged: int | None, parameters: int) -> None:
        """Write what came of the run: the metrics of its best checkpoint, in validation and in the test."""
        best, metrics = self._checkpoints.best_step, {}
        for row in read_metrics(self._folder.metrics):
            if best is not None and int(row["step"]) == best:
                metrics |= {name: float(value) for name, value in row.items() if name.startswith("val/")}
        result = {
            "metrics": metrics | scores,
            "best_step": best,
            "steps": self.trainer.global_step,
            "diverged_at": diverged,
            "parameters": parameters,
            "seconds_per_step": self._step_time.mean,
        }
        write_result(self._folder.result, result)

    def _curves(self) -> str:
        """Where the curves lie, or why they do not: by then the report must not fail."""
        try:
            run = self._folder.path.absolute()
            curves.draw({f"{run.parent.name}/{run.name}": self._folder.metrics}, self._folder.curves)
        except ExperimentError as error:
            return f"not drawn: {error}"
        return _shown(self._folder.curves)

    def _write_config(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            self._folder.result.unlink(missing_ok=True)  # of a run that now goes on
            config = self.config[self.subcommand].clone()
            config.ckpt_path = None  # who runs the file again trains anew
            text = self._parser(self.subcommand).dump(config, skip_unset=False)
            write_text(self._folder.config, text)

    def _tensorboard(self) -> TensorBoardLogger:
        with building("the logger for TensorBoard"):
            return TensorBoardLogger(self._folder.path, name="", version="tensorboard")

    def _what_is_kept(self) -> str:
        if not self._folder.last.is_file():
            return "No checkpoint was written. Make room, or choose another place by --trainer.default_root_dir."
        return f"Kept: {_shown(self._folder.last)}. Make room. {self._how_to_go_on()}"

    def _how_to_go_on(self) -> str:
        if not self._folder.last.is_file():
            return "Stopped before the first checkpoint."
        command = ["python", "-m", "experiments", "fit", "--config", _shown(self._folder.config), "--ckpt_path"]
        trust = [word for module in self._trusted for word in ("--trust", module)]
        return f"Stopped. Go on with:\n{shlex.join([*command, _shown(self._folder.last), *trust])}"


@contextmanager
def _callbacks_left_out() -> Iterator[None]:
    """Lightning warns of those that only training has."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback")
        yield


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + signum)


def _say(text: str) -> None:
    """Print, in one process of several."""
    if rank_zero_only.rank == 0:
        print(text)


def _shown(path: Path) -> str:
    """The path as short as it can be typed from here."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
