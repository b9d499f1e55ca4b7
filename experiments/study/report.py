"""The report of a study, made from the files of its runs alone."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from experiments.core.errors import ExperimentError, write_text, writing
from experiments.study.arms import Arm
from experiments.study.definition import Mode, Study
from experiments.study.outcomes import State, compared, last_words, outcomes
from experiments.study.over_x import draw_over_x, goal_csv
from experiments.study.page import Page
from experiments.study.plots import draw_curves, draw_dots
from experiments.study.recorded import draw_recorded
from experiments.study.runs import Run
from experiments.study.search import Searched
from experiments.study.tables import (
    body,
    headings,
    markdown,
    notes,
    rows_csv,
    runs_csv,
    search_csv,
    search_notes,
    search_table,
)

_CURVES = "Mean over the seeds, and the range of them as a band; in brackets how many. Dotted: a run that diverged."
_DOTS = (
    "Each seed, joined by thin lines; beside them the mean with its 95 % t-interval. Diamond: published. "
    "Cross: diverged."
)
_OVER_X = "Mean over the seeds with its 95 % t-interval as a band, and each seed as a dot."
_RECORDED = (
    "Mean over the seeds, and the range of them as a band; in brackets how many. Histograms: the same of each bin's "
    "share, at each run's last validation."
)


def write_report(
    study: Study,
    arms: Sequence[Arm],
    runs: Sequence[Run],
    chosen: tuple[str, Mode],  # see `chosen_metric`
    folder: Path,
    command: Sequence[str],  # that made the study
    search: Searched | None = None,
    trust: Sequence[str] = (),  # the options of every command
) -> str:
    """Write `table.md`, `table.csv`, `runs.csv`, pictures as PNG and SVG, and `report.html`.

    The pictures are `seeds` and, where folders were kept, the learning `curves`; of a study with x, its `curves` over
    x. Where there is something of them, `recorded` as PNG and SVG, `search.csv` and `goal.csv` too.

    Returns the table with its notes. Raises: ExperimentError where no run is finished, for a metric that no run has
    logged, and where the files cannot be written.
    """
    metric, mode = chosen
    of_runs = outcomes(runs, metric)
    if not any(outcome.state in (State.FINISHED, State.DIVERGED) for outcome in of_runs):
        raise ExperimentError(
            f"study: no run is finished in {folder}. Run the study first, and give its --set to the report too."
        )
    rows = compared(study, arms, of_runs)
    said = notes(rows, of_runs, metric, mode)
    if search is not None:
        said += search_notes(search)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    said += draw_recorded(study.draw, rows, of_runs, folder / "recorded")
    table = markdown(study, rows, metric)
    write_text(folder / "table.md", table + "\n" + "".join(f"- {note}\n" for note in said))
    write_text(folder / "table.csv", rows_csv(study, rows))
    write_text(folder / "runs.csv", runs_csv(study, of_runs))
    if search is not None:
        write_text(folder / "search.csv", search_csv(search))
    if study.goal is not None:
        write_text(folder / "goal.csv", goal_csv(study, rows, mode))
    page = Page(f"Study {study.path.stem}")
    page.table(headings(study, rows, metric), body(study, rows))
    page.items(said)
    if study.x is not None:
        draw_over_x(study, rows, metric, mode, folder / "curves")
        page.heading(f"Over {study.x}")
        page.image(folder / "curves.svg", _OVER_X)
    else:
        draw_dots(rows, of_runs, metric, folder / "seeds")
        page.heading("Seeds")
        page.image(folder / "seeds.svg", _DOTS)
    if study.x is None and study.keep:
        draw_curves(rows, of_runs, metric, folder / "curves")
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
    every = [*(search.runs if search else ()), *runs]
    page.code("\n".join(f"# {run.label}\n{_shell([*run.command, *_threads(run), *trust])}" for run in every))
    page.heading("The study")
    page.code(study.path.read_text(encoding="utf-8"))
    failed = [run for run in (search.runs if search else ()) if run.result is None and run.log.exists()]
    failed += [outcome.run for outcome in of_runs if outcome.state is State.UNFINISHED]
    for run in {run.id: run for run in failed}.values():
        page.heading(f"Not finished: {run.label}")
        page.code(last_words(run, lines=10))
    write_text(folder / "report.html", page.html())
    return table + "\n" + "\n".join(said)


def _threads(run: Run) -> list[str]:
    """The threads that the run had, where its config does not say."""
    threads = (run.result or {}).get("threads")
    return [f"--threads={threads}"] if threads and not run.arm.settings.get("threads") else []


def _shell(arguments: Sequence[str]) -> str:
    return f"python -m experiments {shlex.join(arguments)}"
