"""What policies act in: environments whose episodes have a context each, which the agent is told or must find out."""

from experiments.environments.babyai import BabyAI
from experiments.environments.complex_ode import ComplexODE
from experiments.environments.double_integrator import DoubleIntegrator
from experiments.environments.dynamics import Dynamics
from experiments.environments.environment import Environment, Spaces, Streams
from experiments.environments.experience import Experience, Transitions
from experiments.environments.gymnasium_environment import Gymnasium
from experiments.environments.hidden_context import HiddenContext
from experiments.environments.pendulum import Pendulum
from experiments.environments.simulation import Simulation

__all__ = [
    "BabyAI",
    "ComplexODE",
    "DoubleIntegrator",
    "Dynamics",
    "Environment",
    "Experience",
    "Gymnasium",
    "HiddenContext",
    "Pendulum",
    "Simulation",
    "Spaces",
    "Streams",
    "Transitions",
]
