"""Neural processes: distributions over functions, learnt from many of them."""

from models.neural_process.decoders import ConcatMLP
from models.neural_process.encoders import AttentiveEncoder, Encoder, Gaussian, LatentEncoder, PooledEncoder
from models.neural_process.likelihood import LogLikelihood, elbo, importance_weighted, log_likelihood
from models.neural_process.points import Points, joined, padded
from models.neural_process.process import NeuralProcess

__all__ = [
    "AttentiveEncoder",
    "ConcatMLP",
    "Encoder",
    "Gaussian",
    "LatentEncoder",
    "LogLikelihood",
    "NeuralProcess",
    "Points",
    "PooledEncoder",
    "elbo",
    "importance_weighted",
    "joined",
    "log_likelihood",
    "padded",
]
