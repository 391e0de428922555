"""What configs mean: windows, biases, sizes, and what is refused with a reason."""

from __future__ import annotations

from typing import Any

import pytest

from fastserve.core.errors import CheckpointError
from fastserve.models.families import FAMILIES

SMALL: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def read(architecture: str, **changes: Any) -> Any:
    return FAMILIES[architecture].read_config({**SMALL, **changes})


def test_defaults() -> None:
    config = read("LlamaForCausalLM")
    assert (config.num_kv_heads, config.head_size, config.windows) == (4, 16, (0, 0, 0, 0))
    assert not config.tied_embeddings and not config.qkv_bias
    assert read("LlamaForCausalLM", head_dim=None, num_key_value_heads=2).head_size == 16
    assert read("LlamaForCausalLM", head_dim=32).head_size == 32
    assert read("Qwen3ForCausalLM").head_size == 128
    assert all(read(f"{name}ForCausalLM").tied_embeddings for name in ("SmolLM3", "Starcoder2", "Gemma2"))
    assert read("Qwen2ForCausalLM").qkv_bias and not read("Qwen2ForCausalLM").output_bias


@pytest.mark.parametrize(
    ("architecture", "changes", "windows"),
    [
        ("MistralForCausalLM", {"sliding_window": 32}, (32, 32, 32, 32)),
        ("MistralForCausalLM", {"sliding_window": None}, (0, 0, 0, 0)),
        ("Qwen2ForCausalLM", {"sliding_window": 32}, (0, 0, 0, 0)),
        ("Qwen2ForCausalLM", {"sliding_window": 32, "use_sliding_window": False, "max_window_layers": 0}, (0, 0, 0, 0)),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2},
            (0, 0, 32, 32),
        ),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 32,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
            },
            (32, 0, 0, 32),
        ),
        ("LlamaForCausalLM", {"sliding_window": 32}, (0, 0, 0, 0)),
    ],
)
def test_windows(architecture: str, changes: dict[str, Any], windows: tuple[int, ...]) -> None:
    assert read(architecture, **changes).windows == windows


def test_yarn_reaches_further_than_the_config_says() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert read("Qwen2ForCausalLM", rope_scaling=rope).max_positions == 2048
    assert read("Qwen2ForCausalLM", rope_scaling={**rope, "rope_type": "dynamic"}).max_positions == 512


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("LlamaForCausalLM", {"hidden_act": "mish"}, "activation 'mish'"),
        ("LlamaForCausalLM", {"vocab_size": None}, "lacks the number vocab_size"),
        ("LlamaForCausalLM", {"num_hidden_layers": "4"}, "lacks the number num_hidden_layers"),
        ("LlamaForCausalLM", {"num_attention_heads": 0}, "0 heads cannot share 0 heads of keys"),
        ("LlamaForCausalLM", {"num_key_value_heads": 3}, "4 heads cannot share 3 heads of keys"),
        ("LlamaForCausalLM", {"num_key_value_heads": 0}, "4 heads cannot share 0 heads of keys"),
        ("PhiForCausalLM", {"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5 does not fit heads of 16"),
        ("MistralForCausalLM", {"layer_types": ["full_attention"]}, "layer_types"),
        ("Gemma3ForCausalLM", {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ("Gemma3ForCausalLM", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ("MistralForCausalLM", {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ],
)
def test_refused(architecture: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(architecture, **changes)


def test_gemma_defaults_and_older_spelling() -> None:
    """Gemma 3 folders of 2025 have rope_theta, rope_local_base_freq and sliding_window_pattern."""
    config = read(
        "Gemma3ForCausalLM",
        sliding_window=32,
        sliding_window_pattern=2,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    assert config.tied_embeddings and config.head_size == 256
    assert config.windows == (32, 0, 32, 0)
    assert [(rope.kind, rope.theta) for rope in config.ropes[:2]] == [("default", 1e4), ("linear", 1e6)]
    assert read("Gemma2ForCausalLM", sliding_window=32).windows == (32, 0, 32, 0)


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("FalconForCausalLM", {"alibi": True}, "alibi=True"),
        ("OPTForCausalLM", {"do_layer_norm_before": False}, "do_layer_norm_before=False"),
        ("OPTForCausalLM", {"word_embed_proj_dim": 32}, "word_embed_proj_dim=32"),
        ("StableLmForCausalLM", {"qk_layernorm": True}, "qk_layernorm=True"),
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": [1]}, "layers without experts"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries for 4 layers"),
    ],
)
def test_what_the_parts_cannot_do(architecture: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(architecture, **changes)
