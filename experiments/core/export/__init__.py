"""A trained network in other forms: as weights, or as a program that runs without this project."""

from experiments.core.export.weights import load_network

__all__ = ["load_network"]
