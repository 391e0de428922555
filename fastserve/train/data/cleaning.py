"""One raw document to clean text, or to the name of the rule that drops it.

Repair comes first (broken encodings by ftfy, control characters, spaces), then the language, then quality rules after
Rae et al. 2021, "Scaling Language Models: Gopher", table A1, in forms that also hold for Chinese.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass

import numpy as np

from fastserve.train.data.hashing import Hashes, sequence_hashes, word_hashes
from fastserve.train.data.settings import PrepareSettings

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\u200b\u2060\ufeff\ufffe\uffff]")
_SPACES = re.compile(r"[ \t\u00a0\u2000-\u200a\u202f\u3000]+")
_BLANK_LINES = re.compile(r"\n{3,}")
_ENTITY = re.compile(r"&(?:[a-z]{2,8}|#\d{1,6}|#x[0-9a-f]{1,5});", re.IGNORECASE)
_LANGUAGE_CHARACTERS = 500  # enough to tell; the identifier's time goes with the length
_CHINESE = {"wuu": "zh", "yue": "zh"}  # the identifier tells them apart by single characters: unreliable in short texts
_IDEOGRAPH = re.compile("[\u3400-\u9fff]")
_PERSONAL = (
    ("<EMAIL>", re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b")),
    ("<IP_ADDRESS>", re.compile(r"\b(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)\b")),
)
_CARD = re.compile(r"\b\d(?:[ -]?\d){12,18}\b")
_TELEPHONE = re.compile(r"(?<![\w.])(?:\+\d{1,3}[ .-]?)?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]\d{2,4}){1,3}(?![\w.])")


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A document behind the rules: `dropped_by` names the rule that drops it, "" if it stays."""

    text: str
    words: Hashes
    language: str = ""
    dropped_by: str = ""


def clean(raw: str, settings: PrepareSettings) -> Cleaned:
    """Repair a document and apply the rules; words are hashed once for all that follows."""
    text = repair(raw)
    if settings.scrub_personal:
        text = scrub_personal(text)
    words = word_hashes(text)
    if not len(words):
        return Cleaned(text, words, dropped_by="empty")
    if len(words) < settings.min_words:
        return Cleaned(text, words, dropped_by="too short")
    if settings.max_words and len(words) > settings.max_words:
        return Cleaned(text, words, dropped_by="too long")
    language = language_of(text) if settings.languages else ""
    if language and language not in settings.languages:
        return Cleaned(text, words, language, "other language")
    rule = quality_fault(text, words) if settings.quality else ""
    return Cleaned(text, words, language, rule)


def repair(text: str) -> str:
    """Undo wrong decodings and HTML entities; NFC; no control characters; single spaces; at most one blank line."""
    if not text.isascii():
        import ftfy
        from ftfy.badness import is_bad

        if is_bad(text):
            text = ftfy.fix_encoding(text)
        text = unicodedata.normalize("NFC", text)
    if "&" in text and _ENTITY.search(text):
        import html

        text = html.unescape(text)
    text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = "\n".join(_SPACES.sub(" ", line).strip() for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", text).strip()


def language_of(text: str) -> str:
    """The language's code (py3langid, ISO 639-1), from the beginning of the text."""
    import py3langid

    language: str = py3langid.classify(text[:_LANGUAGE_CHARACTERS])[0]
    return _CHINESE.get(language, language)


def quality_fault(text: str, words: Hashes) -> str:
    """The name of the first rule that the text breaks, or ""."""
    num_symbols = sum(map(text.count, "#…")) + text.count("...")
    if num_symbols > 0.1 * len(words):
        return "symbols"
    pieces = text.split()
    if _IDEOGRAPH.search(text) is None and not 2.5 <= sum(map(len, pieces)) / len(pieces) <= 12:
        return "word length"
    if sum(not piece.isalpha() and not any(map(str.isalpha, piece)) for piece in pieces) > 0.3 * len(pieces):
        return "words without letters"
    lines = [line for line in text.split("\n") if line]
    if len(lines) >= 3:
        if sum(line[0] in "-*•·" for line in lines) > 0.9 * len(lines):
            return "list"
        if sum(line.endswith(("...", "…")) for line in lines) > 0.3 * len(lines):
            return "cut lines"
        repeated = sum(len(line) * (count - 1) for line, count in Counter(lines).items() if count > 1)
        if repeated > 0.3 * len(text):
            return "repeated lines"
    if len(words) >= 40:
        sequences = sequence_hashes(words, 5)
        if len(np.unique(sequences)) < 0.7 * len(sequences):
            return "repeated phrases"
    return ""


def scrub_personal(text: str) -> str:
    """Replace e-mail and IP addresses, card numbers (checked by Luhn's sum) and telephone numbers by placeholders."""
    for placeholder, pattern in _PERSONAL:
        text = pattern.sub(placeholder, text)
    text = _CARD.sub(lambda match: "<CARD_NUMBER>" if _is_card(match[0]) else match[0], text)
    return _TELEPHONE.sub(lambda match: "<TELEPHONE>" if _is_telephone(match[0]) else match[0], text)


def _is_card(number: str) -> bool:
    digits = [int(character) for character in number if character.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (sum(doubled) + sum(digits[-1::-2])) % 10 == 0


def _is_telephone(number: str) -> bool:
    """Ten to fifteen digits, or seven and more behind a plus sign: fewer are dates, years and prices."""
    num_digits = sum(map(str.isdigit, number))
    return 10 <= num_digits <= 15 or (number.startswith("+") and num_digits >= 7)
