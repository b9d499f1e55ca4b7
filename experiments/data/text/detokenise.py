"""Words put together as one would write them."""

from collections.abc import Iterable

# Marks of WikiText inside a word: "state @-@ of", "1 @,@ 000", "0 @.@ 5".
_INSIDE = {"@-@": "-", "@,@": ",", "@.@": "."}
# What the word before it, or the word after it, holds without a space.
_CLOSING = {*",.;:!?)]}%", "...", "…", "n't", "'s", "'m", "'d", "'re", "'ve", "'ll"}
_OPENING = {*"([{$£€#"}


def detokenised(
    words: Iterable[str],
) -> str:
    """The text of tokenised words: one space between them, none at punctuation, and a line break for `<eos>`.

    Straight double quotes open and close in turns within a line. What only the sense tells stays apart, such as a
    single quote.
    """
    text: list[str] = []
    is_glued, is_quoted = True, False  # whether no space comes before the next word; whether a quote is open
    for word in words:
        if word == "<eos>":
            text.append("\n")
            is_glued, is_quoted = True, False
            continue
        closes = word in _CLOSING or word in _INSIDE or (word == '"' and is_quoted)
        text.append("" if is_glued or closes else " ")
        text.append(_INSIDE.get(word, word.replace("\\/", "/")))  # the Penn Treebank has its slashes so
        is_glued = word in _OPENING or word in _INSIDE or (word == '"' and not is_quoted)
        is_quoted ^= word == '"'
    return "".join(text)
