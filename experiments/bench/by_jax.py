"""The cells of the benchmark as a user of JAX writes them: the input's products first, then `jax.lax.scan`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def why_not() -> str:
    """Why there is nothing to compare with here; empty where there is."""
    if importlib.util.find_spec("jax") is None:
        return "JAX is not installed (pip install jax)"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if torch.get_num_threads() != cores:
        return f"JAX takes all {cores} cores, and not {torch.get_num_threads()} threads"
    return ""


def contender(kind: str, module: nn.Module, x: Tensor, cotangent: Tensor, backward: bool) -> Callable[[], list[Any]]:
    """A function that runs the compiled scan once, on the module's weights, and waits for all that it gives.

    Gives the output and the gradients by x and by the weights, in the order of `module.parameters()`.

    Args:
        kind: "lstm", "gru" (its reset before the product) or "rnn", with multiplicative integration.
    """
    import jax

    weights = [jax.numpy.asarray(np.asarray(parameter.detach())) for parameter in module.parameters()]
    given, d_output = (jax.numpy.asarray(np.asarray(tensor.detach())) for tensor in (x, cotangent))
    layer = {"lstm": _lstm, "gru": _gru, "rnn": _rnn}[kind]

    @jax.jit
    def compiled(x: Any, weights: list[Any], d_output: Any) -> list[Any]:
        if not backward:
            return [layer(x, *weights)]
        output, gradients_of = jax.vjp(lambda x, weights: layer(x, *weights), x, weights)
        d_x, d_weights = gradients_of(d_output)
        return [output, d_x, *d_weights]

    return lambda: [torch.from_dlpack(value) for value in jax.block_until_ready(compiled(given, weights, d_output))]


def gradbench(cell: nn.Module, text: Tensor, state: Tensor, output: Tensor, backward: bool) -> Callable[[], list[Any]]:
    """GradBench's loss, and its gradient by the cell's weights and the output's: see `gradbench.py`."""
    import jax
    from jax.nn import sigmoid
    from jax.numpy import exp, log, tanh

    with jax.enable_x64(True):
        learnt = [jax.numpy.asarray(np.asarray(weights.detach())) for weights in (*cell.parameters(), output)]
        bits, first = (jax.numpy.asarray(np.asarray(tensor)) for tensor in (text, state))

    def layer(x: Any, h: Any, c: Any, weights: Any, biases: Any) -> Any:
        c = sigmoid(x * weights[0] + biases[0]) * c + sigmoid(h * weights[1] + biases[1]) * tanh(
            h * weights[3] + biases[3]
        )
        return sigmoid(x * weights[2] + biases[2]) * tanh(c), c

    def loss(learnt: Any, bits: Any, first: Any) -> Any:
        weights, biases, scale, (gain, offset) = learnt

        def step(state: Any, x: Any) -> Any:
            h, lower, c, lower_c = state
            lower, lower_c = layer(x, lower, lower_c, weights[0], biases[0])
            h, c = layer(lower, h, c, weights[1], biases[1])
            return (h, lower, c, lower_c), h

        y = jax.lax.scan(step, tuple(first), bits[:-1] * scale)[1] * gain + offset
        return -(bits[1:] * (y - log(2 + exp(y).sum(-1, keepdims=True)))).mean()

    compiled = jax.jit(jax.value_and_grad(loss) if backward else loss)

    def run() -> list[Any]:
        with jax.enable_x64(True):
            values = jax.tree.leaves(jax.block_until_ready(compiled(learnt, bits, first)))
        return [torch.from_dlpack(value) for value in values]

    return run


def _lstm(x: Any, *weights: Any) -> Any:
    import jax
    from jax.nn import sigmoid
    from jax.numpy import split, tanh, zeros

    def step(state: Any, Wx: Any) -> Any:
        h, c = state
        i, f, g, o = split(_integrated(Wx, h, *weights), 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h = sigmoid(o) * tanh(c)
        return (h, c), h

    start = zeros((x.shape[1], weights[5].shape[1]))
    return jax.lax.scan(step, (start, start), x @ weights[4].T)[1]


def _gru(x: Any, *weights: Any) -> Any:
    import jax
    from jax.nn import sigmoid
    from jax.numpy import split, tanh, zeros

    of_gates, of_candidate = weights[:6], weights[6:]

    def step(h: Any, products: Any) -> Any:
        Wx, Vx = products
        r, z = split(sigmoid(_integrated(Wx, h, *of_gates)), 2, -1)
        h = (1 - z) * tanh(_integrated(Vx, r * h, *of_candidate)) + z * h
        return h, h

    return jax.lax.scan(step, zeros((x.shape[1], of_gates[5].shape[1])), (x @ of_gates[4].T, x @ of_candidate[4].T))[1]


def _rnn(x: Any, *weights: Any) -> Any:
    import jax
    from jax.numpy import tanh, zeros

    def step(h: Any, Wx: Any) -> Any:
        h = tanh(_integrated(Wx, h, *weights))
        return h, h

    return jax.lax.scan(step, zeros((x.shape[1], weights[5].shape[1])), x @ weights[4].T)[1]


def _integrated(Wx: Any, h: Any, alpha: Any, beta1: Any, beta2: Any, bias: Any, _: Any, U: Any) -> Any:
    Uh = h @ U.T
    return alpha * Wx * Uh + beta1 * Uh + beta2 * Wx + bias
