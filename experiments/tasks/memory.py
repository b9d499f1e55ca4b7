"""Memory: answer at the end of a sequence what was in it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from experiments.core.errors import ExperimentError
from experiments.core.task import Mean, Monitor, Stage
from experiments.data.synthetic import Recall
from experiments.tasks.synthetic_task import SyntheticTask
from models import SequenceReader


class Memory(SyntheticTask):
    """Minimises the mean loss of the answers at the last steps of each sequence.

    Of numbers it is the squared error; of classes −log p(class), and `accuracy` is logged too, the share that is right.

    Args:
        network: factory `(X, O) -> SequenceReader` for the numbers of features and of outputs.
        optimizer, halve_after: see `Task`.
    """

    monitor = Monitor("loss", "min")
    unit = "answers"

    sizes_key, expected = "inputs", "Adding, CopyMemory, SequentialDigits or RegularLanguage"

    def __init__(self, network: Callable[[int, int], SequenceReader], **settings: Any) -> None:
        super().__init__(network, **settings)

    def sizes_of(self, description: dict[str, Any]) -> tuple[int, ...]:
        return description["inputs"], description["outputs"]

    def last_loss(self, network: nn.Module, batch: Recall, steps: int) -> Tensor:
        """See `Task`. The answers stand at the end: the sequences of the data must have so many steps."""
        if len(batch.xs) != steps:
            raise ExperimentError(
                f"Memory: the sequences have {len(batch.xs)} steps, and the analysis {steps}: set its length to that."
            )
        answers = batch.answers[-1]
        assert isinstance(network, SequenceReader)
        outputs = network(batch.xs.to(network.decoder.weight.dtype))[-1]
        if answers.is_floating_point():
            return (outputs.squeeze(-1) - answers).square().sum()
        return nn.functional.cross_entropy(outputs, answers, reduction="sum")

    def measure(self, batch: Recall, stage: Stage) -> dict[str, Mean]:
        assert self.network is not None
        answers = batch.answers
        outputs = self.network(batch.xs, len(answers))
        if answers.is_floating_point():
            return {"loss": Mean(nn.functional.mse_loss(outputs.squeeze(-1), answers), answers.numel())}
        loss = nn.functional.cross_entropy(outputs.flatten(0, 1), answers.flatten())
        right = (outputs.detach().argmax(-1) == answers).float().mean()
        return {"loss": Mean(loss, answers.numel()), "accuracy": Mean(right, answers.numel())}
