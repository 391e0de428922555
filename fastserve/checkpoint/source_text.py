"""What a folder of an encoder-decoder says of texts: languages, prefixes, what its decoder begins with, how to search.

Text to token ids, without torch. Three kinds of models know languages: those with a token per language (M2M100, NLLB,
mBART; the target's begins the answer), those whose texts begin with ">>xxx<<" (multilingual Marian), and those with a
sentence before the text for each pair (T5, by `task_specific_params`). Others do one thing: the text is enough.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cached_property
from typing import Any

from fastserve.checkpoint.folder import ModelFolder, read_json
from fastserve.checkpoint.tokenizer import Tokenizer, check_unicode
from fastserve.core.errors import CheckpointError, RequestError
from fastserve.core.sampling_params import WITH_BEAMS, SamplingParams

# How a family spells its languages: M2M100 and NLLB, mBART, multilingual Marian.
_CODES = {
    "M2M100ForConditionalGeneration": re.compile(r"__([a-z]{2,3})__|([a-z]{3}_[A-Z][a-z]{3})"),
    "MBartForConditionalGeneration": re.compile(r"([a-z]{2}_[A-Z]{2})"),
    "MarianMTModel": re.compile(r">>([\w-]+)<<"),
}
_LANGUAGE_LAST = ("MBartTokenizer", "MBartTokenizerFast")  # of the first mBART: its language comes after the text
_PAIR = re.compile(r"translation_(\w+)_to_(\w+)")
_SHOWN = 40
_USUAL_LENGTH = 256  # of an answer where the folder says nothing, as in the pipelines of transformers


class SourceText:
    """Texts for one encoder-decoder.

    Attributes:
        tokenizer: the folder's.
        languages: those that have a token, by the name that users give -> token.

    Raises:
        CheckpointError: the folder says nothing of what its decoder begins with.
    """

    def __init__(self, folder: ModelFolder, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._given = {**folder.config, **{name: v for name, v in folder.generation_config.items() if v is not None}}
        settings = read_json(folder.path / "tokenizer_config.json") if folder.has("tokenizer_config.json") else {}
        self._own_source = str(settings.get("src_lang") or "")
        self._is_marian = folder.architecture == "MarianMTModel"
        self._is_language_last = settings.get("tokenizer_class") in _LANGUAGE_LAST or bool(
            settings.get("legacy_behaviour")
        )
        codes = _CODES.get(folder.architecture)
        self.languages: dict[str, str] = {}
        if codes is not None:
            tokens = sorted(token for token in tokenizer.vocabulary if codes.fullmatch(token))
            self.languages = {_name(codes, token): token for token in tokens}
        self._eos_id = next(iter(folder.eos_token_ids), None)
        tasks = self._given.get("task_specific_params")
        self._tasks: Mapping[str, Any] = tasks if isinstance(tasks, dict) else {}
        start = self._given.get("decoder_start_token_id", self._given.get("bos_token_id"))
        if not isinstance(start, int):
            raise CheckpointError(
                f"{folder.path} names no decoder_start_token_id in generation_config.json or config.json; add it"
            )
        self._start_id = start

    @cached_property
    def pairs(self) -> dict[tuple[str, str], str]:
        """Pairs of languages that have a prefix -> the task that says which."""
        found = {_PAIR.fullmatch(task): task for task in self._tasks}
        return {(match[1], match[2]): task for match, task in found.items() if match is not None}

    def task(self, name: str) -> dict[str, Any]:
        """What the folder says of a task of transformers, such as summarization; {} when it says nothing."""
        values = self._tasks.get(name)
        return dict(values) if isinstance(values, dict) else {}

    def encode(self, text: str, source: str = "", target: str = "", prefix: str = "") -> tuple[list[int], list[int]]:
        """Token ids of a source, and those that its decoder begins with.

        Args:
            source, target: languages of text and answer; "" is the folder's own, where it has one.
            prefix: what is put before the text.

        Raises:
            RequestError: a language that is not known (the message names those that are), or none where one is needed.
        """
        check_unicode(text)
        forced = self._given.get("forced_bos_token_id")
        start = [self._start_id, *([forced] if isinstance(forced, int) else [])]
        if self.pairs and (source or target):
            prefix = str(self.task(self._pair(source, target)).get("prefix", "")) + prefix
        elif not self.languages and (source or target):
            raise RequestError(
                "this model knows no languages by name; leave out source_language and target_language",
                "target_language" if target else "source_language",
            )
        elif self._is_marian and target:
            prefix = f"{self._token(target, 'target_language')} {prefix}"
        elif self.languages and not self._is_marian:
            return self._with_languages(prefix + text, source, target, start)
        return self.tokenizer.encode(prefix + text), start

    def defaults(self, task: str = "") -> dict[str, Any]:
        """Fields of SamplingParams for requests that leave them out, from generation_config.json and a task's own.

        Raises:
            CheckpointError: one of them is out of its range.
        """
        given = {**self._given, **self.task(task)}
        values: dict[str, Any] = {name: given[name] for name in _FIELDS if given.get(name) is not None}
        if not given.get("do_sample"):
            values = {name: value for name, value in values.items() if name not in _OF_SAMPLING} | {"temperature": 0.0}
        if given.get("do_sample") or given.get("repetition_penalty", 1.0) != 1.0:
            values.pop("num_beams", None)  # a search is not sampled
        if values.get("num_beams", 1) == 1:
            values = {name: value for name, value in values.items() if name not in _OF_BEAMS}
        if values.get("repetition_penalty") == 1.0:
            del values["repetition_penalty"]
        values["max_tokens"] = given.get("max_new_tokens") or _less_start(given.get("max_length")) or _USUAL_LENGTH
        values["min_tokens"] = given.get("min_new_tokens") or _less_start(given.get("min_length")) or 0
        words = [ids[0] for ids in given.get("bad_words_ids") or [] if len(ids) == 1]
        values["suppress_token_ids"] = tuple({*words, *(given.get("suppress_tokens") or [])})
        forced = given.get("forced_eos_token_id")
        values["forced_eos_token_id"] = forced[0] if isinstance(forced, list) else forced
        try:
            SamplingParams(**values)
        except (RequestError, TypeError) as error:
            raise CheckpointError(f"generation_config.json: {error}") from error
        return values

    def _with_languages(self, text: str, source: str, target: str, start: list[int]) -> tuple[list[int], list[int]]:
        own = self.tokenizer.token_id(self._token(source or self._own_source, "source_language"))
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        end = [] if self._eos_id is None else [self._eos_id]
        assert own is not None
        source_ids = [*ids, *end, own] if self._is_language_last else [own, *ids, *end]
        begins_with_language = self._start_id in self._language_ids  # as in the first mBART
        if target or (len(start) == 1 and not begins_with_language):
            wanted = self.tokenizer.token_id(self._token(target, "target_language"))
            assert wanted is not None
            start = [wanted] if begins_with_language else [self._start_id, wanted]
        return source_ids, start

    @cached_property
    def _language_ids(self) -> set[int | None]:
        return {self.tokenizer.token_id(token) for token in self.languages.values()}

    def _token(self, name: str, param: str) -> str:
        """A language's token by its name, or by a beginning of it that only one has."""
        begun = [
            known for known in self.languages if known.lower().startswith((f"{name.lower()}_", f"{name.lower()}-"))
        ]
        found = name if name in self.languages else begun[0] if len(begun) == 1 and name else None
        if found is None:
            what = f"there is no language {name!r} here" if name else "a language is needed here"
            listed = ", ".join([*self.languages][:_SHOWN]) + (", ..." if len(self.languages) > _SHOWN else "")
            raise RequestError(f"{what}; {param} may be one of {listed}", param)
        return self.languages[found]

    def _pair(self, source: str, target: str) -> str:
        matching = [task for (first, last), task in self.pairs.items() if last == target and source in ("", first)]
        if len(matching) != 1:
            known = ", ".join(f"{first} to {last}" for first, last in self.pairs)
            raise RequestError(
                f"there is no translation from {source or 'this language'!r} to {target!r} here; known: {known}",
                "target_language",
            )
        return matching[0]


def over_defaults(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> SamplingParams:
    """What a request says over what the folder says; a folder's beams give way to what has no place in a search.

    Raises:
        RequestError: a value is out of its range.
    """
    asked = given.get("num_beams")
    usual = {item.name: item.default for item in fields(SamplingParams)} | {"temperature": 0.0}
    against = {name for name in given.keys() - WITH_BEAMS if given[name] != usual[name]}
    if asked == 1 or (asked is None and (against or given.get("n", 1) > defaults.get("num_beams", 1))):
        defaults = {name: value for name, value in defaults.items() if name not in _OF_BEAMS}
    elif asked is not None:
        defaults = {name: value for name, value in defaults.items() if name in WITH_BEAMS} | {"temperature": 0.0}
    least = min(defaults.get("min_tokens", 0), given.get("max_tokens", 1 << 31))  # a short answer is what was asked for
    return SamplingParams(**{**defaults, "min_tokens": least, **given})


_FIELDS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("num_beams", "length_penalty", "early_stopping", "no_repeat_ngram_size"),
)
_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p")
_OF_BEAMS = ("num_beams", "length_penalty", "early_stopping")


def _name(codes: re.Pattern[str], token: str) -> str:
    match = codes.fullmatch(token)
    assert match is not None
    return next(group for group in match.groups() if group is not None)


def _less_start(length: Any) -> int | None:
    """transformers counts the token that the decoder begins with."""
    return max(1, int(length) - 1) if isinstance(length, int) and length > 0 else None
