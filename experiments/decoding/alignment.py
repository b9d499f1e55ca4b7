"""A reference over a hypothesis, word by word."""

from collections.abc import Sequence

Pair = tuple[str | None, str | None]  # a word of the reference and one of the hypothesis; None: there is none


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[Pair]:
    """The words side by side, with the fewest substitutions, deletions and insertions (Levenshtein)."""
    R, H = len(reference), len(hypothesis)
    distance = [[r + h for h in range(H + 1)] for r in range(R + 1)]  # of the first r words to the first h
    for r in range(1, R + 1):
        for h in range(1, H + 1):
            change = distance[r - 1][h - 1] + (reference[r - 1] != hypothesis[h - 1])
            distance[r][h] = min(change, distance[r - 1][h] + 1, distance[r][h - 1] + 1)
    pairs: list[Pair] = []
    r, h = R, H
    while r or h:
        same = r > 0 and h > 0 and reference[r - 1] == hypothesis[h - 1]
        if r and h and distance[r][h] == distance[r - 1][h - 1] + (not same):
            r, h = r - 1, h - 1
            pairs.append((reference[r], hypothesis[h]))
        elif r and distance[r][h] == distance[r - 1][h] + 1:
            r -= 1
            pairs.append((reference[r], None))
        else:
            h -= 1
            pairs.append((None, hypothesis[h]))
    return pairs[::-1]


def alignment(name: str, reference: str, hypothesis: str) -> str:
    """The words of both in two lines, one below the other, with `*` where one has none."""
    pairs = align(reference.split(), hypothesis.split())
    wrong = sum(r != h for r, h in pairs)
    lines = {"reference ": [r for r, _ in pairs], "hypothesis": [h for _, h in pairs]}
    widths = [max(len(word or "") for word in pair) for pair in pairs]
    shown = [f"{name}: {wrong} of {len(reference.split())} wrong"]
    for title, words in lines.items():
        cells = [
            ("*" * width if word is None else word).ljust(width) for word, width in zip(words, widths, strict=True)
        ]
        shown.append(f"  {title}  {' '.join(cells)}".rstrip())
    return "\n".join(shown)
