"""The comparison of a study's arms as a table: in Markdown, in CSV, and what must be said with it."""

import csv
import io
from collections.abc import Sequence
from functools import partial

from experiments.core.intervals import Estimate
from experiments.study.arms import shown
from experiments.study.definition import PARAMETERS, Mode, Study
from experiments.study.outcomes import Outcome, Row, State
from experiments.study.search import Searched
from experiments.study.statistics import smallest_p

DASH = "–"
_COLUMNS = (
    "panel", "arm", "x", "n", "mean", "low", "high", "lowest", "highest", "pairs", "difference", "difference_low",
    "difference_high", "p", "parameters", "ms_per_step", "published", "source",
)  # fmt: skip
_RUN_COLUMNS = (
    "panel", "arm", "level", "seed", "state", "value", "parameters", "steps", "note", "key", "folder",
)  # fmt: skip


def headings(study: Study, rows: Sequence[Row], metric: str) -> list[str]:
    """The headings of the table."""
    shared = [
        metric, "95 % interval", "n", f"minus {rows[0].arm.name}", "95 % interval", "pairs", "p", "parameters",
        "ms per step", "published",
    ]  # fmt: skip
    return [*_place(study, study.panel or "panel", "arm", str(study.x)), *shared]


def body(study: Study, rows: Sequence[Row]) -> list[list[str]]:
    """The table's cells as text, a list for each row."""
    xs = [DASH if row.x is None else f"{row.x:g}" for row in rows]
    return [[*_place(study, row.arm.panel, row.arm.name, x), *_shown(row)] for row, x in zip(rows, xs, strict=True)]


def _place(study: Study, panel: str, arm: str, x: str) -> list[str]:
    """What is shown of these: an only panel has no column, and parameters have one of their own."""
    return [*([panel] if len(study.panels) > 1 else []), arm, *([x] if study.x not in (None, PARAMETERS) else [])]


def markdown(study: Study, rows: Sequence[Row], metric: str) -> str:
    """The table in Markdown."""
    head = headings(study, rows, metric)
    lines = [head, ["---", *["--:"] * (len(head) - 2), "---"], *body(study, rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def rows_csv(study: Study, rows: Sequence[Row]) -> str:
    """The numbers of the table, unrounded."""
    lines = []
    for row in rows:
        mean, published = row.mean, row.published
        line = {"panel": row.arm.panel, "arm": row.arm.name, "x": row.x, "n": mean.count if mean else 0}
        if mean is not None:
            line |= {"mean": mean.mean, "low": mean.low, "high": mean.high}
            line |= {"lowest": min(row.values), "highest": max(row.values)}
        if row.difference is not None:
            of_pairs = row.difference.estimate
            line |= {"pairs": of_pairs.count if of_pairs else 0, "p": row.difference.p}
            if of_pairs is not None:
                line |= {"difference": of_pairs.mean, "difference_low": of_pairs.low, "difference_high": of_pairs.high}
        line |= {"parameters": row.parameters, "ms_per_step": row.step_ms}
        if published is not None:
            line |= {"published": published.value, "source": published.source}
        lines.append(line)
    return csv_text(_used(study, _COLUMNS), lines)


def runs_csv(study: Study, outcomes: Sequence[Outcome]) -> str:
    """What came of each run."""
    lines = []
    for of in outcomes:
        arm, result, folder = of.run.arm, of.result or {}, of.run.folder.path
        line = {"panel": arm.panel, "arm": arm.name, "level": arm.level if of.at is None else of.at, "key": arm.key}
        line |= {"seed": of.run.seed, "state": of.state.value, "value": of.value, "note": of.note}
        line |= {name: result.get(name) for name in ("parameters", "steps")}
        lines.append(line | {"folder": str(folder) if folder.exists() else ""})
    return csv_text(_used(study, _RUN_COLUMNS), lines)


def _used(study: Study, columns: Sequence[str]) -> list[str]:
    """The columns without those that a study of one panel, or without x, has nothing for."""
    unused = {"panel": len(study.panels) == 1, "x": study.x is None, "level": study.x is None}
    return [column for column in columns if not unused.get(column)]


def search_table(result: Searched) -> tuple[list[str], list[list[str]]]:
    """The headings and the lines of the search's scores, an arm each."""
    head = ["arm", *map(_joined, result.search.candidates), " and ".join(result.search.settings)]
    lines = [[shown(of.of), *(f"{score:.4f}" for score in of.scores), _joined(of.best)] for of in result.found]
    return head, lines


def search_csv(result: Searched) -> str:
    """The scores of the search, unrounded."""
    search, lines = result.search, []
    for of in result.found:
        for candidate, score in zip(search.candidates, of.scores, strict=True):
            line = {"arm": shown(of.of), **dict(zip(search.settings, candidate, strict=True)), "metric": result.metric}
            lines.append(line | {"score": score, "chosen": int(candidate == of.best)})
    return csv_text(("arm", *search.settings, "metric", "score", "chosen"), lines)


def search_notes(result: Searched) -> list[str]:
    """What each arm has, and from what; and which arms have nothing."""
    search = result.search
    seeds = ("seed " if len(search.seeds) == 1 else "seeds ") + ", ".join(map(str, search.seeds))
    steps = "" if search.max_steps is None else f" in {search.max_steps} steps"
    ends = []  # of each setting
    for values in zip(*search.candidates, strict=True):
        edges = [of for of in (min, max) if all(not isinstance(value, str) for value in values)]
        ends.append({of(values): f" (the {of.__name__}imum tried)" for of in edges})
    given = "; ".join(
        f"{shown(of.of)} {', '.join(f'{v}{end.get(v, str())}' for v, end in zip(of.best, ends, strict=True))}"
        for of in result.found
    )
    are, between = ("is", ", ") if len(search.settings) == 1 else ("are", "; ")
    said = [
        f"{' and '.join(search.settings)} of each arm {are} the best of "
        f"{between.join(map(_joined, search.candidates))} by {result.metric} with {seeds}{steps}: {given}."
    ]
    said += [
        f"Left out of the study, for its search gave no value: {arm}: {why}." for arm, why in result.left_out.items()
    ]
    if result.first in result.left_out:
        first = shown(result.found[0].of)
        said.append(f"{result.first}, the study's first arm, is left out: {first} stands in its place.")
    return said


def _joined(candidate: Sequence[float | str]) -> str:
    return ", ".join(map(str, candidate))


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
    if any(row.difference is not None for row in rows):
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
    said, first = [], rows[0].arm.name
    counts = set()
    for row in rows:
        if row.difference is None:
            continue
        pairs = row.difference.estimate.count if row.difference.estimate else 0
        counts.add(pairs)
        ours = row.mean.count if row.mean else 0
        if pairs and not ours == row.seeds_of_first == pairs:
            said.append(
                f"{row.arm.label} has {ours} seeds and {first} {row.seeds_of_first}: the difference is over the "
                f"{pairs} that both have, and may not be that of the means."
            )
    for pairs in sorted(counts - {0, 1}):
        said.append(f"With {pairs} pairs p is at least {smallest_p(pairs):.2g}.")
    return said


def _left_out(outcomes: Sequence[Outcome]) -> list[str]:
    """A sentence for each state other than finished, with its runs."""
    said = []
    what = {
        State.DIVERGED: "Diverged, and in no number here",
        State.WITHOUT: "Finished without the metric, and in no number here",
        State.UNFINISHED: "Not finished, and in no number here",
        State.MISSING: "Not run",
    }
    for state, text in what.items():
        named = {
            f"{of.run.label} ({of.note})" if of.note and state is State.DIVERGED else of.run.label: None
            for of in outcomes
            if of.state is state
        }
        if named:
            said.append(f"{text}: {'; '.join(named)}.")
    return said


def _shown(row: Row) -> list[str]:
    mean, of_pairs = row.mean, row.difference.estimate if row.difference else None
    p = row.difference.p if row.difference else None
    return [
        _number(mean.mean) if mean else DASH,
        _interval(mean),
        str(mean.count if mean else 0),
        _number(of_pairs.mean, "+") if of_pairs else DASH,
        _interval(of_pairs, "+"),
        str(of_pairs.count if of_pairs else 0) if row.difference else DASH,
        DASH if p is None else f"{p:.2g}",
        DASH if row.parameters is None else f"{row.parameters:,}",
        DASH if row.step_ms is None else f"{row.step_ms:.3g}",
        f"{row.published.value:g} ({row.published.source})" if row.published else DASH,
    ]


def _interval(of: Estimate | None, sign: str = "") -> str:
    return (of and of.interval(partial(_number, sign=sign))) or DASH


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.4f}" if abs(value) >= 0.01 else f"{value:{sign}.2g}"


def csv_text(columns: Sequence[str], lines: Sequence[dict[str, object]]) -> str:
    """The lines, as far as they have these columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()
