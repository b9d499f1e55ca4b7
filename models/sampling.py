"""Text from a language model, one symbol at a time."""

from collections.abc import Sequence

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
    banned: Sequence[int] = (),
) -> Tensor:  # (length,) int64
    """The symbols that the network draws after a prompt: y_t ~ softmax(logits_t / temperature).

    Dropout is off while it draws.

    Args:
        prompt: the symbols read first, at least one.
        length: the number of symbols to draw.
        temperature: below 1 the likely symbols become likelier; 0 always takes the likeliest.
        top_k: draw from the k likeliest symbols only.
        generator: the source of randomness, on the network's device; torch's own if None.
        banned: symbols that are never drawn, as if their probability were 0. The prompt may hold them.

    Raises: OptionError for an empty prompt and for settings out of range; MultintError for a network whose outputs are
    no finite numbers.
    """
    _check(prompt, length, temperature, top_k)
    _check_banned(banned, network.vocabulary_size)
    never = torch.tensor(banned, dtype=torch.long, device=prompt.device)
    was_training = network.training
    network.eval()
    try:
        logits, state = network(prompt[:, None])
        drawn = []
        for _ in range(length):
            symbol = _draw(_finite(logits[-1, 0]).index_fill(0, never, -torch.inf), temperature, top_k, generator)
            drawn.append(symbol)
            logits, state = network(symbol[None], state)
    finally:
        network.train(was_training)
    return torch.cat(drawn)


def _finite(logits: Tensor) -> Tensor:
    if not logits.isfinite().all():
        raise MultintError("sample: the network's outputs are no finite numbers: its training has diverged")
    return logits


def _draw(
    logits: Tensor,  # (V,), −∞ for a symbol that is not to be drawn
    temperature: float,
    top_k: int | None,
    generator: torch.Generator | None,
) -> Tensor:  # (1,)
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


def _check_banned(banned: Sequence[int], vocabulary_size: int) -> None:
    strangers = [symbol for symbol in banned if not 0 <= symbol < vocabulary_size]
    if strangers:
        raise OptionError(f"sample: banned holds {strangers[0]}, expected symbols from 0 to {vocabulary_size - 1}")
    if len(set(banned)) == vocabulary_size:
        raise OptionError(f"sample: banned holds all {vocabulary_size} symbols, expected one to be left")
