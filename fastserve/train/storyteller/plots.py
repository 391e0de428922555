"""A small story grammar: complete, simple tales about any hero, friend or thing.

A few hundred short tales are too few to teach a small model that an answer is about its request. The plots in
`plots.txt`, written for this project, are told of any subject in many ways: `[a|b]` is a choice, `{the_hero}` a slot.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from importlib.resources import files

from fastserve.train.storyteller.topics import with_article
from fastserve.train.storyteller.words import KINDS, NAMES

_PRONOUNS = {"boy": ("he", "him", "his"), "girl": ("she", "her", "her"), "thing": ("it", "it", "its")}
_KINDS, _KIND_SHARES = ("animal", "man", "woman", "name", "any"), (0.3, 0.14, 0.06, 0.2, 0.3)
_SHARE_WITH_THING = 0.45


@dataclass(frozen=True, slots=True)
class Told:
    """A tale as an answer tells it, with the noun phrase that a request names it by (may be empty)."""

    text: str
    topic: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class _Character:
    phrase: str  # `an owl`, `a girl named Lucy`
    short: str  # `the owl`, `Lucy`
    sex: str


class StoryGrammar:
    """Tells stories of random heroes, friends and things, none of whom is in `excluded`.

    Besides the word lists, `nouns` and `names` (by sex) of a corpus take part: among many hundreds of subjects, to copy
    the one that was asked for is easier to learn than to know them all.
    """

    def __init__(self, excluded: frozenset[str], nouns: list[str], names: dict[str, list[str]]) -> None:
        self._sections = _read_sections(
            files("fastserve.train.storyteller").joinpath("plots.txt").read_text(encoding="utf-8")
        )
        self._nouns = {kind: [noun for noun in listed if noun not in excluded] for kind, listed in KINDS.items()}
        self._nouns["any"] = [noun for noun in nouns if noun not in excluded] or self._nouns["thing"]
        self._names = {sex: [*listed, *names.get(sex, ())] for sex, listed in NAMES.items()}

    def tell(self, chooser: random.Random) -> Told:
        """An opening, a trait or none, a plot and an ending, with every choice made and every slot filled."""
        hero = self._character(chooser)
        friend = self._character(chooser)
        while friend.short == hero.short:
            friend = self._character(chooser)
        thing = chooser.choice(self._nouns[chooser.choice(("thing", "any"))])
        with_thing = chooser.random() < _SHARE_WITH_THING
        plot = chooser.choice(self._sections["plot with a thing" if with_thing else "plot"])
        endings = [end for end in self._sections["ending"] if "{the_friend}" not in end or "{the_friend}" in plot]
        trait = chooser.choice([*self._sections["character"], ""])
        separator = chooser.choice((" ", "\n"))
        pattern = (
            f"{chooser.choice(self._sections['opening'])} {trait}{separator}{plot}{separator}{chooser.choice(endings)}"
        )
        text = _fill(pattern, self._slots(hero, friend, thing, chooser), chooser)
        draw = chooser.random()
        if with_thing and draw < 0.5:
            return Told(text, with_article(thing) if draw < 0.3 else f"{hero.phrase} and {with_article(thing)}")
        return Told(text, f"{hero.phrase} and {friend.phrase}" if draw > 0.85 else hero.phrase)

    def _slots(self, hero: _Character, friend: _Character, thing: str, chooser: random.Random) -> dict[str, str]:
        he, him, his = _PRONOUNS[hero.sex]
        slots = {"a_hero": hero.phrase, "the_hero": hero.short, "he": he, "him": him, "his": his}
        slots |= {"a_friend": friend.phrase, "the_friend": friend.short}
        slots |= {"thing": thing, "a_thing": with_article(thing), "the_thing": f"the {thing}"}
        slots |= {name: chooser.choice(self._sections[name]) for name in ("place", "goal")}
        return slots | {_capital(name): _capital(value) for name, value in slots.items()}

    def _character(self, chooser: random.Random) -> _Character:
        """An animal, a person, a child with a name, or anything at all."""
        kind = chooser.choices(_KINDS, _KIND_SHARES)[0]
        sex = {"man": "boy", "woman": "girl", "any": "thing"}.get(kind) or chooser.choice(("boy", "girl"))
        if kind == "name":
            name, child = chooser.choice(self._names[sex]), chooser.choice((sex, f"little {sex}"))
            return _Character(f"a {child} {chooser.choice(('named', 'called'))} {name}", name, sex)
        noun = chooser.choice(self._nouns[kind])
        return _Character(with_article(noun), f"the {noun}", sex)


def _read_sections(text: str) -> dict[str, list[str]]:
    """The entries of each section, every entry on one line."""
    sections = {}
    for part in re.split(r"^== ", text, flags=re.MULTILINE)[1:]:
        name, body = part.split("\n", 1)
        sections[name] = [" ".join(entry.split()) for entry in body.split("\n\n") if entry.strip()]
    return sections


def _fill(pattern: str, slots: dict[str, str], chooser: random.Random) -> str:
    chosen = re.sub(r"\[([^\]]*)\]", lambda match: chooser.choice(match[1].split("|")), pattern)
    text = re.sub(r"\{(\w+)\}", lambda match: slots[match[1]], chosen)
    return re.sub(r" +", " ", text).replace(" \n", "\n").strip()


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
