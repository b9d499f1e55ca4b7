"""Sentences with their neighbours."""

from experiments.data.sentences.sentence_data import Books
from experiments.data.sentences.splitting import sentences_of, words_of
from experiments.data.sentences.tokens import read_sentences
from experiments.data.sentences.triples import Batch, Sentences, Triples

__all__ = ["Batch", "Books", "Sentences", "Triples", "read_sentences", "sentences_of", "words_of"]
