"""What is learnt: one Task each."""

from experiments.tasks.language_modelling import LanguageModelling
from experiments.tasks.neural_processes import NeuralProcesses

__all__ = ["LanguageModelling", "NeuralProcesses"]
