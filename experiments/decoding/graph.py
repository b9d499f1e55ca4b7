"""Decoding graphs: from labels in frames to words, with the costs of a language model."""

import contextlib
import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pooch

from experiments.core.errors import ExperimentError
from experiments.data.speech.units import Units
from experiments.decoding.quiet import quiet

if TYPE_CHECKING:
    from kaldifst import StdVectorFst

Topology = Literal["strict", "eesen"]

INSTALL = 'pip install -c constraints.txt -e ".[decoding]"'

# Symbols of graphs are numbers, of which 0 is "none". Labels without the blank keep theirs between T and L, and the
# disambiguation symbols follow: #0, which marks the language model's back-offs, and #1, #2, … at the end of words that
# sound like another one, or like its beginning. On T's own input label k is k + 1, since the blank is there too.
_NONE, _LOOP = 0, 0
_RECIPE = 1  # goes up when the same parts would become another graph

Arc = tuple[int, int, int, int]  # from state, to state, input, output


def words_of(units: Units) -> list[str]:
    """The words of a graph: number k of its output is word k − 1."""
    return sorted(units.lexicon)


def decoding_graph(
    units: Units,
    arpa: str,  # the language model of all of `words_of(units)`
    topology: Topology,
) -> "StdVectorFst":
    """TLG = T ∘ min(det(L ∘ G)): what is heard in frames, as words, with −log of their probability.

    T takes frames to labels, L labels to words, and G is the language model. T accepts a label in one frame or several,
    and blanks between labels: "strict" demands one between equal labels, as CTC is trained; "eesen" does not. Then each
    frame of a label may also be a label of its own.

    The graph is kept in the user's cache folder for multint, where that can be written, by the digest of its parts.

    Raises ExperimentError without `kaldifst` and `kaldilm` (extra `decoding`).
    Source: Mohri et al. 2002; Miao et al. 2015 for T.
    """
    try:
        import kaldifst
        import kaldilm  # noqa: F401
    except ImportError as error:
        raise ExperimentError(f"decoding graphs are made by kaldifst and kaldilm: {INSTALL}") from error
    lexicon, marks = _lexicon(units)
    frames = _frames(len(units), marks, topology)
    parts = (_text(frames), _text(lexicon), words_of(units), arpa)
    recipe = (_RECIPE, *(version(name) for name in ("kaldifst", "kaldilm")))
    digest = hashlib.blake2b(repr((recipe, parts)).encode(), digest_size=16).hexdigest()
    path = Path(pooch.os_cache("multint")) / "graphs" / f"{digest}.fst"
    if (graph := _kept(path)) is not None:
        return graph
    T, L, G = _compiled(parts[0]), _compiled(parts[1]), _compiled(_grammar(arpa, parts[2]))
    kaldifst.arcsort(L, "olabel")
    kaldifst.arcsort(G, "ilabel")
    LG = _vector(kaldifst.compose(L, G))
    kaldifst.determinize_star(LG)
    kaldifst.minimize_encoded(LG)
    kaldifst.arcsort(LG, "ilabel")
    kaldifst.arcsort(T, "olabel")
    graph = _vector(kaldifst.compose(T, LG))
    _keep(graph, path)
    return graph


class _Part(list[Arc]):
    """Arcs from state 0 on, and the states in which a sequence may end."""

    def __init__(self, arcs: Iterable[Arc], final: Iterable[int]) -> None:
        super().__init__(arcs)
        self.final = list(final)


def _frames(labels: int, marks: range, topology: Topology) -> _Part:
    """T, from frames to labels; state 0 has heard a blank, or nothing, and state k label k last."""
    arcs: list[Arc] = [(_LOOP, _LOOP, 1, _NONE)]
    for label in range(1, labels):
        arcs += [(_LOOP, label, label + 1, label), (label, label, label + 1, _NONE)]
        if topology == "eesen":
            arcs.append((label, _LOOP, _NONE, _NONE))
        else:
            arcs.append((label, _LOOP, 1, _NONE))
            arcs += [(label, other, other + 1, other) for other in range(1, labels) if other != label]
    # The marks stand between labels and take no frame. In "eesen", state 0 is reached without one.
    final = [_LOOP] if topology == "eesen" else list(range(labels))
    arcs += [(state, state, _NONE, mark) for state in final for mark in marks]
    return _Part(arcs, final)


def _lexicon(units: Units) -> tuple[_Part, range]:
    """L, from labels to words, and the disambiguation symbols.

    Words of characters have a space between them, and there may be more around them.
    """
    spoken = [(number, one) for number, word in enumerate(words_of(units), start=1) for one in units.labels_of(word)]
    alike = Counter(tuple(labels) for _, labels in spoken)
    beginnings = {tuple(labels[:n]) for _, labels in spoken for n in range(1, len(labels))}
    back_off, used = len(units), Counter[tuple[int, ...]]()
    space = units.symbols.index(" ") + 1 if units.kind == "characters" and " " in units.symbols else None
    end = _LOOP if units.kind != "characters" else 1  # the state after a word
    arcs: list[Arc] = [(state, state, back_off, len(units.lexicon) + 1) for state in {_LOOP, end}]
    if space is not None:
        arcs += [(_LOOP, _LOOP, space, _NONE), (end, _LOOP, space, _NONE)]
    states = end + 1
    for word, labels in spoken:
        key = tuple(labels)
        if alike[key] > 1 or key in beginnings:
            used[key] += 1
            labels = [*labels, back_off + used[key]]
        chain = [_LOOP, *range(states, states + len(labels) - 1), end]
        states += len(labels) - 1
        outputs = [word] + [_NONE] * (len(labels) - 1)
        arcs += zip(chain[:-1], chain[1:], labels, outputs, strict=True)
    return _Part(arcs, {_LOOP, end}), range(back_off, back_off + max(used.values(), default=0) + 1)


def _grammar(arpa: str, words: list[str]) -> str:
    """G, as text: back-offs read #0, and `<s>` and `</s>` are left out."""
    import kaldilm

    symbols = ["<eps>", *words, "#0", "<s>", "</s>"]
    with tempfile.TemporaryDirectory() as folder:
        model, table = Path(folder) / "model.arpa", Path(folder) / "words.txt"
        model.write_text(arpa, encoding="utf-8")
        table.write_text("".join(f"{word} {k}\n" for k, word in enumerate(symbols)), encoding="utf-8")
        with quiet():
            return kaldilm.arpa2fst(str(model), disambig_symbol="#0", read_symbol_table=str(table))


def _text(part: _Part) -> str:
    """OpenFst's format, in which the first arc's state is the one to start in."""
    assert part[0][0] == _LOOP
    return "".join(f"{' '.join(map(str, arc))}\n" for arc in part) + "".join(f"{state}\n" for state in part.final)


def _compiled(text: str) -> "StdVectorFst":
    import kaldifst

    return kaldifst.compile(text, acceptor=False)


def _vector(fst: object) -> "StdVectorFst":
    import kaldifst

    return kaldifst.StdVectorFst(fst)


def _kept(path: Path) -> "StdVectorFst | None":
    import kaldifst

    if not path.is_file():
        return None
    with quiet():  # of a damaged file it says so, and gives None
        return kaldifst.StdVectorFst.read(str(path))


def _keep(graph: "StdVectorFst", path: Path) -> None:
    # Without a folder that can be written the graph is made anew each time.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, aside = tempfile.mkstemp(dir=path.parent, suffix=".part")
        os.close(descriptor)
        if graph.write(aside):
            os.replace(aside, path)
        else:
            os.unlink(aside)
