"""What is learnt: one Task each."""

from experiments.tasks.language_modelling import LanguageModelling

__all__ = ["LanguageModelling"]
