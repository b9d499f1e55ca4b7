"""The command line: it finds the command, and turns a user's mistake into one message."""

import argparse
import importlib
import io
import os
import pkgutil
import select
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from experiments.core.errors import DivergedError, ExperimentError, choices_message, mistake_in

OVERVIEW = """\
usage: python -m experiments COMMAND [options]

commands:
{commands}

ready configs, in experiments/configs:
{configs}

Any setting of a config can be given as an option, and a class by its name:
  --model.network.recurrent.cell.integrator=LowRank --model.network.recurrent.cell.integrator.rank=16
A module of your own must be named before a config may use its classes: --trust MODULE (repeatable).
COMMAND --help lists every option of a command, COMMAND --config CONFIG --print_config every setting.
"""


class Command(NamedTuple):
    """A command: the function of an invocation that runs it, what it does, and how it is called."""

    function: str  # MODULE:NAME
    what: str
    example: str
    packages: Sequence[str] = ()  # whose classes a config may name without their module


class OptionParser(argparse.ArgumentParser):
    """An argparse parser that raises ExperimentError for a mistake, instead of printing its usage and exiting."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ExperimentError(f"{message}. See {self.prog} --help")


class Invocation(NamedTuple):
    """What a command's function is called with."""

    argv: list[str]  # the command's name first
    trusted: list[str]  # the modules of --trust


def run(argv: Sequence[str], commands: Mapping[str, Command]) -> int:
    """Run one command and return the exit code.

    It is 0, 1 for a run that diverged, 2 after the user's mistake, and 128 + N where the signal N stopped it. A mistake
    is one message on the standard error stream, without a traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a symbol that its encoding lacks must not end a run
    try:
        trusted, rest = _split_trust(argv)
        if not rest or rest[0] in ("-h", "--help"):
            print(_overview(commands), end="")
        else:
            _dispatch(Invocation(rest, trusted), commands)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # where the rest goes, at Python's exit too
        return 128 + signal.SIGPIPE
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning turns the one into the other
            return 130
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except ModuleNotFoundError as error:
        if (error.name or "experiments").partition(".")[0] in ("experiments", "models", "multint"):
            raise
        print(
            f"error: the package '{error.name}' is not installed. The commands themselves need: "
            "pip install -e '.[experiments]'",
            file=sys.stderr,
        )
        return 2
    except Exception as error:
        message = mistake_message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 1 if isinstance(error, DivergedError) else 2
    return 0


def _reader_is_gone() -> bool:
    """Whether nobody reads the output any more, as after `| head`."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)  # errors are always told
    return bool(output.poll(0))


def _dispatch(invocation: Invocation, commands: Mapping[str, Command]) -> None:
    # Imported here because it needs a package, whose lack is told.
    from experiments.core.trust import trusting

    name = invocation.argv[0]
    if name not in commands:
        raise ExperimentError(f"there is no command '{name}'{choices_message(name, commands)}")
    for package in commands[name].packages:
        importlib.import_module(package)
    with trusting(invocation.trusted):
        for module in invocation.trusted:
            _import_trusted(module)
        pkgutil.resolve_name(commands[name].function)(invocation)


def _import_trusted(module: str) -> None:
    """Import it now, so that its classes need no module in a config, and a checkpoint of them can be loaded."""
    from experiments.core.trust import take_classes_for_factories  # it needs a package, whose lack is told

    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ExperimentError(f"--trust {module}: {error}") from error
    take_classes_for_factories(module)


def mistake_message(error: Exception) -> str | None:
    """The message for a user's mistake, wherever in the chain of causes it stands; None for anything else."""
    if own := mistake_in(error):
        return str(own)
    if not isinstance(error, argparse.ArgumentError):
        return None
    from experiments.core.trust import refusal

    # What the wall behind `refusal` did not let in, of a checkpoint: jsonargparse quotes it in its own words.
    link: BaseException | None = error
    while link is not None and not isinstance(link, ImportError):
        link = link.__cause__
    return next(filter(None, map(refusal, str(link).split("'"))), str(error.message))


def _split_trust(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The modules of the --trust options, and the other arguments."""
    parser = OptionParser(prog="python -m experiments", add_help=False)
    parser.add_argument("--trust", action="append", default=[], metavar="MODULE")
    known, rest = parser.parse_known_args(argv)
    return known.trust, rest


def _overview(commands: Mapping[str, Command]) -> str:
    # Imported here because it needs a package, whose lack is told.
    from experiments.core.configs import first_line, ready_configs

    shown = [f"  {name:<10} {command.what:<42} {name} {command.example}" for name, command in commands.items()]
    configs = []
    for task, paths in ready_configs().items():
        configs += [f"  {task}/", *(f"    {path.name:<20}  {first_line(path)}" for path in paths)]
    return OVERVIEW.format(commands="\n".join(shown), configs="\n".join(configs))
