"""Pieces of a step as kernels: compiled by Inductor for any number of rows, or run op by op where it cannot."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from multint.engines.trace import TRACING
from multint.errors import in_a_line

_settings = {"compile": True}

_OPTIONS = {
    # 2 / (1 + exp(−2x)) − 1: near 0 of the same absolute and not the same relative error, and faster.
    "cpp.use_decompose_tanh": True,
    # They would be checked at every step. The engine gives contiguous tensors of the right sizes.
    "size_asserts": False,
    "alignment_asserts": False,
}


@contextlib.contextmanager
def eager_pieces() -> Iterator[None]:
    """Run pieces op by op within the context, to test the engine's logic apart from the compiler."""
    before, _settings["compile"] = _settings["compile"], False
    try:
        yield
    finally:
        _settings["compile"] = before


class Kernel:
    """A function of tensors that writes its results into given buffers.

    Args:
        module: the function, (inputs) → results.
        inputs, results: stand-ins for them; the tensors themselves are contiguous.
        adds: for each result, whether it is added to what the buffer holds, and not written over it.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: list[Tensor],
        results: list[Tensor],
        adds: list[bool],
        mode: FakeTensorMode,
    ) -> None:
        self.module = module
        self.adds = adds
        self._stand_ins = [*inputs, *results]
        self._count = len(inputs)
        self._mode = mode
        self._compiled: Callable[[list[Tensor]], Any] | None = None

    def __call__(self, arguments: list[Tensor]) -> None:
        """Run on the inputs and the buffers, in one list, which it may empty."""
        if not _settings["compile"]:
            self._write(*arguments)
            return
        if self._compiled is None:
            with TRACING:
                self._compiled = self._compiled or self._compile()
        self._compiled(arguments)

    def _write(self, *arguments: Tensor) -> list[Tensor]:
        results = self.module(*arguments[: self._count])
        for buffer, result, add in zip(arguments[self._count :], results, self.adds, strict=True):
            if add:
                buffer.add_(result)
            else:
                buffer.copy_(result)
        return []

    def _compile(self) -> Callable[[list[Tensor]], Any]:
        # Inductor's inner entry: torch.compile would check guards at every call, which costs as much as a small piece.
        from torch._guards import TracingContext, tracing
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.decomposition import select_decomp_table

        try:
            with self._mode, enable_python_dispatcher(), torch.no_grad():
                # Stand-ins of their own: a tensor that is two arguments would be traced as one.
                fakes = [torch.empty_like(s, memory_format=torch.contiguous_format) for s in self._stand_ins]
                graph = make_fx(
                    torch.func.functionalize(self._write),
                    decomposition_table=select_decomp_table(),
                    _allow_non_fake_inputs=True,
                )(*fakes)
            with tracing(TracingContext(self._mode)), self._mode, torch.no_grad(), config.patch(_OPTIONS):
                compiled: Any = compile_fx_inner(graph, fakes)
        except Exception as error:
            # Many things can be missing: a C++ compiler, its headers, Inductor's support of an operation.
            _warn_once(in_a_line(error))
            return lambda arguments: self._write(*arguments)
        # Beneath `compiled` itself, which looks for a profiler at every call.
        run: Callable[[list[Tensor]], Any] = compiled.current_callable
        return run


_warned: list[str] = []


def _warn_once(reason: str) -> None:
    if not _warned:
        warnings.warn(
            f"multint: a piece of a step could not be compiled, so it runs slower, in eager mode ({reason})",
            stacklevel=2,
        )
    _warned.append(reason)
