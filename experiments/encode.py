"""The commands `encode` and `nearest`: vectors of sentences, and the sentences whose vectors are alike."""

from argparse import Namespace
from pathlib import Path
from time import perf_counter

import numpy as np

from experiments.core.command_line import Invocation, OptionParser
from experiments.core.errors import ExperimentError, replacing
from experiments.data.books import check_encoding, read_book
from experiments.data.sentences import read_sentences
from experiments.sentence_encoder import SentenceEncoder


def encode(invocation: Invocation) -> None:
    """Write the vectors of a file's sentences, (N, D) in float32, in NumPy's format, and tell how fast that went.

    Raises ExperimentError for a checkpoint of another task, and for a file that is no text.
    """
    parser = _parser("encode", "The vectors of the sentences in a file.")
    parser.add_argument("--output", type=Path, required=True, metavar="NPY", help="the file of the vectors")
    options = parser.parse_args(invocation.argv[1:])
    if options.output.suffix != ".npy":
        raise ExperimentError(f"--output: got {options.output}, expected a name that ends in .npy.")
    if not options.output.parent.is_dir():  # found out before the work
        raise ExperimentError(f"--output: {options.output.parent} is no folder, expected one to write to.")
    _, vectors = _encoded(options, _encoder(options, invocation))
    with replacing(options.output) as aside, open(aside, "wb") as file:
        np.save(file, vectors)
    print(f"{options.output}: {' × '.join(map(str, vectors.shape))}")


def nearest(invocation: Invocation) -> None:
    """Print the sentences of a file that are nearest to one, by the cosine of their vectors.

    Raises ExperimentError as `encode` does.
    """
    parser = _parser("nearest", "The sentences of a file that are most like one, with the cosine of their vectors.")
    parser.add_argument("sentence", metavar="SENTENCE", help="what they are to be like")
    parser.add_argument("--count", type=int, default=5, metavar="N", help="how many (5)")
    options = parser.parse_args(invocation.argv[1:])
    if options.count < 1:
        raise ExperimentError(f"--count: got {options.count}, expected at least 1.")
    encoder = _encoder(options, invocation)
    sentences, vectors = _encoded(options, encoder)
    wanted = encoder.encode([options.sentence])[0]
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(wanted)
    cosines = vectors @ wanted / np.maximum(lengths, np.finfo(np.float32).tiny)
    order = [i for i in np.argsort(-cosines, kind="stable") if sentences[i].strip()]
    for i in order[: options.count]:
        print(f"{cosines[i]:.3f}  {sentences[i]}")


def _encoder(options: Namespace, invocation: Invocation) -> SentenceEncoder:
    encoder = SentenceEncoder.load(options.checkpoint, options.device, invocation.trusted)
    if options.vectors is not None:
        print(f"{options.vectors}: mapped by {encoder.expand(options.vectors)} words that the model knows")
    return encoder


def _encoded(options: Namespace, encoder: SentenceEncoder) -> tuple[list[str], np.ndarray]:
    text = read_book(options.file, check_encoding(options.encoding))
    sentences = [*read_sentences(text, options.layout)]
    begin = perf_counter()
    vectors = encoder.encode(sentences, options.batch_size, progress=True)
    seconds = perf_counter() - begin
    print(
        f"{len(sentences):,} sentences in {seconds:.1f} s, {len(sentences) / seconds:,.0f} a second; "
        f"{encoder.known(sentences):.1%} of their words are known"
    )
    return sentences, vectors


def _parser(name: str, what: str) -> OptionParser:
    parser = OptionParser(prog=f"python -m experiments {name}", description=what)
    parser.add_argument("checkpoint", type=Path, metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument("file", type=Path, metavar="FILE", help="a text, each line of which is a sentence")
    parser.add_argument("--layout", choices=("lines", "prose"), default="lines", help="prose: split it into sentences")
    parser.add_argument("--encoding", default="utf-8", help="of the text, by Python's name for it (utf-8)")
    parser.add_argument("--vectors", type=Path, metavar="FILE", help="word2vec's or GloVe's, for unknown words")
    parser.add_argument("--batch_size", type=int, default=128, help="sentences in a batch (128)")
    parser.add_argument("--device", default="cpu", help="where the network runs, as cuda (cpu)")
    return parser
