"""Text from a language model, one symbol at a time."""

import torch
from torch import Tensor

from models.language_model import LanguageModel
from multint.errors import MultintError, OptionError


@torch.no_grad()
def sample(
    network: LanguageModel,
    prompt: Tensor,  # (N,) int64
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # (length,) int64
    """The symbols that the network draws after a prompt: y_t ~ softmax(logits_t / temperature).

    Dropout is off while it draws.

    Args:
        prompt: the symbols read first, at least one.
        length: the number of symbols to draw.
        temperature: below 1 the likely symbols become likelier; 0 always takes the likeliest.
        top_k: draw from the k likeliest symbols only.
        generator: the source of randomness, on the network's device; torch's own if None.

    Raises: OptionError for an empty prompt and for settings out of range; MultintError for a network whose outputs are
    no finite numbers.
    """
    _check(prompt, length, temperature, top_k)
    was_training = network.training
    network.eval()
    try:
        logits, state = network(prompt[:, None])
        drawn = []
        for _ in range(length):
            symbol = _draw(logits[-1, 0], temperature, top_k, generator)
            drawn.append(symbol)
            logits, state = network(symbol[None], state)
    finally:
        network.train(was_training)
    return torch.cat(drawn)


def _draw(
    logits: Tensor,  # (V,)
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None,
) -> Tensor:  # (1,)
    if not logits.isfinite().all():
        raise MultintError("sample: the network's outputs are no finite numbers: its training has diverged")
    if temperature == 0:
        return logits.argmax(keepdim=True)
    if top_k is not None and top_k < len(logits):
        likeliest = logits.topk(top_k)
        return likeliest.indices[_draw(likeliest.values, temperature, None, generator)]
    # From the likeliest down, and by no less than the smallest number: else a low temperature gives ∞/∞ or 0/0.
    scaled = (logits - logits.max()) / max(temperature, torch.finfo(logits.dtype).tiny)
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator)


def _check(prompt: Tensor, length: int, temperature: float, top_k: int | None) -> None:
    if prompt.ndim != 1 or len(prompt) < 1:
        raise OptionError(f"sample: prompt has shape {tuple(prompt.shape)}, expected (N,) with at least one symbol")
    if length < 1:
        raise OptionError(f"sample: length is {length}, expected at least 1")
    if not temperature >= 0:
        raise OptionError(f"sample: temperature is {temperature}, expected 0 (the likeliest symbol) or more")
    if top_k is not None and top_k < 1:
        raise OptionError(f"sample: top_k is {top_k}, expected at least 1, or none at all")
