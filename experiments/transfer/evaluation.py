"""What linear models tell of sentence vectors: they are trained on the vectors, which stay as they are.

The settings are those of skip-thoughts' public code (Kiros et al. 2015): vectors of length 1, ten folds, and
C ∈ {2⁰, …, 2⁸}. Two things differ. Of pairs, u ⊙ v weighs √D times as much beside |u − v| as with vectors of length 1.
And C is chosen for SICK too, where that code ends the training early. Bags of random word vectors of D = 256 reach
r = 0.720 so, 0.710 by that code's training, and 0.676 where u ⊙ v weighs what it does there and C is chosen.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.core.errors import ExperimentError
from experiments.core.intervals import estimate_of

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

Array = NDArray[Any]

FOLDS = 10
_STRENGTHS = tuple(2.0**power for power in range(9))  # C, of vectors of length 1
_STRENGTHS_OF_RATINGS = tuple(2.0**power for power in range(-4, 9))
_SEED = 1234  # of the folds and of the bootstrap
_RESAMPLES = 1000
# Of the largest component of the loss's gradient: on MR with random networks it starts at 0.02. With a tenth of this, a
# fit takes three times as long; the accuracy on MR changed by up to 0.2 (its interval is ± 1), and r on SICK by 0.001.
_TOLERANCE = 1e-3


class Score(NamedTuple):
    """A metric, and its 95 % interval."""

    metric: str
    value: float
    low: float
    high: float


def require_scikit_learn() -> None:
    """Raises ExperimentError where it is not installed."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        raise ExperimentError('transfer needs scikit-learn: pip install -c constraints.txt -e ".[transfer]"') from error


class Vectors:
    """An encoder's vectors with the length √D: their entries are of one size, whatever the encoder's are.

    Each sentence is encoded once. A vector of zeros stays one.
    Raises ExperimentError where the encoder does not give a finite vector for each sentence.
    """

    def __init__(self, encode: Callable[[Sequence[str]], Array], name: str) -> None:
        self._encode, self._name = encode, name  # what messages call it
        self._known: dict[str, Array] = {}
        self.seconds = 0.0  # that it took
        self.dimensions = 0  # D, known after a call

    def __call__(self, sentences: Sequence[str]) -> Array:  # (N, D) float32
        begin = perf_counter()
        if new := [sentence for sentence in dict.fromkeys(sentences) if sentence not in self._known]:
            given = self._encode(new)
            try:
                vectors = np.asarray(given)
            except (TypeError, ValueError, RuntimeError) as error:  # numpy's words, and torch's
                raise ExperimentError(f"{self._name}: what it gave is no array: {error}") from error
            self._known.update(zip(new, self._checked(vectors, len(new)), strict=True))
        vectors = np.stack([self._known[sentence] for sentence in sentences])
        self.seconds += perf_counter() - begin
        return vectors

    def _checked(self, vectors: Array, count: int) -> Array:
        expected = (count, self.dimensions or vectors.size // count)  # D is free the first time
        if vectors.shape != expected or not vectors.size or vectors.dtype.kind not in "fiu":
            raise ExperimentError(
                f"{self._name}: got {vectors.dtype} of shape {vectors.shape} for {count} sentences, expected as many "
                "vectors of numbers: (N, D)."
            )
        self.dimensions = vectors.shape[1]
        vectors = vectors.astype(np.float64)
        if (wrong := ~np.isfinite(vectors).all(1)).any():
            raise ExperimentError(f"{self._name}: {wrong.sum()} of {count} vectors have numbers that are not finite.")
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return (vectors * (self.dimensions**0.5 / np.where(lengths > 0, lengths, 1))).astype(np.float32)


def paired(first: Array, second: Array) -> Array:  # (N, 2·D)
    """What tells how two vectors go together: |u − v| and u ⊙ v."""
    return np.concatenate([np.abs(first - second), first * second], axis=1)


def cross_validated(
    features: Array,  # (N, D), of `Vectors`
    labels: Array,  # (N,)
) -> list[Score]:
    """The accuracy of logistic regression on each tenth, its C chosen by cross-validation on the other nine.

    These nine are the folds of that again, so that a model which has seen neither of two tenths serves both.
    The interval is a t-interval over the tenths. It is of these sentences: the models share most of what they learn
    from, so another sample of sentences may lie outside more often.
    """
    folds = _folds(labels)
    accuracy = np.zeros((FOLDS, FOLDS, len(_STRENGTHS)))  # [i, j]: on tenth j, of models that saw neither i nor j
    for i in range(FOLDS):
        for j in range(i):
            seen = (folds != i) & (folds != j)
            for k, model in enumerate(_models(features[seen], labels[seen], features.shape[1], _STRENGTHS)):
                for one, other in ((i, j), (j, i)):
                    accuracy[one, other, k] = model.score(features[folds == other], labels[folds == other])
    reached = []
    for i in range(FOLDS):
        seen = folds != i
        strength = _STRENGTHS[int(accuracy[i].mean(0).argmax())]
        [model] = _models(features[seen], labels[seen], features.shape[1], [strength])
        reached.append(100 * model.score(features[~seen], labels[~seen]))
    estimate = estimate_of(reached)
    assert estimate is not None
    assert estimate.low is not None
    assert estimate.high is not None
    return [Score("accuracy", estimate.mean, estimate.low, estimate.high)]


def tested(
    train: tuple[Array, Array],  # features and labels
    test: tuple[Array, Array],
    dimensions: int,  # of a vector
    metrics: Mapping[str, Callable[[Array, Array], Array]],  # `accuracy`, `f1`; the last one chooses
) -> list[Score]:
    """The metrics of logistic regression on a test, its C chosen by ten-fold cross-validation of the training part.

    Intervals are by bootstrap over the test.
    """
    choose = list(metrics.values())[-1]
    features, labels = train
    folds = _folds(labels)
    reached = np.zeros((FOLDS, len(_STRENGTHS)))
    for i in range(FOLDS):
        seen = folds != i
        for k, model in enumerate(_models(features[seen], labels[seen], dimensions, _STRENGTHS)):
            reached[i, k] = choose(model.predict(features[~seen]), labels[~seen])
    [model] = _models(features, labels, dimensions, [_STRENGTHS[int(reached.mean(0).argmax())]])
    return bootstrapped(metrics, model.predict(test[0]), test[1])


def rated(
    features: Mapping[str, Array],  # of the pairs for "train", "trial" and "test"
    ratings: Mapping[str, Array],
    dimensions: int,  # of a vector
) -> list[Score]:
    """How the ratings that softmax regression expects agree with those of people: r, ρ and the mean squared error.

    It learns a distribution over the ratings 1 to 5, see `rating_targets`. C is the one of the highest r on the trial
    pairs. Intervals are by bootstrap over the test's pairs.
    """
    # A pair with two possible ratings is two examples, whose weights are their probabilities.
    targets = rating_targets(ratings["train"])
    rows, classes = np.nonzero(targets)
    best, predicted = -np.inf, np.zeros(0)
    for model in _models(features["train"][rows], classes, dimensions, _STRENGTHS_OF_RATINGS, targets[rows, classes]):
        on_trial, on_test = (model.predict_proba(features[part]) @ (model.classes_ + 1.0) for part in ("trial", "test"))
        if (r := float(pearson(on_trial, ratings["trial"]))) > best:
            best, predicted = r, on_test
    return bootstrapped({"r": pearson, "ρ": spearman, "MSE": squared_error}, predicted, ratings["test"])


def rating_targets(ratings: Array) -> Array:  # (N, 5)
    """Distributions over 1, …, 5, on a rating's two neighbours alone, whose means are the ratings (Tai et al. 2015)."""
    return np.maximum(0, 1 - np.abs(ratings[:, None] - np.arange(1, 6)))


def bootstrapped(
    metrics: Mapping[str, Callable[[Array, Array], Array]], predicted: Array, expected: Array
) -> list[Score]:
    """The metrics, and the middle 95 % of them over samples of as many examples, drawn with replacement."""
    drawn = np.random.default_rng(_SEED).integers(len(expected), size=(_RESAMPLES, len(expected)))
    scores = []
    for name, metric in metrics.items():
        low, high = np.percentile(metric(predicted[drawn], expected[drawn]), [2.5, 97.5])
        scores.append(Score(name, float(metric(predicted, expected)), float(low), float(high)))
    return scores


def accuracy(predicted: Array, expected: Array) -> Array:
    """The per cent that are as expected, along the last axis."""
    return 100 * (predicted == expected).mean(-1)


def f1(predicted: Array, expected: Array) -> Array:
    """The harmonic mean of precision and recall of the label 1 in per cent, along the last axis; 0 without any 1."""
    hits = (predicted * expected).sum(-1)
    return 200 * hits / np.maximum(predicted.sum(-1) + expected.sum(-1), 1)


def pearson(predicted: Array, expected: Array) -> Array:
    """The correlation along the last axis; 0 where one side is constant."""
    x, y = (values - values.mean(-1, keepdims=True) for values in (predicted, expected))
    scale = np.sqrt((x * x).sum(-1) * (y * y).sum(-1))
    return (x * y).sum(-1) / np.where(scale > 0, scale, 1)


def spearman(predicted: Array, expected: Array) -> Array:
    """The correlation of the ranks along the last axis."""
    from scipy.stats import rankdata  # takes a second

    return pearson(rankdata(predicted, axis=-1), rankdata(expected, axis=-1))


def squared_error(predicted: Array, expected: Array) -> Array:
    """The mean squared error along the last axis."""
    return ((predicted - expected) ** 2).mean(-1)


def _folds(labels: Array) -> Array:
    """The tenth that each example is in; all have the same share of each label."""
    from sklearn.model_selection import StratifiedKFold

    folds = np.zeros(len(labels), dtype=int)
    parts = StratifiedKFold(FOLDS, shuffle=True, random_state=_SEED).split(labels, labels)
    for fold, (_, held_out) in enumerate(parts):
        folds[held_out] = fold
    return folds


def _models(
    features: Array,
    labels: Array,
    dimensions: int,
    strengths: Sequence[float],
    weights: Array | None = None,
) -> "Iterator[LogisticRegression]":
    """The model for each C in turn, to be used before the next, which starts from its weights.

    By L-BFGS, whose step costs two products of the features with a vector: Newton's has a matrix of D × D. On vectors
    of length 1, C would be D times as large; on these the tolerance means the same at any D.
    """
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(warm_start=True, tol=_TOLERANCE, max_iter=1000)
    for strength in strengths:
        model.C = strength / dimensions
        yield model.fit(features, labels, weights)
