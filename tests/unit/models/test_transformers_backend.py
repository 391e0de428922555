"""Other architectures through transformers: paged where that is exact, else the model's own cache; always checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastserve.checkpoint.folder import ModelFolder
from fastserve.core.errors import CheckpointError
from fastserve.kernels.interface import Scores
from fastserve.models import transformers_backend, transformers_network
from fastserve.models.loader import LoadedModel, load_model
from tests import folders
from tests.paged_driver import PagedDriver

LENGTHS = [29, 3, 1]
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4}
# configuration class -> its options, and whether it must run over the paged cache
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "Gemma2Config": (
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6, "attn_logit_softcapping": 2.0},
        True,
    ),
    "Phi3Config": ({}, True),
    "Olmo2Config": ({}, True),
    "GPTNeoXConfig": ({}, True),
    "OPTConfig": ({"ffn_dim": 128, "word_embed_proj_dim": 64}, True),
    "GraniteConfig": ({"logits_scaling": 3.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.1}, True),
    "MixtralConfig": (MOE, True),
    "FalconConfig": ({"new_decoder_architecture": True, "num_kv_heads": 2}, False),
    "BloomConfig": ({"n_layer": 2, "n_head": 4}, False),
    "MambaConfig": ({"state_size": 8}, False),
    "DeepseekV2Config": (
        {
            **LATENT,
            "q_lora_rank": None,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
        },
        False,
    ),
    "GptOssConfig": ({**MOE, "head_dim": 16, "sliding_window": 6, "rope_parameters": {"rope_type": "default"}}, False),
}


@pytest.fixture(scope="module", params=list(CASES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, Any, bool]:
    from transformers import AutoModelForCausalLM

    options, is_paged = CASES[request.param]
    folder = folders.other(tmp_path_factory.mktemp(request.param), request.param, **options)
    loaded = load_model(ModelFolder.open(str(folder)), backend="transformers")
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    return loaded, reference, is_paged


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, folders.VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]


def test_way_is_reported(pair: tuple[LoadedModel, Any, bool]) -> None:
    loaded, _, is_paged = pair
    assert loaded.model.has_own_cache is not is_paged
    assert loaded.report[1].startswith("backend: transformers (")
    assert any(("attention: paged" in line) is is_paged for line in loaded.report if line.startswith("attention:"))
    shape = loaded.model.shape
    assert (shape.num_layers, shape.hidden_size, shape.vocab_size) == (2, 64, folders.VOCAB_SIZE)


@pytest.mark.parametrize("chunk_size", [1000, 5])
def test_logits(pair: tuple[LoadedModel, Any, bool], chunk_size: int) -> None:
    loaded, reference, _ = pair
    driver = PagedDriver(loaded)
    for index, sequence in enumerate(prompts()):
        driver.add(str(index), sequence)
    for index, logits in driver.prompt_logits(chunk_size).items():
        with torch.inference_mode():
            expected = reference(torch.tensor([prompts()[int(index)]]), use_cache=False).logits[0]
        torch.testing.assert_close(logits, expected.float(), atol=1e-4, rtol=0)


def test_greedy_output(pair: tuple[LoadedModel, Any, bool]) -> None:
    loaded, reference, _ = pair
    driver = PagedDriver(loaded)
    for index, sequence in enumerate(prompts()):
        driver.add(str(index), sequence)
    output = driver.generate(16, chunk_size=7)
    for index, sequence in enumerate(prompts()):
        ids = torch.tensor([sequence])
        with torch.inference_mode():
            for _ in range(16):  # without a cache: the plain meaning of the model
                ids = torch.cat((ids, reference(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
        assert output[str(index)] == ids[0, len(sequence) :].tolist()


def test_own_cache_forgets_and_begins_anew(tmp_path: Path) -> None:
    loaded = load_model(ModelFolder.open(str(folders.other(tmp_path, "BloomConfig", n_layer=2, n_head=4))))
    driver = PagedDriver(loaded)
    driver.add("a", prompts()[0])
    first = driver.prompt_logits(10)["a"]
    driver.add("a", prompts()[0])  # preempted: position 0 comes again
    torch.testing.assert_close(driver.prompt_logits(10)["a"], first, atol=1e-5, rtol=0)
    loaded.model.release(["a", "never seen"])
    driver.sequences["a"].token_ids.append(5)
    with pytest.raises(AssertionError, match="must come in order"):
        driver.step({"a": 1})


def test_attention_that_ignores_order_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If our attention were not causal, the check at load would notice; this is the trap of a mask that is missing."""

    def not_causal(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        result = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        heads = (item[0].transpose(0, 1) for item in (query, key, value))
        options["fastserve_context"].attend(module.layer_idx, *heads, Scores(1.0), None)
        return result.transpose(1, 2), None

    folder = folders.other(tmp_path, "Olmo2Config")
    monkeypatch.setattr(transformers_network, "attend", not_causal)
    loaded = load_model(ModelFolder.open(str(folder)), backend="transformers")
    monkeypatch.undo()
    transformers_network.register_attention()
    assert loaded.model.has_own_cache
    assert any("logits would differ" in line for line in loaded.report)


def test_windows_known_only_to_a_mask_are_refused() -> None:
    class Config:
        layer_types = ("sliding_attention", "full_attention")

    transformers_backend._check_windows(Config(), (8, 0))
    for windows in ((0, 0), (8, 8)):
        with pytest.raises(transformers_network.NotPagedError):
            transformers_backend._check_windows(Config(), windows)


def test_lengths_that_would_change_other_sequences_are_cut(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 64,
    }
    folder = folders.other(tmp_path, "Phi3Config", rope_parameters=rope, original_max_position_embeddings=64)
    for backend in ("native", "transformers"):
        loaded = load_model(ModelFolder.open(str(folder)), backend=backend)
        assert loaded.model.shape.max_positions == 64


def test_encoders_are_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="BertForMaskedLM"):
        load_model(ModelFolder.open(str(tmp_path)))


def test_missing_tensors_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = folders.other(tmp_path, "Olmo2Config")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing keys: model\.layers\.1\.mlp\.up_proj"):
        load_model(ModelFolder.open(str(folder)), backend="transformers")
