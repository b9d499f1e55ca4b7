"""The parser of the project's own options."""

import argparse
from typing import Any, NoReturn

from experiments.core.errors import ExperimentError


class OptionParser(argparse.ArgumentParser):
    """An argparse parser that raises ExperimentError for a mistake, instead of printing its usage and exiting."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ExperimentError(f"{message}. See {self.prog} --help")
