"""fp32: the same tokens with and without guesses; greedy, sampled, with penalties, stops, masks and little memory."""

from __future__ import annotations

import json
import shutil
from copy import copy
from dataclasses import replace
from pathlib import Path

import pytest

from fastserve import LLM, RequestOutput, SamplingParams, StructuredOutputs
from fastserve.core.errors import ConfigError
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


def test_a_stop_string_ends_the_tokens_among_guesses(folder: Path) -> None:
    llm = LLM(folder, dtype="float32", speculation="ngram", kv_cache_memory="8MiB")
    whole = llm.generate(PROMPTS[4], GREEDY)[0].outputs[0]  # one token of two characters, over and over
    for count in range(8, 24, 3):
        found = llm.generate(PROMPTS[4], replace(GREEDY, stop=whole.text[: 2 * count]))[0].outputs[0]
        assert (found.token_ids, found.stop_reason) == (whole.token_ids[:count], whole.text[: 2 * count])


def test_auto_gives_the_same(folder: Path, without: list) -> None:
    assert results(LLM(folder, dtype="float32", speculation="auto", kv_cache_memory="8MiB")) == without


@pytest.fixture(scope="module", params=["itself", "another"])
def draft(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A draft model that is always right, and one of the same vocabulary that hardly ever is."""
    if request.param == "itself":
        return folder
    return folders.FAMILIES["llama"](tmp_path_factory.mktemp("draft") / "llama", num_hidden_layers=1)


def test_a_draft_model_changes_nothing(folder: Path, draft: Path, without: list) -> None:
    llm = LLM(folder, dtype="float32", speculation="draft", draft_model=str(draft), kv_cache_memory="8MiB")
    assert results(llm) == without
    stats = llm.engine.stats()
    assert stats.draft_tokens > 0 and stats.kv_blocks_used == 0
    before = copy(stats)
    llm.generate(PROMPTS[:3], [GREEDY, replace(SAMPLED, ignore_eos=True), replace(GREEDY, logprobs=1)])
    stats = llm.engine.stats()
    guessed, right = stats.draft_tokens - before.draft_tokens, stats.draft_tokens_right - before.draft_tokens_right
    if draft == folder:  # greedy and sampled guesses of the model itself are its tokens
        assert guessed == right >= 2 * 30
        assert stats.num_steps - before.num_steps < 50
    else:
        assert right < guessed / 2


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_draft_model_with_little_memory_and_small_steps(
    folder: Path, draft: Path, without: list, kernels: str
) -> None:
    options = {"dtype": "float32", "max_model_len": 160, "speculation": "draft", "draft_model": str(draft)}
    probe = LLM(folder, **options, kv_cache_memory="8MiB")
    small = 14 * probe.engine.memory.block_bytes
    llm = LLM(folder, **options, kernels=kernels, kv_cache_memory=small, max_batch_tokens=24, max_batch_sequences=6)
    assert results(llm) == without
    assert llm.engine.stats().num_preemptions > 0 and llm.engine.stats().draft_tokens > 0


def test_with_auto_a_draft_model_that_is_wrong_rests(folder: Path, tmp_path: Path) -> None:
    other = folders.FAMILIES["llama"](tmp_path / "llama", num_hidden_layers=1)
    llm = LLM(folder, dtype="float32", draft_model=str(other), kv_cache_memory="8MiB", max_model_len=256)
    llm.generate(PROMPTS[2], replace(GREEDY, max_tokens=120))
    assert llm.engine.stats().draft_tokens < 60  # guessing always, it would be about 4 * 120


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculation": "off"}, "speculation must be one of auto, draft"),
        ({"kv_cache_max_memory": "1GiB"}, "leave out kv_cache_max_memory"),
        ({"draft_model": "", "speculation": "draft"}, "needs draft_model"),
    ],
)
def test_what_does_not_go_with_a_draft_model(folder: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(folder, **{"dtype": "float32", "draft_model": str(folder), **options})


def test_a_model_with_its_own_cache_can_neither_draft_nor_be_drafted_for(folder: Path, tmp_path: Path) -> None:
    own = folders.other(tmp_path / "bloom", "BloomConfig", n_layer=1, hidden_size=32, n_head=4)
    for served, draft in ((folder, own), (own, folder)):
        with pytest.raises(ConfigError, match="needs models that FastServe computes itself"):
            LLM(served, dtype="float32", draft_model=str(draft), kv_cache_memory="8MiB")


def test_a_draft_model_with_another_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=r"another vocabulary than .* \(2 tokens differ\)"):
        LLM(folder, dtype="float32", draft_model=str(other), kv_cache_memory="8MiB")


def test_ids_that_only_the_padding_of_a_vocabulary_has(folder: Path, tmp_path: Path) -> None:
    padded = folders.FAMILIES["qwen3"](tmp_path / "padded", vocab_size=folders.VOCAB_SIZE + 64)
    prompt = [*PERIOD, folders.VOCAB_SIZE + 60, *PERIOD]
    made = []
    for options in ({"speculation": "off"}, {"speculation": "draft", "draft_model": str(folder)}):
        llm = LLM(padded, dtype="float32", kv_cache_memory="8MiB", **options)
        outputs = llm.generate([prompt, prompt], [GREEDY, replace(SAMPLED, temperature=5.0, top_k=0, ignore_eos=True)])
        made.append([output.outputs[0].token_ids for output in outputs])
    assert made[0] == made[1] and max(made[0][1]) >= folders.VOCAB_SIZE
