"""Beam search against transformers' own: the same tokens and scores, alone, beside others, and when memory is short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastserve import LLM, SamplingParams
from fastserve.core.errors import RequestError
from fastserve.core.request import Request
from tests import folders

PROMPTS = [[5, 9, 33, 40, 7], list(range(20, 57)), [100]]
Answers = list[list[tuple[list[int], float]]]


def open_llm(folder: Path, **options: Any) -> LLM:
    settings = {"max_model_len": 96, "kv_cache_memory": "4MiB", "num_threads": 1, "block_size": 4, "dtype": "float32"}
    return LLM(str(folder), **{**settings, **options})


def ours(llm: LLM, num_beams: int, **options: Any) -> Answers:
    outputs = llm.beam_search(PROMPTS, num_beams, **options)
    return [[(answer.token_ids, answer.score) for answer in output.outputs] for output in outputs]


def theirs(folder: Path, num_beams: int, max_tokens: int = 16, **options: Any) -> Answers:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    eos = options.pop("eos_token_id", model.generation_config.eos_token_id)
    found: Answers = []
    for prompt in PROMPTS:
        made = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            num_beams=num_beams,
            num_return_sequences=num_beams,
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=eos,
            output_scores=True,
            return_dict_in_generate=True,
            **options,
        )
        answers = []
        for row, score in zip(made.sequences[:, len(prompt) :].tolist(), made.sequences_scores.tolist(), strict=True):
            ends = [
                place for place, token_id in enumerate(row) if token_id in (eos if isinstance(eos, list) else [eos])
            ]
            answers.append((row[: ends[0] + 1] if ends else row, score))
        found.append(answers)
    return found


def check(found: Answers, expected: Answers) -> None:
    for one, other in zip(found, expected, strict=True):
        assert [tokens for tokens, _ in one] == [tokens for tokens, _ in other]
        torch.testing.assert_close([score for _, score in one], [score for _, score in other], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head is scaled down, so that many continuations compete and answers end early."""
    return folders.llama(tmp_path_factory.mktemp("beams") / "llama", embedding_deviation=0.1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma2", "mixtral"])
def test_families(tmp_path: Path, family: str) -> None:
    base = folders.FAMILIES[family](tmp_path / family)
    check(ours(open_llm(base), 4, max_tokens=12), theirs(base, 4, 12))


@pytest.mark.parametrize("num_beams", [2, 3, 8])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.5, -1.0])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_options(folder: Path, num_beams: int, length_penalty: float, early_stopping: bool | str) -> None:
    ends = list(range(2, 60))  # so many that answers end all the time
    options: dict[str, Any] = {"length_penalty": length_penalty, "early_stopping": early_stopping}
    found = ours(open_llm(folder), num_beams, stop_token_ids=tuple(ends), max_tokens=14, **options)
    check(found, theirs(folder, num_beams, 14, eos_token_id=ends, **options))
    assert any(tokens[-1] in ends for answers in found for tokens, _ in answers)


def test_beside_others_and_under_preemption(folder: Path) -> None:
    """Small steps and few blocks, with plain requests in between: the answers of a search alone."""
    alone = ours(open_llm(folder), 4, max_tokens=24, ignore_eos=True)
    sampling = SamplingParams(temperature=1.0, seed=3, max_tokens=24, ignore_eos=True)
    plain = open_llm(folder).generate(PROMPTS, sampling, use_tqdm=False)
    policies = {"fcfs": True, "aged-srpt": False, "priority": False, "skip-join-mlfq": True}
    for scheduler, prefix_caching in policies.items():
        small = open_llm(
            folder, scheduler=scheduler, max_batch_sequences=16, max_batch_tokens=19, prefix_caching=prefix_caching
        )
        small.engine.resize_kv_cache(26 * small.engine.memory.block_bytes)
        beams = SamplingParams(temperature=0.0, num_beams=4, n=4, max_tokens=24, ignore_eos=True)
        made = small.generate([*PROMPTS, *PROMPTS], [beams] * 3 + [sampling] * 3, use_tqdm=False)
        check([[(item.token_ids, item.score) for item in output.outputs] for output in made[:3]], alone)
        for output, expected in zip(made[3:], plain, strict=True):
            assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        stats = small.engine.stats()
        assert stats.num_preemptions > 0 and stats.kv_blocks_used == 0, scheduler


@pytest.mark.parametrize("scheduler", ["fcfs", "aged-srpt", "skip-join-mlfq"])
def test_a_search_has_its_places_from_the_start(folder: Path, scheduler: str) -> None:
    """As many searches at a time as have room with all their beams: with memory enough nobody is sent back."""
    alone = ours(open_llm(folder), 4, max_tokens=24, ignore_eos=True)
    llm = open_llm(folder, scheduler=scheduler, max_batch_sequences=9)
    sampling = SamplingParams(temperature=0.0, num_beams=4, n=4, max_tokens=24, ignore_eos=True, seed=0)
    for index, prompt in enumerate(PROMPTS * 2):
        llm.engine.add(Request(str(index), prompt, sampling, 0.0))
    found = {}
    while llm.engine.has_work():
        found |= {output.request_id: output.beams for output in llm.engine.step() if output.finish_reason}
    for index, answers in found.items():
        check([[(list(beam.token_ids), beam.score) for beam in answers]], [alone[int(index) % len(PROMPTS)]])
    assert len(found) == 2 * len(PROMPTS) and llm.engine.stats().num_preemptions == 0


def test_beams_share_blocks(folder: Path) -> None:
    """Eight beams over a long prompt take little more than one sequence."""
    llm = open_llm(folder)
    sampling = SamplingParams(temperature=0.0, num_beams=8, n=1, max_tokens=8, ignore_eos=True, seed=0)
    llm.engine.add(Request("a", list(range(10, 74)), sampling, 0.0))
    most = 0
    while llm.engine.has_work():
        llm.engine.step()
        most = max(most, llm.engine.stats().kv_blocks_used)
    assert 16 < most <= 16 + 8 * 2


def test_an_aborted_search_leaves_nothing(folder: Path) -> None:
    llm = open_llm(folder)
    sampling = SamplingParams(temperature=0.0, num_beams=4, n=2, max_tokens=30, ignore_eos=True, seed=0)
    for steps in (1, 2, 5):
        llm.engine.add(Request("a", [5, 6, 7], sampling, 0.0))
        for _ in range(steps):
            llm.engine.step()
        llm.engine.abort(["a"])
        assert not llm.engine.has_work() and llm.engine.stats().kv_blocks_used == 0


def test_one_token_and_one_answer(folder: Path) -> None:
    llm = open_llm(folder)
    [first, *_] = llm.beam_search([PROMPTS[0]], 3, max_tokens=1, n=1)
    assert len(first.outputs) == 1 and first.outputs[0].finish_reason == "length"
    greedy = llm.generate([PROMPTS[0]], SamplingParams(temperature=0.0, max_tokens=1), use_tqdm=False)
    assert first.outputs[0].token_ids == greedy[0].outputs[0].token_ids


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.5},
        {"top_p": 0.9},
        {"n": 5},
        {"stop": ["x"]},
        {"logprobs": 1},
        {"length_penalty": 100.0},
        {"early_stopping": "maybe"},
    ],
)
def test_what_a_search_may_not_have(options: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(options))):
        SamplingParams(num_beams=4, **options)


def test_more_beams_than_places(folder: Path) -> None:
    with pytest.raises(RequestError, match="may be 5"):
        open_llm(folder, max_batch_sequences=5).beam_search([PROMPTS[0]], 6)


def test_adapters_and_chunks(folder: Path, tmp_path: Path) -> None:
    adapter = folders.lora(tmp_path / "fox", folder)
    merged = folders.merge_lora(tmp_path / "merged", folder, adapter)
    llm = open_llm(folder, lora=f"fox={adapter}", max_batch_sequences=4, max_batch_tokens=4)
    check(ours(llm, 3, max_tokens=10, lora="fox"), theirs(merged, 3, 10))
