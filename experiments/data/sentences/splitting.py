"""The sentences of a text, and the words of a sentence, by a few rules that know no grammar."""

import re
from collections.abc import Iterator

PARAGRAPH_END = re.compile(r"\n\s*\n")
# After these a full stop ends no sentence; nor does it after a single letter, but for the words I and a.
_ABBREVIATIONS = {
    *("mr", "mrs", "ms", "messrs", "dr", "prof", "st", "capt", "col", "gen", "lieut", "lt", "sgt", "rev", "hon"),
    *("sen", "gov", "jr", "sr", "esq", "vs", "viz", "cf", "vol", "fig", "pp", "e.g", "i.e"),
}
_MARK = re.compile(r"[.!?…]+[\"'”’»)\]]*(?:\s+|(?=--|—))")  # with the quotes and brackets that it stands within
_LAST_WORD = re.compile(r"[^\W\d_]+(?:\.[^\W\d_]+)*$")
_OPENING = "\"'“‘«([*-–— "

# How words are written alike, whoever typed them.
_ALIKE = [
    (re.compile(r"[\x00-\x08\x0e-\x1b\x7f\u200b\ufeff_]+"), " "),  # control characters, and underscores: emphasis
    (re.compile("[‘’‚‛`´]"), "'"),
    (re.compile("''|[“”„‟«»]"), ' " '),
    (re.compile("[‒–—―]|-{2,}"), " -- "),
    (re.compile(r"…|\.{2,}"), " ... "),
    # "don't" is "do" and "n't", "it's" is "it" and "'s", as in the Penn Treebank.
    (re.compile(r"(?<=[^\W_])(?=n't\b)"), " "),
    (re.compile(r"(?<=[^\W_])(?='(?:s|d|m|ll|re|ve)\b)"), " "),
]
_WORD = re.compile(
    r"\d+(?:[.,:/]\d+)+"  # 1,000.50
    r"|'(?:s|d|m|ll|re|ve)\b"
    r"|[^\W_]+(?:['-][^\W_]+)*"  # o'clock, well-known
    r"|--|\.\.\.|[^\w\s]"
)


def sentences_of(text: str) -> Iterator[str]:
    """The sentences of running text, each in one line.

    Blank lines end one. So do . ! ? with the quotes and brackets behind them, if white space or a dash follows and then
    no small letter, but not the full stop of an abbreviation or of an initial. What has no letter and no digit is none.
    """
    for paragraph in PARAGRAPH_END.split(text):
        line = " ".join(paragraph.split())
        begin = 0
        for mark in _MARK.finditer(line):
            if _ends(line, mark):
                yield from _if_any(line[begin : mark.end()])
                begin = mark.end()
        yield from _if_any(line[begin:])


def words_of(sentence: str) -> list[str]:
    """The words of a sentence in small letters, punctuation apart. Split again, joined by spaces, they are the same.

    A clitic is a word (do n't, it 's), and so is a number, a word with hyphens or apostrophes in it, -- and ...; any
    other symbol is one alone. Quotes, dashes and dots are written alike.
    """
    line = sentence.lower()
    for pattern, written in _ALIKE:
        line = pattern.sub(written, line)
    return _WORD.findall(line)


def _ends(line: str, mark: re.Match[str]) -> bool:
    following = line[mark.end() :].lstrip(_OPENING)[:1]
    if following.islower():
        return False
    if mark[0].rstrip() != ".":
        return True
    last = _LAST_WORD.search(line[max(0, mark.start() - 20) : mark.start()])
    if last is None:
        return True
    return last[0].lower() not in _ABBREVIATIONS and (len(last[0]) > 1 or last[0] in "Ia")


def _if_any(sentence: str) -> Iterator[str]:
    if any(map(str.isalnum, sentence)):
        yield sentence.strip()
