"""Data that are made: by teachers, by contradicting tasks, by machines and languages, and to be remembered."""

from experiments.data.synthetic.adding import Adding
from experiments.data.synthetic.affine_tasks import AffineTasks
from experiments.data.synthetic.copying import CopyMemory
from experiments.data.synthetic.digits import SequentialDigits
from experiments.data.synthetic.pairs import Pairs
from experiments.data.synthetic.recall import Recall
from experiments.data.synthetic.regular_languages import RegularLanguage
from experiments.data.synthetic.state_machines import Sequences, StateMachine
from experiments.data.synthetic.synthetic_data import SyntheticData
from experiments.data.synthetic.teachers import Teacher

__all__ = [
    "Adding",
    "AffineTasks",
    "CopyMemory",
    "SyntheticData",
    "Pairs",
    "Recall",
    "RegularLanguage",
    "Sequences",
    "SequentialDigits",
    "StateMachine",
    "Teacher",
]
