"""Build the chat tuning set: requests made from the stories themselves, answered by the stories.

A complete short tale answers `Tell me a story about ...`; the first part of a long one answers a request for a
beginning. Many tales are retold of somebody else (topics.retell) and others are told by a grammar (plots.py), afresh in
each epoch. Pieces of the books as they are keep their language from being forgotten.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastserve.train.storyteller import phrases
from fastserve.train.storyteller.corpus import Document
from fastserve.train.storyteller.plots import StoryGrammar, Told
from fastserve.train.storyteller.recipe import Chats
from fastserve.train.storyteller.topics import NounFinder, another_of_its_kind, mentions, retell, sex_of
from fastserve.train.storyteller.words import NAMES

Message = tuple[str, str]  # role, content
_TALE_OPENS = re.compile(
    r"Once|There (?:was|were|lived)|(?:A|An|Two|Three|Some) [A-Za-z]+|One (?:day|morning|evening|night|winter|summer)"
    r"|(?:A )?[Ll]ong(?:,? long)? (?:time )?ago|In (?:a|the) |The [A-Z]"
)
_OPENING_LENGTH = 200  # letters in which a tale must name its topic
_MIN_NOUN_COUNT = 8  # a noun the corpus counts so often (`a kettle`) can be the subject of a plot
_FIRST_PERSON = re.compile(r"\bI\b")
_SPEECH = re.compile(r'"[^"]*"')


@dataclass(frozen=True, slots=True)
class Tale:
    """A text that can answer a request; `is_complete` says whether it has an end."""

    text: str
    title: str
    subjects: tuple[str, ...]
    name: str  # a proper name in it, or ""
    is_complete: bool
    requests: int


class ChatSet:
    """Makes the conversations of an epoch from the tales of a corpus; no request names one of `held_out_subjects`."""

    def __init__(
        self,
        training: dict[str, list[Document]],
        section: Chats,
        held_out_subjects: frozenset[str],
    ) -> None:
        self._section = section
        self._excluded = held_out_subjects
        self._nouns = NounFinder(document.text for name in section.requests_per_story for document in training[name])
        self.tales = [
            tale
            for name, requests in section.requests_per_story.items()
            for document in training[name]
            for tale in self._tales_of(document, requests)
        ]
        self._grammar = StoryGrammar(held_out_subjects, self._nouns.countable(_MIN_NOUN_COUNT), self._names_by_sex())
        self._books = [document for name in section.book_sources for document in training[name]]

    def rows(self, seed: int) -> Iterator[dict[str, Any]]:
        """The rows of one epoch as `fastserve finetune instruction` reads them: `messages`, or a piece of a book."""
        chooser, chat_words, book_words = random.Random(seed + 1), 0, 0
        share = self._section.book_share
        for conversation in self.conversations(seed):
            num_words = sum(len(content.split()) for _, content in conversation)
            if num_words > self._section.max_words:
                continue
            yield {"messages": [{"role": role, "content": content} for role, content in conversation]}
            chat_words += num_words
            while self._books and book_words < chat_words * share / (1 - share):
                piece = self._piece(chooser)
                book_words += len(piece.split())
                yield {"text": piece}

    def conversations(self, seed: int) -> Iterator[list[Message]]:
        """The conversations of one epoch as messages: real tales, told plots, small talk."""
        chooser = random.Random(seed)
        complete = [tale for tale in self.tales if tale.is_complete]
        for tale in self.tales:
            if tale.is_complete or chooser.random() < self._section.opening_share:
                for _ in range(tale.requests):
                    messages = self._request(tale, chooser)
                    if tale.is_complete and chooser.random() < self._section.follow_up_share:
                        messages += self._follow_up(self._told(chooser.choice(complete), chooser), chooser)
                    yield self._with_system(messages, chooser)
        for _ in range(self._section.plots):
            messages = self._request_plot(self._grammar.tell(chooser), chooser)
            if chooser.random() < self._section.follow_up_share:
                messages += self._follow_up(self._grammar.tell(chooser), chooser)
            yield self._with_system(messages, chooser)
        for _ in range(self._section.small_talk_rounds):
            for questions, answers in phrases.SMALL_TALK:
                for question in questions:
                    yield self._with_system([("user", question), ("assistant", chooser.choice(answers))], chooser)

    def _piece(self, chooser: random.Random) -> str:
        """Paragraphs of a book that follow each other, about as long as the longest answer."""
        paragraphs = chooser.choice(self._books).text.split("\n")
        start = chooser.randrange(len(paragraphs))
        return "\n".join(_paragraphs_within(paragraphs[start:], self._section.max_answer_words)) or paragraphs[start]

    def _tales_of(self, document: Document, requests: int) -> Iterator[Tale]:
        """A short document is a tale if it was published or reads like one; a long one gives its first paragraphs."""
        told_by_nobody = not _FIRST_PERSON.search(_SPEECH.sub("", document.text))
        if not document.title and not (told_by_nobody and _TALE_OPENS.match(document.text)):
            return
        paragraphs = document.text.split("\n")
        num_words = len(document.text.split())
        if self._section.min_answer_words <= num_words <= self._section.max_answer_words:
            yield self._tale(document.text, document.title, True, requests)
        elif num_words > self._section.max_answer_words:
            opening = "\n".join(_paragraphs_within(paragraphs, self._section.max_answer_words // 2))
            if len(opening.split()) >= 50:
                yield self._tale(opening, document.title, False, 1)

    def _tale(self, text: str, title: str, is_complete: bool, requests: int) -> Tale:
        subjects = tuple(noun for noun in self._nouns.subjects(text, title) if noun not in self._excluded)
        names = [name for name in self._nouns.names(text) if name.lower() not in subjects]
        return Tale(text, title, subjects, names[0] if names else "", is_complete, requests)

    def _with_system(self, messages: list[Message], chooser: random.Random) -> list[Message]:
        if chooser.random() < self._section.system_share:
            return [("system", chooser.choice(phrases.SYSTEM_PROMPTS)), *messages]
        return messages

    def _request(self, tale: Tale, chooser: random.Random) -> list[Message]:
        """One way of asking for a tale, and the tale."""
        told = self._told(tale, chooser)
        if not tale.is_complete:
            requests = phrases.OPENING_REQUESTS if told.topic else phrases.OPEN_OPENING_REQUESTS
            return _exchange(requests, told, chooser)
        draw = chooser.random()
        is_short = told.text.count(" ") < 200
        if draw < 0.12 and (messages := self._continuation(told.text, chooser)):
            return messages
        if draw < 0.16 and told.title and is_short:
            return _exchange(phrases.NAME_TITLE_REQUESTS, told, chooser, answer=f"{told.title}.")
        if draw < 0.20 and told.topic and is_short:
            return _exchange(phrases.WHO_REQUESTS, told, chooser, answer=f"It is a story about {told.topic}.")
        if draw < 0.30 and told.title and not any(mentions(told.title, noun) for noun in self._excluded):
            return _exchange(phrases.TITLE_REQUESTS, told, chooser)
        if draw < 0.36 or not told.topic:
            return _exchange(phrases.OPEN_REQUESTS, told, chooser)
        return _exchange(phrases.STORY_REQUESTS, told, chooser)

    def _request_plot(self, told: Told, chooser: random.Random) -> list[Message]:
        draw = chooser.random()
        if draw < 0.06 and (messages := self._continuation(told.text, chooser)):
            return messages
        return _exchange(phrases.OPEN_REQUESTS if draw < 0.12 else phrases.STORY_REQUESTS, told, chooser)

    def _follow_up(self, told: Told, chooser: random.Random) -> list[Message]:
        has_topic = told.topic and chooser.random() < 0.5
        return _exchange(phrases.ANOTHER_TOPIC_REQUESTS if has_topic else phrases.ANOTHER_REQUESTS, told, chooser)

    def _names_by_sex(self) -> dict[str, list[str]]:
        """The names in the tales whose pronouns tell the sex."""
        found: dict[str, set[str]] = {"boy": set(), "girl": set()}
        for tale in self.tales:
            if tale.name and (sex := sex_of(tale.text)):
                found[sex].add(tale.name)
        return {sex: sorted(names) for sex, names in found.items()}

    def _told(self, tale: Tale, chooser: random.Random) -> Told:
        """A tale as it is or retold of somebody else. Its topic (may be empty) is one that the tale opens with."""
        text, title, subjects, name = tale.text, tale.title, list(tale.subjects), tale.name
        sex = sex_of(text)
        if chooser.random() < self._section.retold_share:
            for index, noun in enumerate(subjects):
                if other := another_of_its_kind(noun, text, chooser, self._excluded):
                    text, title = retell(text, title, noun, other)
                    subjects[index] = other
            if name and sex:
                text, title = retell(text, title, name, other := chooser.choice(NAMES[sex]))
                name = other
        opening = text[:_OPENING_LENGTH]
        topics = [self._nouns.phrase(noun) for noun in subjects if mentions(opening, noun)]
        if name and name in opening and (not topics or chooser.random() < 0.35):
            topic = f"a {sex} {chooser.choice(('named', 'called'))} {name}" if sex and chooser.random() < 0.6 else name
        elif len(topics) >= 2 and chooser.random() < 0.3:
            topic = f"{topics[0]} and {topics[1]}"
        else:
            topic = topics[0] if topics else ""
        return Told(text, topic, title)

    def _continuation(self, text: str, chooser: random.Random) -> list[Message] | None:
        """A request to continue a story cut after its first sentences; None if it is too short to cut."""
        sentences = re.split(r"(?<=[.!?])\s+(?=[\"A-Z])", text)
        if len(sentences) < 5:
            return None
        head = " ".join(sentences[: chooser.randint(1, min(4, len(sentences) // 2))])
        request = chooser.choice(phrases.CONTINUE_REQUESTS).format(story=head)
        return [("user", request), ("assistant", text[len(head) :].strip())]


def _exchange(requests: tuple[str, ...], told: Told, chooser: random.Random, answer: str = "") -> list[Message]:
    request = chooser.choice(requests).format(topic=told.topic, title=told.title, story=told.text)
    return [("user", request), ("assistant", answer or told.text)]


def _paragraphs_within(paragraphs: list[str], num_words: int) -> list[str]:
    """The first paragraphs that have at most so many words together."""
    ends = itertools.accumulate(len(paragraph.split()) for paragraph in paragraphs)
    return [paragraph for paragraph, end in zip(paragraphs, ends, strict=True) if end <= num_words]
