"""Language models and decoders: what they find is what an exhaustive search finds."""

import itertools
import math
import sys
from collections import Counter, defaultdict
from importlib.util import find_spec

import pytest
import torch
from torch.testing import assert_close

from experiments.core.errors import ExperimentError
from experiments.data import Labelling, Units
from experiments.decoding import WFST, NGram, PrefixBeam, graph

SENTENCES = ["A B A", "B", "A A B", "", "A C"]


# N-grams


def brute_force(order, sentences, words):
    """P(word | history) from the equation alone, counting n-grams anew for each."""
    texts = [("<s>", *sentence.split(), "</s>") for sentence in sentences]

    def counted(gram):
        return sum(text[i : i + len(gram)] == gram for text in texts for i in range(len(text)))

    def probability(word, history):
        following = {w: counted((*history, w)) for w in [*words, "</s>"]}
        kinds, total = sum(count > 0 for count in following.values()), sum(following.values())
        lower = probability(word, history[1:]) if history else 1 / (len(words) + 1)
        return (following[word] + kinds * lower) / (total + kinds) if total else lower

    return lambda word, history: probability(word, history[max(0, len(history) - order + 1) :])


def read_arpa(text):
    """P(word | history) as who reads the file has it."""
    logs, back_offs = {}, {}
    for line in text.splitlines():
        if "\t" in line:
            log, gram, *back_off = line.split("\t")
            logs[tuple(gram.split())] = float(log)
            back_offs[tuple(gram.split())] = float(back_off[0]) if back_off else 0.0

    def log(word, history):
        if (*history, word) in logs:
            return logs[(*history, word)]
        return back_offs.get(history, 0.0) + log(word, history[1:])

    return lambda word, history: 10 ** log(word, history)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_an_ngram_models_probabilities_and_its_file_are_those_of_the_equation(order):
    words = ["A", "B", "C", "D"]  # D is never seen
    model = NGram(SENTENCES, words, order)
    expected, read = brute_force(order, SENTENCES, words), read_arpa(model.arpa())
    histories = [("<s>", *some) for n in range(3) for some in itertools.product(words, repeat=n)]
    for history in [*histories, ("A",), ()]:
        probabilities = [model.probability(word, history) for word in [*words, "</s>"]]
        kept = history[max(0, len(history) - order + 1) :]
        right = torch.tensor([expected(word, history) for word in [*words, "</s>"]])
        assert_close(torch.tensor(probabilities), right)
        assert_close(torch.tensor([read(word, kept) for word in [*words, "</s>"]]), right, rtol=1e-5, atol=0)
        assert sum(probabilities) == pytest.approx(1)
    text = ["B A A", "D"]
    logs = [math.log(expected(w, h)) for s in text for w, h in steps(s)]
    assert model.perplexity(text) == pytest.approx(math.exp(-sum(logs) / 6))


def steps(sentence):
    words = ("<s>", *sentence.split(), "</s>")
    return [(words[i], words[:i]) for i in range(1, len(words))]


def test_a_bigram_is_smoothed_by_hand():
    """After `<s>` A was seen once of once, and by itself once of three, A, B and the end: (1 + 1 · 1/3) / (1 + 1)."""
    model = NGram(["A B"], ["A", "B"], 2)
    assert model.probability("A", ["<s>"]) == pytest.approx(2 / 3)
    assert model.probability("B", ["<s>"]) == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("sentences", "words", "order", "message"),
    [
        (["A"], ["A"], 0, "order: got 0"),
        (["A B"], ["A"], 2, "'B' is not one of the n-gram model's 1 words"),
        (["A"], ["A", "<s>"], 2, "<s> is no word"),
        ([], ["A"], 2, "needs sentences, got none"),
    ],
)
def test_an_ngram_model_says_what_it_cannot_learn(sentences, words, order, message):
    with pytest.raises(ExperimentError, match=message):
        NGram(sentences, words, order)


# Decoders


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "multint/graphs"


wfst = pytest.mark.skipif(
    not all(map(find_spec, ("kaldifst", "kaldilm", "kaldi_decoder"))),
    reason="kaldifst, kaldilm or kaldi-decoder is not installed (extra decoding)",
)
prefix_beam = pytest.mark.skipif(
    not find_spec("flashlight"),
    reason="flashlight-text is not installed (extra decoding)",
)

LEXICON = {"GO": ["G O"], "GOAT": ["G O T"], "TO": ["T O"], "TWO": ["T O"], "A": ["O G", "T G"]}
TEXTS = {
    "characters": ["A B", "B A A", "AB"],
    "words": ["A B A", "B B", "C", "A B"],
    "phones": ["GO TO", "TWO GO A", "GOAT A", "A TWO"],
}


def labelled(kind, texts, lexicon=LEXICON):
    lexicon = {word: [one.split() for one in lexicon[word]] for word in lexicon} if kind == "phones" else None
    units = Units.of(kind, texts, lexicon)
    return Labelling.of(units, [units.encode(text, "x") for text in texts], texts)


def shown(labelling, *paths, sure=6.0):
    """Log posteriors (T, B, V) in which each frame nearly surely has the path's label; `-` is the blank."""
    labels = {symbol: k for k, symbol in enumerate(["-", *labelling.units.symbols])}
    frames = torch.tensor([[labels[symbol] for symbol in path] for path in paths]).T
    lengths = torch.full((len(paths),), len(frames))
    return (sure * torch.nn.functional.one_hot(frames, len(labels)).float()).log_softmax(-1), lengths


def sequences(path, topology):
    """The sequences of labels that a path of frames can be."""
    runs = [(label, len(list(same))) for label, same in itertools.groupby(path)]
    choices = [
        [()] if label == 0 else [(label,) * n for n in range(1, (length if topology == "eesen" else 1) + 1)]
        for label, length in runs
    ]
    return {tuple(itertools.chain(*chosen)) for chosen in itertools.product(*choices)}


def texts_of(labels, units):
    """The texts that a sequence of labels can be."""
    if units.kind == "characters":
        words = "".join(units.symbols[label - 1] for label in labels).split()
        return {" ".join(words)} if all(word in units.lexicon for word in words) else set()
    if not labels:
        return {""}
    return {
        f"{word} {rest}".strip()
        for word in units.lexicon
        for one in units.labels_of(word)
        if list(labels[: len(one)]) == one
        for rest in texts_of(labels[len(one) :], units)
    }


def exhaustive(scores, labelling, order, topology, add):
    """The best text over all paths, the scores of which are added up as probabilities, or the best one is taken."""
    units, T = labelling.units, len(scores)
    model = brute_force(order, labelling.transcripts, sorted(units.lexicon))
    paths = defaultdict(list)
    for path in itertools.product(range(len(units)), repeat=T):
        score = sum(scores[t, label].item() for t, label in enumerate(path))
        for text in {text for labels in sequences(path, topology) for text in texts_of(labels, units)}:
            paths[text].append(score)

    def total(text):
        acoustic = torch.tensor(paths[text]).logsumexp(0).item() if add else max(paths[text])
        return acoustic + sum(math.log(model(*step)) for step in steps(text))

    return max(paths, key=total)


@wfst
@pytest.mark.parametrize("topology", ["strict", "eesen"])
@pytest.mark.parametrize("kind", ["characters", "words", "phones"])
def test_the_graphs_answer_is_that_of_an_exhaustive_search(kind, topology):
    labelling = labelled(kind, TEXTS[kind])
    decoder = WFST(labelling, 2, topology, acoustic_scale=0.7, prior_scale=0.4, beam=100.0)
    torch.manual_seed(0)
    log_posteriors = (3 * torch.randn(5, 6, len(labelling.units))).log_softmax(-1)
    lengths = torch.tensor([5, 5, 5, 4, 4, 3])
    counts = torch.tensor(labelling.counts, dtype=torch.float32)
    scores = 0.7 * (log_posteriors - 0.4 * (counts / counts.sum()).log())
    expected = [exhaustive(scores[:n, b], labelling, 2, topology, add=False) for b, n in enumerate(lengths.tolist())]
    assert len(set(expected)) > 2
    assert decoder(log_posteriors, lengths) == expected


@prefix_beam
@pytest.mark.parametrize("kind", ["characters", "words"])
def test_the_prefix_beams_answer_is_that_of_adding_up_all_paths(kind):
    labelling = labelled(kind, TEXTS[kind])
    torch.manual_seed(0)
    log_posteriors = (2 * torch.randn(5, 6, len(labelling.units))).log_softmax(-1)
    lengths = torch.tensor([5, 5, 5, 4, 4, 3])
    expected = [
        exhaustive(log_posteriors[:n, b], labelling, 2, "strict", add=True) for b, n in enumerate(lengths.tolist())
    ]
    assert len(set(expected)) > 2
    assert PrefixBeam(labelling, 2)(log_posteriors, lengths) == expected


@wfst
@pytest.mark.parametrize(
    ("topology", "path", "text"),
    [
        ("strict", "A-A", "AA"),
        ("strict", "AAA", "A"),
        ("strict", "A A", "A A"),
        ("eesen", "A-A", "AA"),
        ("eesen", "AAA", "AA"),
    ],
)
def test_equal_labels_take_a_blank_between_them_under_the_strict_topology_alone(topology, path, text):
    """AA is a likelier word than A."""
    labelling = labelled("characters", ["AA", "AA", "AA", "A A"])
    assert WFST(labelling, 2, topology, prior_scale=0.0)(*shown(labelling, path)) == [text]


@wfst
def test_homophones_are_told_apart_by_the_language_model_and_pronunciations_are_one_word():
    labelling = labelled("phones", TEXTS["phones"])
    decoder = WFST(labelling, 2, prior_scale=0.0)
    assert decoder(*shown(labelling, "-GGOTO-", "-TO-GOO", "GOT-OG-", "GOT-TGG")) == [
        "GO TO",
        "TWO GO",
        "GOAT A",
        "GOAT A",
    ]


@wfst
def test_a_beam_that_loses_every_sentence_warns():
    """Of characters: the beam has room for the beginning of a word alone, and no word begins so and ends there."""
    labelling = labelled("characters", ["AB"])
    with pytest.warns(UserWarning, match="of 1 utterances no whole sentence was left in the beam"):
        WFST(labelling, 2, beam=0.01)(*shown(labelling, "AA", sure=30.0))


@wfst
def test_a_graph_is_made_once_for_the_same_parts(cache, monkeypatch):
    labelling, made, grammar = labelled("characters", ["AB A", "A"]), Counter(), graph._grammar
    monkeypatch.setattr(graph, "_grammar", lambda *parts: made.update(["made"]) or grammar(*parts))
    frames = shown(labelling, "A-A", "AB ")
    answers = [WFST(labelling, 2)(*frames) for _ in range(2)]
    assert answers[0] == answers[1]
    assert made["made"] == 1
    for other in (
        lambda: WFST(labelling, 3),
        lambda: WFST(labelling, 2, topology="eesen"),
        lambda: WFST(labelled("characters", ["AB A", "AB"]), 2),
    ):
        before = made["made"]
        other()
        assert made["made"] == before + 1
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert WFST(labelling, 2)(*frames) == answers[0], "a damaged one is made anew"
    assert [path.suffix for path in cache.iterdir()] == 4 * [".fst"]


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (lambda some: WFST(some, beam=0.0), "beam is 0.0"),
        (lambda some: WFST(some, acoustic_scale=-1.0), "acoustic_scale is -1.0"),
        (lambda some: WFST(some, prior_scale=2.0), "prior_scale is 2.0"),
        (lambda some: PrefixBeam(some, order=1), "order is 1, expected 2 to 6"),
        (lambda some: PrefixBeam(some, lm_weight=-1.0), "lm_weight is -1.0"),
        (lambda some: PrefixBeam(some, beam_width=0), "beam_width is 0"),
        (PrefixBeam, "the labels are phones, expected characters or words"),
    ],
)
def test_a_decoder_says_which_setting_is_wrong(decoder, message):
    with pytest.raises(ExperimentError, match=message):
        decoder(labelled("phones", TEXTS["phones"]))


@pytest.mark.parametrize(
    ("decoder", "library"),
    [(WFST, "kaldi_decoder"), (WFST, "kaldifst"), (WFST, "kaldilm"), (PrefixBeam, "flashlight.lib.text")],
)
def test_a_decoder_without_its_library_says_what_to_install(decoder, library, monkeypatch):
    for name in ("kaldi_decoder", "kaldifst", "kaldilm"):
        monkeypatch.setitem(sys.modules, name, object())
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ExperimentError, match=r'pip install -c constraints.txt -e "\.\[decoding\]"'):
        decoder(labelled("characters", TEXTS["characters"]))
