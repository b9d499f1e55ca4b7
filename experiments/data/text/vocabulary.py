"""The symbols of a text and their indices."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from experiments.core.errors import ExperimentError

Unit = Literal["characters", "bytes"]

# Symbols looked up at once: the 4-byte code points of a 100 MB text are never all in memory.
_CHUNK = 1 << 22


class Vocabulary:
    """A bijection between symbols and the indices 0 … V-1.

    The symbols are all characters (`str` of length 1) or all byte values (`int`); `unit` says which.
    Raises ExperimentError where there are no symbols, one occurs twice, or one is neither.
    """

    def __init__(
        self,
        symbols: Sequence[str] | Sequence[int],
    ) -> None:
        self.symbols: tuple[str, ...] | tuple[int, ...] = tuple(symbols)  # type: ignore[assignment]
        self.unit: Unit = _unit(self.symbols)
        codes = np.array([ord(s) if isinstance(s, str) else s for s in self.symbols])
        # One entry more than the largest code: larger ones are clipped to it, and it stays unknown.
        self._indices = np.full(codes.max() + 2, -1, dtype=np.int32)
        self._indices[codes] = np.arange(len(codes))

    @classmethod
    def of(cls, text: str | bytes) -> "Vocabulary":
        """The distinct symbols of `text`, sorted: characters of a `str`, byte values of a `bytes`."""
        symbols: Any = sorted(set[Any](text))
        return cls(symbols)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Vocabulary":
        """The vocabulary whose `state_dict()` this is."""
        return cls(state["symbols"])

    def state_dict(self) -> dict[str, Any]:
        """`{"unit": …, "symbols": […]}`, plain values only, so that checkpoints load with `weights_only=True`."""
        return {"unit": self.unit, "symbols": list(self.symbols)}

    @property
    def start(self) -> int:
        """What a network reads first where nothing precedes: the first symbol, in most texts newline or space."""
        return 0

    @property
    def unknown(self) -> None:
        """No symbol stands for others."""
        return None

    def encode(self, text: str | bytes) -> Tensor:
        """The indices of the text's symbols, (N,) int64; a byte vocabulary reads a `str` as UTF-8.

        Raises ExperimentError naming the first symbol that is not in the vocabulary.
        """
        return self.encode_compact(text).long()

    def encode_compact(self, text: str | bytes) -> Tensor:
        """As `encode`, (N,) in the smallest integer type that holds V: what a long stream is stored in."""
        if self.unit == "bytes" and isinstance(text, str):
            text = text.encode()
        if self.unit == "characters" and isinstance(text, bytes):
            raise ExperimentError("Vocabulary: got bytes, expected characters: decode them, or set --data.unit=bytes.")
        dtype = np.min_scalar_type(len(self) - 1) if len(self) <= 256 else np.dtype(np.int32)
        indices = np.empty(len(text), dtype)
        filled = 0
        for codes in _codes(text):
            found = self._indices.take(codes, mode="clip")
            if found.size and found.min() < 0:
                raise self._unknown(text[filled + int(found.argmin())])
            indices[filled : filled + len(found)] = found
            filled += len(found)
        return torch.from_numpy(indices)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The text of these indices, (N,); bytes are read as UTF-8, invalid ones become U+FFFD."""
        symbols: Any = [self.symbols[i] for i in (ids.tolist() if isinstance(ids, Tensor) else ids)]
        return "".join(symbols) if self.unit == "characters" else bytes(symbols).decode("utf-8", errors="replace")

    def __len__(self) -> int:
        return len(self.symbols)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.symbols == other.symbols

    def __hash__(self) -> int:
        return hash(self.symbols)

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} {self.unit})"

    def _unknown(self, symbol: str | int) -> ExperimentError:
        return ExperimentError(
            f"Vocabulary: {symbol!r} is not among the {len(self)} {self.unit} of this vocabulary. "
            "Remove it from the text, or train on a text that holds it."
        )


def _unit(symbols: Sequence[str | int]) -> Unit:
    if not symbols:
        raise ExperimentError("Vocabulary: got no symbols, expected at least one: is the text empty?")
    if len(set(symbols)) < len(symbols):
        raise ExperimentError("Vocabulary: a symbol occurs twice, expected distinct symbols.")
    if all(isinstance(s, str) and len(s) == 1 for s in symbols):
        return "characters"
    if all(isinstance(s, int) and 0 <= s < 256 for s in symbols):
        return "bytes"
    raise ExperimentError("Vocabulary: expected all symbols to be single characters, or all byte values 0 … 255.")


def _codes(text: str | bytes) -> Iterator[np.ndarray]:
    for start in range(0, len(text), _CHUNK):
        chunk = text[start : start + _CHUNK]
        if isinstance(chunk, bytes):
            yield np.frombuffer(chunk, np.uint8)
        else:
            yield np.frombuffer(chunk.encode("utf-32-le", "surrogatepass"), "<u4")
