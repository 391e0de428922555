"""The order of service changes nothing but the order: same tokens with every policy, with and without enough memory."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fastserve import LLM, SamplingParams
from fastserve.core.config import parse_bytes
from fastserve.engine.engine import Engine
from fastserve.scheduler.policy import POLICY_NAMES
from tests import folders


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.llama(tmp_path_factory.mktemp("policies") / "llama")


def generate(model: Path, scheduler: str, memory: str) -> tuple[list[list[int]], Engine]:
    draws = random.Random(0)
    prompts = [[draws.randrange(1, 200) for _ in range(draws.randrange(1, 60))] for _ in range(12)]
    params = [SamplingParams(temperature=0.0, max_tokens=draws.randrange(1, 60), ignore_eos=True) for _ in prompts]
    llm = LLM(
        str(model),
        scheduler=scheduler,
        dtype="float32",
        kv_cache_memory=parse_bytes(memory),
        max_model_len=128,
        max_batch_sequences=3,
        max_batch_tokens=16,
        prefix_caching=False,
    )
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs], llm.engine


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    return generate(model, "fcfs", "8MiB")[0]


@pytest.mark.parametrize("scheduler", POLICY_NAMES)
def test_every_policy_makes_the_same_tokens(model: Path, expected: list[list[int]], scheduler: str) -> None:
    tokens, engine = generate(model, scheduler, "8MiB")
    assert tokens == expected
    assert engine.stats().kv_blocks_used == 0


@pytest.mark.parametrize("scheduler", ["skip-join-mlfq", "aged-srpt", "priority"])
def test_scarce_memory_changes_no_token(model: Path, expected: list[list[int]], scheduler: str) -> None:
    _, roomy = generate(model, scheduler, "8MiB")
    tokens, engine = generate(model, scheduler, str(roomy.memory.block_bytes * 9))
    assert engine.memory.num_blocks < 12
    assert tokens == expected
    assert engine.stats().num_preemptions > 0


def test_the_warm_up_stays_within_the_models_positions(tmp_path: Path) -> None:
    folder = folders.gpt2(tmp_path / "gpt2", n_positions=64)
    engine = LLM(str(folder), scheduler="hrrn", kernels="reference", kv_cache_memory="8MiB").engine
    assert engine.max_model_len == 64
