"""Pieces of a step as kernels: compiled by Inductor for any number of rows, or run op by op where it cannot."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from multint.engines import private
from multint.engines.cpp import function_of
from multint.engines.failures import RefusedError
from multint.engines.private import StandIns
from multint.errors import in_a_line

_settings = {"compile": True}

# How far compiled code may be from the operations on numbers around 1.
_ROUNDING = {torch.float64: 1e-7, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


@contextlib.contextmanager
def eager_pieces() -> Iterator[None]:
    """Run pieces op by op within the context, to test the engine's logic apart from the compiler."""
    before, _settings["compile"] = _settings["compile"], False
    try:
        yield
    finally:
        _settings["compile"] = before


def compiles() -> bool:
    """Whether anything is to be compiled."""
    return _settings["compile"]


class Kernel:
    """A function of tensors that writes its results into given buffers.

    Args:
        module: the function, (inputs) → results.
        inputs, results: stand-ins for them; the tensors themselves are contiguous.
        adds: for each result, whether it is added to what the buffer holds, and not written over it.
        world: that of the stand-ins.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: list[Tensor],
        results: list[Tensor],
        adds: list[bool],
        world: StandIns,
    ) -> None:
        self.module = module
        self.adds = adds
        self._stand_ins = [*inputs, *results]
        self._count = len(inputs)
        self._world = world
        self._compiled: Callable[[list[Tensor]], Any] | None = None
        self._cpp: str | RefusedError | None = None

    def __call__(self, arguments: list[Tensor]) -> None:
        """Run on the inputs and the buffers, in one list, which it may empty."""
        if not compiles():
            self.eagerly(arguments)
            return
        if self._compiled is None:
            self._compiled = self._compile()
        self._compiled(arguments)

    def eagerly(self, arguments: list[Tensor]) -> None:
        """The same op by op, by the operations that were traced."""
        self._write(*arguments)

    def cpp(self) -> str:
        """Its C++ function of one row, for a native loop.

        Raises: RefusedError where it has none.
        """
        if self._cpp is None:
            from multint.engines.capture import TRACING, unaware

            with TRACING:
                try:
                    graph = unaware(private.plain, self.module, self._stand_ins[: self._count], self._world)
                    self._cpp = function_of(graph, self.adds)
                except RefusedError as error:
                    self._cpp = error
        if isinstance(self._cpp, RefusedError):
            raise self._cpp
        return self._cpp

    def operations(self) -> int:
        """How many operations it has."""
        return sum(node.op == "call_function" for node in self.module.graph.nodes)

    def _write(self, *arguments: Tensor) -> list[Tensor]:
        results = self.module(*arguments[: self._count])
        for buffer, result, add in zip(arguments[self._count :], results, self.adds, strict=True):
            if add:
                buffer.add_(result)
            else:
                buffer.copy_(result)
        return []

    def _compile(self) -> Callable[[list[Tensor]], Any]:
        from multint.engines.capture import TRACING

        reason = ""
        with TRACING:
            if self._compiled is not None:  # by another thread meanwhile
                return self._compiled
            for size_asserts in (False, True):
                try:
                    run = private.compiled(self._write, self._stand_ins, self._world, size_asserts)
                    self._prove(run)
                except Exception as error:
                    # Many things can be missing: a C++ compiler, its headers, Inductor's support of an operation.
                    reason = reason or in_a_line(error)
                else:
                    return run
        _warn_once(reason)
        return lambda arguments: self._write(*arguments)

    def _prove(self, run: Callable[[list[Tensor]], Any]) -> None:
        """Raise unless the compiled code gives what the operations give, on random numbers in three rows."""
        generator = torch.Generator().manual_seed(0)

        def drawn(stand_in: Tensor) -> Tensor:
            shape = [3 if isinstance(size, torch.SymInt) else size for size in stand_in.shape]
            numbers = torch.randn(shape, generator=generator, device="cpu")
            return (numbers if stand_in.is_floating_point() else numbers * 0).to(stand_in.device, stand_in.dtype)

        some = [drawn(stand_in) for stand_in in self._stand_ins]
        plain, compiled = ([tensor.clone() for tensor in some] for _ in range(2))
        with torch.no_grad():
            self._write(*plain)
            run(list(compiled))
        # By the coarsest dtype: Inductor computes half precision in float32 and rounds less often than the operations.
        coarse = max(_ROUNDING.get(tensor.dtype, 0.0) for tensor in some)
        for actual, expected in zip(compiled[self._count :], plain[self._count :], strict=True):
            if expected.is_floating_point():
                scale = float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()) if expected.numel() else 0.0
                torch.testing.assert_close(actual, expected, rtol=coarse, atol=coarse * max(1.0, scale), equal_nan=True)
            elif not torch.equal(actual, expected):
                raise AssertionError("the compiled code gives other whole numbers than the operations")


_warned: list[str] = []


def _warn_once(reason: str) -> None:
    if not _warned:
        warnings.warn(
            f"multint: a piece of a step could not be compiled, so it runs slower, in eager mode ({reason})",
            stacklevel=2,
        )
    _warned.append(reason)
