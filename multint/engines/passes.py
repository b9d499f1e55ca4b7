"""What is done to a traced graph before it is planned: the same values, in fewer and plainer operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from multint.engines import private
from multint.errors import EngineError

aten = torch.ops.aten

_CONSTANTS = {
    aten.new_zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.new_ones.default: 1,
    aten.ones_like.default: 1,
}


def mutates(graph: fx.Graph) -> bool:
    """Whether an operation writes to one of its arguments."""
    return any(private.writes(node.target) for node in graph.nodes)


def tidied(module: fx.GraphModule) -> tuple[fx.Graph, dict[str, Tensor]]:
    """The module's graph in its plainest form, and its literals: placeholders of that name stand for them.

    Raises: EngineError for a tensor in it that the step did not make itself.
    """
    graph = module.graph
    literals = _take_literals(module)
    _free_constants(graph)
    _plain_copies(graph)
    _plain_masks(graph)
    _merge_duplicates(graph)
    _drop_choices(graph)
    graph.eliminate_dead_code()
    return graph, literals


def _take_literals(module: fx.GraphModule) -> dict[str, Tensor]:
    """Give what the step makes of numbers in its code, as `torch.tensor(0.5)`, a placeholder; refuse other tensors.

    Those are no arguments of the graph, and would be frozen with today's numbers.
    """
    graph, found = module.graph, dict[str, Tensor]()
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        value = getattr(module, str(node.target))
        if any(user.target is not aten.lift_fresh_copy.default for user in node.users):
            raise EngineError(
                f"fused: the step uses a tensor of the shape {tuple(value.shape)} that is no parameter, buffer or "
                "attribute of the cell; register it as a buffer"
            )
        with graph.inserting_after([n for n in graph.nodes if n.op == "placeholder"][-1]):
            placeholder = graph.placeholder(f"literal_{len(found)}")
        found[placeholder.name] = value
        for user in list(node.users):
            placeholder.meta = dict(user.meta)
            user.replace_all_uses_with(placeholder)
            graph.erase_node(user)
        graph.erase_node(node)
    return found


def _free_constants(graph: fx.Graph) -> None:
    """Let a constant of a fixed shape depend on nothing: its argument gave it a dtype alone."""
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.target in _CONSTANTS and all(isinstance(size, int) for size in value.shape):
            with graph.inserting_before(node):
                constant = graph.call_function(
                    aten.full.default,
                    (list(value.shape), _CONSTANTS[node.target]),
                    {"dtype": value.dtype, "device": value.device},
                )
            constant.meta["val"] = value
            node.replace_all_uses_with(constant)
            graph.erase_node(node)


def _plain_copies(graph: fx.Graph) -> None:
    """What writing into a part of a tensor has become, as operations that have derivatives: `copy` has none."""
    for node in list(graph.nodes):
        if node.target is aten.copy.default:
            target, source = node.args[0].meta["val"], node.args[1]
            with graph.inserting_before(node):
                if source.meta["val"].dtype != target.dtype:
                    source = graph.call_function(aten._to_copy.default, (source,), {"dtype": target.dtype})
                    source.meta["val"] = node.args[1].meta["val"].to(target.dtype)
                if tuple(source.meta["val"].shape) != tuple(target.shape):
                    shape = graph.call_function(aten.expand_as.default, (source, node.args[0]))
                    shape.meta["val"] = node.meta["val"]
                    source = shape
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _plain_masks(graph: fx.Graph) -> None:
    """`v[mask] = number` as a `where`: as an index, a mask would seem to choose among the rows."""
    for node in list(graph.nodes):
        if node.target is aten.index_put.default and len(node.args) == 3:
            target, indices, number = node.args
            value, mask = number.meta["val"], indices[0].meta["val"] if indices[0] is not None else None
            if len(indices) == 1 and mask is not None and mask.dtype == torch.bool and value.ndim == 0:
                missing = target.meta["val"].ndim - mask.ndim
                with graph.inserting_before(node):
                    for _ in range(missing):
                        indices = [graph.call_function(aten.unsqueeze.default, (indices[0], -1))]
                        mask = mask.unsqueeze(-1)
                        indices[0].meta["val"] = mask
                    chosen = graph.call_function(aten.where.self, (indices[0], number, target))
                chosen.meta["val"] = node.meta["val"]
                node.replace_all_uses_with(chosen)
                graph.erase_node(node)


def _drop_choices(graph: fx.Graph) -> None:
    """Leave out a mask's choice of two values that are one: a layer's masks make it of a field that its cell keeps."""
    for node in list(graph.nodes):
        if node.target is aten.where.self and node.args[1] is node.args[2]:
            chosen, value = node.args[1], node.meta["val"]
            if chosen.meta["val"].dtype == value.dtype and tuple(chosen.meta["val"].shape) == tuple(value.shape):
                node.replace_all_uses_with(chosen)
                graph.erase_node(node)


def _merge_duplicates(graph: fx.Graph) -> None:
    """Compute once what the step computes twice from the same values."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        key = (node.target, repr(node.args), repr(node.kwargs))  # nodes show by their names, which are unique
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node
