"""fp32: a sequence's tokens are the same alone, in a batch, chunked, preempted, and with a prefix-cache hit.

Greedy and sampled with a seed; also log probabilities alone against chunked, and the whole against transformers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastserve import LLM, RequestOutput, SamplingParams
from tests import folders

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, top_k=40, max_tokens=24, ignore_eos=True, seed=17)
PROMPTS = [[3 + (7 * index + 11 * place) % 310 for place in range(5 + 3 * index)] for index in range(32)]


@pytest.fixture(scope="module", params=["llama3", "qwen3", "mistral", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.FAMILIES[request.param](tmp_path_factory.mktemp("model") / request.param)


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, list[list[int]]]:
    options = dict(dtype="float32", speculation="off", prefix_caching=False, kv_cache_memory="8MiB", burst_ms=0)
    llm = LLM(folder, max_batch_sequences=1, **options)
    return {
        "greedy": tokens(llm.generate(PROMPTS, GREEDY)),
        "sampled": tokens(llm.generate(PROMPTS, seeded())),
    }


def seeded() -> list[SamplingParams]:
    return [replace(SAMPLED, seed=index) for index in range(len(PROMPTS))]


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def check(llm: LLM, alone: dict[str, list[list[int]]]) -> None:
    assert tokens(llm.generate(PROMPTS, GREEDY)) == alone["greedy"]
    assert tokens(llm.generate(PROMPTS, seeded())) == alone["sampled"]


def test_in_a_batch_of_32(folder: Path, alone: dict[str, list[list[int]]]) -> None:
    check(LLM(folder, dtype="float32", max_batch_sequences=32, prefix_caching=False), alone)


def test_in_bursts(folder: Path, alone: dict[str, list[list[int]]]) -> None:
    llm = LLM(folder, dtype="float32", speculation="off", prefix_caching=False, kv_cache_memory="8MiB", burst_ms=1e6)
    plans: list[int] = []
    run = llm.engine._executor.run
    llm.engine._executor.run = lambda plan: plans.append(plan.num_rounds) or run(plan)
    for params, expected in ((GREEDY, alone["greedy"][1]), (seeded()[1], alone["sampled"][1])):
        plans.clear()
        before = llm.engine.stats().num_steps
        assert tokens(llm.generate([PROMPTS[1]], params)) == [expected]
        # 8 tokens of prompt: the first block ends after 8 more, the second is full.
        assert plans == [1, 8, 15]
        assert llm.engine.stats().num_steps == before + 24
        last = next(place for place, token_id in enumerate(expected) if place > 2 and token_id not in expected[:place])
        stopped = replace(params, stop_token_ids=(expected[last],))
        before = llm.engine.stats().num_steps
        assert tokens(llm.generate([PROMPTS[1]], stopped)) == [expected[: last + 1]]
        assert llm.engine.stats().num_steps == before + last + 1  # nothing was computed for nobody


@pytest.mark.parametrize("burst_ms", [1e6, 5.0])
def test_bursts_of_unlike_requests(folder: Path, burst_ms: float) -> None:
    params = [
        GREEDY,
        replace(GREEDY, ignore_eos=False, stop_token_ids=tuple(range(3, 300, 7)), min_tokens=5),
        replace(GREEDY, max_tokens=9),
        replace(SAMPLED, frequency_penalty=0.5, repetition_penalty=1.2),
        replace(GREEDY, max_tokens=20, no_repeat_ngram_size=2),
        replace(GREEDY, forced_eos_token_id=4),
    ]
    found = []
    for burst in (0.0, burst_ms):
        llm = LLM(folder, dtype="float32", prefix_caching=False, kv_cache_memory="8MiB", burst_ms=burst)
        # By threes, so that some batches are greedy alone and others are not.
        outputs = [llm.generate(PROMPTS[:3], params[place : place + 3]) for place in range(4)]
        found.append([tokens(output) for output in outputs])
    assert found[0] == found[1]


def test_chunked_at_16_tokens(folder: Path, alone: dict[str, list[list[int]]]) -> None:
    check(LLM(folder, dtype="float32", max_batch_sequences=16, max_batch_tokens=16, prefix_caching=False), alone)


def test_preempted_midway(folder: Path, alone: dict[str, list[list[int]]]) -> None:
    probe = LLM(folder, dtype="float32", max_model_len=160)
    small = 40 * probe.engine.memory.block_bytes  # 640 tokens for 32 sequences of 29 to 122
    options = {"kv_cache_memory": small, "prefix_caching": False, "speculation": "off"}  # guesses end sequences sooner
    llm = LLM(folder, dtype="float32", max_model_len=160, **options)
    check(llm, alone)
    assert llm.engine.stats().num_preemptions > 0


def test_with_a_prefix_cache_hit(folder: Path, alone: dict[str, list[list[int]]]) -> None:
    llm = LLM(folder, dtype="float32")
    check(llm, alone)
    again = llm.generate(PROMPTS, GREEDY)
    assert tokens(again) == alone["greedy"]
    assert sum(output.num_cached_tokens for output in again) > 1000


def test_logprobs_and_prompt_logprobs_do_not_depend_on_chunking(folder: Path) -> None:
    params = replace(GREEDY, logprobs=3, prompt_logprobs=2)
    whole = LLM(folder, dtype="float32").generate(PROMPTS[20:24], params)
    chunked = LLM(folder, dtype="float32", max_batch_sequences=4, max_batch_tokens=7).generate(PROMPTS[20:24], params)
    for one, other in zip(whole, chunked, strict=True):
        assert one.prompt_logprobs is not None and other.prompt_logprobs is not None
        assert one.prompt_logprobs[0] is None
        assert len(one.prompt_logprobs) == len(one.prompt_token_ids)
        for mine, theirs, token_id in zip(
            one.prompt_logprobs[1:], other.prompt_logprobs[1:], one.prompt_token_ids[1:], strict=True
        ):
            assert mine is not None and theirs is not None
            assert mine.keys() == theirs.keys()
            assert mine[token_id].logprob == pytest.approx(theirs[token_id].logprob, abs=1e-4)
        assert one.outputs[0].logprobs is not None
        for token_id, item in zip(one.outputs[0].token_ids, one.outputs[0].logprobs, strict=True):
            assert item[token_id].rank == 1
            assert len(item) == 3


def test_greedy_tokens_equal_those_of_transformers(folder: Path, alone: dict[str, list[list[int]]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for prompt, expected in list(zip(PROMPTS, alone["greedy"], strict=True))[::6]:
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([prompt]), do_sample=False, max_new_tokens=24, min_new_tokens=24, eos_token_id=None
            )
        assert output[0, len(prompt) :].tolist() == expected
