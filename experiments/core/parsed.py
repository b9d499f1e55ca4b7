"""A config that is read and checked as `fit` would, without a run."""

from typing import Any

from lightning import Trainer

from experiments.core.configs import load_yaml
from experiments.core.training import TrainingCommands


class Parsed(TrainingCommands):
    """Reads the config of a command and builds its task and its data, and runs nothing; see `TrainingCommands`."""

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting of the command, given or not, as plain values."""
        text = self._parser(self.subcommand).dump(self.config[self.subcommand], skip_unset=False)
        return load_yaml(text, "config")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        return Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")

    def _run_subcommand(self, subcommand: str) -> None:
        pass
