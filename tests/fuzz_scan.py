"""The compiled scan against the loop on random cells: `python -m tests.fuzz_scan --cells 200 --seed 7`.

Each cell is run several times, and something changes before each run: its weights, their ties, its attributes, dtypes,
sizes, training or evaluation. Outputs, the final state, every gradient, and what a step leaves behind in the cell must
be the loop's, or `engine="fused"` raises an EngineError. `auto` always runs, as the loop does, and without a warning.

Every engine has a twin of the cell to itself, and what `fused` refuses is looped there, so that a step that changes its
cell leaves the same in each.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from multint import explain, scan
from multint.engines.kernel import eager_pieces
from multint.errors import EngineError
from tests.random_cells import NAMES, Program, random_program

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-4}


@dataclass(frozen=True)
class Call:
    """What a cell is run on, and in which mode."""

    seed: int
    steps: int
    rows: int
    dtype: torch.dtype
    layout: str  # of the streams in memory
    loud: bool  # one value of each float stream is 60
    gradients: bool  # else under no_grad
    second: bool  # the gradients' gradients too
    streams_require_grad: bool
    state_requires_grad: bool
    state_dtype: torch.dtype

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in vars(self).items())

    @classmethod
    def draw(cls, chance: random.Random, dtype: torch.dtype) -> Call:
        def seldom(share: float) -> bool:
            return chance.random() < share

        return cls(
            seed=chance.randrange(2**31),
            steps=chance.choice((1, 2, 3, 3, 5)),
            rows=chance.choice((1, 2, 3, 4, 5, 7)),
            dtype=dtype,
            layout=chance.choice(("plain", "plain", "batch first", "strided", "expanded")),
            loud=seldom(0.25),
            gradients=not seldom(0.1),
            second=seldom(0.15),
            streams_require_grad=not seldom(0.15),
            state_requires_grad=not seldom(0.15),
            state_dtype=torch.float32 if seldom(0.03) else dtype,
        )

    def inputs(self, program: Program, moved: float = 0.0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The streams and the fields of the state, as leaves; `moved` a little, to see whether results hold still."""
        torch.manual_seed(self.seed)
        streams, fields = {}, {}
        for kind in program.streams:
            value = kind.draw(self.rows, self.steps, dtype=self.dtype).transpose(0, 1)
            if self.layout == "plain":
                value = value.contiguous()
            elif self.layout == "strided":
                value = value.repeat_interleave(2, -1)[..., ::2]
            elif self.layout == "expanded":
                value = value[:1].expand_as(value)
            if kind.dtype is None and self.loud:
                value = value.clone()
                value[-1, 0] = 60.0
            streams[kind.name] = value
        for kind in program.fields:
            fields[kind.name] = kind.draw(self.rows, dtype=self.state_dtype)
        for values, requires in ((streams, self.streams_require_grad), (fields, self.state_requires_grad)):
            for name, value in values.items():
                if value.is_floating_point():
                    noise = 1 + moved * torch.randn(value.shape, dtype=value.dtype) if moved else 1
                    values[name] = (value * noise if moved else value.detach()).requires_grad_(requires)
        return streams, fields


@dataclass
class Outcome:
    """What a run gave, by name; `error` where it raised, `stage` where: "forward", "backward" or ""."""

    values: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None
    stage: str = ""
    engine: str = ""  # that ran, as `explain` tells
    recorded: bool = True  # else under no_grad, where the loop hands a field on with its graph that a step hands on
    warned: list[str] = field(default_factory=list)

    @property
    def refused(self) -> bool:
        return self.stage == "forward" and isinstance(self.error, EngineError)


def run(program: Program, state_type: Any, cell: nn.Module, call: Call, engine: str, moved: float = 0.0) -> Outcome:
    """The outputs, final state and gradients of a scan, and what it left in its inputs and in the cell."""
    outcome = Outcome(stage="forward", recorded=call.gradients)
    streams, fields = call.inputs(program, moved)
    # Copies, since a leaf cannot be written to, as odd steps do.
    xs = {name: value.clone() if call.layout == "plain" else value.view_as(value) for name, value in streams.items()}
    state = state_type(*(value.clone() for value in fields.values()))
    torch.manual_seed(call.seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with torch.set_grad_enabled(call.gradients):
                output, final = scan(cell, xs.get("", xs), state, engine=engine)
            if engine != "loop":
                outcome.engine = re.match("engine: (.*)", str(explain(cell)))[1]
            outcome.values |= {"output": output, "type of the state": type(final).__name__}
            outcome.values |= {f"final {name}": value for name, value in final._asdict().items()}
            outcome.values |= _left(cell, xs, state)
            outcome.stage = "backward"
            leaves = {f"x {name}": value for name, value in streams.items()}
            leaves |= {f"state {name}": value for name, value in fields.items()}
            leaves |= dict(cell.named_parameters())
            _differentiate(outcome, output, final, {k: v for k, v in leaves.items() if v.requires_grad}, call.second)
            outcome.stage = ""
        except Exception as error:
            outcome.error = error
    outcome.warned = [str(one.message) for one in caught if str(one.message).startswith("multint:")]
    return outcome


def _left(cell: nn.Module, xs: dict[str, Tensor], state: Any) -> dict[str, Any]:
    """What is found afterwards where a step could write, copied."""
    plain = {name: value for name, value in vars(cell).items() if isinstance(value, int | float | list)}
    tensors = {**{f"x {k}": v for k, v in xs.items()}, **state._asdict(), **dict(cell.named_buffers())}
    return {f"afterwards {k}": v.detach().clone() for k, v in tensors.items()} | {"attributes": str(plain)}


def _differentiate(outcome: Outcome, output: Tensor, final: Any, leaves: dict[str, Tensor], second: bool) -> None:
    options = {"allow_unused": True, "materialize_grads": True}
    terms = [output.double() * torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view_as(output)]
    terms += [value.double().square() for value in final if value.is_floating_point()]
    loss = sum(term.sum() for term in terms)
    names, values = list(leaves), list(leaves.values())
    if not values or not outcome.recorded:
        return
    if not loss.requires_grad:
        first = [torch.zeros_like(value) for value in values]
        second = False
    else:
        first = list(torch.autograd.grad(loss, values, create_graph=second, **options))
    outcome.values |= {f"gradient of {name}": value for name, value in zip(names, first, strict=True)}
    squares = sum(value.double().square().sum() for value in first)
    if second and squares.requires_grad:
        twice = torch.autograd.grad(squares, values, **options)
        outcome.values |= {f"second gradient of {name}": value for name, value in zip(names, twice, strict=True)}


def difference(expected: Outcome, actual: Outcome, tolerance: float) -> str:
    """In what an outcome is not the loop's; empty where it is."""
    if actual.warned:
        return f"warned: {actual.warned[0]}"
    if expected.error is not None:
        same = isinstance(actual.error, type(expected.error)) and actual.stage == expected.stage
        # Where autograd cannot follow the loop, as after a write to what it saved, an engine may do better.
        return "" if same or (expected.stage == "backward" and actual.error is None) else _told(expected, actual)
    if actual.error is not None:
        return _told(expected, actual)
    for name, right in expected.values.items():
        found = actual.values.get(name)
        if not isinstance(right, Tensor):
            if found != right:
                return f"{name}: {found}, expected {right}"
            continue
        if not isinstance(found, Tensor) or (found.shape, found.dtype) != (right.shape, right.dtype):
            got = (tuple(found.shape), found.dtype) if isinstance(found, Tensor) else found
            return f"{name}: {got}, expected {(tuple(right.shape), right.dtype)}"
        wide, other = right.detach().double(), found.detach().double()
        scale = max(1.0, wide[wide.isfinite()].abs().max().item() if wide.isfinite().any() else 1.0)
        # Second gradients amplify the rounding of a step that computes in float32 somewhere.
        allowed = 100 * tolerance if name.startswith("second") else tolerance
        if not torch.allclose(other / scale, wide / scale, rtol=0, atol=allowed, equal_nan=True):
            return f"{name}: off by {(other - wide).abs().max().item():.2g}, largest value {scale:.2g}"
    return ""


def _told(expected: Outcome, actual: Outcome) -> str:
    def short(outcome: Outcome) -> str:
        if outcome.error is None:
            return "ran"
        where = traceback.extract_tb(outcome.error.__traceback__)[-1]
        line = (str(outcome.error).strip().splitlines() or [""])[0][:200]
        return f"raised {type(outcome.error).__name__} in its {outcome.stage} pass ({where.name}: {line})"

    return f"{short(actual)}, where the loop {short(expected)}"


def change(cell: nn.Module, program: Program, chance: random.Random) -> tuple[str, bool]:
    """A statement that changes the cell, and whether `fused` should run what it leaves."""
    if program.changes and chance.random() < 0.5:
        return chance.choice(program.changes), True
    parameters = dict(cell.named_parameters(remove_duplicate=False))
    if not parameters:
        return "pass", True
    name = chance.choice(sorted(parameters))
    owner, _, leaf = name.rpartition(".")
    at, place = f'cell.get_parameter("{name}")', f'cell.get_submodule("{owner}"), "{leaf}"'
    alike = [n for n, p in parameters.items() if p.shape == parameters[name].shape and p is not parameters[name]]
    general: list[str] = [
        "for p in cell.parameters(): p.data.mul_(0.8)",
        "for p in cell.parameters(): p.data = p.data * 0.8",
        f"torch.nn.init.normal_({at}, std=0.5)",
        f"setattr({place}, nn.Parameter(0.5 * torch.randn_like({at})))",
        f"{at}.requires_grad_(not {at}.requires_grad)",
        "cell.train(not cell.training)",
        "cell.double() if next(cell.parameters()).dtype is torch.float32 else cell.float()",
        "cell = copy.deepcopy(cell)",
        "for b in cell.buffers(): b.mul_(-0.7)",
        "pass",
    ]
    general += [
        f'setattr({place}, cell.get_parameter("{other}"))' for other in chance.sample(alike, min(2, len(alike)))
    ]
    maps = [name for name, module in cell.named_modules() if isinstance(module, nn.Linear)]
    if maps and chance.random() < 0.03:
        hook = "lambda module, inputs, output: 0.5 * output"
        return f'cell.get_submodule("{chance.choice(maps)}").register_forward_hook({hook})', False
    return chance.choice(general), True


@dataclass
class Report:
    """What happened to the calls; "legal" ones are those that `fused` should run."""

    counts: Counter[str] = field(default_factory=Counter)
    refusals: dict[str, Counter[str]] = field(default_factory=lambda: {"legal": Counter(), "odd": Counter()})
    examples: dict[str, int] = field(default_factory=dict)  # of refusals: a cell's number
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{count:7d} {what}" for what, count in sorted(self.counts.items())]
        for kind, reasons in self.refusals.items():
            lines += [f"{kind}, but refused:"] if reasons else []
            lines += [
                f"{count:7d} {reason} (as cell {self.examples[kind + reason]})"
                for reason, count in reasons.most_common(30)
            ]
        return "\n".join([*lines, f"{len(self.failures)} failures"])


class _Failure(Exception):  # noqa: N818
    """An engine is wrong."""


class _Trial:
    """One cell, of which every engine has a twin."""

    def __init__(self, seed: int, number: int, report: Report) -> None:
        self.seed, self.number, self.report = seed, number, report
        self.program = random_program(f"{seed}-{number}")
        self.chance = random.Random(f"calls {seed}-{number}")
        self.legal, self.log = self.program.legal, ["as built"]
        cell_type, self.state_type = self.program.build()
        dtype = self.chance.choice((torch.float64, torch.float64, torch.float32))
        self.twins: dict[str, nn.Module] = {}
        for engine in ("loop", "fused", "auto"):
            torch.manual_seed(0)
            self.twins[engine] = cell_type().to(dtype)

    def __call__(self, calls: int) -> None:
        """Note the first failure in the report: after it the twins may differ."""
        try:
            for number in range(calls):
                if number:
                    self._change()
                call = Call.draw(self.chance, next((p.dtype for p in self.twins["loop"].parameters()), torch.float64))
                self.log.append(f"  call: {call}")
                self._compare(call)
        except _Failure as failure:
            kind, log = "legal" if self.program.legal else "odd", "\n".join(self.log)
            again = f"{kind} cell {self.number}: python -m tests.fuzz_scan --seed {self.seed} --cell {self.number}"
            message = f"FAILED: {failure}, in the call after: {self.log[-2].strip()}\n{again}"
            self.report.failures.append(f"{message}\n\n{self.program.source}\n\n{log}\n")

    def _change(self) -> None:
        statement, legal = change(self.twins["loop"], self.program, self.chance)
        self.log.append(statement)
        self.legal = self.legal and legal
        for engine, cell in self.twins.items():
            names = {**NAMES, "cell": cell}
            torch.manual_seed(len(self.log))
            with contextlib.suppress(Exception), torch.no_grad():  # what one twin does not allow, none does
                exec(statement, names)
            self.twins[engine] = names["cell"]

    def _run(self, call: Call, engine: str, twin: str = "", moved: float = 0.0) -> Outcome:
        return run(self.program, self.state_type, self.twins[twin or engine], call, engine, moved)

    def _compare(self, call: Call) -> None:
        dtypes = {call.dtype, call.state_dtype, *(value.dtype for value in self.twins["loop"].state_dict().values())}
        if ".float()" in self.program.source:
            dtypes.add(torch.float32)
        tolerance = max(_TOLERANCE[dtype] for dtype in dtypes & set(_TOLERANCE))
        expected = self._run(call, "loop")
        for engine in ("fused", "auto"):
            actual = self._run(call, engine)
            if expected.stage != "forward":
                self._count(engine, actual)
            if engine == "fused" and actual.refused:
                actual = replace(self._run(call, "loop", twin=engine), warned=actual.warned)
            found = difference(expected, actual, tolerance)
            if found and not ("off by" in found and self._undetermined(call, expected, tolerance)):
                raise _Failure(f"{engine}: {found}")

    def _count(self, engine: str, actual: Outcome) -> None:
        kind, report = "legal" if self.legal else "odd", self.report
        if engine == "auto":
            report.counts[f"auto: {actual.engine}"] += 1
        elif actual.refused:
            reason = re.sub(r"\b[a-z]?\d+\b", "N", str(actual.error))[:150]
            report.counts[f"{kind} calls refused"] += 1
            report.refusals[kind][reason] += 1
            report.examples.setdefault(kind + reason, self.number)
        else:
            report.counts[f"{kind} calls taken"] += 1

    def _undetermined(self, call: Call, expected: Outcome, tolerance: float) -> bool:
        """Whether the loop does not agree with itself: comparisons and norms of what is 0 but for rounding."""
        moved = self._run(call, "loop", moved=1e-13 if tolerance < 1e-6 else 1e-6)
        found = bool(difference(expected, moved, tolerance))
        self.report.counts["calls that rounding decides"] += found
        return found


@contextlib.contextmanager
def eager_to_fuse() -> Iterator[None]:
    """Within the context, `auto` fuses scans of any size, and memory taken without filling it is full of NaN."""

    def poisoned(original: Callable[..., Any]) -> Callable[..., Any]:
        def fill(*arguments: Any, **options: Any) -> Any:
            made = original(*arguments, **options)
            plain = type(made) is Tensor and made.is_floating_point()
            return made.detach().fill_(float("nan")).requires_grad_(made.requires_grad) if plain else made

        return fill

    with contextlib.ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("multint.engines") and hasattr(module, "_WORTH_COMPILING"):
                stack.enter_context(mock.patch.object(module, "_WORTH_COMPILING", 0))
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, poisoned(getattr(owner, name))))
        yield


def fuzz(
    cells: range,
    seed: int,
    calls: int = 4,  # of each cell
    compiled: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Try the cells of these numbers, with some changes each."""
    report = Report()
    with eager_to_fuse(), contextlib.nullcontext() if compiled else eager_pieces():
        for done, number in enumerate(cells, 1):
            before = len(report.failures)
            _Trial(seed, number, report)(calls)
            if progress:
                for failure in report.failures[before:]:
                    progress(failure + "\n")
                if done % 20 == 0:
                    progress(f"{done} cells, {len(report.failures)} failures")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description="The compiled scan against the loop on random cells.")
    parser.add_argument("--cells", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cell", type=int, help="this one alone, and its program")
    parser.add_argument("--calls", type=int, default=4, help="of each cell, with a change before each but the first")
    parser.add_argument("--compiled", action="store_true", help="compile the pieces, and do not run them op by op")
    options = parser.parse_args()
    cells = range(options.cells) if options.cell is None else range(options.cell, options.cell + 1)
    if options.cell is not None:
        print(random_program(f"{options.seed}-{options.cell}").source)
    report = fuzz(cells, options.seed, options.calls, options.compiled, lambda line: print(line, flush=True))
    print(report)
    return bool(report.failures)


if __name__ == "__main__":
    sys.exit(main())
