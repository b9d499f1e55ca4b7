"""Data that are made: by teachers, by tasks that contradict each other, and by finite-state machines."""

from experiments.data.synthetic.affine_tasks import AffineTasks
from experiments.data.synthetic.drawn_data import DrawnData
from experiments.data.synthetic.pairs import Pairs
from experiments.data.synthetic.state_machines import Sequences, StateMachine
from experiments.data.synthetic.teachers import Teacher

__all__ = ["AffineTasks", "DrawnData", "Pairs", "Sequences", "StateMachine", "Teacher"]
