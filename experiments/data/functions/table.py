"""A table of a user's own: every group of its rows is a function."""

import csv
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from experiments.core.errors import ExperimentError, choices_message
from experiments.data.functions.batches import Sizes
from experiments.data.functions.curves import Interval
from experiments.data.functions.function_data import FunctionData
from experiments.data.functions.function_sets import Functions, Groups, Predict
from experiments.data.functions.pictures import groups as draw_groups

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = dict[str, tuple[Tensor, Tensor]]  # by group: x (N, X) and y (N, Y), float64


class Table(FunctionData):
    """Tasks from a CSV file with a header: its rows with one value in the group's column are one function.

    Whole groups are held out, drawn by `eval_seed`. With `standardise` every column has the mean 0 and the variance 1
    over the training's groups, and log-likelihoods are of these values.

    Raises ExperimentError at construction for a setting out of range, and in `setup` for a file that is not there, a
    column that it has not or has twice, a row that is longer or shorter than the header, a cell that is no number, and
    a group without a name or with too few rows. Warns where `most` has no effect.

    Args:
        path: the file, in UTF-8.
        group: the column that tells the groups apart, of any content but for the spaces around it.
        x: the columns of the inputs.
        y: the columns of the values.
        standardise: see above.
        delimiter: what separates the cells.
        valid: the fraction of the groups held out for validation.
        test: the fraction held out for test.
        context: how many context points a task has, from the first to the second number; fewer in a small group.
        targets: the same of its target points; None: all other rows of the group.
        most: see `Curves`; it bounds nothing where `targets` is None.
        ragged, batch_size, epoch, seed, eval_seed: see `Curves`.
        eval_context: `context` in validation and test; None: the same. The targets are all others there.
        eval_batch_size: groups in a batch of these.
    """

    def __init__(
        self,
        path: str,
        group: str,
        x: list[str],
        y: list[str],
        standardise: bool = True,
        delimiter: str = ",",
        valid: float = 0.15,
        test: float = 0.15,
        context: Interval = (1, 10),
        targets: Interval | None = None,
        most: int | None = None,
        eval_context: Interval | None = None,
        ragged: bool = True,
        batch_size: int = 16,
        epoch: int = 100,
        eval_batch_size: int = 16,
        seed: int | None = None,
        eval_seed: int = 0,
    ) -> None:
        shared = (ragged, epoch, 2**31, 2**31, eval_batch_size, seed, eval_seed)
        super().__init__(batch_size, Sizes(context, targets, most), Sizes(eval_context or context, None), *shared)
        if not x or not y:
            raise ExperimentError(f"--data.{'y' if x else 'x'}: got no columns, expected at least one name.")
        for column, times in Counter([*x, *y]).items():
            if times > 1:
                raise ExperimentError(f"--data.x, --data.y: got the column '{column}' {times} times, expected it once.")
        if most is not None and targets is None:
            warnings.warn("--data.most: no effect without --data.targets.", stacklevel=2)
        if len(delimiter) != 1:
            raise ExperimentError(f"--data.delimiter: got {delimiter!r}, expected one character.")
        if not (valid > 0 and test > 0 and valid + test < 1):
            raise ExperimentError(
                f"--data.valid, --data.test: got {valid} and {test}, expected fractions above 0 whose sum is below 1."
            )
        self.path, self.group, self.x, self.y, self.delimiter = Path(path).expanduser(), group, x, y, delimiter
        self.standardise, self.held_out = standardise, {"valid": valid, "test": test}

    @property
    def features(self) -> tuple[int, int]:
        return len(self.x), len(self.y)

    def _functions(self) -> dict[str, Mapping[str, Functions]]:
        groups = read_table(self.path, self.group, self.x, self.y, self.delimiter)
        self._check(groups)
        counts = {split: max(1, round(fraction * len(groups))) for split, fraction in self.held_out.items()}
        if sum(counts.values()) >= len(groups):
            raise ExperimentError(
                f"{self.path}: got {len(groups)} groups by the column '{self.group}', expected at least "
                f"{sum(counts.values()) + 1}: --data.valid and --data.test hold {sum(counts.values())} out."
            )
        names, rows = list(groups), list(groups.values())
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.eval_seed)).tolist()
        valid, test = counts["valid"], counts["test"]
        splits = {"valid": order[:valid], "test": order[valid : valid + test], "train": order[valid + test :]}
        if self.standardise:
            rows = _standardised(rows, splits["train"])
        return {
            split: {self.path.stem: Groups([rows[i] for i in chosen], [names[i] for i in chosen])}
            for split, chosen in splits.items()
        }

    def pictures(self, predict: Predict) -> "dict[str, Figure]":
        [functions] = self._sets["test"].values()
        assert isinstance(functions, Groups)
        x_name, y_name = (f"{name}, standardised" if self.standardise else name for name in (self.x[0], self.y[0]))
        return {"predictions": draw_groups(functions, self.eval_sizes, predict, self.eval_seed, x_name, y_name)}

    def _check(self, groups: Rows) -> None:
        least = 1 if self.sizes.targets is None else self.sizes.targets[0]
        needed = max(self.sizes.context[0] + least, self.eval_sizes.context[0] + 1)
        for name, (x, _) in groups.items():
            if len(x) < needed:
                raise ExperimentError(
                    f"{self.path}: the group '{name}' has {len(x)} rows, expected at least {needed}: the smallest "
                    "context and the fewest targets. Lower --data.context, or leave such groups out of the file."
                )


def read_table(path: Path, group: str, x: list[str], y: list[str], delimiter: str = ",") -> Rows:
    """The rows of a CSV file with a header, by what stands in the group's column. Empty lines are left out.

    Raises ExperimentError for a file that is not there, empty or no text, a column that it has not or has twice, a row
    that is longer or shorter than the header, a row without a group, and a cell that is no finite number.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise ExperimentError(f"{path}: {what}, expected a CSV file. Give yours by --data.path.")
    numbers: dict[str, list[list[float]]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            header = next(filter(None, reader), None)
            if header is None:
                raise ExperimentError(f"{path}: the file is empty, expected a header and rows.")
            for setting, columns in (("group", [group]), ("x", x), ("y", y)):
                for column in columns:
                    _check_column(column, header, f"--data.{setting}: {path}")
            for cells in filter(None, reader):
                line = f"{path}, line {reader.line_num}"
                if len(cells) != len(header):
                    raise ExperimentError(f"{line}: got {len(cells)} cells, expected {len(header)}, as the header has.")
                row = dict(zip(header, cells, strict=True))
                if not (name := row[group].strip()):
                    raise ExperimentError(f"{line}, '{group}': got an empty cell, expected the group of the row.")
                values = [_number(row[column], f"{line}, '{column}'") for column in [*x, *y]]
                numbers.setdefault(name, []).append(values)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ExperimentError(f"{path}: no CSV file in UTF-8: {error}.") from error
    tables = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in numbers.items()}
    return {name: (table[:, : len(x)], table[:, len(x) :]) for name, table in tables.items()}


def _check_column(column: str, header: list[str], where: str) -> None:
    """Raise ExperimentError unless the header has the column once."""
    if column not in header:
        hint = " The header is one cell alone: see --data.delimiter." if len(header) == 1 else ""
        raise ExperimentError(f"{where} has no column '{column}'{choices_message(column, header)}{hint}")
    if header.count(column) > 1:
        raise ExperimentError(f"{where} has the column '{column}' {header.count(column)} times, expected it once.")


def _number(cell: str, where: str) -> float:
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        got = f"'{cell}'" if cell else "an empty cell"
        raise ExperimentError(f"{where}: got {got}, expected a number. Leave such rows out, or name other columns.")
    return number


def _standardised(rows: list[tuple[Tensor, Tensor]], train: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Every column less its mean, over its deviation, both of the training's groups."""
    scaled = []
    for i in range(2):
        whole = torch.cat([rows[j][i] for j in train])
        mean, std = whole.mean(0), whole.std(0, correction=0)
        scaled.append([(pair[i] - mean) / torch.where(std > 0, std, 1) for pair in rows])
    return list(zip(*scaled, strict=True))
