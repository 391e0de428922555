"""Streaming text equals decoding the whole, stop strings end it in the same place however the tokens arrive."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from fastserve.checkpoint.text_stream import TextStream
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.sampling_params import SamplingParams
from tests import folders
from tests.unit.checkpoint.test_tokenizer import open_folder, sentencepiece


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(open_folder(folders.write_tokenizer(tmp_path_factory.mktemp("bytes"))))


@pytest.fixture(scope="module")
def byte_backend(tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    folder = folders.write_tokenizer(tmp_path_factory.mktemp("backend"))
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(open_folder(sentencepiece(tmp_path_factory.mktemp("pieces"))))


ids_strategy = st.lists(st.integers(0, folders.VOCAB_SIZE + 3), max_size=40)
# Few letters, so that stop strings are met, begin often, and overlap themselves.
letters = st.sampled_from(["a", "b", "ab", "aab", " ", "é", "\n"])
stop_strategy = st.lists(st.lists(letters, min_size=1, max_size=6).map("".join), max_size=3)


def stream_all(stream: TextStream, ids: list[int], cuts: list[int]) -> list[str]:
    """Push in portions, the last one finished."""
    bounds = sorted({cut % (len(ids) + 1) for cut in cuts} | {0, len(ids)})
    shown = [stream.push(ids[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]
    return [*shown, stream.push([], finished=True)]


@settings(max_examples=300, deadline=None)
@given(ids=ids_strategy, cuts=st.lists(st.integers(0, 50), max_size=40), skip=st.booleans())
def test_equals_decoding_the_whole(
    byte_level: Tokenizer, byte_backend: tokenizers.Tokenizer, ids: list[int], cuts: list[int], skip: bool
) -> None:
    """Random bytes, most of them no UTF-8, against the tokenizers library's own decoding."""
    stream = TextStream(byte_level, [5], SamplingParams(skip_special_tokens=skip))
    shown = stream_all(stream, ids, cuts)
    known = [token_id for token_id in ids if token_id < folders.VOCAB_SIZE]
    expected = byte_backend.decode(known, skip_special_tokens=skip)
    assert "".join(shown) == stream.text == byte_level.decode(ids, skip) == expected
    assert stream.num_tokens == len(ids)


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="the fox é😀漢\n", max_size=30))
def test_no_part_of_a_character(byte_level: Tokenizer, text: str) -> None:
    stream = TextStream(byte_level, [], SamplingParams())
    for token_id in byte_level.encode(text):
        assert "\ufffd" not in stream.push([token_id])
        assert text.startswith(stream.text)
    assert stream.push([], finished=True) == ""
    assert stream.text == text


def first_stop(text: str, stops: list[str]) -> tuple[str, str] | None:
    """By definition: the text up to the first end of any stop string, and the longest that ends there."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if text[:end].endswith(stop)]
        if hits:
            longest = max(hits, key=len)
            return text[: end - len(longest)], longest
    return None


@settings(max_examples=400, deadline=None)
@given(
    text=st.lists(letters, max_size=30).map("".join),
    stops=stop_strategy,
    cuts=st.lists(st.integers(0, 50), max_size=40),
    include=st.booleans(),
)
def test_stop_strings(byte_level: Tokenizer, text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    stream = TextStream(byte_level, [], SamplingParams(stop=tuple(stops), include_stop_str_in_output=include))
    ids = byte_level.encode(text)
    shown = "".join(stream_all(stream, ids, cuts))
    hit = first_stop(text, stops)
    if hit is None:
        assert (shown, stream.stop_reason, stream.num_tokens) == (text, None, len(ids))
    else:
        before, stop = hit
        assert (shown, stream.stop_reason) == (before + stop * include, stop)
        kept = byte_level.decode(ids[: stream.num_tokens])
        assert stop in kept and stop not in byte_level.decode(ids[: stream.num_tokens - 1])[len(before) :]
    assert stream.text == shown


@settings(max_examples=200, deadline=None)
@given(text=st.lists(letters, max_size=30).map("".join), stops=stop_strategy)
def test_shows_all_that_cannot_become_a_stop(byte_level: Tokenizer, text: str, stops: list[str]) -> None:
    stream = TextStream(byte_level, [], SamplingParams(stop=tuple(stops)))
    for token_id in byte_level.encode(text):
        stream.push([token_id])
        if stream.stop_reason is not None:
            break
        whole = byte_level.decode(byte_level.encode(text)[: stream.num_tokens]).rstrip("\ufffd")
        held = max((n for stop in stops for n in range(len(stop)) if whole.endswith(stop[:n])), default=0)
        assert stream.text == whole[: len(whole) - held]


def test_end_token_is_not_shown(byte_level: Tokenizer) -> None:
    ids = [*byte_level.encode("fox"), folders.IM_END]
    for sampling, expected in (
        (SamplingParams(), "fox"),
        (SamplingParams(skip_special_tokens=False), "fox"),
        (SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True), "fox<|im_end|>"),
    ):
        stream = TextStream(byte_level, [], sampling)
        assert stream.push(ids, finished=True, stop_token_id=folders.IM_END) == expected
        assert stream.num_tokens == len(ids)
    word = byte_level.encode("x")[-1]
    stream = TextStream(byte_level, [], SamplingParams(stop_token_ids=(word,)))
    stream.push([word])
    assert stream.push([word], finished=True, stop_token_id=word) == ""
    assert stream.text == "x"


def test_stop_strings_wait_for_min_tokens(byte_level: Tokenizer) -> None:
    ids = [byte_level.encode(letter)[0] for letter in "ababab"]
    stream = TextStream(byte_level, [], SamplingParams(stop=("ab",), min_tokens=3))
    assert stream.push(ids) == "abab"
    assert (stream.stop_reason, stream.text, stream.num_tokens) == ("ab", "abab", 6)


def test_nothing_after_a_stop(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level, [], SamplingParams(stop=("b",)))
    assert stream.push(byte_level.encode("abab")) == "a"
    assert stream.push(byte_level.encode("ab"), finished=True) == ""
    assert (stream.text, stream.stop_reason) == ("a", "b")


def test_stop_completed_by_the_last_half_character(byte_level: Tokenizer) -> None:
    half = byte_level.encode("é")[0]
    stream = TextStream(byte_level, [], SamplingParams(stop=("a\ufffd",)))
    assert stream.push([byte_level.encode("a")[0], half]) == ""
    assert stream.push([], finished=True) == ""
    assert stream.stop_reason == "a\ufffd"


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 276), max_size=4),
    text=st.text(alphabet="the fox é😀\n", max_size=20),
)
def test_space_at_the_beginning(pieces: Tokenizer, prompt: list[int], text: str) -> None:
    """sentencepiece drops a space at the beginning of a text, not where one goes on."""
    stream = TextStream(pieces, prompt, SamplingParams())
    ids = pieces.encode(text, add_special_tokens=False)
    shown = "".join([*(stream.push([token_id]) for token_id in ids), stream.push([], finished=True)])
    if all(token_id in pieces.special_ids for token_id in prompt):
        assert shown == pieces.decode(ids) == text
    else:
        assert pieces.decode([266, *ids]) == pieces.decode([266]) + shown


def test_decoder_of_the_library(tmp_path: Path) -> None:
    """A decoder without byte rules: WordPiece joins pieces and sets spaces by itself."""
    words = ["[UNK]", "play", "##ing", "fox", ",", "##s"]
    backend = tokenizers.Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(open_folder(tmp_path))
    ids = [3, 1, 2, 4, 3, 5, 1] * 20
    stream = TextStream(tokenizer, [], SamplingParams(stop=("never",)))
    shown = [stream.push([token_id]) for token_id in ids]
    shown.append(stream.push([], finished=True))
    assert "".join(shown) == tokenizer.decode(ids)


def test_work_per_token_does_not_grow(byte_level: Tokenizer) -> None:
    stop = SamplingParams(stop=("z" * 1000, "y"))

    def lines(count: int) -> int:
        """Python lines that run while `count` tokens are pushed."""
        stream = TextStream(byte_level, [], stop)
        num_lines = 0

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal num_lines
            num_lines += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            for token_id in byte_level.encode("z") * 999 + byte_level.encode("a") * (count - 999):
                stream.push([token_id])
        finally:
            sys.settrace(before)
        return num_lines

    lines(2_000)  # what runs once in a process is not of each token
    assert lines(6_000) - lines(4_000) == lines(4_000) - lines(2_000)
