"""State tracking: tell the state of a machine after every symbol that it reads."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from experiments.core.errors import ExperimentError
from experiments.core.task import Mean, Monitor, Stage
from experiments.data.synthetic import Sequences
from experiments.tasks.synthetic_task import SyntheticTask
from models import SequenceLabeller


class StateTracking(SyntheticTask):
    """Minimises −Σ log p(q_t | symbol_1 … symbol_t) over all steps, on sequences of one length.

    Logged are the loss in nats per step and `accuracy`, the share of steps whose state is right. In the test it is told
    by length too, since the sequences go on beyond the training's length L: `accuracy_L` of the steps to L,
    `accuracy_2L` of those from L+1 to 2L, `accuracy_4L` of those from 2L+1 to 4L, and so on. The validation sees no
    step beyond L, so that the best checkpoint is chosen without them. The test's `above_chance` is of the last step
    alone: with a its accuracy, (a − 1/Q) / (1 − 1/Q), which is 0 for who guesses.

    Args:
        network: factory `(S, Q) -> SequenceLabeller` for the numbers of symbols and of states.
        optimizer, halve_after: see `Task`.
    """

    monitor = Monitor("loss", "min")
    unit = "steps"

    sizes_key, expected = "symbols", "StateMachine"

    def __init__(self, network: Callable[[int, int], SequenceLabeller], **settings: Any) -> None:
        super().__init__(network, **settings)

    def sizes_of(self, description: dict[str, Any]) -> tuple[int, ...]:
        return description["symbols"], description["states"]

    def last_loss(self, network: nn.Module, batch: Sequences, steps: int) -> Tensor:
        if len(batch.symbols) < steps:
            raise ExperimentError(
                f"StateTracking: the sequences have {len(batch.symbols)} steps, expected at least {steps}. Raise "
                "--data.length, or lower the length of the analysis."
            )
        logits = network(batch.symbols[:steps])[-1]
        return nn.functional.cross_entropy(logits, batch.states[steps - 1], reduction="sum")

    def measure(self, batch: Sequences, stage: Stage) -> dict[str, Mean]:
        assert self.network is not None
        logits = self.network(batch.symbols)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch.states.flatten())
        right = (logits.detach().argmax(-1) == batch.states).float()
        means = {"loss": Mean(loss, right.numel()), "accuracy": Mean(right.mean(), right.numel())}
        if stage == "test":
            first, last = 0, self.description["length"]
            while first < len(right):
                steps = right[first:last]
                means[f"accuracy_{min(last, len(right))}"] = Mean(steps.mean(), steps.numel())
                first, last = last, 2 * last
            chance = 1 / logits.shape[-1]
            means["above_chance"] = Mean((right[-1].mean() - chance) / (1 - chance), right[-1].numel())
        return means
