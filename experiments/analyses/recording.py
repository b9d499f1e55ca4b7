"""One pass of a recurrent network over a batch, with all its states and products kept."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiments.core.errors import ExperimentError
from experiments.core.task import Task
from multint import Recurrent
from multint.integrators import Integrator, outermost_integrators


@dataclass
class Layer:
    """What one direction of one recurrent layer did in a pass."""

    name: str  # "" for the only one of a network
    states: list[Tensor] = field(default_factory=list)  # h_0 … h_T, (N, H)
    # For each step, ‖·‖² of the product with each matrix that x alone enters by, and z alone, (N,).
    products: list[dict[str, dict[str, Tensor]]] = field(default_factory=list)
    integrators: dict[str, Integrator] = field(default_factory=dict)
    # The streams x (N, X) and z (N, Z) that each integrator met, step by step.
    streams: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)


class Recording(NamedTuple):
    """A pass over N sequences of T steps."""

    loss: Tensor  # (): at the last step, summed over the sequences
    layers: list[Layer]


def recorded(
    task: Task,
    batch: Any,
    steps: int,  # T
) -> Recording:
    """Run the task's network over sequences of a batch, from the initial state, and keep what its layers do.

    It is a copy of the network that runs, in float64 and in evaluation, by the loop over its steps: gradients of 1e-44
    are no zeros, and what is trained is not touched.
    Raises: ExperimentError for a network without recurrent layers, and for a batch or a task that gives no such loss.
    """
    network = copy.deepcopy(task.network)
    assert network is not None
    layers = []
    for name, stack in named_stacks(network.double().eval()):
        stack.engine = "loop"
        for i, direction in enumerate(stack.directions):
            layer = Layer(_named(name, stack, i))
            _note_states(direction, layer)
            for of, integrator in outermost_integrators(direction.cell).items():
                _note_products(of, integrator, layer)
                layer.integrators[of], layer.streams[of] = integrator, []
                integrator.register_forward_hook(_noting_streams(layer.streams[of]))
            layers.append(layer)
    return Recording(task.last_loss(network, batch, steps), layers)


def named_stacks(network: nn.Module) -> list[tuple[str, Recurrent]]:
    """The network's recurrent stacks by name, "" for the only one. Raises ExperimentError where there is none."""
    stacks = [(name, part) for name, part in network.named_modules() if isinstance(part, Recurrent)]
    if not stacks:
        raise ExperimentError(f"{type(network).__name__} has no recurrent stack, multint.Recurrent, to look at.")
    return stacks if len(stacks) > 1 else [("", stacks[0][1])]


def _named(name: str, stack: Recurrent, index: int) -> str:
    layer, backward = divmod(index, 2) if stack.bidirectional else (index, 0)
    parts = [name, f"layer_{layer}" if stack.num_layers > 1 else "", "backward" if backward else ""]
    return "_".join(filter(None, parts))


def _note_states(direction: Any, layer: Layer) -> None:
    """Let a direction's step append to the layer's states; h_0 is made one that has a gradient."""
    step = direction.step

    def noting(streams: dict[str, Tensor], state: Any) -> Any:
        if not layer.states:
            start = state[0].clone()
            layer.states.append(start if start.requires_grad else start.requires_grad_())
            state = type(state)(start, *state[1:])
        layer.products.append({"x": {}, "z": {}})
        new = step(streams, state)
        layer.states.append(new[0])
        return new

    direction.step = noting


def _note_products(name: str, integrator: Integrator, layer: Layer) -> None:
    """Let the integrator's products of x alone, and those of z alone, be noted."""
    weights = {"x": integrator.x_weights, "z": integrator.z_weights}
    for stream, other in (("x", "z"), ("z", "x")):
        for weight in weights[stream]:
            path = weight.rpartition(".")[0]
            module = integrator.get_submodule(path)
            if weight not in weights[other] and isinstance(module, nn.Linear):
                module.register_forward_hook(_noting(layer, stream, f"{name}.{path}"))


def _noting(layer: Layer, stream: str, name: str) -> Callable[..., None]:
    def note(module: nn.Module, arguments: Any, product: Tensor) -> None:
        if product.ndim > 1:  # not of a constant, as the zeros of a GRU that resets after the product
            layer.products[-1][stream][name] = product.detach().square().sum(-1)

    return note


def _noting_streams(streams: list[tuple[Tensor, Tensor]]) -> Callable[..., None]:
    def note(integrator: nn.Module, arguments: Any, result: Tensor) -> None:
        x, z = (stream.detach() for stream in arguments)
        if x.ndim == z.ndim == 2:  # not of a constant
            streams.append((x, z))

    return note


def norms(layer: Layer, stream: str) -> Iterator[Tensor]:
    """For each step, the norm (N,) of all products of a stream together; nothing where there are none."""
    for of_step in layer.products:
        if squares := of_step[stream]:
            yield torch.stack(list(squares.values())).sum(0).sqrt()


def named(metric: str, name: str) -> str:
    """The metric of a layer or a stack, whose name may be empty."""
    return f"{metric}_{name}" if name else metric
