"""The report of a study, made from the files of its runs alone."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from experiments.core.errors import ExperimentError, write_text, writing
from experiments.study.cells import Arm, Cell
from experiments.study.definition import Mode, Study
from experiments.study.outcomes import State, compared, last_words, outcomes
from experiments.study.page import Page
from experiments.study.plots import draw_curves, draw_dots
from experiments.study.recorded import draw_recorded
from experiments.study.search import Searched
from experiments.study.tables import (
    body,
    cells_csv,
    headings,
    markdown,
    notes,
    rows_csv,
    search_csv,
    search_notes,
    search_table,
)

_CURVES = "Mean over the seeds, and the range of them as a band; in brackets how many. Dotted: a run that diverged."
_DOTS = (
    "Each seed, joined by thin lines; beside them the mean with its 95 % t-interval. Diamond: published. "
    "Cross: diverged."
)
_RECORDED = (
    "Mean over the seeds, and the range of them as a band; in brackets how many. Histograms: the same of each bin's "
    "share, at each run's last validation."
)


def write_report(
    study: Study,
    arms: Sequence[Arm],
    cells: Sequence[Cell],
    chosen: tuple[str, Mode],  # see `chosen_metric`
    folder: Path,
    command: Sequence[str],  # that made the study
    search: Searched | None = None,
    trust: Sequence[str] = (),  # the options of every command
) -> str:
    """Write `table.md`, `table.csv`, `cells.csv`, `curves` and `seeds` as PNG and SVG, and `report.html`.

    Where there is something of them, `recorded` as PNG and SVG and `search.csv` too.

    Returns the table with its notes. Raises: ExperimentError where no cell is finished, for a metric that no run has
    logged, and where the files cannot be written.
    """
    metric, mode = chosen
    of_cells = outcomes(cells, metric)
    if not any(outcome.state in (State.FINISHED, State.DIVERGED) for outcome in of_cells):
        raise ExperimentError(
            f"study: no cell is finished in {folder}. Run the study first, and give its --set to the report too."
        )
    rows = list(compared(arms, of_cells, study))
    said = notes(rows, of_cells, metric, mode)
    if search is not None:
        said += search_notes(search)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    said += draw_recorded(study.draw, rows, of_cells, folder / "recorded")
    table = markdown(rows, metric)
    write_text(folder / "table.md", table + "\n" + "".join(f"- {note}\n" for note in said))
    write_text(folder / "table.csv", rows_csv(rows))
    write_text(folder / "cells.csv", cells_csv(of_cells))
    if search is not None:
        write_text(folder / "search.csv", search_csv(search))
    draw_curves(rows, of_cells, metric, folder / "curves")
    draw_dots(rows, of_cells, metric, folder / "seeds")
    page = Page(f"Study {study.path.stem}")
    page.table(headings(rows, metric), body(rows))
    page.items(said)
    page.heading("Seeds")
    page.image(folder / "seeds.svg", _DOTS)
    page.heading("Learning curves")
    page.image(folder / "curves.svg", _CURVES)
    if (folder / "recorded.svg").exists():
        page.heading("Recorded")
        page.image(folder / "recorded.svg", _RECORDED)
    if search is not None:
        page.heading(f"Search: {search.metric}")
        page.table(*search_table(search))
    page.heading("Commands")
    page.code(_shell([*command, *trust]))
    every = [*(search.cells if search else ()), *cells]
    page.code("\n".join(f"# {cell.label}\n{_shell([*cell.command, *_threads(cell), *trust])}" for cell in every))
    page.heading("The study")
    page.code(study.path.read_text(encoding="utf-8"))
    failed = [cell for cell in (search.cells if search else ()) if cell.result is None and cell.log.exists()]
    failed += [outcome.cell for outcome in of_cells if outcome.state is State.UNFINISHED]
    for cell in failed:
        page.heading(f"Not finished: {cell.label}")
        page.code(last_words(cell, lines=10))
    write_text(folder / "report.html", page.html())
    return table + "\n" + "\n".join(said)


def _threads(cell: Cell) -> list[str]:
    """The threads that the run had, where its config does not say."""
    threads = (cell.result or {}).get("threads")
    return [f"--threads={threads}"] if threads and not cell.arm.settings.get("threads") else []


def _shell(arguments: Sequence[str]) -> str:
    return f"python -m experiments {shlex.join(arguments)}"
