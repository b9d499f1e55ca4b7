"""Whole networks as plain PyTorch modules."""

from models.acoustic_model import AcousticModel
from models.attentive_reader import AttentiveReader
from models.hmm import Filtered, ForwardCell, HiddenMarkovModel
from models.initialisation import Glorot, Uniform
from models.language_model import Features, LanguageModel
from models.multi_head import MultiHead
from models.neural_process import (
    AttentiveEncoder,
    ConcatMLP,
    LatentEncoder,
    NeuralProcess,
    Points,
    PooledEncoder,
    elbo,
    importance_weighted,
    log_likelihood,
    padded,
)
from models.policy import Action, Actor, ActorCritic, Critic, MeetingMLP
from models.recurrent_policy import InstructedImage, Judged, RecurrentActorCritic
from models.sampling import sample
from models.sequence_labeller import SequenceLabeller
from models.sequence_reader import SequenceReader
from models.skip_thought import SkipThought
from models.softmax_loss import softmax_cross_entropy, symbol_losses

__all__ = [
    "AcousticModel",
    "Action",
    "Actor",
    "ActorCritic",
    "AttentiveEncoder",
    "AttentiveReader",
    "ConcatMLP",
    "Critic",
    "Features",
    "Filtered",
    "ForwardCell",
    "Glorot",
    "HiddenMarkovModel",
    "InstructedImage",
    "Judged",
    "LanguageModel",
    "LatentEncoder",
    "MeetingMLP",
    "MultiHead",
    "NeuralProcess",
    "Points",
    "PooledEncoder",
    "RecurrentActorCritic",
    "SequenceLabeller",
    "SequenceReader",
    "SkipThought",
    "Uniform",
    "elbo",
    "importance_weighted",
    "log_likelihood",
    "padded",
    "sample",
    "softmax_cross_entropy",
    "symbol_losses",
]
