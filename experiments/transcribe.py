"""The command `transcribe`: what is said in audio files, by a checkpoint."""

from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path

from jsonargparse import ArgumentParser

from experiments.core.command_line import Invocation, OptionParser
from experiments.core.errors import ExperimentError, building
from experiments.core.loading import RunSettings, checkpoint_in, load_task
from experiments.data.speech import Labelling, SpeechData
from experiments.decoding import Decoder
from experiments.tasks import Speech


def main(invocation: Invocation) -> None:
    """Print the text of each file or, with `--show N`, what was said in utterances of the test over what is heard.

    Raises ExperimentError for a checkpoint of another task, and for a file that is no audio.
    """
    parser = _parser()
    options = parser.parse_args(invocation.argv[1:])
    if bool(options.files) == (options.show is not None):
        parser.error("expected audio files, or --show N")
    if options.show is not None and options.show < 1:
        raise ExperimentError(f"--show: got {options.show}, expected at least 1.")
    checkpoint = checkpoint_in(options.checkpoint)
    task = load_task(checkpoint)
    if not isinstance(task, Speech):
        raise ExperimentError(f"{checkpoint}: the checkpoint of a {type(task).__name__}, which hears nothing.")
    if options.decoder is not None:
        task.decode_with(_decoder(options.decoder))
    for path in options.files:
        print(f"{path}: {task.transcribe(path)}", flush=True)
    if options.show is not None:
        config = options.config or checkpoint.absolute().parent.parent / "config.yaml"
        print(task.compare(_data(config).utterances("test")[: options.show]))


def _decoder(given: str) -> Callable[[Labelling], Decoder]:
    """The factory of a decoder that is named, or given as YAML with its settings."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--decoder", type=Callable[[Labelling], Decoder])
    try:
        config = parser.parse_args(["--decoder", given])
    except ArgumentError as error:
        reason = str(error).splitlines()[-1].strip().rstrip(".")
        raise ExperimentError(
            f"--decoder: got {given}, expected Greedy, WFST or PrefixBeam, or YAML of its class_path and init_args "
            f"({reason})."
        ) from error
    with building("--decoder"):
        return parser.instantiate(config).decoder


def _data(config: Path) -> SpeechData:
    if not config.is_file():
        raise ExperimentError(f"{config}: there is no config of the checkpoint's run. Give one by --config CONFIG.")
    data = RunSettings(["validate", "--config", str(config)]).data
    if not isinstance(data, SpeechData):
        raise ExperimentError(f"{config}: its data are {type(data).__name__}, expected recordings.")
    data.prepare_data()
    data.setup("test")
    return data


def _parser() -> OptionParser:
    parser = OptionParser(prog="python -m experiments transcribe", description="What is said in audio files.")
    parser.add_argument("checkpoint", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="WAV or FLAC files")
    parser.add_argument("--show", type=int, metavar="N", help="N utterances of the run's test, over what is heard")
    parser.add_argument("--decoder", help="Greedy, WFST or PrefixBeam, or YAML with its settings (the run's)")
    parser.add_argument("--config", type=Path, help="whose data to show (config.yaml of the checkpoint's run)")
    return parser
