"""Policies with a memory, for observations that do not tell all: an actor-critic whose layers the context meets."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from multint import LSTM, Integrator
from multint.errors import OptionError, ShapeError
from multint.integrators import Projected
from multint.integrators.base import build
from multint.integrators.checks import flag, positive
from multint.recurrent import Recurrent


class InstructedImage(Integrator):
    """Features of a small image of symbols, which an instruction meets at every place.

    Each place is the sum of its symbols' embeddings, the instruction that of its words'. After a convolution both meet,
    and another convolution and a linear layer follow, each with a ReLU: y = φ(P φ(K₂ φ(f(φ(K₁ e), w)))).

    Shapes: x (..., side · side · S), symbols as numbers, by places; z (..., Z), words as numbers, 0 for none.

    Args:
        channels: of the image's layers.
        word_features: W, of the words' embeddings.
        integrator: factory `(channels, W, channels) -> Integrator` of f.
        symbols: S counts, of the symbols that a place has of each kind; BabyAI's objects, colours and states.
        words: in the vocabulary, "no word" not counted.

    Raises: OptionError for a number below 1, and for symbols and words beyond their counts; ShapeError for an image
    that is no square of places.
    Source: Chevalier-Boisvert et al. 2019; Hui et al. 2020 for the embedding.
    """

    z_name = "context"
    x_weights = ("symbols.weight",)
    z_weights = ("words.weight",)

    def __init__(
        self,
        x_features: int,
        context_features: int,
        out_features: int,
        channels: int = 32,
        word_features: int = 32,
        integrator: Callable[[int, int, int], Integrator] = Projected,
        symbols: tuple[int, ...] = (11, 6, 3),
        words: int = 32,
    ) -> None:
        super().__init__(x_features, context_features, out_features)
        sizes = {"channels": channels, "word_features": word_features, "words": words}
        for name, size in [*sizes.items(), *(("symbols", count) for count in symbols)]:
            positive(self, name, size)
        self.counts = symbols
        self.side = round((x_features / len(symbols)) ** 0.5)
        if self.side < 3 or self.side**2 * len(symbols) != x_features:
            raise ShapeError(
                f"InstructedImage: x has {x_features} features, expected {len(symbols)} symbols for each place of a "
                "square, whose side is at least 3"
            )
        self.symbols = nn.Embedding(sum(symbols), channels)
        self.words = nn.EmbeddingBag(words + 1, word_features, mode="sum", padding_idx=0)
        self.before = nn.Conv2d(channels, channels, 3, padding=1)
        self.meeting = build(self, "integrator", integrator, channels, word_features, channels)
        self.after = nn.Conv2d(channels, channels, 3, stride=2)
        self.last = nn.Linear(channels * ((self.side - 1) // 2) ** 2, out_features)

    def integrate(
        self,
        x: Tensor,  # (..., side · side · S)
        z: Tensor,  # (..., Z)
    ) -> Tensor:  # (..., O)
        leading, side = x.shape[:-1], self.side
        symbols, words = x.long().reshape(-1, side, side, len(self.counts)), z.expand(*leading, -1).long()
        if not x.is_meta:
            self._refuse_unknown(symbols, words)
        # A table for each kind, so that no symbol beyond its count is read as one of the next kind.
        tables = self.symbols.weight.split(self.counts)
        kinds = zip(symbols.unbind(-1), tables, strict=True)
        image = sum(nn.functional.embedding(kind, table) for kind, table in kinds)
        words = self.words(words.reshape(-1, z.shape[-1]))
        image = torch.relu(self.before(image.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        image = torch.relu(self.meeting(image, words[:, None, None]))
        image = torch.relu(self.after(image.permute(0, 3, 1, 2)))
        return torch.relu(self.last(image.flatten(1))).reshape(*leading, self.out_features)

    def _refuse_unknown(self, symbols: Tensor, words: Tensor) -> None:
        if (symbols < 0).any() or (symbols >= symbols.new_tensor(self.counts)).any():
            highest = symbols.amax((0, 1, 2)).tolist()
            raise OptionError(
                f"InstructedImage: the image has symbols up to {highest}, expected those from 0 and below "
                f"{list(self.counts)} (symbols)"
            )
        known = self.words.num_embeddings - 1
        if (words < 0).any() or (words > known).any():
            raise OptionError(
                f"InstructedImage: the instruction has words from {words.min()} to {words.max()}, expected those "
                f"from 0 to {known} (words)"
            )


class Judged(NamedTuple):
    """What an actor-critic says of steps."""

    policy: Distribution  # of actions (T, B, A), or (T, B) if they are discrete
    value: Tensor  # (T, B)
    state: Any  # the memory's after the last step


class RecurrentActorCritic(nn.Module):
    """Policy and value of what was seen up to a step: linear maps of m(f(o, c)), with a memory m.

    The policy is categorical for discrete actions. For others it is normal, with learnt standard deviations that do not
    depend on the observation, and actions beyond ± 1 are cut off by the environment.

    Args:
        action_features: A; the number of actions to choose from if they are discrete.
        network: factory `(X, C, features) -> Integrator` of f: how observation and context meet.
        memory: factory `(features, hidden) -> Recurrent` of m.
        features: of f's output.
        hidden: of the memory.
        is_discrete: whether an action is one of so many.

    Shapes: o (T, B, X), c (T, B, C).
    Raises: OptionError for a number below 1 and for a memory that reads otherwise; ShapeError for streams that do not
    fit.
    """

    def __init__(
        self,
        observation_features: int,
        context_features: int,
        action_features: int,
        network: Callable[[int, int, int], Integrator],
        memory: Callable[[int, int], Recurrent] = LSTM,
        features: int = 128,
        hidden: int = 128,
        is_discrete: bool = True,
    ) -> None:
        super().__init__()
        self.is_discrete = flag(self, "is_discrete", is_discrete)
        self.network = build(self, "network", network, observation_features, context_features, features)
        self.memory = memory(features, hidden)
        if self.memory.bidirectional or self.memory.batch_first:
            raise OptionError("RecurrentActorCritic: the memory is bidirectional or batch_first, expected neither")
        self.actor = nn.Linear(self.memory.output_size, positive(self, "action_features", action_features))
        self.critic = nn.Linear(self.memory.output_size, 1)
        nn.init.orthogonal_(self.actor.weight, gain=0.01)  # first, no action is preferred
        nn.init.zeros_(self.actor.bias)
        self.log_std = None if is_discrete else nn.Parameter(torch.full((action_features,), -0.5))

    def forward(
        self,
        observation: Tensor,  # (T, B, X)
        context: Tensor,  # (T, B, C)
        reset: Tensor,  # (T, B) bool: this step begins an episode
        state: Any = None,
    ) -> Judged:
        """Policy and value at each step, from the state before the first: the memory's initial one if None."""
        output, state = self.memory(self.network(observation, context), state, reset=reset)
        parameters = self.actor(output)
        if self.log_std is None:
            policy: Distribution = Categorical(logits=parameters, validate_args=False)
        else:
            policy = Independent(Normal(parameters, self.log_std.exp(), validate_args=False), 1, validate_args=False)
        return Judged(policy, self.critic(output).squeeze(-1), state)
