"""A corpus of random sentences with planted repetitions and leaks, and what is to be found in it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

_SYLLABLES = ("ba", "ko", "ri", "ten", "mu", "sal", "vi", "dor", "ne", "hul", "gra", "pli", "zo", "fen", "wa", "chi")


def words_of(chooser: random.Random, number: int) -> list[str]:
    vocabulary = ["".join(chooser.choices(_SYLLABLES, k=chooser.choice((1, 2, 3)))) for _ in range(3000)]
    return chooser.choices(vocabulary, k=number)


@dataclass
class Planted:
    """`copies` are the indices of texts that repeat an earlier one in other words here and there."""

    texts: list[str]
    copies: set[int] = field(default_factory=set)


def planted_corpus(num_originals: int = 300, num_copies: int = 120, seed: int = 1) -> Planted:
    """Originals of 80 to 400 words, copies of some, and as many decoys that share a third of an original.

    A copy has 1 to 4 % of its words changed, dropped or added, and may be in capitals or with other marks.
    """
    chooser = random.Random(seed)
    originals = [sentences(words_of(chooser, chooser.randint(80, 400))) for _ in range(num_originals)]
    found = Planted(list(originals))
    for number in range(num_copies):
        found.copies.add(len(found.texts))
        found.texts.append(edited(originals[number], chooser))
    for number in range(num_copies):
        words = originals[-1 - number].split()
        rest = words_of(chooser, 2 * len(words) // 3)
        found.texts.append(" ".join(words[: len(words) // 3] + rest))
    return found


def sentences(words: list[str]) -> str:
    return "\n".join(" ".join(words[start : start + 12]).capitalize() + "." for start in range(0, len(words), 12))


def edited(text: str, chooser: random.Random) -> str:
    words = text.split()
    for _ in range(max(1, int(len(words) * chooser.uniform(0.01, 0.04)))):
        place = chooser.randrange(len(words))
        kind = chooser.choice(("change", "drop", "add"))
        if kind == "drop":
            del words[place]
        elif kind == "add":
            words.insert(place, chooser.choice(words))
        else:
            words[place] = chooser.choice(words)
    text = " ".join(words)
    return chooser.choice((text, text.upper(), text.replace(".", " !"), "  " + text + "\n"))
