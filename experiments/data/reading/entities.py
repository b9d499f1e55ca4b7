"""Who and what a novel names, found by capitals alone.

A word is a name if it is written with a capital within sentences, nearly always. Names that follow each other are one
mention, with the title before them: "Mr Frank Churchill". Mentions of a passage are of one entity where a shorter one
begins or ends exactly one longer one: "Churchill" and "Mr Churchill" are Mr Frank Churchill where no other Churchill
is there. It knows no grammar: "she" is nobody, and a place is an entity like a person.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_ABBREVIATED = ("Mr", "Mrs", "Messrs", "Dr", "St", "Capt", "Col", "Gen", "Rev", "Hon")
_TITLES = {*_ABBREVIATED} | {
    *("Miss", "Sir", "Lady", "Lord", "Master", "Madam", "Madame", "Monsieur", "Mademoiselle", "Don", "Uncle", "Aunt"),
    *("Captain", "Colonel", "Major", "General", "Admiral", "Doctor", "Professor", "Inspector", "Father", "Brother"),
    *("Sister", "Mother", "King", "Queen", "Prince", "Princess", "Duke", "Duchess", "Earl", "Count", "Bishop", "Saint"),
}
_LEAST = 3  # times that a name must stand with a capital within sentences
_SHARE = 0.9  # of its places without a sentence's start, where it must have the capital

_TOKEN = re.compile(
    rf"(?P<title>(?:{'|'.join(_ABBREVIATED)})\b)\.?|[^\W\d_]+(?:[-'’][^\W\d_]+)*|\d+|--|[^\w\s]",
)
_POSSESSIVE = re.compile(r"(.+)(['’]s)")


class Mention(NamedTuple):
    """An entity as a sentence names it."""

    title: str  # "" where there is none
    names: tuple[str, ...]


def sentences(text: str) -> list[list[str]]:
    """The sentences of a text as words, without emphasis; paragraphs have blank lines between them.

    A sentence ends at . ! or ? with the quotes that follow it at once, unless the next word has a small letter.
    """
    found: list[list[str]] = []
    for paragraph in re.split(r"\n\s*\n", text.replace("_", " ").replace("\r", "")):
        sentence: list[str] = []
        is_over, end = False, 0  # whether the sentence may be, and where the last word has ended
        for match in _TOKEN.finditer(paragraph):
            word = match["title"] or match[0]  # a title without its full stop, which ends no sentence
            is_closing = match.start() == end and word in "\"'’”)]"
            if is_over and not is_closing:
                if not word[0].islower():
                    found.append(sentence)
                    sentence = []
                is_over = False
            possessive = _POSSESSIVE.fullmatch(word)
            sentence += possessive.groups() if possessive else [word]
            is_over = is_over or word in (".", "!", "?")
            end = match.end()
        if sentence:
            found.append(sentence)
    return found


def names_in(text: Iterable[Sequence[str]]) -> set[str]:
    """The words of these sentences that are names: see above."""
    capitals, small = Counter[str](), Counter[str]()
    for sentence in text:
        for before, word in zip(["", *sentence], sentence, strict=False):
            if _is_capitalised(word):
                if before[:1].isalpha():  # after a full stop or a quote, any word has a capital
                    capitals[word] += 1
            elif word[0].isalpha():
                small[word] += 1
    return {
        word
        for word, count in capitals.items()
        if count >= _LEAST and count >= _SHARE * (count + small[word.lower()]) and word not in _TITLES
    }


def _is_capitalised(word: str) -> bool:
    """Such as "Emma", and neither "I" nor "I'm" nor "VOLUME"."""
    return word[0].isupper() and any(map(str.islower, word)) and word[:2] not in ("I'", "I’")


def mentioning(sentence: Sequence[str], names: set[str]) -> list[str | Mention]:
    """The sentence with each mention of an entity in place of its words."""
    whole: list[str | Mention] = []
    i = 0
    while i < len(sentence):
        end = start = i + (sentence[i] in _TITLES)
        while end < len(sentence) and sentence[end] in names:
            end += 1
        if end > start:
            whole.append(Mention(sentence[i] if start > i else "", tuple(sentence[start:end])))
        else:
            end = i + 1
            whole.append(sentence[i])
        i = end
    return whole


def merged(mentions: Iterable[Mention]) -> dict[Mention, Mention]:
    """The fullest mention of the entity that each of a passage's mentions names; see above."""
    distinct = list(dict.fromkeys(mentions))
    fuller = {}
    for one in distinct:
        longer = [other for other in distinct if _is_shorter(one, other)]
        # "Emma", "Emma Woodhouse" and "Miss Emma Woodhouse" are one: of these the last is the longest of all.
        longest = [other for other in longer if not any(_is_shorter(other, another) for another in longer)]
        fuller[one] = longest[0] if len(longest) == 1 else one
    return fuller


def _is_shorter(one: Mention, other: Mention) -> bool:
    """Whether the one's names begin or end the other's, and its title, where it has one, is the other's."""
    size = len(one.names)
    is_part = one.names in (other.names[:size], other.names[-size:])
    return one != other and is_part and one.title in ("", other.title)
