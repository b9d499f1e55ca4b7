"""`python -m experiments`: the core's command line, with this project's commands, tasks and data."""

import sys
from collections.abc import Sequence

from experiments.core.command_line import Command, run

# Whose classes a config may name without their module. What records a training is needed, and imported, by that alone.
_BUILDING = ("experiments.tasks", "experiments.data", "experiments.decoding")
_TRAINING = (*_BUILDING, "experiments.analyses")

_RUN, _STUDY = "experiments.core.training:main", "experiments.study.command:main"
_LOOK, _PLOT, _EXPORT = (f"experiments.core.{name}" for name in ("inspection", "curves:main", "export:main"))
COMMANDS = {
    "fit": Command(_RUN, "train, validate, test the best checkpoint", "--config CONFIG", _TRAINING),
    "validate": Command(_RUN, "the validation metrics of a checkpoint", "--config CONFIG --ckpt_path CKPT", _TRAINING),
    "test": Command(_RUN, "the test metrics of a checkpoint", "--config CONFIG --ckpt_path CKPT", _TRAINING),
    "summary": Command(f"{_LOOK}:summary", "layers, work and memory of a network", "--config CONFIG", _BUILDING),
    "plot": Command(_PLOT, "the learning curves of runs in one picture", "RUN RUN --output PNG"),
    "show": Command(f"{_LOOK}:show", "what a run's network does, in pictures", "RUN", _BUILDING),
    "sample": Command("experiments.sample:main", "text from a run's network", "RUN --prompt TEXT", _BUILDING),
    "transcribe": Command("experiments.transcribe:main", "what is said in audio files", "RUN FILE.wav", _BUILDING),
    "encode": Command("experiments.encode:encode", "vectors of sentences", "RUN FILE --output NPY", _BUILDING),
    "nearest": Command("experiments.encode:nearest", "sentences like one", "RUN FILE SENTENCE", _BUILDING),
    "transfer": Command(
        "experiments.transfer.command:main",
        "sentence vectors on other tasks",
        "RUN --tasks sick,mr --data.root FOLDER",
        _BUILDING,
    ),
    "export": Command(_EXPORT, "weights or a program from a run", "RUN --format onnx", _BUILDING),
    "study": Command(_STUDY, "arms × seeds of a config, compared", "STUDY --jobs 2", _TRAINING),
    "report": Command(_STUDY, "the report of a study, from its files", "STUDY", _TRAINING),
    "bench": Command("experiments.bench.command:main", "times of the scan engines, side by side", "lstm-512 --quick"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; see `experiments.core.command_line.run`."""
    return run(sys.argv[1:] if argv is None else argv, COMMANDS)


if __name__ == "__main__":
    sys.exit(main())
