"""The report of a run: the test of its best checkpoint, its result for who compares runs, and what is printed."""

from pathlib import Path

from lightning import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from experiments.core import curves
from experiments.core.callbacks import Divergence, Speed
from experiments.core.errors import DivergedError, ExperimentError
from experiments.core.loading import load_weights, read_checkpoint
from experiments.core.module import TaskModule
from experiments.core.network_size import table
from experiments.core.run_folder import RunFolder, read_metrics, write_result
from experiments.core.saving import Checkpoints


class RunReport:
    """What came of a run that has ended.

    Raises: DivergedError where its loss became no finite number, after all was reported.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: TaskModule,
        folder: RunFolder,
        checkpoints: Checkpoints,
        divergence: Divergence,
        speed: Speed,
    ) -> None:
        self.is_written = False
        self._trainer, self._model, self._folder = trainer, model, folder
        self._checkpoints, self._divergence, self._speed = checkpoints, divergence, speed

    def __call__(self) -> None:
        """Test, write and print."""
        task, rows, scores, text = self._model.task, dict[str, str](), dict[str, float](), ""
        diverged = self._divergence.step  # before the best checkpoint is loaded, which may know less
        score, name = self._checkpoints.best_score, task.monitor.name
        if score is not None:
            rows[f"validation {name}"] = f"{score:.4f}"
            scores = self._tested()
            rows |= {metric.replace("/", " "): f"{value:.4f}" for metric, value in scores.items()}
        elif task.monitored in self._trainer.callback_metrics:
            rows[f"validation {name}"] = f"{self._trainer.callback_metrics[task.monitored].item():.4f}"
        else:
            _say("No validation ran, so there is no best checkpoint to test.")
        if diverged is not None:
            rows["diverged"] = f"at step {diverged}: from there on the loss is no finite number"
        parameters = sum(p.numel() for p in self._model.parameters())
        rows["parameters"] = f"{parameters:,}"
        if score is not None:
            rows["best checkpoint"] = shown(self._folder.best)
        rows["last checkpoint"] = shown(self._folder.last)
        if rank_zero_only.rank > 0:
            return
        if read_metrics(self._folder.metrics):
            rows |= {"metrics": shown(self._folder.metrics), "curves": self._curves()}
        if score is not None and diverged is None:
            text = f"\n{task.show()}\n\n"
        # Last of all files, and at once with the report: whoever stops the run before gets it by going on.
        self._write(scores, diverged, parameters)
        _say(text + table(rows))
        self.is_written = True
        if diverged is not None:
            raise DivergedError(
                f"the run diverged: at step {diverged} its loss is no finite number. Lower the learning rate, or limit "
                "the gradient: --trainer.gradient_clip_val=1"
            )

    def _tested(self) -> dict[str, float]:
        """The metrics of the best checkpoint in the test, where there is one."""
        data = self._trainer.datamodule
        if not hasattr(self._model.task if data is None else data.data, "test_dataloader"):
            return {}
        # Not by `ckpt_path`: callbacks would take their part of the checkpoint too, and `WeightAveraging` puts back the
        # weights that training went on with.
        load_weights(self._model.task, read_checkpoint(self._folder.best))
        scores = self._trainer.test(self._model, data, verbose=False)
        return {name: value for of_loader in scores for name, value in of_loader.items()}

    def _write(self, scores: dict[str, float], diverged: int | None, parameters: int) -> None:
        """Write what came of the run: the metrics of its best checkpoint, in validation and in the test."""
        best, metrics = self._checkpoints.best_step, dict[str, float]()
        for row in read_metrics(self._folder.metrics):
            if best is not None and int(row["step"]) == best:
                metrics |= {name: float(value) for name, value in row.items() if name.startswith("val/")}
        result = {
            "metrics": metrics | scores,
            "best_step": best,
            "steps": self._trainer.global_step,
            "diverged_at": diverged,
            "parameters": parameters,
            "seconds_per_step": self._speed.seconds_per_step,
        }
        write_result(self._folder.result, result)

    def _curves(self) -> str:
        """Where the curves lie, or why they do not: by then the report must not fail."""
        try:
            run = self._folder.path.absolute()
            curves.draw_metrics({f"{run.parent.name}/{run.name}": self._folder.metrics}, self._folder.curves)
        except ExperimentError as error:
            return f"not drawn: {error}"
        return shown(self._folder.curves)


def shown(path: Path) -> str:
    """The path as short as it can be typed from here."""
    path = path.absolute()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _say(text: str) -> None:
    """Print, in one process of several."""
    if rank_zero_only.rank == 0:
        print(text)
