"""What a reader attends to, drawn."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 96  # characters of a line
_INCH = 0.085  # the width of a character of size 10, and a line's height is twice as much


def attention(
    words: Sequence[str],
    weights: Tensor,  # (T,)
    title: str,
) -> "Figure":
    """The words in lines, the darker the background the larger the weight; the largest is written beside."""
    from matplotlib.figure import Figure

    places, line, column = [], 0, 0
    for word in words:
        if column and column + len(word) > _COLUMNS:
            line, column = line + 1, 0
        places.append((line, column))
        column += len(word) + 1
    heading = "\n".join(textwrap.fill(part, _COLUMNS) for part in title.splitlines())
    lines, above = line + 1, heading.count("\n") + 2
    figure = Figure(figsize=(_INCH * (_COLUMNS + 4), 2 * _INCH * (lines + above + 1)))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-2, _COLUMNS + 2), ylim=(lines + 1, -above))
    axes.axis("off")
    style = {"family": "monospace", "fontsize": 9, "va": "center"}
    axes.text(0, -above / 2, heading, weight="bold", **style)
    highest = weights.max().item()
    for word, weight, (y, x) in zip(words, weights.tolist(), places, strict=True):
        share = weight / highest
        axes.fill_between([x - 0.3, x + len(word) + 0.3], y - 0.45, y + 0.45, color="C1", alpha=share, linewidth=0)
        for i, letter in enumerate(word):  # each in its place, whatever the font's width
            axes.text(x + i + 0.5, y, letter, ha="center", **style)
    axes.text(_COLUMNS, lines + 0.5, f"largest weight {highest:.2f}", ha="right", **style)
    return figure
