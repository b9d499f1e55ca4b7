"""`python -m experiments`: the core's command line, with this project's commands, tasks and data."""

import sys
from collections.abc import Sequence

from experiments.core.command_line import Command, run

# Whose classes a config may name without their module.
PACKAGES = ("experiments.tasks", "experiments.data", "experiments.analyses")

_TRAINING = "experiments.core.training"
COMMANDS = {
    "fit": Command(_TRAINING, "train, validate, test the best checkpoint", "--config CONFIG"),
    "validate": Command(_TRAINING, "the validation metrics of a checkpoint", "--config CONFIG --ckpt_path CKPT"),
    "test": Command(_TRAINING, "the test metrics of a checkpoint", "--config CONFIG --ckpt_path CKPT"),
    "summary": Command("experiments.core.summary", "parameters, work and memory of a network", "--config CONFIG"),
    "plot": Command("experiments.core.curves", "the learning curves of runs in one picture", "RUN RUN --output PNG"),
    "show": Command("experiments.core.show", "what a checkpoint does, in pictures", "CKPT"),
    "sample": Command("experiments.sample", "text from a checkpoint", "CKPT --prompt TEXT"),
    "export": Command("experiments.core.export", "weights or a program from a checkpoint", "CKPT --format onnx"),
    "study": Command("experiments.study.command", "arms × seeds of a config, compared", "STUDY --jobs 2"),
    "report": Command("experiments.study.command", "the report of a study, from its files", "STUDY"),
    "bench": Command("experiments.bench.command", "times of the scan engines, side by side", "lstm-512 --quick"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code; see `experiments.core.command_line.run`."""
    return run(sys.argv[1:] if argv is None else argv, COMMANDS, PACKAGES)


if __name__ == "__main__":
    sys.exit(main())
