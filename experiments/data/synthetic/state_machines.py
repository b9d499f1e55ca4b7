"""Sequences of symbols, and the state that each leaves a finite-state machine in."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from experiments.core.errors import ExperimentError
from experiments.data.batch_streams import generator_of
from experiments.data.synthetic.synthetic_data import SyntheticData

Machine = Literal["addition", "maps", "permutations"]
_DRAWS = 1000


class Sequences(NamedTuple):
    """Symbols, and the state after each."""

    symbols: Tensor  # (T, B) int64
    states: Tensor  # (T, B) int64

    def share(self, rank: int, processes: int) -> "Sequences":
        """The sequences of one process among several."""
        return Sequences(*(stream[:, rank::processes] for stream in self))


class StateMachine(SyntheticData):
    """Uniformly random symbols, and the states q_t = δ(symbol_t, q_{t−1}) of a machine that starts in state 0.

    Args:
        machine: δ. "addition": (q + symbol) mod Q, with as many symbols as states; two of them make parity. "maps": for
            each symbol a random map of the states, which soon forgets where it started. "permutations": for each symbol
            a random permutation, which never forgets. Random machines are drawn until one can reach all its states.
        states: Q.
        symbols: S; None for as many as states.
        length: T in training and validation.
        shortest: None, or the least T in training: each batch then has one from there to `length`, all as often.
        test_length: T in the test.
        batch_size, epoch, eval_examples, seed: see `SyntheticData`. The seed draws the machine, too.

    Raises ExperimentError for additions with another number of symbols, and for lengths that fall from one to the next.
    """

    def __init__(
        self,
        machine: Machine = "addition",
        states: int = 2,
        symbols: int | None = None,
        length: int = 8,
        shortest: int | None = None,
        test_length: int = 128,
        batch_size: int = 64,
        epoch: int = 500,
        eval_examples: int = 512,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, epoch, eval_examples, seed)
        symbols = states if symbols is None else symbols
        shortest = length if shortest is None else shortest
        self.check(states=states, symbols=symbols, length=length, shortest=shortest, test_length=test_length)
        if machine == "addition" and symbols != states:
            raise ExperimentError(
                f"--data.symbols: got {symbols}, expected null or {states}: numbers modulo {states} are added."
            )
        if length < shortest:
            raise ExperimentError(
                f"--data.shortest: got {shortest}, expected at most --data.length, which is {length}."
            )
        if test_length < length:
            raise ExperimentError(
                f"--data.test_length: got {test_length}, expected at least --data.length, which is {length}."
            )
        self.machine: Machine = machine
        self.states, self.symbols = states, symbols
        self.shortest, self.length, self.test_length = shortest, length, test_length

    def learnt(self) -> dict[str, Any]:
        return {"symbols": self.symbols, "states": self.states, "length": self.length}

    def setup(self, stage: str | None = None) -> None:
        """Draws the machine. Raises ExperimentError where no draw reaches all states: maps of too few symbols."""
        super().setup(stage)
        generator = generator_of(0, "machine", self.seed)
        draws = (self._transitions(generator) for _ in range(_DRAWS))
        transitions = next((drawn for drawn in draws if _reaches_all(drawn)), None)
        if transitions is None:
            raise ExperimentError(
                f"--data.symbols: got {self.symbols}, expected more: none of {_DRAWS} random machines reaches all "
                f"{self.states} states."
            )
        self.transitions = transitions  # (S, Q): δ

    def draw(self, count: int, split: str, generator: torch.Generator) -> Sequences:
        length = self.test_length if split == "test" else self.length
        if split == "train" and self.shortest < length:
            length = int(torch.randint(self.shortest, length + 1, (), generator=generator))
        symbols = torch.randint(self.symbols, (length, count), generator=generator)
        states = torch.empty_like(symbols)
        state = torch.zeros(count, dtype=torch.long)
        for t, symbol in enumerate(symbols):
            states[t] = state = self.transitions[symbol, state]
        return Sequences(symbols, states)

    def _transitions(self, generator: torch.Generator) -> Tensor:
        S, Q = self.symbols, self.states
        if self.machine == "addition":
            return (torch.arange(S).unsqueeze(-1) + torch.arange(Q)) % Q
        if self.machine == "maps":
            return torch.randint(Q, (S, Q), generator=generator)
        return torch.stack([torch.randperm(Q, generator=generator) for _ in range(S)])


def _reaches_all(transitions: Tensor) -> bool:
    """Whether a machine (S, Q) can get from state 0 to every state."""
    successors = transitions.T.tolist()  # of each state
    reached, ahead = {0}, [0]
    while ahead:
        new = set(successors[ahead.pop()]) - reached
        reached |= new
        ahead += new
    return len(reached) == len(successors)
