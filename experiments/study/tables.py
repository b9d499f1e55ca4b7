"""The comparison of a study's arms as a table: in Markdown, in CSV, and what must be said with it."""

import csv
import io
from collections.abc import Sequence

from experiments.study.definition import Mode
from experiments.study.outcomes import Outcome, Row, State
from experiments.study.search import Searched
from experiments.study.statistics import Estimate, smallest_p

DASH = "–"
_COLUMNS = (
    "arm", "n", "mean", "low", "high", "pairs", "difference", "difference_low", "difference_high", "p", "parameters",
    "ms_per_step", "published", "source",
)  # fmt: skip
_SEARCH_COLUMNS = ("arm", "setting", "value", "metric", "score", "chosen")
_CELL_COLUMNS = ("arm", "seed", "state", "value", "steps", "note", "folder")


def headings(rows: Sequence[Row], metric: str) -> list[str]:
    """The headings of the table."""
    return [
        "arm", metric, "95 % interval", "n", f"minus {rows[0].arm.name}", "95 % interval", "pairs", "p", "parameters",
        "ms per step", "published",
    ]  # fmt: skip


def body(rows: Sequence[Row]) -> list[list[str]]:
    """The table's cells as text, a list for each arm."""
    return [_shown(row) for row in rows]


def markdown(rows: Sequence[Row], metric: str) -> str:
    """The table in Markdown."""
    head = headings(rows, metric)
    lines = [head, ["---", *["--:"] * (len(head) - 2), "---"], *body(rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def rows_csv(rows: Sequence[Row]) -> str:
    """The numbers of the table, unrounded."""
    lines = []
    for row in rows:
        mean, published = row.mean, row.published
        line = {"arm": row.arm.name, "n": mean.count if mean else 0}
        if mean is not None:
            line |= {"mean": mean.mean, "low": mean.low, "high": mean.high}
        if row.difference is not None:
            of_pairs = row.difference.estimate
            line |= {"pairs": of_pairs.count if of_pairs else 0, "p": row.difference.p}
            if of_pairs is not None:
                line |= {"difference": of_pairs.mean, "difference_low": of_pairs.low, "difference_high": of_pairs.high}
        line |= {"parameters": row.parameters, "ms_per_step": row.step_ms}
        if published is not None:
            line |= {"published": published.value, "source": published.source}
        lines.append(line)
    return _csv(_COLUMNS, lines)


def cells_csv(outcomes: Sequence[Outcome]) -> str:
    """What came of each cell."""
    lines = []
    for outcome in outcomes:
        cell, result = outcome.cell, outcome.result or {}
        line = {"arm": cell.arm.name, "seed": cell.seed, "state": outcome.state.value, "value": outcome.value}
        lines.append(line | {"steps": result.get("steps"), "note": outcome.note, "folder": str(cell.run.path)})
    return _csv(_CELL_COLUMNS, lines)


def search_table(result: Searched) -> tuple[list[str], list[list[str]]]:
    """The headings and the lines of the search's scores, an arm each."""
    head = ["arm", *map(str, result.search.values), result.search.setting]
    return head, [[of.arm, *(f"{score:.4f}" for score in of.scores), str(of.value)] for of in result.found]


def search_csv(result: Searched) -> str:
    """The scores of the search, unrounded."""
    lines = []
    for of in result.found:
        for value, score in zip(result.search.values, of.scores, strict=True):
            line = {"arm": of.arm, "setting": result.search.setting, "value": value, "metric": result.metric}
            lines.append(line | {"score": score, "chosen": int(value == of.value)})
    return _csv(_SEARCH_COLUMNS, lines)


def search_notes(result: Searched) -> list[str]:
    """Which value each arm has, and from what; and which arms have none."""
    search = result.search
    seeds = ("seed " if len(search.seeds) == 1 else "seeds ") + ", ".join(map(str, search.seeds))
    steps = "" if search.max_steps is None else f" in {search.max_steps} steps"
    edges = [v for v in (min, max) if all(not isinstance(value, str) for value in search.values)]
    ends = {of(search.values): f" (the {of.__name__}imum tried)" for of in edges}
    given = ", ".join(f"{of.arm} {of.value}{ends.get(of.value, '')}" for of in result.found)
    tried = ", ".join(map(str, search.values))
    said = [f"{search.setting} of each arm is the best of {tried} by {result.metric} with {seeds}{steps}: {given}."]
    said += [
        f"Left out of the study, for its search gave no value: {arm}: {why}." for arm, why in result.left_out.items()
    ]
    if result.first in result.left_out:
        said.append(f"{result.first}, the study's first arm, is left out: {result.found[0].arm} stands in its place.")
    return said


def notes(
    rows: Sequence[Row],
    outcomes: Sequence[Outcome],
    metric: str,
    mode: Mode,
) -> list[str]:
    """What a reader of the table must know, a sentence or two each."""
    first = rows[0].arm.name
    better = "lower" if mode == "min" else "higher"
    said = [f"{metric} of each run's best checkpoint; {better} is better. Intervals are t-intervals over the seeds."]
    if any(row.mean is not None and row.mean.count == 1 for row in rows):
        said.append(f"One seed has no interval: {DASH}.")
    if len(rows) > 1:
        said.append(
            f"Differences are to {first} at the same seed; p is of the two-sided permutation test on them, without "
            "a correction for the number of arms."
        )
        said += _of_pairs(rows)
    said += _left_out(outcomes)
    if any(row.step_ms is not None for row in rows):
        said.append("Times are of training steps alone, the median over the runs, beside whatever else was running.")
    versions = {str(outcome.result.get("versions")) for outcome in outcomes if outcome.result}
    if len(versions) > 1:
        said.append(f"The runs were made with different versions: {'; '.join(sorted(versions))}.")
    return said


def _of_pairs(rows: Sequence[Row]) -> list[str]:
    said, first = [], rows[0]
    counts = set()
    for row in rows[1:]:
        assert row.difference is not None
        pairs = row.difference.estimate.count if row.difference.estimate else 0
        counts.add(pairs)
        ours, firsts = (of.mean.count if of.mean else 0 for of in (row, first))
        if pairs and not ours == firsts == pairs:
            said.append(
                f"{row.arm.name} has {ours} seeds and {first.arm.name} {firsts}: the difference is over the {pairs} "
                "that both have, and may not be that of the means."
            )
    for pairs in sorted(counts - {0, 1}):
        said.append(f"With {pairs} pairs p is at least {smallest_p(pairs):.2g}.")
    return said


def _left_out(outcomes: Sequence[Outcome]) -> list[str]:
    """A sentence for each state other than finished, with its cells."""
    said = []
    what = {
        State.DIVERGED: "Diverged, and in no number here",
        State.WITHOUT: "Finished without the metric, and in no number here",
        State.UNFINISHED: "Not finished, and in no number here",
        State.MISSING: "Not run",
    }
    for state, text in what.items():
        cells = [outcome for outcome in outcomes if outcome.state is state]
        if cells:
            named = (
                f"{c.cell.label} ({c.note})" if c.note and state is State.DIVERGED else c.cell.label for c in cells
            )
            said.append(f"{text}: {'; '.join(named)}.")
    return said


def _shown(row: Row) -> list[str]:
    mean, of_pairs = row.mean, row.difference.estimate if row.difference else None
    p = row.difference.p if row.difference else None
    return [
        row.arm.name,
        f"{mean.mean:.4f}" if mean else DASH,
        _interval(mean),
        str(mean.count if mean else 0),
        f"{of_pairs.mean:+.4f}" if of_pairs else DASH,
        _interval(of_pairs, "+"),
        str(of_pairs.count if of_pairs else 0) if row.difference else DASH,
        DASH if p is None else f"{p:.2g}",
        DASH if row.parameters is None else f"{row.parameters:,}",
        DASH if row.step_ms is None else f"{row.step_ms:.3g}",
        f"{row.published.value:g} ({row.published.source})" if row.published else DASH,
    ]


def _interval(of: Estimate | None, sign: str = "") -> str:
    return DASH if of is None or of.low is None else f"{of.low:{sign}.4f} to {of.high:{sign}.4f}"


def _csv(columns: Sequence[str], lines: Sequence[dict[str, object]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
