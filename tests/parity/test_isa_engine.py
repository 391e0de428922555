"""The engine on each instruction set of this machine, with keys and values as they are and in eight bits.

A sequence's tokens are the same alone, in a batch, chunked, in little memory and with a prefix-cache hit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fastserve import LLM, SamplingParams
from fastserve.core.errors import ConfigError
from tests import folders
from tests.kernels.conftest import ISAS, native_kernels

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, top_k=40, max_tokens=24, ignore_eos=True)
PROMPTS = [[3 + (7 * index + 11 * place) % 310 for place in range(5 + 9 * index)] for index in range(8)]
PARAMS = [replace(SAMPLED, seed=index) if index % 2 else GREEDY for index in range(8)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.FAMILIES["qwen3"](tmp_path_factory.mktemp("model") / "qwen3")


def tokens(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
def test_tokens_do_not_depend_on_the_company(
    folder: Path, isa: str, kv_cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native_kernels(isa)  # skips where the machine lacks it
    monkeypatch.setenv("FASTSERVE_ISA", isa)
    options = dict(dtype="bfloat16", kernels="cpu", kv_cache_dtype=kv_cache_dtype, max_model_len=160)
    alone = tokens(LLM(folder, max_batch_sequences=1, prefix_caching=False, **options))
    assert tokens(LLM(folder, max_batch_sequences=4, max_batch_tokens=16, prefix_caching=False, **options)) == alone
    cached = LLM(folder, **options)
    assert f"kernels: cpu ({isa})" in cached.engine.report
    assert tokens(cached) == alone
    assert tokens(cached) == alone
    assert cached.engine.stats().prefix_cache_hits > 0
    small = LLM(folder, kv_cache_memory=12 * cached.engine.memory.block_bytes, prefix_caching=False, **options)
    assert tokens(small) == alone  # few at a time


def test_int8_keys_and_values_change_little(folder: Path) -> None:
    """Log probabilities of a prompt: reference kernels in float32, with and without the int8 cache."""
    params = replace(GREEDY, max_tokens=1, prompt_logprobs=0)
    options = dict(dtype="float32", kernels="reference", max_model_len=160, prefix_caching=False, max_batch_tokens=64)
    scores = []
    for kv_cache_dtype in ("auto", "int8"):
        (output,) = LLM(folder, kv_cache_dtype=kv_cache_dtype, **options).generate([PROMPTS[7]], params)
        assert output.prompt_logprobs is not None
        pairs = zip(output.prompt_logprobs[1:], PROMPTS[7][1:], strict=True)
        scores.append([item[token_id].logprob for item, token_id in pairs if item is not None])
    differences = [abs(one - other) for one, other in zip(*scores, strict=True)]
    assert 0 < sum(differences) / len(differences) < 0.1  # random weights: log probabilities spread over several nats


def test_int8_asks_for_blocks_that_keep_scales_aligned() -> None:
    with pytest.raises(ConfigError, match="multiple of 4"):
        LLM("", kv_cache_dtype="int8", block_size=6)
