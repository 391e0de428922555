"""fp32: the same tokens with and without guesses; greedy, sampled, with penalties, stops, masks and little memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastserve import LLM, RequestOutput, SamplingParams, StructuredOutputs
from tests import folders

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
# A narrow distribution repeats itself, so that many guesses are right and many are wrong.
SAMPLED = SamplingParams(temperature=0.7, top_k=3, max_tokens=40, seed=3)
LISTS = SamplingParams(
    temperature=0.8,
    seed=5,
    max_tokens=60,
    structured_outputs=StructuredOutputs(json={"type": "array", "items": {"enum": ["fox", "bear"]}, "maxItems": 9}),
)
PARAMS = [
    GREEDY,
    replace(GREEDY, frequency_penalty=0.3, repetition_penalty=1.1),
    SAMPLED,
    replace(SAMPLED, seed=4, presence_penalty=0.5, ignore_eos=True),
    LISTS,
    replace(GREEDY, logprobs=2),
]
PERIOD = [20, 45, 99, 7, 130, 64]
PROMPTS = [PERIOD * 4, PERIOD * 2 + [9, 8], list(range(3, 60)), PERIOD * 6, [5, 6] * 12, PERIOD * 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.FAMILIES["qwen3"](tmp_path_factory.mktemp("model") / "qwen3")


def results(llm: LLM) -> list[tuple[list[int], str | None]]:
    outputs: list[RequestOutput] = llm.generate(PROMPTS, PARAMS)
    return [(output.outputs[0].token_ids, output.outputs[0].finish_reason) for output in outputs]


@pytest.fixture(scope="module")
def without(folder: Path) -> list[tuple[list[int], str | None]]:
    return results(LLM(folder, dtype="float32", speculation="off", kv_cache_memory="8MiB"))


def test_guesses_change_nothing_but_the_number_of_steps(folder: Path, without: list) -> None:
    llm = LLM(folder, dtype="float32", speculation="ngram", kv_cache_memory="8MiB")
    assert results(llm) == without
    plain = LLM(folder, dtype="float32", speculation="off", kv_cache_memory="8MiB")
    for one in (llm, plain):
        one.num_before = one.engine.stats().num_steps
        one.generate(PROMPTS[0], replace(GREEDY, max_tokens=64))
        one.num_after = one.engine.stats().num_steps
    assert llm.num_after - llm.num_before < plain.num_after - plain.num_before
    assert llm.engine.stats().kv_blocks_used == 0


def test_with_little_memory_and_small_steps(folder: Path, without: list) -> None:
    probe = LLM(folder, dtype="float32", max_model_len=160, kv_cache_memory="8MiB")
    small = 14 * probe.engine.memory.block_bytes
    llm = LLM(
        folder, dtype="float32", speculation="ngram", max_model_len=160, kv_cache_memory=small, max_batch_tokens=24,
        max_batch_sequences=6,
    )  # fmt: skip
    assert results(llm) == without
    assert llm.engine.stats().num_preemptions > 0


def test_auto_gives_the_same(folder: Path, without: list) -> None:
    assert results(LLM(folder, dtype="float32", speculation="auto", kv_cache_memory="8MiB")) == without
