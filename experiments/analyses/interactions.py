"""How much the integrators of a recurrent network use their product, on one fixed batch of the validation."""

import torch
from torch import Tensor

from experiments.analyses.norms import BatchAnalysis
from experiments.analyses.recording import Recording, named
from experiments.core.errors import ExperimentError
from multint.integrators import RecurrentBatchNorm, interaction

_ROWS = 256  # of each stream, every one of which meets every other


class Interactions(BatchAnalysis):
    """Logs `val/interaction`: the share of an integrator's output that neither x nor h explains alone.

    It is `multint.integrators.interaction` of the streams that the integrator meets in all steps and sequences, of each
    256 at equal distances. Of several layers, and of a cell with several integrators, each has its own, as
    `val/interaction_layer_0_candidate`.

    Args:
        length: T, the steps of a sequence.

    Raises: ExperimentError for a length below 1, where the network or its task cannot be looked at, and for a
    `RecurrentBatchNorm`, by which an integrator is another one at every step.
    """

    def values(self, recording: Recording) -> dict[str, Tensor]:
        values = {}
        for layer in recording.layers:
            for name, f in layer.integrators.items():
                if any(isinstance(part, RecurrentBatchNorm) for part in f.modules()):
                    raise ExperimentError(
                        f"Interactions: {name} has a RecurrentBatchNorm, by which it is another map at every step. "
                        "Leave the analysis out, or choose another norm."
                    )
                x, z = (_some(torch.cat(stream)) for stream in zip(*layer.streams[name], strict=True))
                parts = [layer.name, name.replace(".", "_") if len(layer.integrators) > 1 else ""]
                values[named("interaction", "_".join(filter(None, parts)))] = torch.tensor([interaction(f, x, z)])
        return values


def _some(rows: Tensor) -> Tensor:
    """Rows at equal distances."""
    return rows[torch.linspace(0, len(rows) - 1, min(_ROWS, len(rows))).long()]
