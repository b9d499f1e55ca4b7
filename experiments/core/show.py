"""The command `show`: what a checkpoint's task has to show, as text and as pictures beside the metrics."""

from pathlib import Path

from experiments.core.checkpoints import checkpoint_in, load_task
from experiments.core.command_line import Invocation, OptionParser
from experiments.core.errors import ExperimentError, write_figure, writing
from experiments.core.run_settings import RunSettings


def main(invocation: Invocation) -> None:
    """Print what the task says of the checkpoint, and write its pictures, each as NAME.png.

    The data are those of the run's config.yaml. Raises ExperimentError where that is not beside the checkpoint, for a
    task with nothing to show, and for a folder that cannot be written.
    """
    parser = OptionParser(
        prog="python -m experiments show", description="What a checkpoint does, in text and pictures."
    )
    parser.add_argument("checkpoint", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument("--config", type=Path, help="whose data to show (config.yaml of the checkpoint's run)")
    parser.add_argument("--output", type=Path, help="the pictures' folder (that of the checkpoint's run)")
    options = parser.parse_args(invocation.argv[1:])
    checkpoint = checkpoint_in(options.checkpoint)
    task = load_task(checkpoint)
    run = checkpoint.absolute().parent.parent
    config = options.config or run / "config.yaml"
    if not config.is_file():
        raise ExperimentError(f"{config}: there is no config of the checkpoint's run. Give one by --config CONFIG.")
    data = RunSettings(["validate", "--config", str(config)]).data
    if data is not None:
        data.prepare_data()
        data.setup("test")
    figures, text = task.pictures(data), task.show()
    if not (figures or text):
        raise ExperimentError(f"{checkpoint}: a {type(task).__name__} has nothing to show.")
    if text:
        print(text)
    folder = options.output or run
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        write_figure(path, figure, dpi=150)
        print(path)
