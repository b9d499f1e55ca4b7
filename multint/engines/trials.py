"""What a graph gives, held against what its step gives, on random numbers.

Two trials: the step of some rows together against that of each alone, since a graph may mix rows in ways that no rule
knows; and the graph against the step, outputs and gradients, since tracing sees neither `.data` nor an autograd
function's own backward pass nor a branch on `requires_grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from multint.engines.copies import Copy, as_state
from multint.engines.legality import SEE_EACH_OTHER
from multint.errors import EngineError, in_a_line

if TYPE_CHECKING:
    from multint.engines.capture import Trace

_ROWS = 5
_RANGES = (1000, 100, 20, 5, 2, 1)  # of an integer stream, which may be an index


def check_by_trial(step: Copy, traced: Trace, exact: Trace | None, x: Any, state: Any) -> None:
    """Raise unless the step keeps its rows apart, and the graph and its gradients are the step's, on random numbers.

    Args:
        exact: the step traced in float64, by which gradients are compared where the step computes in half precision.
    """
    trial = _Trial(step, traced, exact, x, state)
    finite = [False] * len(traced.outputs)
    for scale in (1.0, 10.0):
        rows = trial.draw(scale)
        together = trial.check_rows(rows)
        finite = [seen or not new.numel() or not new.isnan().all() for seen, new in zip(finite, together, strict=True)]
        trial.check_gradients(rows)
    if not all(finite):
        raise EngineError("fused: the step gives nothing but NaN for random numbers, so it cannot be checked")


class _Trial:
    def __init__(self, step: Copy, traced: Trace, exact: Trace | None, x: Any, state: Any) -> None:
        self.step, self.traced, self.exact, self.x, self.state = step, traced, exact, x, state
        self._generator = torch.Generator().manual_seed(0)
        self.weights = [self._moved(tensor) for tensor in step.tensors]
        # An index out of range is an error on a CPU, and the end of the process on a GPU.
        on_cpu = all(field.device.type == "cpu" for field in state)
        self._range = next((n for n in _RANGES if self._runs(n)), 1) if on_cpu else 1

    def _moved(self, tensor: Tensor) -> Tensor:
        """A parameter that no chance has made 0 or 1, which would hide what it multiplies."""
        if not tensor.is_floating_point() or not (tensor.requires_grad or isinstance(tensor, nn.Parameter)):
            return tensor.detach()
        noise = torch.randn(tensor.shape, generator=self._generator, device="cpu")
        return (tensor + noise.to(tensor.device, tensor.dtype) / 10).detach()

    def draw(self, scale: float, below: int | None = None) -> list[Tensor]:
        """Random rows for the inputs and the states."""
        rows = []
        for node in chain(self.traced.inputs.values(), self.traced.states.values()):
            value = node.meta["val"]
            shape = (_ROWS, *value.shape[1:])
            if value.is_floating_point():
                numbers = scale * torch.randn(shape, generator=self._generator, device="cpu")
            else:
                most = 2 if value.dtype == torch.bool else below or self._range
                numbers = torch.randint(most, shape, generator=self._generator, device="cpu")
            rows.append(numbers.to(value.device, value.dtype))
        return rows

    def _runs(self, below: int) -> bool:
        """Whether the step takes whole numbers up to that."""
        try:
            with torch.no_grad():
                self._new(self.weights, self.draw(1.0, below))
        except Exception:
            return False
        return True

    def _new(self, weights: Sequence[Tensor], rows: Sequence[Tensor]) -> list[Tensor]:
        count = len(self.traced.inputs)
        x = dict(zip(self.traced.inputs, rows, strict=False)) if isinstance(self.x, dict) else rows[0]
        return list(self.step(weights, x, as_state(type(self.state), list(rows[count:]))))

    def check_rows(self, rows: list[Tensor]) -> list[Tensor]:
        """Raise unless the step of all rows is that of each alone, in float64 where the step can be run so."""
        try:
            (together, alone), tolerance = self._both(_double(self.weights), _double(rows)), 1e-9
        except EngineError:
            raise
        except Exception:  # a step that insists on its dtypes
            try:
                together, alone = self._both(self.weights, rows)
            except Exception as error:
                raise EngineError(f"fused: the step cannot be tried on random numbers: {in_a_line(error)}") from error
            tolerance = 1e-3 if all(new.dtype in (torch.float32, torch.float64) for new in together) else 0.1
        for whole, parts in zip(together, alone, strict=True):
            if whole.shape != parts.shape or not torch.allclose(whole, parts, tolerance, tolerance, equal_nan=True):
                raise EngineError(SEE_EACH_OTHER)
        return together

    def _both(self, weights: list[Tensor], rows: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The step of all rows, and of each alone."""
        with torch.no_grad(), torch.autocast(rows[0].device.type, enabled=False):
            together = self._new(weights, rows)
            alone = [self._new(weights, [row[i : i + 1] for row in rows]) for i in range(_ROWS)]
        return together, [torch.cat(parts) for parts in zip(*alone, strict=True)]

    def check_gradients(self, rows: list[Tensor]) -> None:
        """Raise unless the graph gives the step's outputs and its gradients, in the step's own dtypes."""
        asked = [tensor.requires_grad for tensor in self.step.tensors] + [row.is_floating_point() for row in rows]

        graph, given = self.traced, [*self.weights, *rows]
        if self.exact is not None:
            graph, given = self.exact, _double(given)
        off = torch.autocast(rows[0].device.type, enabled=False)

        def run(function: Callable[[list[Tensor], list[Tensor]], list[Tensor]]) -> tuple[list[Tensor], list[Any]]:
            values = [v.detach().clone().requires_grad_(a) for v, a in zip(given, asked, strict=True)]
            count = len(self.weights)
            for value, tensor in zip(values, self.step.tensors, strict=False):
                vars(value).update(vars(tensor))  # what the user has put on a weight, and a stand-in lacks
            # Copies of the rows: in a scan they are results, too, and no leaves.
            new = function(values[:count], [value.clone() for value in values[count:]])
            return [field.detach() for field in new], _gradients(new, [v for v in values if v.requires_grad])

        try:
            with off if self.exact is not None else nullcontext():
                expected, gradients = run(self._new)
        except EngineError:
            raise
        except Exception:  # no derivative: then what needs one fails as it does in the loop
            return
        try:
            with off:  # its casts are in the graph
                actual, ours = run(lambda weights, some: interpret(graph, [*weights, *some]))
        except Exception as error:
            raise EngineError(f"fused: the step's graph cannot be differentiated: {in_a_line(error)}") from error
        if not all(map(_near, actual, expected)):
            raise EngineError(
                "fused: the step's graph does not give the step's numbers; a step that is not the same at each run, or "
                "a branch on requires_grad or is_grad_enabled(), does that"
            )
        if not all(map(_near, ours, gradients)):
            raise EngineError(
                "fused: the step's gradients are not its operations' own; .data, an autograd.Function with a backward "
                "pass of its own, or a branch on requires_grad or is_grad_enabled() does that"
            )


def interpret(traced: Trace, arguments: list[Tensor]) -> list[Tensor]:
    """The graph's outputs, operation by operation; the arguments are the invariants, inputs and states."""
    placeholders = chain(traced.invariants.values(), traced.inputs.values(), traced.states.values())
    values: dict[fx.Node, Any] = traced.literals | dict(zip(placeholders, arguments, strict=True))
    for node in traced.graph.nodes:
        if node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return [values[node] for node in traced.outputs]


def _gradients(results: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The gradients of a sum of all results with fixed, irregular weights."""
    results = [result for result in results if result.requires_grad]
    if not results or not leaves:
        return []
    given = [torch.linspace(0.5, 1.5, r.numel()).cos().to(r.device, r.dtype).view(r.shape) for r in results]
    return list(torch.autograd.grad(results, leaves, given, allow_unused=True, materialize_grads=True))


def _near(actual: Tensor, expected: Tensor) -> bool:
    """Whether two results of the same operations are equal but for rounding; NaN is equal to itself."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if torch.equal(actual, expected):  # as it mostly is, which takes a tenth of what follows
        return True
    if not expected.is_floating_point():
        return False
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(expected.dtype, 0.2)
    a, b = actual.double().nan_to_num(), expected.double().nan_to_num()
    return bool(torch.equal(actual.isnan(), expected.isnan()) and (a - b).norm() <= tolerance * (b.norm() + 1e-6))


def _double(values: Iterable[Tensor]) -> list[Tensor]:
    return [value.double() if value.is_floating_point() else value for value in values]
