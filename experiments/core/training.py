"""The commands `fit`, `validate` and `test`: Lightning's command line with this project's defaults."""

import logging
import shlex
import warnings
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from lightning import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from experiments.core.checkpoints import LastCheckpoint, best_checkpoint, check_checkpoint
from experiments.core.command_line import Invocation
from experiments.core.config_errors import check_classes
from experiments.core.configs import with_bases
from experiments.core.errors import ExperimentError, building
from experiments.tasks import LanguageModelling

# Lightning's notes on devices and its advertisements; warnings and errors stay.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
# Lightning's own affair with torch 2.13.
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
# A run that goes on writes to the folder of its checkpoints, as it must.
warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")

# How those of Lightning's RuntimeErrors begin that a setting causes once training is under way.
MISTAKES = ("Early stopping conditioned on metric", "SaveConfigCallback expected")


class TrainingCommands(LightningCLI):
    """Runs one command; everything it needs stands in YAML files and options.

    A run is kept below `runs/NAME/version_N`: `config.yaml`, `metrics.csv`, `checkpoints/best.ckpt` (by bits per symbol
    in validation) and `checkpoints/last.ckpt`. Checkpoints are loaded with `weights_only=True`.

    Raises: ExperimentError and MultintError for the user's mistakes, argparse.ArgumentError for a bad config.
    """

    def __init__(self, argv: list[str], trusted: list[str]) -> None:
        self._trusted = trusted
        super().__init__(
            LightningModule,
            subclass_mode_model=True,
            args=argv,
            seed_everything_default=0,
            trainer_defaults={"enable_autolog_hparams": False},
            parser_kwargs={"exit_on_error": False},
            auto_configure_optimizers=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        skipped = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders", "weights_only"}
        return dict.fromkeys(("fit", "validate", "test"), skipped)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--name", type=str, default="run", help="The run's folder below runs/.")
        parser.add_argument(
            "--threads",
            type=PositiveInt | None,
            default=None,
            help="CPU threads of torch, its own choice if null. Small networks are fastest with one.",
        )
        parser.add_argument("--base", type=str | None, default=None, help="A config that this one builds on.")

    def parse_arguments(self, parser: ArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(with_bases(args))
        command = self.config[self.config.subcommand]
        command.base = None  # its settings are here now
        check_classes({"model": command.model, "data": command.data})

    def _parse_ckpt_path(self) -> None:
        # Lightning would silently put the checkpoint's settings in place of those asked for. The config decides, and
        # the task refuses a checkpoint of another one.
        path = self.config[self.config.subcommand].ckpt_path
        if path is None and self.config.subcommand != "fit":
            raise ExperimentError(f"{self.config.subcommand} needs a checkpoint: --ckpt_path CKPT.")
        if path is not None:
            check_checkpoint(Path(path))

    def before_instantiate_classes(self) -> None:
        if threads := self._get(self.config, "threads"):
            torch.set_num_threads(threads)
        if self.subcommand != "fit":
            self.save_config_callback = None
        # A run that goes on keeps its checkpoints where they are: the best one of before still counts.
        loaded = self._get(self.config, "ckpt_path")
        self._best = best_checkpoint(Path(loaded).parent if loaded else None)
        self._last = LastCheckpoint(self._best, Path(loaded) if loaded else None)
        self.trainer_defaults["callbacks"] = [self._best, self._last]

    def instantiate_classes(self) -> None:
        with building("the classes of the config"):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        given = self._get(self.config_init, "trainer")
        if given.logger in (None, True):
            folder = given.default_root_dir or "runs"
            is_run = self.subcommand == "fit" and not given.fast_dev_run
            kwargs["logger"] = CSVLogger(folder, name=self._get(self.config, "name")) if is_run else False
        with building("the trainer"):
            return super().instantiate_trainer(**kwargs)

    def fit(self, **kwargs: Any) -> None:
        """Train, then test the best checkpoint and say what came of it."""
        try:
            self.trainer.fit(weights_only=True, **kwargs)
        except SystemExit:
            if self.trainer.interrupted:
                print(self._how_to_go_on())
            raise
        except RuntimeError as error:
            if str(error).startswith(MISTAKES):
                raise ExperimentError(str(error)) from error
            raise
        if not self.trainer.fast_dev_run:
            self._report(kwargs["model"])

    def validate(self, **kwargs: Any) -> None:
        """Print the metrics of the validation text."""
        self.trainer.validate(weights_only=True, **kwargs)

    def test(self, **kwargs: Any) -> None:
        """Print the metrics of the test text."""
        self.trainer.test(weights_only=True, **kwargs)

    def _report(self, model: LightningModule) -> None:
        best = self._best
        if not best.best_model_path:
            print(f"No validation ran, so there is no best checkpoint to test. The last one: {_shown(self._last.path)}")
            return
        [scores] = self.trainer.test(
            model, self.datamodule, ckpt_path=best.best_model_path, weights_only=True, verbose=False
        )
        rows = {
            "validation BPC": f"{best.best_model_score:.4f}",
            "test BPC": f"{scores['test/bpc']:.4f}",
            "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
            "best checkpoint": _shown(best.best_model_path),
            "last checkpoint": _shown(self._last.path),
        }
        if isinstance(self.trainer.logger, CSVLogger):
            rows["metrics"] = _shown(Path(self.trainer.logger.log_dir) / "metrics.csv")
        if isinstance(model, LanguageModelling):
            print(f"\nA sample of what it writes:\n\n{model.text('', 300, temperature=0.8)}\n")
        width = max(map(len, rows))
        print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))

    def _how_to_go_on(self) -> str:
        if self._last.path is None:
            return "Stopped before the first checkpoint."
        config = Path(self.trainer.log_dir or "") / "config.yaml"
        command = ["python", "-m", "experiments", "fit", "--config", _shown(config), "--ckpt_path"]
        trust = [word for module in self._trusted for word in ("--trust", module)]
        return f"Stopped. Go on with:\n{shlex.join([*command, _shown(self._last.path), *trust])}"


def main(invocation: Invocation) -> None:
    """Run `fit`, `validate` or `test`."""
    TrainingCommands(invocation.argv, invocation.trusted)


def _shown(path: Any) -> str:
    """The path as short as it can be typed from here."""
    path = Path(path).absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
