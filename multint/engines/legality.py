"""What a graph cannot say of a step, and so must be found before the graph may stand for it.

A step may be run as a graph of all its rows, at every step of every call, only where that is what it means. Four looks
find where it is not; two are here. The *rehearsal* runs the step itself, and sees what it does beside computing: random
draws, branches on values, writes. The *graph* shows operations that mix the rows of a batch. The trials (`trials.py`)
find what these two do not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from multint.engines import private
from multint.engines.copies import Copy, as_state
from multint.engines.failures import StepError
from multint.errors import EngineError

if TYPE_CHECKING:
    from multint.engines.capture import Trace

aten = torch.ops.aten

_READ_NUMBERS = (Tensor.tolist, Tensor.numpy, Tensor.__array__)
SEE_EACH_OTHER = "fused: the rows of a batch see each other"


def rehearse(step: Copy, x: Any, state: Any) -> None:
    """Run the step on up to three rows, to see what it does beside computing.

    Raises: EngineError for what no graph can hold; StepError where the step fails.
    """
    found: list[str] = []

    def rows(leaf: Tensor) -> Tensor:
        some = leaf.detach()[:3].clone()
        return some.requires_grad_().clone() if some.is_floating_point() else some

    def called(function: Any) -> None:
        if function is private.SETS_GRADIENTS:
            found.append("the step turns gradients on or off; use detach")
        elif function is Tensor.register_hook:
            found.append("the step registers a hook on a tensor")
        elif getattr(function, "__self__", None) is Tensor.data:  # its getter or setter
            found.append("the step takes .data, whose gradient a graph does not show; use detach()")
        elif function in _READ_NUMBERS:
            found.append(f"the step reads the numbers of a tensor ({function.__name__})")

    def operation(target: Any, args: Any, kwargs: Any) -> None:
        if _is_random(target, args, kwargs):
            found.append(f"the step draws random numbers ({target}); draw them outside, as streams")
        elif target is aten._local_scalar_dense.default:
            found.append(f"the step branches on a value ({target}); use torch.where")
        elif "batch_norm" in str(target) and private.given(target, args, kwargs, "training"):
            found.append(f"the rows of a batch see each other ({target})")

    one_x = {name: rows(leaf) for name, leaf in x.items()} if isinstance(x, dict) else rows(x)
    one_state = as_state(type(state), list(map(rows, state)))
    before = step.entries()
    with torch.random.fork_rng(devices=[]), private.python_function_calls(called), private.operations(operation):
        try:
            new = step.cell.step(one_x, one_state)
        except EngineError:  # of a tripwire
            raise
        except Exception as error:
            raise StepError from error
    after = step.entries()
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if changed:
        found.insert(0, f"the step changes the cell's {changed[0]}; keep it in the state")
    if not isinstance(new, tuple | list) or not all(isinstance(field, Tensor) for field in new):
        found.append(f"the step gives a {type(new).__name__}, and not a tuple of tensors")
    if found:
        raise EngineError(f"fused: {found[0]}")


def _is_random(target: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    # Attention has a probability of dropout, and draws nothing where that is 0.
    return torch.Tag.nondeterministic_seeded in target.tags and private.given(target, args, kwargs, "dropout_p") != 0


# Operations whose dimension says how values are arranged, and not over which ones something is computed.
_ARRANGE = {"select", "slice", "squeeze", "unsqueeze", "cat", "stack", "split", "split_with_sizes", "unbind", "unfold", "select_scatter", "slice_scatter", "permute", "narrow", "movedim", "diagonal"}  # fmt: skip  # noqa: E501
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "dot"}  # where they go over the rows, their result has none
_COPIES = {"clone", "_to_copy", "repeat"}
# Operations that choose by values which row of their first argument is read.
_CHOOSE = {"index", "index_put", "_unsafe_index", "_unsafe_index_put", "embedding", "take", "put", "masked_scatter"}


def check_graph(traced: Trace) -> None:
    """Raise for what the graph of a step shows: rows that see each other, or a fixed number of them."""
    depends = set(chain(traced.inputs.values(), traced.states.values()))
    for node in traced.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_complex():
            raise EngineError(f"fused: the step computes with complex numbers ({node.target})")
        if not private.is_operation(node.target):
            if node.op == "call_function" and depends.intersection(node.all_input_nodes) and isinstance(value, Tensor):
                depends.add(node)
                _check_has_rows(node, node.all_input_nodes[0])
            continue
        if private.writes(node.target):
            raise EngineError(
                f"fused: the step writes to one of its inputs ({node.target}); return a new tensor instead"
            )
        if _is_random(node.target, node.args, node.kwargs):
            raise EngineError(f"fused: the step draws random numbers ({node.target}); draw them outside, as streams")
        if depends.intersection(node.all_input_nodes) and not isinstance(value, torch.SymInt):
            depends.add(node)
            _check_keeps_rows_apart(node, depends)
    fixed = traced.world.fixed_rows()
    if fixed:
        raise EngineError(f"fused: the step branches on the number of rows, or fixes it ({fixed})")


def _check_keeps_rows_apart(node: fx.Node, depends: set[fx.Node]) -> None:
    """Raise where an operation on values of rows computes over them."""
    target: Any = node.target
    if isinstance(node.meta.get("val"), Tensor):
        _check_has_rows(node, node)
    name = private.short_name(target)
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or not isinstance(first.meta.get("val"), Tensor):
        return
    on_rows = private.row_dimensions(first.meta["val"])
    if name in _CHOOSE and on_rows:
        indices: Any = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
        by_values = {d for d, index in enumerate(indices) if isinstance(index, fx.Node) and index in depends}
        if name not in ("index", "index_put", "_unsafe_index", "_unsafe_index_put") or by_values & set(on_rows):
            raise EngineError(f"{SEE_EACH_OTHER} ({target})")
    for flag in ("scale_grad_by_freq", "sparse"):  # gradients that go by all rows, or are no plain tensors
        if private.given(target, node.args, node.kwargs, flag):
            raise EngineError(f"fused: the step uses {target} with {flag}")
    over_dims = private.has_argument(target, "dim") or private.has_argument(target, "dims")
    plain = private.is_pointwise(target) or private.is_view(target) or name in _ARRANGE | _PRODUCTS | _COPIES
    if on_rows not in ([], [0]) and not over_dims and not plain:
        # A pooling, a norm or the like, over dimensions that its arguments do not name.
        raise EngineError(f"{SEE_EACH_OTHER} ({target})")
    for argument in ("dim", "dims"):
        if name not in _ARRANGE and private.has_argument(target, argument):
            dims = private.given(target, node.args, node.kwargs, argument)
            count = max(1, first.meta["val"].ndim)
            over = range(count) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
            if {d % count for d in over} & set(on_rows):
                raise EngineError(f"{SEE_EACH_OTHER} ({target})")


def _check_has_rows(node: fx.Node, named: fx.Node) -> None:
    """Raise where a value that depends on the rows has none: something was computed over them all."""
    if len(private.row_dimensions(node.meta["val"])) != 1:
        raise EngineError(f"{SEE_EACH_OTHER} ({named.target})")
