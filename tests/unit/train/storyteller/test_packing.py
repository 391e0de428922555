"""Every token is used once an epoch, order follows the seed, and prompts carry no loss."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fastserve.core.errors import ConfigError
from fastserve.train.storyteller.packing import IGNORED, Conversation, WindowSource, mixed_batches, pack_conversations


def documents(first: int, count: int) -> list[np.ndarray]:
    return [np.arange(first + 10 * index, first + 10 * index + 10, dtype=np.uint16) for index in range(count)]


def test_windows_cover_an_epoch_without_overlap() -> None:
    source = WindowSource(documents(0, 10), length=9, seed=3)
    windows = [source.take() for _ in range(11)]
    targets = np.concatenate([window[1:] for window in windows])
    assert len(set(targets.tolist())) == len(targets) == 99
    assert all(len(window) == 10 for window in windows)


def test_epochs_differ_and_seeds_repeat() -> None:
    first, again = (WindowSource(documents(0, 10), 9, seed=3) for _ in range(2))
    taken = [first.take().tolist() for _ in range(22)]
    assert taken == [again.take().tolist() for _ in range(22)]
    assert taken[:11] != taken[11:]


def test_targets_are_the_next_tokens() -> None:
    batch = next(mixed_batches({"a": documents(0, 10)}, {"a": 1.0}, batch_tokens=36, length=9, seed=0))
    assert batch.inputs.shape == batch.targets.shape == (4, 9)
    np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])


def test_mixture_follows_the_weights() -> None:
    texts = {"low": documents(0, 20), "high": documents(1000, 20)}
    batches = itertools.islice(mixed_batches(texts, {"low": 3.0, "high": 1.0}, batch_tokens=80, length=10, seed=0), 100)
    share = np.mean([(batch.inputs[:, 0] < 1000).mean() for batch in batches])
    assert 0.7 < share < 0.8


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="fewer than 101 tokens"):
        WindowSource(documents(0, 10), length=100, seed=0)


def conversation(prompt: int, answer: int) -> Conversation:
    tokens = np.arange(1, prompt + answer + 1, dtype=np.uint16)
    return Conversation(tokens, np.arange(prompt + answer) >= prompt)


def test_loss_is_taken_on_answers_only() -> None:
    (batch,) = pack_conversations([conversation(3, 2)], batch_tokens=8, length=8, seed=0)
    assert batch.inputs.tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]]
    assert batch.targets.tolist() == [[IGNORED, IGNORED, 4, 5, IGNORED, IGNORED, IGNORED, IGNORED]]


def test_every_answer_token_is_packed_once() -> None:
    parts = [conversation(3, size) for size in range(1, 30)]
    batches = list(pack_conversations(parts, batch_tokens=64, length=32, seed=1))
    learned = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
    assert learned == sum(range(1, 30))
    assert all(batch.inputs.shape == (2, 32) for batch in batches)


def test_a_conversation_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tune\.length"):
        list(pack_conversations([conversation(5, 20)], batch_tokens=16, length=16, seed=0))
