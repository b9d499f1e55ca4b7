"""The command `bench`: measure, print a table, write a CSV and a plot."""

from __future__ import annotations

import csv
import io
import os
import platform
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch

from experiments.bench import by_jax
from experiments.bench.case import Case
from experiments.bench.cases import cases
from experiments.bench.measure import alone, check, first_calls, side_by_side, vendor_fault
from experiments.core.command_line import Invocation, OptionParser
from experiments.core.errors import ExperimentError, write_figure, write_text, writing
from experiments.core.run_folder import new_folder

COLUMNS = (
    "case", "T", "B", "X", "H", "dtype", "passes", "rival", "rival_ms", "ours_ms", "ratio", "ratio_min", "ratio_max",
    "at_least", "first_call_s", "second_process_s", "rival_MiB", "ours_MiB",
    "ours_above_MiB", "threads", "instructions",
)  # fmt: skip
Row = dict[str, Any]


def main(invocation: Invocation) -> None:
    """Run the cases and write `cpu.csv` after each, and `cpu.png` at the end, to the output folder.

    Raises ExperimentError for an unknown case, for a folder that has the results of an earlier bench or cannot be
    written, and for gradients that are not right.
    """
    options = _parser().parse_args(invocation.argv[1:])
    chosen = _chosen(options.cases)
    if options.rounds < 1 or options.threads < 1:
        raise ExperimentError(
            f"bench: {options.rounds} rounds on {options.threads} threads, expected at least 1 of each"
        )
    torch.set_num_threads(options.threads)
    out = _folder(options.out)
    print("\n".join(_conditions()))
    print("ratio: t(rival) / t(ours), the median over rounds and its range; higher is better")
    print(f"\n{'case':<22} {'rival':<15} {'rival ms':>9} {'ours ms':>9} {'ratio':>6} {'range':>13} {'at least':>9}")
    sys.stdout.flush()
    rows: list[Row] = []
    try:
        for number, case in enumerate(chosen, start=1):
            print(f"case {number} of {len(chosen)}: {case.name}", file=sys.stderr, flush=True)
            rows += _measure(case, options.rounds, options.quick)
            _write(rows, out / "cpu.csv")
    finally:
        if (out / "cpu.csv").exists():
            print(f"\nwritten: {out / 'cpu.csv'}")
            _plot(rows, out / "cpu.png")
        elif options.out is None:
            out.rmdir()


def _parser() -> OptionParser:
    parser = OptionParser(prog="python -m experiments bench", description="Times of the scan engines, side by side.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names of cases (all)")
    parser.add_argument("--rounds", type=int, default=15, help="measurements of each pair, in turns (15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (torch's default)")
    parser.add_argument("--quick", action="store_true", help="leave out first calls, memory and the compiled step")
    parser.add_argument("--out", type=Path, help="folder for the results (runs/bench/version_N)")
    return parser


def _folder(given: Path | None) -> Path:
    """The folder for the results, made where it is not there; a new one where none is given."""
    if given is None:
        return new_folder(Path("runs/bench"))
    with writing(given):
        given.mkdir(parents=True, exist_ok=True)
    for name in ("cpu.csv", "cpu.png"):
        if (given / name).exists():
            raise ExperimentError(f"{given / name}: this is of an earlier bench. Move it, or give another --out.")
    return given


def _chosen(names: list[str]) -> list[Case]:
    known = {case.name: case for case in cases()}
    for name in names:
        if name not in known:
            raise ExperimentError(f"bench: there is no case '{name}'; there are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)] or list(known.values())


def _conditions() -> list[str]:
    """What times depend on."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    fault = by_jax.why_not()
    return [
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {_processor()}",
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}, oneDNN {torch.backends.mkldnn.is_available()}"
        + (f", held to {limit} by ONEDNN_MAX_CPU_ISA" if limit else ""),
        *([f"JAX's scans are left out: {fault}"] if fault else []),
    ]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _measure(case: Case, rounds: int, quick: bool) -> list[Row]:
    # The vendor's failure alone is forgiven: there is nothing to compare with, and it says nothing of our layer.
    fault = vendor_fault(case)
    if fault is not None:
        print(f"{case.name:<22} left out, as the vendor's layer cannot run here: {fault}", flush=True)
        return []
    check(case)
    steps, batch_size, inputs, hidden = case.size
    shared: Row = {"case": case.name, "T": steps, "B": batch_size, "X": inputs, "H": hidden}
    shared |= {"dtype": str(case.dtype).removeprefix("torch."), "passes": "both" if case.backward else "forward"}
    shared |= {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}
    rows = [
        shared | _compared(case, rival, rounds) for rival in case.rivals if not (quick and rival == "compiled step")
    ]
    if not rows:
        rows = [shared | {"ours_ms": _milliseconds(alone(case, rounds))}]
        print(f"{case.name:<22} {'none':<15} {'':>9} {rows[0]['ours_ms']:>9.3g}", flush=True)
    if not quick:
        _tell(case, rows)
    return rows


def _compared(case: Case, rival: str, rounds: int) -> Row:
    taken = side_by_side(case, rival, rounds)
    aim = case.aim(rival)
    row = {
        "rival": rival,
        "rival_ms": _milliseconds(taken.rival),
        "ours_ms": _milliseconds(taken.ours),
        "ratio": round(median(taken.ratios), 2),
        "ratio_min": round(min(taken.ratios), 2),
        "ratio_max": round(max(taken.ratios), 2),
        "at_least": aim,
    }
    print(
        f"{case.name:<22} {rival:<15} {row['rival_ms']:>9.3g} {row['ours_ms']:>9.3g} {row['ratio']:>6.2f} "
        f"{row['ratio_min']:>6.2f}-{row['ratio_max']:<6.2f} {aim or '':>9}",
        flush=True,
    )
    return row


def _milliseconds(seconds: list[float]) -> float:
    """Their median, to four digits."""
    return float(f"{median(seconds) * 1e3:.4g}")


def _tell(case: Case, rows: list[Row]) -> None:
    """Print and note the first calls and the memory, measured in processes of their own."""
    rivals, cold, warm = first_calls(case)
    rows[0] |= {"first_call_s": round(cold.first_call, 1), "second_process_s": round(warm.first_call, 1)}
    line = f"{'':<22} first call {cold.first_call:.1f} s, in a second process {warm.first_call:.1f} s"
    if warm.peak is not None:
        above = max(0, warm.peak - warm.results)
        for row in rows:
            row |= {"ours_MiB": warm.peak // 2**20, "ours_above_MiB": above // 2**20}
            if (rival := rivals.get(row.get("rival", ""))) is not None and rival.peak is not None:
                row["rival_MiB"] = rival.peak // 2**20
        line += f"; memory of a run {warm.peak / 2**20:.0f} MiB ({above / 2**20:.0f} above outputs and gradients)"
        line += "".join(f", {who} {fresh.peak / 2**20:.0f} MiB" for who, fresh in rivals.items() if fresh.peak)
    print(line, flush=True)


def _write(rows: list[Row], path: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _plot(rows: list[Row], path: Path) -> None:
    """The ratios with their ranges, one line for each case and rival, where there is one."""
    from matplotlib.figure import Figure  # takes a second, which the first case need not wait for

    rows = [row for row in rows if "ratio" in row]
    if not rows:
        return
    colours = {rival: f"C{i}" for i, rival in enumerate(dict.fromkeys(row["rival"] for row in rows))}
    figure = Figure(figsize=(8, 1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    for rival, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=rival)
    axes.legend()
    for i, row in enumerate(rows):
        spread = [[row["ratio"] - row["ratio_min"]], [row["ratio_max"] - row["ratio"]]]
        axes.errorbar(row["ratio"], -i, xerr=spread, fmt="o", capsize=3, color=colours[row["rival"]])
        if row["at_least"]:
            axes.plot(row["at_least"], -i, "k|", markersize=12)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_yticks([-i for i in range(len(rows))], [f"{row['case']}: {row['rival']}" for row in rows])
    axes.set_xlabel("t(rival) / t(ours): median and range over rounds; | the ratio aimed at")
    write_figure(path, figure, dpi=150)
    print(f"written: {path}")
