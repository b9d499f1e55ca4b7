"""Pieces of a step as kernels: C++ for a native loop, compiled by Inductor for any number of rows, or run op by op."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from multint.engines import private
from multint.engines.decompositions import is_composite, plainer
from multint.engines.failures import RefusedError
from multint.engines.native.loops import RowFunction, function_of
from multint.engines.private import StandIns
from multint.engines.step import in_own_thread
from multint.engines.tables import TRACING, warn_once
from multint.errors import in_a_line

_settings = {"compile": True}


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
        module: the function, (inputs) → results, traced on stand-ins; the tensors themselves are contiguous.
        world: that of the stand-ins.
        adds: for each result, whether it is added to what the buffer holds, and not written over it.
    """

    def __init__(self, module: fx.GraphModule, world: StandIns, adds: Sequence[bool] | None = None) -> None:
        self.module = module
        self.outputs: list[fx.Node] = list(module.graph.output_node().args[0])  # type: ignore[arg-type]
        self.adds = list(adds or [False] * len(self.outputs))
        self._inputs = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
        self._world = world
        self._compiled: Callable[..., Any] | None = None
        self._cpp: RowFunction | RefusedError | None = None

    def __call__(self, *arguments: Tensor) -> None:
        """Run on the inputs and the buffers, by compiled code, which is there after `build`."""
        assert self._compiled is not None
        self._compiled(*arguments)

    def build(self) -> None:
        """Compile it."""
        with TRACING:
            if self._compiled is None:
                self._compiled = self._compile()

    def eagerly(self, *arguments: Tensor) -> list[Tensor]:
        """The same op by op, by the operations that were traced."""
        count = len(self._inputs)
        results = self.module(*arguments[:count])
        for buffer, result, add in zip(arguments[count:], results, self.adds, strict=True):
            if add:
                buffer.add_(result)
            else:
                buffer.copy_(result)
        return []  # a graph has a result

    def cpp(self) -> RowFunction:
        """Its C++ function of one row, for a native loop.

        Raises: RefusedError where it has none.
        """
        if self._cpp is None:
            with TRACING:
                try:
                    graph = in_own_thread(plain, self.module, self._world)
                    self._cpp = function_of(graph, self.adds)
                except RefusedError as error:
                    self._cpp = error
        if isinstance(self._cpp, RefusedError):
            raise self._cpp
        return self._cpp

    def dtypes(self) -> set[torch.dtype]:
        """Of all values in it, but for what counts truths."""
        counts = {torch.ops.aten.sum.dim_IntList, torch.ops.aten.sum.default}
        nodes = [n for n in self.module.graph.nodes if not (n.target in counts and _is_bool(n.args[0]))]
        values = [node.meta.get("val") for node in nodes]
        return {value.dtype for value in values if isinstance(value, Tensor)}

    def operations(self) -> int:
        """How many operations it has."""
        return sum(node.op == "call_function" for node in self.module.graph.nodes)

    def _compile(self) -> Callable[..., Any]:
        stand_ins = [*self._inputs, *(node.meta["val"] for node in self.outputs)]
        try:
            compiled: Callable[..., Any] = in_own_thread(private.compiled, self.eagerly, stand_ins, self._world)
        except Exception as error:
            # Many things can be missing: a C++ compiler, its headers, Inductor's support of an operation.
            warn_once(
                "multint: a piece of a step could not be compiled, so it runs slower, in eager mode "
                f"({in_a_line(error)})"
            )
            return self.eagerly
        return compiled


def _is_bool(node: Any) -> bool:
    return node.meta["val"].dtype == torch.bool


def plain(module: fx.GraphModule, world: StandIns) -> fx.Graph:
    """The module's graph with composite operations, such as norms and derivatives, in terms of plainer ones.

    Only these are traced, and those that are alike once: to trace all operations again takes twice as long.
    """
    graph, values = fx.Graph(), dict[fx.Node, Any]()
    for node in module.graph.nodes:
        if is_composite(node):
            part = _plainer_graph(node, world)
            given = zip(part.nodes, (values[n] for n in node.all_input_nodes), strict=False)
            values[node] = graph.graph_copy(part, dict(given))
        elif node.target is operator.getitem and not isinstance(values[node.args[0]], fx.Node):
            values[node] = values[node.args[0]][node.args[1]]
        else:
            values[node] = graph.node_copy(node, values.__getitem__)
    for node in graph.nodes:  # what only writes passes for dead code
        if private.writes(node.target):
            raise RefusedError(f"it has the operation {node.target}, which writes into a tensor")
    graph.eliminate_dead_code()
    return graph


def _plainer_graph(node: fx.Node, world: StandIns) -> fx.Graph:
    """An operation in terms of plainer ones: a function of the nodes that it takes, in order."""
    target: Any = node.target
    given = node.all_input_nodes
    names = {n: f"%{i}" for i, n in enumerate(given)}
    values = [n.meta["val"] for n in given]
    kinds = [(v.dtype, v.device, v.shape, v.stride()) if isinstance(v, Tensor) else v for v in values]
    key = target, str((fx.node.map_arg((node.args, node.kwargs), names.get), kinds))
    if key not in world.plainer:

        def operation(*arguments: Any) -> Any:
            values = dict(zip(given, arguments, strict=True))
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.get)
            return target(*args, **kwargs)

        with torch.no_grad():
            # A tensor that is two arguments would be traced as one.
            apart = [value.detach() if isinstance(value, Tensor) else value for value in values]
            world.plainer[key] = world.trace(operation, apart, plainer()).graph
    return world.plainer[key]
