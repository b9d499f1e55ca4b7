"""Whole networks as plain PyTorch modules."""

from models.initialisation import Uniform
from models.language_model import LanguageModel
from models.sampling import sample

__all__ = ["LanguageModel", "Uniform", "sample"]
