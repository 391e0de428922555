"""The soak benchmark's judgement: what it must call an error, and how it measures memory."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace

import pytest

from benchmarks import soak
from fastserve.bench.loadgen import StreamResult

ALONE = StreamResult(
    status=200,
    pieces=["The ", "red", " fox"],
    times=[1.0, 2.0, 3.0],
    tokens=["The ", "red", " fox"],
    finish_reason="length",
    usage={"completion_tokens": 3},
    is_done=True,
)


def test_the_same_answer_is_right() -> None:
    assert soak.check(ALONE, None) == ""
    assert soak.check(replace(ALONE), ALONE) == ""
    merged = replace(ALONE, pieces=["The red", " fox"])
    assert soak.check(merged, ALONE) == "", "a server may put two tokens into one event"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"pieces": ["The ", " fox"]}, "another answer"),
        ({"pieces": ["The ", "red", "red", " fox"]}, "4 events for 3 tokens"),
        ({"tokens": ["The ", "red"]}, "2 tokens came"),
        ({"tokens": ["The ", "red", " cat"]}, "another answer"),
        ({"usage": None}, "no usage"),
        ({"finish_reason": None}, "no finish_reason"),
        ({"finish_reason": "stop"}, "3 tokens, stop"),
        ({"error": "HTTP 500: oops"}, "HTTP 500"),
    ],
)
def test_a_lost_repeated_or_failed_answer_is_named(change, words) -> None:
    assert words in soak.check(replace(ALONE, **change), ALONE)


def test_more_tokens_counted_than_alone() -> None:
    alone = replace(ALONE, tokens=[])
    assert "4 tokens, length; alone 3" in soak.check(replace(alone, usage={"completion_tokens": 4}), alone)


def test_memory_of_a_family_of_processes() -> None:
    watch = soak.MemoryWatch(os.getpid())

    async def run() -> None:
        child = await asyncio.create_subprocess_exec("sleep", "5")
        family = list(watch._family())
        assert family[0] == os.getpid() and child.pid in family
        assert soak.resident_bytes(child.pid) > 0
        child.kill()
        await child.wait()
        assert soak.resident_bytes(child.pid) == 0

    asyncio.run(run())
    watch.samples = [(float(second), 100 + (second if second < 10 else 20)) for second in range(40)]
    assert watch.growth(warm_up=10) == 0
    assert watch.growth(warm_up=0) > 0.05
    with pytest.raises(RuntimeError, match="longer"):
        watch.growth(warm_up=35)


def test_prompts_are_varied_and_seeded() -> None:
    first, again = soak.tasks(has_chat=True), soak.tasks(has_chat=True)
    assert first == again
    assert {job.path for job in first} == {"/v1/completions", "/v1/chat/completions"}
    assert len({str(job.body) for job in first}) == len(first)
    assert {"logprobs" in job.body for job in first} == {True, False}
    assert {job.path for job in soak.tasks(has_chat=False)} == {"/v1/completions"}
