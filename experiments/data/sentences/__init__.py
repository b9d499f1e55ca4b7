"""Sentences with their neighbours."""

from experiments.data.sentences.sentence_data import Books
from experiments.data.sentences.splitting import sentences_of, words_of
from experiments.data.sentences.tokens import lines_of
from experiments.data.sentences.triples import Batch, Triples

__all__ = ["Batch", "Books", "Triples", "lines_of", "sentences_of", "words_of"]
