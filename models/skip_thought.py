"""The vector of a sentence, learnt by writing the sentences beside it."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.initialisation import Uniform
from models.softmax_loss import softmax_cross_entropy
from models.time_major import last_output, time_major
from multint import Integrator, Recurrent
from multint.errors import OptionError, ShapeError
from multint.integrators import build
from multint.integrators.checks import positive

# B sentences: their words, (T, B) int64, of which each sentence's last one is its end; and how many each has, (B,).
Sentences = tuple[Tensor, Tensor]


class SkipThought(nn.Module):
    """The vector v of a sentence, from which two decoders write the sentence before and the one after.

        e_t = E[word_t]                        v = encoder(e_1 … e_T), its output at the end
        h_t = decoder(x_t, h_{t−1})            logits_t = A h_t + b, of the t-th word

    What a decoder knows of v: by `conditioning="state"` its first state is h_0 = v, and it reads x_t = e_{t−1}. By
    "step" it starts from its own initial state, and reads v at every step: x_t = meet(e_{t−1}, v) or, without `meet`,
    both side by side, which in an additive GRU gives the terms C v of Kiros et al. Before the first word, e_0 = 0.
    The embedding E and the softmax's A and b are shared.

    Of a bidirectional encoder v is the output at both ends, side by side. With a second encoder, `combine`, v has its
    output beside the first one's. (The combine-skip of Kiros et al. joins the vectors of two models trained apart.)

    Args:
        vocabulary_size: V.
        encoder: factory `(X) -> Recurrent` of the encoder's stack. All stacks are time-major.
        combine: factory of a second one; None: there is none.
        decoder: factory `(X, D) -> Recurrent` of each decoder's stack, whose outputs are as many as v has numbers.
        embedding_size: E, of a word.
        conditioning: how a decoder knows v.
        meet: factory `(E, D, E) -> Integrator` of how a word meets v at every step, one for each decoder.
        initialise: fills the matrices anew after they are built; None leaves every part its own initialisation.

    Raises: OptionError for settings out of range, for a `meet` that would not be used, for stacks that are
    `batch_first`, and for a bidirectional decoder, which would read the words that it writes; ShapeError for a decoder
    whose outputs are of another size.
    Source: Kiros et al. 2015, equations 1 to 11; their public code has the conditioning "state".
    """

    def __init__(
        self,
        vocabulary_size: int,
        encoder: Callable[[int], Recurrent],
        decoder: Callable[[int, int], Recurrent],
        combine: Callable[[int], Recurrent] | None = None,
        embedding_size: int = 620,
        conditioning: Literal["state", "step"] = "state",
        meet: Callable[[int, int, int], Integrator] | None = None,
        initialise: Uniform | None = None,
    ) -> None:
        super().__init__()
        if conditioning not in ("state", "step"):
            raise OptionError(f"SkipThought: conditioning is {conditioning!r}, expected 'state' or 'step'")
        if meet is not None and conditioning == "state":
            raise OptionError("SkipThought: got meet, by which no word meets the vector: expected conditioning 'step'")
        self.conditioning = conditioning
        self.embedding = nn.Embedding(
            positive(self, "vocabulary_size", vocabulary_size), positive(self, "embedding_size", embedding_size)
        )
        stacks = [factory(embedding_size) for factory in (encoder, combine) if factory is not None]
        self.encoders = nn.ModuleList(time_major(self, stack) for stack in stacks)
        size = sum(stack.output_size for stack in stacks)  # D
        self.meets = nn.ModuleList()
        self.decoders = nn.ModuleList()
        inputs = embedding_size if conditioning == "state" or meet is not None else embedding_size + size
        for _ in range(2):
            self.decoders.append(_checked(time_major(self, decoder(inputs, size)), size))
            if meet is not None:
                self.meets.append(build(self, "meet", meet, embedding_size, size, embedding_size))
        self.vector_size = size
        self.softmax = nn.Linear(size, vocabulary_size)
        if initialise is not None:
            initialise(self)

    def forward(
        self,
        words: Tensor,  # (T, B) int64; what stands past a length has no influence
        lengths: Tensor,  # (B,), each at least 1
    ) -> Tensor:  # (B, D)
        """The vectors of sentences."""
        return self.vectors(self.embedding(words), lengths)

    def vectors(
        self,
        embedded: Tensor,  # (T, B, E)
        lengths: Tensor,  # (B,)
    ) -> Tensor:  # (B, D)
        """The vectors of sentences whose words have these embeddings, which may be of other words than the model's."""
        return torch.cat([last_output(encoder, embedded, lengths) for encoder in self.encoders], -1)

    def loss(
        self,
        sentences: Sentences,
        previous: Sentences,
        following: Sentences,
    ) -> Tensor:  # ()
        """−log Pr[previous, following | sentences] in nats, the mean of all words to write, ends of sentences too."""
        v = self(*sentences)
        written = [self._written(which, v, beside) for which, beside in enumerate((previous, following))]
        features, targets = (torch.cat(parts) for parts in zip(*written, strict=True))
        return softmax_cross_entropy(features, self.softmax.weight, self.softmax.bias, targets)

    def _written(
        self,
        which: int,  # decoder
        v: Tensor,  # (B, D)
        beside: Sentences,
    ) -> tuple[Tensor, Tensor]:
        """What the softmax reads, (N, D), and the word to write, (N,), at each place of these sentences."""
        words, lengths = beside
        e = self.embedding(words)
        x, start = torch.cat([torch.zeros_like(e[:1]), e[:-1]]), None
        if self.conditioning == "state":
            start = _starting(self.decoders[which], v)
        elif self.meets:
            x = self.meets[which](x, v)
        else:
            x = torch.cat([x, v.expand(len(x), -1, -1)], -1)
        output, _ = self.decoders[which](x, start)
        is_word = torch.arange(len(words), device=words.device).unsqueeze(1) < lengths
        return output[is_word], words[is_word]


def _starting(decoder: Any, v: Tensor) -> Any:
    """The decoder's initial state with v for what every layer's cell gives out: the first field of its state."""
    starts = decoder.initial_states(len(v))
    _, *others = (torch.stack(field) for field in zip(*starts, strict=True))
    output = v.expand(len(starts), -1, -1)
    return (output, *others) if others else output


def _checked(decoder: Recurrent, size: int) -> Recurrent:
    if decoder.bidirectional:
        raise OptionError(
            "SkipThought: decoder.bidirectional is true, expected false: its backward direction reads the words to be "
            "written"
        )
    if decoder.output_size != size:
        raise ShapeError(
            f"SkipThought: the decoder's outputs have {decoder.output_size} features, expected {size}, those of a "
            "sentence's vector: its factory is called with them"
        )
    return decoder
