"""Token ids arriving one by one -> text that may be shown now.

Never shows part of a character, nor text that could still become a stop string; finds stop strings, because text exists
only here and above. One stream per completion; the work per token does not grow with the length of the text.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from fastserve.checkpoint.tokenizer import Tokenizer, strip_start
from fastserve.core.sampling_params import SamplingParams

_WINDOW = 6
_MAX_WINDOW = 32


class TextStream:
    """The text of one completion while it is made.

    Args:
        tokenizer: the model's.
        prompt_ids: what came before; decides about a space at the beginning.
        sampling: stop strings, min_tokens, skip_special_tokens and include_stop_str_in_output are read.

    Attributes:
        stop_reason: the stop string that ended the text, else None.
        num_tokens: tokens that belong to the completion; those after a stop string are not counted.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        self.stop_reason: str | None = None
        self.num_tokens = 0
        self._skipped = tokenizer.special_ids if sampling.skip_special_tokens else frozenset[int]()
        self._decoder: _ByteDecoder | _WindowDecoder
        if tokenizer.byte_rules is not None:
            begins_text = all(token_id in self._skipped for token_id in prompt_ids)
            self._decoder = _ByteDecoder(tokenizer, tokenizer.byte_rules.num_stripped if begins_text else 0)
        else:
            self._decoder = _WindowDecoder(tokenizer, prompt_ids, sampling.skip_special_tokens)
        self._matchers = [_StopMatcher(text) for text in sampling.stop]
        self._include_stop = sampling.include_stop_str_in_output
        self._min_tokens = sampling.min_tokens
        self._held = ""
        self._shown: list[str] = []

    @property
    def text(self) -> str:
        """All text shown so far."""
        if len(self._shown) > 1:
            self._shown = ["".join(self._shown)]
        return self._shown[0] if self._shown else ""

    def push(self, token_ids: Sequence[int], finished: bool = False, stop_token_id: int | None = None) -> str:
        """Add tokens and return the text that may be shown now; "" after a stop string.

        Args:
            finished: these are the last tokens; everything held back is decided.
            stop_token_id: the last token ended the request and has this id; its text is not shown, unless stops are
                to be included.
        """
        pieces: list[str] = []
        for index, token_id in enumerate(token_ids):
            if self.stop_reason is not None:
                break
            self.num_tokens += 1
            ends_request = stop_token_id is not None and token_id == stop_token_id and index == len(token_ids) - 1
            if token_id not in self._skipped and (self._include_stop or not ends_request):
                pieces.append(self._filter(self._decoder.push(token_id)))
        if finished and self.stop_reason is None:
            pieces.append(self._filter(self._decoder.flush()))
            if self.stop_reason is None:
                pieces.append(self._held)
                self._held = ""
        shown = "".join(pieces)
        if shown:
            self._shown.append(shown)
        return shown

    def _filter(self, text: str) -> str:
        """What of the held and the new text may be shown; sets stop_reason at the first stop string that completes."""
        if not self._matchers or self.num_tokens <= self._min_tokens:
            return text
        held = self._held + text
        start = len(self._held)
        for index, character in enumerate(text, start + 1):
            hit = ""
            for matcher in self._matchers:
                if matcher.push(character) and len(matcher.text) > len(hit):
                    hit = matcher.text
            if hit:
                self.stop_reason = hit
                self._held = ""
                return held[: index if self._include_stop else index - len(hit)]
        num_held = max(matcher.num_matched for matcher in self._matchers)
        self._held = held[len(held) - num_held :]
        return held[: len(held) - num_held]


class _StopMatcher:
    """Finds one stop string in a stream of characters (Knuth, Morris and Pratt, 1977)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0  # longest end of the stream so far that begins the stop string
        self._fallback = [0] * len(text)
        length = 0
        for index in range(1, len(text)):
            while length and text[index] != text[length]:
                length = self._fallback[length - 1]
            length += text[index] == text[length]
            self._fallback[index] = length

    def push(self, character: str) -> bool:
        """Whether this character completes the stop string."""
        matched = self.num_matched
        while matched and self.text[matched] != character:
            matched = self._fallback[matched - 1]
        matched += self.text[matched] == character
        self.num_matched = matched
        return matched == len(self.text)


class _ByteDecoder:
    """For vocabularies whose tokens have exact bytes."""

    def __init__(self, tokenizer: Tokenizer, num_stripped: int) -> None:
        self._tokenizer = tokenizer
        self._num_stripped = num_stripped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        return self._strip(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def flush(self) -> str:
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if not self._num_stripped or not text:
            return text
        kept = strip_start(text, self._num_stripped)
        self._num_stripped = 0 if kept else self._num_stripped - len(text)
        return kept


class _WindowDecoder:
    """For other decoders: decodes the last few tokens together and shows what the newest one added."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids = list(prompt_ids[-_WINDOW:])
        self._known = self._decode()

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        text = self._decode()
        if text.endswith("\ufffd") and len(self._ids) < _MAX_WINDOW:
            return ""
        new = text[len(self._known) :]
        if len(self._ids) > 2 * _WINDOW:
            del self._ids[:-_WINDOW]
            text = self._decode()
        self._known = text
        return new

    def flush(self) -> str:
        return self._decode()[len(self._known) :]

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, self._skip_special_tokens)
