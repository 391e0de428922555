"""What a story is about, found by counting; and the same story told of somebody else.

`NounFinder` learns the countable nouns of a corpus from the words that follow articles, then ranks the nouns of one
story. `retell` swaps a story's animal, person or thing for another of its kind: this is how a few hundred short stories
teach a small model that the subject of the answer is the subject of the request.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterable

from fastserve.train.storyteller.words import IRREGULAR_PLURALS, KINDS, KNOWN_NOUNS, NO_SUBJECT

_COUNTED = re.compile(
    r"\b(an?|the|my|his|her|their|your|our|this|that) ([a-z]{3,})\b"
    r"(?=([.,;!?]| (?:who|that|was|named|called|lived|had|came|went|said|in|on|of|with|and|to|at|for|from)\b)?)"
)


def plural(noun: str) -> str:
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if re.search(r"(?:s|x|z|ch|sh)$", noun):
        return noun + "es"
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def mentions(text: str, noun: str) -> int:
    """How often a noun, singular or plural, occurs in a text."""
    return len(re.findall(rf"\b(?:{re.escape(noun)}|{re.escape(plural(noun))})\b", text, re.IGNORECASE))


class NounFinder:
    """Knows which words are countable nouns in a corpus, and in how many texts each occurs."""

    def __init__(self, texts: Iterable[str], min_count: int = 5) -> None:
        after_article: Counter[str] = Counter()
        closing: Counter[str] = Counter()  # ... and that end the noun phrase
        self._after_a: Counter[str] = Counter()
        everywhere: Counter[str] = Counter()
        self._num_texts = 0
        self._texts_with: Counter[str] = Counter()
        self._lower_case: Counter[str] = Counter()
        for text in texts:
            self._num_texts += 1
            self._lower_case.update(re.findall(r"\b[a-z]{3,}\b", text))
            words = re.findall(r"[a-z]{3,}", text.lower())
            everywhere.update(words)
            self._texts_with.update(set(words))
            for article, word, follower in _COUNTED.findall(text.lower()):
                after_article[word] += 1
                closing[word] += bool(follower)
                self._after_a[word] += article in ("a", "an")
        self._nouns = KNOWN_NOUNS | {
            word
            for word, count in closing.items()
            if count >= min_count
            and count > 0.5 * after_article[word]
            and after_article[word] > 0.25 * everywhere[word]
            and word not in NO_SUBJECT
            and not word.endswith(("ing", "ed", "ly"))
        }
        self._singular = {plural(noun): noun for noun in sorted(self._nouns)}

    def subjects(self, text: str, title: str = "", limit: int = 3) -> list[str]:
        """The nouns a text is about, best first: frequent in it, rare elsewhere, in its title or opening."""
        words = re.findall(r"[a-z]{3,}", text.lower())
        counts = Counter(self._singular.get(word, word) for word in words)
        opening = {self._singular.get(word, word) for word in words[:30]}
        titled = {self._singular.get(word, word) for word in re.findall(r"[a-z]{3,}", title.lower())}
        scores = {
            noun: count * self._rarity(noun) * (1 + (noun in opening) + 2 * (noun in titled) + (noun in KNOWN_NOUNS))
            for noun, count in counts.items()
            if noun in self._nouns and (count >= 2 or noun in titled)
        }
        best = max(scores.values(), default=0.0)
        return [noun for noun in sorted(scores, key=lambda noun: -scores[noun])[:limit] if scores[noun] > 0.25 * best]

    def _rarity(self, noun: str) -> float:
        return math.log(2 + self._num_texts / (1 + self._texts_with[noun]))

    def phrase(self, noun: str) -> str:
        """The noun as a request names it: `an owl`, but `rain`."""
        return with_article(noun) if noun in KNOWN_NOUNS or self._after_a[noun] >= 3 else noun

    def countable(self, min_count: int) -> list[str]:
        """The singular nouns that occur at least so often after `a` or `an`."""
        plurals = {plural(noun) for noun in self._nouns} - set(IRREGULAR_PLURALS)
        return sorted(noun for noun in self._nouns - plurals if self._after_a[noun] >= min_count)

    def names(self, text: str, limit: int = 2) -> list[str]:
        """Proper names that occur at least twice within sentences and are no ordinary words."""
        found = Counter(re.findall(r"(?<=[a-z,] )(?!Mrs?\b|Miss\b|Sir\b)([A-Z][a-z]{2,})\b", text))
        return [name for name, count in found.most_common(limit) if count >= 2 and self._lower_case[name.lower()] < 3]


def sex_of(text: str) -> str | None:
    """`boy` or `girl` by the pronouns of a text; None where both are common."""
    males, females = (len(re.findall(words, text)) for words in (r"\b[Hh](?:e|im|is)\b", r"\b(?:[Ss]he|[Hh]ers?)\b"))
    if males > 4 * females:
        return "boy"
    return "girl" if females > 4 * males else None


def retell(text: str, title: str, old: str, new: str) -> tuple[str, str]:
    """The story with one noun swapped for another, in every form, with articles and capitals put right."""
    forms = {old.lower(): new, plural(old).lower(): plural(new)}
    words = "|".join(sorted({old, plural(old)}, key=len, reverse=True))
    pattern = re.compile(rf"(?<!')\b(?:(an?)(\s+))?({words})\b", 0 if old[0].isupper() else re.IGNORECASE)

    def swap(match: re.Match[str]) -> str:
        article, space, word = match.groups()
        fresh = forms[word.lower()]
        fresh = fresh.upper() if word.isupper() else fresh.capitalize() if word[0].isupper() else fresh
        if not article:
            return fresh
        fitting = "an" if fresh[0].lower() in "aeiou" else "a"
        return (fitting.capitalize() if article[0].isupper() else fitting) + space + fresh

    return pattern.sub(swap, text), pattern.sub(swap, title)


def another_of_its_kind(noun: str, text: str, chooser: random.Random, excluded: frozenset[str]) -> str | None:
    """A noun of the same kind that the text does not mention; None if the noun is of no known kind."""
    for nouns in KINDS.values():
        if noun in nouns:
            choices = [other for other in nouns if other not in excluded and not mentions(text, other)]
            return chooser.choice(choices) if choices else None
    return None
