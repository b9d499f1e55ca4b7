"""The command line: `python -m experiments fit|validate|test|sample|bench`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.errors import ExperimentError
from experiments.parsing import OptionParser

COMMANDS = ("fit", "validate", "test", "sample", "bench")
CONFIGS = Path(__file__).parent / "configs"

OVERVIEW = """\
usage: python -m experiments COMMAND [options]

commands:
  fit       train, validate, test the best checkpoint   fit --config CONFIG
  validate  the validation metrics of a checkpoint      validate --config CONFIG --ckpt_path CKPT
  test      the test metrics of a checkpoint            test --config CONFIG --ckpt_path CKPT
  sample    text from a checkpoint                      sample CKPT --prompt TEXT
  bench     times of the scan engines, side by side     bench lstm-512 --quick

ready configs:
{configs}

Any setting of a config can be given as an option, and a class by its name:
  --model.network.recurrent.cell.integrator=LowRank --model.network.recurrent.cell.integrator.rank=16
A module of your own must be named before a config may use its classes: --trust MODULE (repeatable).
COMMAND --help lists every option of a command, COMMAND --config CONFIG --print_config every setting.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 after the user's mistake, 130 after Ctrl-C.

    A mistake is one message on the standard error stream, without a traceback.
    """
    try:
        trusted, rest = _split_trust(sys.argv[1:] if argv is None else argv)
        if not rest or rest[0] in ("-h", "--help"):
            print(_overview(), end="")
        else:
            _run(rest, trusted)
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning turns the one into the other
            return 130
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        message = _mistake(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    return 0


def _run(argv: list[str], trusted: list[str]) -> None:
    # Imported here because Lightning takes seconds, which --help must not.
    from experiments.config_errors import choices_message
    from experiments.trust import trusting

    command = argv[0]
    if command not in COMMANDS:
        raise ExperimentError(f"there is no command '{command}'{choices_message(command, COMMANDS)}")
    with trusting(trusted):
        if command == "sample":
            from experiments.sample import write_sample

            write_sample(argv[1:])
        elif command == "bench":
            from experiments.bench.command import bench

            bench(argv[1:])
        else:
            from experiments.training import TrainingCommands

            TrainingCommands(argv, trusted)


def _mistake(error: BaseException) -> str | None:
    """The message for a user's mistake, wherever in the chain of causes it stands; None for anything else."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from experiments.config_errors import explain
    from multint import MultintError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ExperimentError | MultintError | MisconfigurationException):
            return str(cause)
        cause = cause.__cause__
    return explain(error) if isinstance(error, argparse.ArgumentError) else None


def _split_trust(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The modules of the --trust options, and the other arguments."""
    parser = OptionParser(prog="python -m experiments", add_help=False, allow_abbrev=False)
    parser.add_argument("--trust", action="append", default=[], metavar="MODULE")
    known, rest = parser.parse_known_args(argv)
    return known.trust, rest


def _overview() -> str:
    lines = []
    for path in sorted(CONFIGS.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        lines.append(f"  {path.name:<20}  {first.removeprefix('# ')}")
    return OVERVIEW.format(configs="\n".join(lines))
