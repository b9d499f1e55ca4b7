"""What is learnt: one LightningModule each."""

from experiments.tasks.language_modelling import LanguageModelling

__all__ = ["LanguageModelling"]
