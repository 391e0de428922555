"""Any text comes back exactly, and special tokens have the first ids."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fastserve.core.errors import ConfigError
from fastserve.train.storyteller.tokenizer import SPECIAL_TOKENS, load_tokenizer, token_id, train_tokenizer

TOKENIZER = train_tokenizer(["Once upon a time there was a fox. The fox was happy."] * 5, 300)


@given(st.text().filter(lambda text: "<|" not in text))
def test_round_trip(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_come_first(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [token_id(loaded, token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
    assert 262 < loaded.get_vocab_size() <= 300


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size must be at least"):
        train_tokenizer([], 100)
    with pytest.raises(ConfigError, match="run the stage `tokenizer` first"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"no token <\|no\|>"):
        token_id(TOKENIZER, "<|no|>")
