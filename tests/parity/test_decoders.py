"""Native decoders against transformers on random folders: logits within 1e-4 and equal greedy output, in float32."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastserve.checkpoint.folder import ModelFolder
from fastserve.models.attention import VarlenContext
from fastserve.models.loader import LoadedModel, load_model
from tests import folders
from tests.paged_driver import PagedDriver

LENGTHS = [37, 5, 1, 60]
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 256,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-all-heads": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-biases-sharded": ("llama", {"attention_bias": True, "mlp_bias": True, "shard_size": "100KB"}),
    "llama-linear-rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 3.0}}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-mscale": (
        "llama",
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16}},
    ),
    "llama3": ("llama3", {}),
    "llama3-untied": ("llama3", {"tie_word_embeddings": False}),
    "qwen2": ("qwen2", {}),
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-untied-bias": ("qwen3", {"tie_word_embeddings": False, "attention_bias": True}),
    "mistral": ("mistral", {}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "gpt2": ("gpt2", {}),
    "gpt2-inner-gelu": ("gpt2", {"n_inner": 96, "activation_function": "gelu"}),
    "gemma2": ("gemma2", {}),
    "gemma2-no-caps": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3": ("gemma3", {}),
    "phi3": ("phi3", {}),
    "phi3-longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256}),
    "phi": ("phi", {}),
    "gpt-neox": ("gpt-neox", {}),
    "gpt-neox-serial": ("gpt-neox", {"use_parallel_residual": False, "attention_bias": False}),
    "opt": ("opt", {}),
    "falcon-one-key-head": ("falcon", {}),
    "falcon-all-heads": ("falcon", {"multi_query": False, "bias": True, "parallel_attn": False}),
    "falcon-new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-new-one-norm": ("falcon", {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1}),
    "starcoder2": ("starcoder2", {}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "smollm3": ("smollm3", {}),
    "mixtral": ("mixtral", {}),
    "qwen3-moe": ("qwen3-moe", {}),
    "qwen3-moe-normed": ("qwen3-moe", {"norm_topk_prob": True}),
    "stablelm": ("stablelm", {}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True}),
    "gpt-bigcode": ("gpt-bigcode", {}),
    "gpt-bigcode-all-heads": ("gpt-bigcode", {"multi_query": False}),
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Any]:
    """The same folder loaded by us and by transformers."""
    from transformers import AutoModelForCausalLM

    family, options = VARIANTS[request.param]
    folder = folders.FAMILIES[family](tmp_path_factory.mktemp(request.param), **options)
    loaded = load_model(ModelFolder.open(str(folder)), backend="native", kernels="reference")
    return loaded, AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, folders.VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.inference_mode()
def expected_logits(model: Any, token_ids: list[int]) -> Tensor:
    return model(torch.tensor([token_ids])).logits[0]


def test_dense_logits(pair: tuple[LoadedModel, Any]) -> None:
    loaded, reference = pair
    sequences = prompts()
    ids = torch.tensor([token_id for sequence in sequences for token_id in sequence])
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    context = VarlenContext(loaded.kernels, [0, *accumulate(LENGTHS)], is_causal=True)
    hidden = loaded.model.forward(ids, positions, context)
    logits = loaded.model.logits(hidden)
    assert logits.dtype is torch.float32
    expected = torch.cat([expected_logits(reference, sequence) for sequence in sequences])
    assert expected.std() > 0.5  # not degenerate
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunk_size", [1000, 7, 1])
def test_paged_logits_in_chunks(pair: tuple[LoadedModel, Any], chunk_size: int) -> None:
    loaded, reference = pair
    driver = PagedDriver(loaded)
    for index, sequence in enumerate(prompts()):
        driver.add(str(index), sequence)
    for index, logits in driver.prompt_logits(chunk_size).items():
        expected = expected_logits(reference, prompts()[int(index)])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_greedy_output(pair: tuple[LoadedModel, Any]) -> None:
    loaded, reference = pair
    driver = PagedDriver(loaded)
    for index, sequence in enumerate(prompts()):
        driver.add(str(index), sequence)
    output = driver.generate(64, chunk_size=16)
    for index, sequence in enumerate(prompts()):
        made = reference.generate(torch.tensor([sequence]), max_new_tokens=64, do_sample=False, eos_token_id=None)
        expected = made[0, len(sequence) :].tolist()
        assert output[str(index)] == expected
        assert len(set(expected)) > 3 or len(sequence) == 1  # not one token for ever


@pytest.mark.parametrize("family", ["llama3", "qwen2", "mistral"])
def test_older_spelling_of_the_config(family: str, tmp_path: Path) -> None:
    """rope_theta, rope_scaling and torch_dtype as transformers 4 wrote them, layer_types absent: the same network."""
    options = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1} if family == "qwen2" else {}
    folder = folders.FAMILIES[family](tmp_path, **options)
    ids, positions = torch.tensor(prompts()[3]), torch.arange(LENGTHS[3])

    def logits() -> Tensor:
        loaded = load_model(ModelFolder.open(str(folder)), backend="native", kernels="reference")
        hidden = loaded.model.forward(ids, positions, VarlenContext(loaded.kernels, [0, LENGTHS[3]], is_causal=True))
        return loaded.model.logits(hidden)

    newer = logits()
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(), newer)
