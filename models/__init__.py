"""Whole networks as plain PyTorch modules."""

from models.initialisation import Uniform
from models.language_model import Features, LanguageModel
from models.sampling import sample
from models.softmax_loss import softmax_cross_entropy, symbol_losses

__all__ = ["Features", "LanguageModel", "Uniform", "sample", "softmax_cross_entropy", "symbol_losses"]
