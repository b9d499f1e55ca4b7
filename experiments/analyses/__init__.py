"""What a recurrent network does while it is trained, as Lightning callbacks: they look, and change nothing."""

from experiments.analyses.activations import HiddenActivations
from experiments.analyses.interactions import Interactions
from experiments.analyses.norms import GradientNorms, StreamNorms

__all__ = ["GradientNorms", "HiddenActivations", "Interactions", "StreamNorms"]
