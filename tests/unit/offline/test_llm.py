"""LLM: order, n, stop strings, chat, errors and clean-up, on a tiny random model."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve import LLM, SamplingParams
from fastserve.core.errors import ConfigError, RequestError
from tests import folders

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.llama(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, kv_cache_memory="8MiB", max_model_len=200)


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [f"Tell me about {word}" for word in ("the fox", "a bear", "the deep green sea and the ship")]
    lengths = [9, 3, 6]
    params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
    outputs = llm.generate(prompts, params)
    assert [output.prompt for output in outputs] == prompts
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    assert all(output.outputs[0].finish_reason == "length" for output in outputs)
    for output in outputs:
        assert output.outputs[0].text == llm.tokenizer.decode(output.outputs[0].token_ids)


def test_text_and_token_ids_of_one_prompt_agree(llm: LLM) -> None:
    ids = llm.tokenizer.encode("The fox said")
    by_text = llm.generate("The fox said", GREEDY)[0]
    by_ids = llm.generate(ids, GREEDY)[0]
    assert by_text.outputs[0].token_ids == by_ids.outputs[0].token_ids
    assert by_ids.prompt is None and by_ids.prompt_token_ids == ids
    by_dicts = llm.generate([{"prompt": "The fox said"}, {"prompt_token_ids": ids}], GREEDY)
    assert [output.prompt for output in by_dicts] == ["The fox said", None]
    assert [output.outputs[0].token_ids for output in by_dicts] == [by_text.outputs[0].token_ids] * 2


def test_n_completions_differ_and_are_reproducible(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=10, ignore_eos=True)
    first = llm.generate("The bear", params)[0]
    again = llm.generate(["The river", "The bear"], [GREEDY, params])[1]
    ids = [completion.token_ids for completion in first.outputs]
    assert [completion.index for completion in first.outputs] == [0, 1, 2]
    assert len({tuple(item) for item in ids}) == 3
    assert ids == [completion.token_ids for completion in again.outputs]


def test_the_seed_of_the_model_is_for_requests_without_one(folder: Path) -> None:
    def texts(seed: int | None) -> list[str]:
        again = LLM(folder, seed=seed, kv_cache_memory="8MiB", max_model_len=200)
        params = SamplingParams(max_tokens=10, ignore_eos=True)
        return [output.outputs[0].text for output in again.generate(["The bear"] * 2, params)]

    first = texts(1)
    assert first == texts(1)
    assert len({*first, *texts(2), *texts(None)}) == 6


def test_a_stop_string_ends_the_text_and_frees_the_sequence(llm: LLM) -> None:
    whole = llm.generate("The fox", GREEDY)[0].outputs[0]
    stop = whole.text[5:8]
    cut = llm.generate("The fox", SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop=stop))[0]
    assert cut.outputs[0].text == whole.text[: whole.text.index(stop)]
    assert (cut.outputs[0].finish_reason, cut.outputs[0].stop_reason) == ("stop", stop)
    assert not llm.engine.has_work()
    assert llm.engine.stats().kv_blocks_used == 0


def test_a_stop_token_id_is_reported(llm: LLM) -> None:
    token_id = llm.generate("The fox", GREEDY)[0].outputs[0].token_ids[2]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, stop_token_ids=(token_id,))
    completion = llm.generate("The fox", params)[0].outputs[0]
    assert completion.token_ids[-1] == token_id
    assert (completion.finish_reason, completion.stop_reason) == ("stop", token_id)


def test_chat_goes_through_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    output = llm.chat(messages, GREEDY)[0]
    assert output.prompt is not None and output.prompt.endswith("assistant\n")
    assert output.prompt_token_ids == llm.tokenizer.encode(output.prompt, add_special_tokens=False)
    assert [item.prompt for item in llm.chat([messages, messages], GREEDY)] == [output.prompt] * 2


def test_bad_input_is_refused_and_nothing_stays_behind(llm: LLM) -> None:
    with pytest.raises(RequestError, match="empty"):
        llm.generate([[5, 6], []], GREEDY)
    with pytest.raises(RequestError, match="200 tokens"):
        llm.generate([[5, 6], [5] * 200], GREEDY)
    with pytest.raises(RequestError, match="between 0 and"):
        llm.generate([[5, 10**6]], GREEDY)
    with pytest.raises(RequestError, match="as many params"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(RequestError, match="as many params"):
        llm.generate(["a", "b"], [])
    with pytest.raises(RequestError, match="as many lora"):
        llm.generate(["a", "b"], GREEDY, lora=[])
    for wrong in (["a"], [1.5], {"ids": [1]}, {}, None):
        with pytest.raises(RequestError, match="a prompt is a text"):
            llm.generate([[5, 6], wrong], GREEDY)
    assert not llm.engine.has_work()
    assert llm.engine.stats().kv_blocks_used == 0


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown option speed"):
        LLM("", speed=11)
