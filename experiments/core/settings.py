"""Whether a checkpoint is of the settings that are asked for."""

from collections.abc import Iterator
from typing import Any

from lightning import LightningModule

from experiments.core.errors import ExperimentError


def refuse_other_settings(task: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Raises ExperimentError for a checkpoint of other settings or weights than the task's, naming what differs.

    Training goes on with the checkpoint's optimiser state, learning rate included: other settings would silently have
    no effect. Evaluation needs the same parameters only.
    """
    saved, asked = checkpoint.get(task.CHECKPOINT_HYPER_PARAMS_KEY), dict(task.hparams)
    differences = list(_differences(saved, asked)) if saved and asked else []
    shapes = {name: tuple(value.shape) for name, value in task.state_dict().items()}
    saved_shapes = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    if differences and not (shapes == saved_shapes and task._trainer is not None and task.trainer.state.fn != "fit"):
        raise ExperimentError(
            f"{type(task).__name__}: the checkpoint is of a run with other settings. Give those, or train anew without "
            f"--ckpt_path. They differ in {'; '.join(differences)}."
        )
    if misfits := [name for name in (shapes | saved_shapes) if shapes.get(name) != saved_shapes.get(name)]:
        name = misfits[0]
        raise ExperimentError(
            f"{type(task).__name__}: the checkpoint's weights do not fit the network: {name} is "
            f"{saved_shapes.get(name, 'missing')}, expected {shapes.get(name, 'no such weight')}. "
            "Give the checkpoint of a network that was built from the same settings."
        )


def _differences(saved: Any, asked: Any, path: str = "model") -> Iterator[str]:
    if isinstance(saved, dict) and isinstance(asked, dict):
        for key in sorted(saved.keys() | asked.keys()):
            yield from _differences(saved.get(key), asked.get(key), f"{path}.{key}")
    elif saved != asked:
        yield f"{path} (saved {saved!r}, asked {asked!r})"
