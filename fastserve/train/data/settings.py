"""The options of `fastserve data prepare`: a field here is a flag, a TOML key and a keyword."""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.core.errors import ConfigError

TEXT_DOCUMENTS = ("auto", "separator", "blank-line", "line", "file")


@dataclass(frozen=True, slots=True)
class PrepareSettings:
    """What to keep, what to drop, and how to split.

    Attributes:
        text_key: key of the text in JSON lines and column of it in Parquet files and hub datasets.
        text_documents: what one document of a text file is: separator (they end with a line <|endoftext|>), blank-line
            (paragraph groups), line, file, or auto (separator where the file has one, else file).
        languages: keep these languages only (codes such as en, zh); without it all, and none is looked for.
        min_words: drop shorter documents; a Chinese or Japanese character counts as a word.
        max_words: drop longer documents; 0: no limit.
        quality: apply the quality rules (symbols, repetition, lists, words without letters).
        near_duplicates: drop near-duplicates as well as exact ones.
        similarity: share of common three-word sequences from which two documents are the same.
        against: evaluation files; documents that hold a sequence of theirs are dropped.
        against_words: length in words of such a sequence; a shorter evaluation text must occur as a whole.
        scrub_personal: replace e-mail addresses, telephone numbers, card numbers and IP addresses by placeholders.
        validation_share: share of documents kept back as the validation split.
        workers: processes; 0: one per core.
    """

    text_key: str = "text"
    text_documents: str = "auto"
    languages: tuple[str, ...] = ()
    min_words: int = 10
    max_words: int = 0
    quality: bool = True
    near_duplicates: bool = True
    similarity: float = 0.7
    against: tuple[str, ...] = ()
    against_words: int = 13
    scrub_personal: bool = False
    validation_share: float = 0.01
    workers: int = 0

    def __post_init__(self) -> None:
        if self.text_documents not in TEXT_DOCUMENTS:
            raise ConfigError(f"text_documents must be one of {', '.join(TEXT_DOCUMENTS)}, not {self.text_documents!r}")
        if not 0 < self.similarity <= 1:
            raise ConfigError(f"similarity must be above 0 and at most 1, not {self.similarity}")
        if not 0 <= self.validation_share < 1:
            raise ConfigError(f"validation_share must be at least 0 and below 1, not {self.validation_share}")
        for name, low in (("min_words", 0), ("max_words", 0), ("against_words", 4), ("workers", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, not {getattr(self, name)}")
