"""What is learnt: one Task each."""

from experiments.tasks.language_modelling import LanguageModelling
from experiments.tasks.memory import Memory
from experiments.tasks.neural_processes import NeuralProcesses
from experiments.tasks.proximal_policy_optimization import ProximalPolicyOptimization
from experiments.tasks.reading import Reading
from experiments.tasks.regression import Regression
from experiments.tasks.sentence_vectors import SentenceVectors
from experiments.tasks.soft_actor_critic import SoftActorCritic
from experiments.tasks.speech import Speech
from experiments.tasks.state_tracking import StateTracking

__all__ = [
    "LanguageModelling",
    "Memory",
    "NeuralProcesses",
    "ProximalPolicyOptimization",
    "Reading",
    "Regression",
    "SentenceVectors",
    "SoftActorCritic",
    "Speech",
    "StateTracking",
]
