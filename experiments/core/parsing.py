"""The parser of the project's own options."""

import argparse
from typing import NoReturn

from experiments.core.errors import ExperimentError


class OptionParser(argparse.ArgumentParser):
    """An argparse parser that raises ExperimentError for a mistake, instead of printing its usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise ExperimentError(f"{message}. See {self.prog} --help")
