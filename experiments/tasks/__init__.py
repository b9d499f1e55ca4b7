"""What is learnt: one Task each."""

from experiments.tasks.language_modelling import LanguageModelling
from experiments.tasks.neural_processes import NeuralProcesses
from experiments.tasks.regression import Regression
from experiments.tasks.state_tracking import StateTracking

__all__ = ["LanguageModelling", "NeuralProcesses", "Regression", "StateTracking"]
