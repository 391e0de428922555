"""LoRA adapters by request: the tokens of merged weights, whatever else is in the batch, however it is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastserve import LLM, SamplingParams
from fastserve.core.errors import RequestError
from tests import folders

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
PROMPTS = [[5, 9, 33, 40, 7], list(range(20, 60)), [100], [3, 200, 31, 8, 250, 17, 90, 44, 12]]


def tokens(llm: LLM, prompts: list[list[int]], lora: Any = None) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, GREEDY, lora=lora, use_tqdm=False)]


def open_llm(folder: Path, **options: Any) -> LLM:
    settings = {"max_model_len": 128, "kv_cache_memory": "4MiB", "num_threads": 1, "block_size": 4, "dtype": "float32"}
    return LLM(str(folder), **{**settings, **options})


def by_merging(tmp_path: Path, base: Path, adapters: dict[str, Path], prompts: list[list[int]], **options: Any) -> Any:
    """The tokens of each prompt under each adapter ("" for none) by folders with merged weights."""
    expected = {"": tokens(open_llm(base, **options), prompts)}
    for name, adapter in adapters.items():
        merged = folders.merge_lora(tmp_path / f"merged-{name}", base, adapter)
        expected[name] = tokens(open_llm(merged, **options), prompts)
    return expected


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "phi3", "falcon", "gpt-neox", "gemma2", "mixtral"])
def test_a_batch_of_adapters_equals_merged_weights(tmp_path: Path, family: str, kernels: str) -> None:
    base = folders.FAMILIES[family](tmp_path / "base")
    adapters = {
        "fox": folders.lora(tmp_path / "fox", base, rank=4, seed=1),
        "bear": folders.lora(tmp_path / "bear", base, rank=9, seed=2, use_rslora=True, lora_alpha=5),
    }
    expected = by_merging(tmp_path, base, adapters, PROMPTS, kernels=kernels)
    assert expected["fox"] != expected[""] != expected["bear"]
    llm = open_llm(base, kernels=kernels, lora=[f"{name}={path}" for name, path in adapters.items()])
    names = ["fox", "", "bear", "fox"]
    mixed = tokens(llm, PROMPTS, names)
    assert mixed == [expected[name][index] for index, name in enumerate(names)]
    assert tokens(llm, PROMPTS, "bear") == expected["bear"]
    assert tokens(llm, PROMPTS) == expected[""]


@pytest.mark.parametrize(
    "family", sorted(set(folders.FAMILIES) - {"llama", "qwen2", "gpt2", "phi3", "falcon", "gemma2"})
)
def test_every_family_takes_adapters(tmp_path: Path, family: str) -> None:
    base = folders.FAMILIES[family](tmp_path / "base")
    adapter = folders.lora(tmp_path / "fox", base, rank=2)
    expected = by_merging(tmp_path, base, {"fox": adapter}, PROMPTS[:2])
    llm = open_llm(base, lora=f"fox={adapter}")
    assert tokens(llm, PROMPTS[:2], ["fox", ""]) == [expected["fox"][0], expected[""][1]]


def test_thirty_two_adapters_in_one_batch(tmp_path: Path) -> None:
    base = folders.llama(tmp_path / "base")
    adapters = {f"a{index}": folders.lora(tmp_path / f"a{index}", base, seed=index) for index in range(32)}
    expected = by_merging(tmp_path, base, adapters, [PROMPTS[0]])
    llm = open_llm(base, lora=[f"{name}={path}" for name, path in adapters.items()], max_batch_sequences=32)
    made = tokens(llm, [PROMPTS[0]] * 32, list(adapters))
    assert made == [expected[name][0] for name in adapters]
    assert len({tuple(item) for item in made}) > 24


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_do_not_depend_on_the_batch(tmp_path: Path, kernels: str, dtype: str) -> None:
    """Chunks of five tokens, preemption in a cache of few blocks, prefix hits: always the adapter's own tokens."""
    if (kernels, dtype) == ("reference", "bfloat16"):
        pytest.skip("plain PyTorch in bfloat16 is not the same in every batch, with or without adapters")
    base = folders.llama(tmp_path / "base")
    lora = [f"a{index}={folders.lora(tmp_path / f'a{index}', base, seed=index)}" for index in range(3)]
    names = ["a0", "a1", "", "a2"]
    options: dict[str, Any] = {"kernels": kernels, "dtype": dtype, "lora": lora}
    llm = open_llm(base, **options)
    alone = [tokens(llm, [prompt], name)[0] for prompt, name in zip(PROMPTS, names, strict=True)]
    small = open_llm(base, **options, max_batch_tokens=5, max_batch_sequences=4, kv_cache_memory=0, max_model_len=68)
    small.engine.resize_kv_cache(22 * small.engine.memory.block_bytes)
    assert tokens(small, PROMPTS, names) == alone
    assert small.engine.stats().num_preemptions > 0
    assert tokens(small, PROMPTS, names) == alone


def test_adapters_share_no_prefix(tmp_path: Path) -> None:
    base = folders.llama(tmp_path / "base")
    fox, bear = (folders.lora(tmp_path / name, base, seed=seed) for seed, name in enumerate(("fox", "bear")))
    llm = open_llm(base, lora=[f"fox={fox}", f"bear={bear}"])

    def cached(name: str) -> int:
        return llm.generate([PROMPTS[1]], GREEDY, lora=name, use_tqdm=False)[0].num_cached_tokens

    assert [cached("fox"), cached("bear"), cached("")] == [0, 0, 0]
    assert cached("fox") == cached("") == 36
    llm.unload_lora("fox")
    llm.load_lora("fox", str(bear))  # another adapter of the same name
    assert cached("fox") == 0


def test_adapters_come_and_go(tmp_path: Path) -> None:
    base = folders.llama(tmp_path / "base")
    fox = folders.lora(tmp_path / "fox", base)
    llm = open_llm(base, max_loras=1)
    with pytest.raises(RequestError, match="no adapter 'fox'"):
        tokens(llm, PROMPTS, "fox")
    llm.load_lora("fox", str(fox))
    first = tokens(llm, PROMPTS, "fox")
    with pytest.raises(RequestError, match="already"):
        llm.load_lora("fox", str(fox))
    with pytest.raises(RequestError, match="max_loras"):
        llm.load_lora("bear", str(fox))
    llm.unload_lora("fox")
    base_tokens = tokens(llm, PROMPTS)
    llm.load_lora("bear", str(fox))
    assert tokens(llm, PROMPTS, "bear") == first != base_tokens


def test_an_adapter_in_use_is_not_unloaded(tmp_path: Path) -> None:
    from fastserve.core.request import Request

    base = folders.llama(tmp_path / "base")
    engine = open_llm(base, lora=f"fox={folders.lora(tmp_path / 'fox', base)}").engine
    sampling = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, seed=0)
    engine.add(Request("1", [1, 2, 3], sampling, 0.0, adapter="fox"))
    with pytest.raises(RequestError, match="in use"):
        engine.unload_adapter("fox")
    while engine.has_work():
        engine.step()
    engine.unload_adapter("fox")
    with pytest.raises(RequestError, match="no adapter 'fox'"):
        engine.unload_adapter("fox")


def test_prompt_scores_are_those_of_the_adapter(tmp_path: Path) -> None:
    base = folders.llama(tmp_path / "base")
    fox = folders.lora(tmp_path / "fox", base)
    merged = open_llm(folders.merge_lora(tmp_path / "merged", base, fox))
    params = SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=0)
    expected = merged.generate([PROMPTS[1]], params, use_tqdm=False)[0].prompt_logprobs
    found = (
        open_llm(base, lora=f"fox={fox}").generate([PROMPTS[1]], params, lora="fox", use_tqdm=False)[0].prompt_logprobs
    )
    assert expected is not None and found is not None
    for one, other in zip(expected[1:], found[1:], strict=True):
        assert one is not None and other is not None
        [(token_id, value)] = one.items()
        assert other[token_id].logprob == pytest.approx(value.logprob, abs=1e-3)


def test_a_quantised_network_takes_adapters(tmp_path: Path) -> None:
    """8-bit activations are scaled after the product; what an adapter adds is not."""
    from fastserve.checkpoint.quantized import QuantizedWeight, QuantScheme
    from fastserve.kernels.cpu import create
    from fastserve.kernels.reference import Kernels

    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 255, (96, 64), generator=generator, dtype=torch.uint8)
    weight = QuantizedWeight(QuantScheme(8, 0, True, 8), values, torch.full((96, 1), 0.01), None)
    a, b = torch.randn(4, 64, generator=generator), torch.randn(96, 4, generator=generator)
    x = torch.randn(7, 64, generator=generator)
    results = []
    for kernels in (Kernels(), create()):
        if kernels.supports.__self__.name == "cpu" and kernels.native_backend is None:
            pytest.skip("the native library was not built")
        packed = kernels.pack_linear(weight, None)
        step = [torch.tensor([0, -1, 1, 0, -1, 0, 1])]
        kernels.allow_adapters(packed, step, 2)
        kernels.set_adapter(packed, 0, (a, b), torch.float32)
        adapted = kernels.linear(packed, x)
        step.clear()
        plain = kernels.linear(packed, x)
        changed = (adapted - plain)[[0, 3, 5]]
        torch.testing.assert_close(changed, x[[0, 3, 5]] @ a.t() @ b.t(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(adapted[[1, 2, 4, 6]], plain[[1, 2, 4, 6]], rtol=0, atol=0)
        results.append(adapted)
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-3)
