"""Rope frequencies against transformers' own functions, both spellings of the config, growing tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastserve.core.errors import CheckpointError
from fastserve.models.rope import Rope, RopeTable, read_rope

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"factor": 4.0, "original_max_position_embeddings": 4096}
CASES: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 1e6},
    {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3},
    {"rope_type": "yarn", "rope_theta": 1e6, **YARN},
    {"rope_type": "yarn", "rope_theta": 1e6, **YARN, "beta_fast": 64, "beta_slow": 2, "truncate": False},
    {"rope_type": "yarn", "rope_theta": 1e4, **YARN, "mscale": 0.7, "mscale_all_dim": 1.0},
    {"rope_type": "yarn", "rope_theta": 1e4, **YARN, "attention_factor": 1.25},
    {"rope_type": "yarn", "rope_theta": 1e4, **YARN, "factor": 0.5},
]


def by_transformers(parameters: dict[str, Any]) -> tuple[torch.Tensor, float]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, max_position_embeddings=16384, rope_parameters=dict(parameters)
    )
    if parameters["rope_type"] == "default":
        if "partial_rotary_factor" in parameters:
            from transformers import StableLmConfig
            from transformers.models.stablelm.modeling_stablelm import StableLmRotaryEmbedding

            config = StableLmConfig(hidden_size=512, num_attention_heads=4, rope_parameters=dict(parameters))
            return StableLmRotaryEmbedding.compute_default_rope_parameters(config)
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config)


@pytest.mark.parametrize("parameters", CASES)
def test_frequencies(parameters: dict[str, Any]) -> None:
    rope = read_rope({"rope_parameters": parameters, "max_position_embeddings": 16384}, head_size=128)
    frequencies, factor = rope.frequencies()
    expected, expected_factor = by_transformers(parameters)
    torch.testing.assert_close(frequencies, expected.float(), rtol=1e-6, atol=0)
    assert factor == pytest.approx(expected_factor)


def test_both_spellings() -> None:
    newer = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}}
    older = {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}
    oldest = {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **LLAMA3}}
    assert read_rope(newer, 64) == read_rope(older, 64) == read_rope(oldest, 64)
    assert read_rope({}, 64) == Rope("default", 10000.0, 64)
    assert read_rope({"rope_scaling": None, "rope_theta": 5}, 64) == Rope("default", 5.0, 64)


def test_several_ropes_in_one_config() -> None:
    parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert read_rope({"rope_parameters": parameters}, 64, "sliding_attention") == Rope("default", 1e4, 64)
    assert read_rope({"rope_parameters": parameters}, 64, "full_attention").kind == "linear"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "spiral"}, "'spiral' is not known"),
        ({"rope_type": "longrope", "short_factor": [1.0]}, "a list short_factor of 32 numbers"),
        ({"rope_type": "linear"}, "lacks the number factor"),
        ({"rope_type": "llama3", "factor": 2.0}, "lacks the number low_freq_factor"),
        ({"rope_type": "yarn", "factor": "4"}, "lacks the number factor"),
    ],
)
def test_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_rope({"rope_parameters": parameters}, 64)


def test_an_odd_number_has_no_pairs() -> None:
    with pytest.raises(CheckpointError, match="15 numbers of a head cannot be rotated"):
        RopeTable(Rope("default", 10000.0, 15), 100, torch.device("cpu"))


def test_long_tables_grow_when_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastserve.models import rope as module

    rope = Rope("default", 10000.0, 8)
    whole = RopeTable(rope, 100, torch.device("cpu"))
    monkeypatch.setattr(module, "_FIRST_ROWS", 4)
    growing = RopeTable(rope, 100, torch.device("cpu"))
    for num_positions in (3, 5, 51, 100):
        for ours, expected in zip(growing.rotation(num_positions), whole.rotation(num_positions), strict=True):
            assert len(ours) >= num_positions
            assert torch.equal(ours, expected[: len(ours)])
    angle = torch.tensor(50 * 10000.0 ** (-2 / 8))
    cos, sin = whole.rotation(51)
    torch.testing.assert_close(cos[50, 1], angle.cos(), atol=1e-5, rtol=0)
    torch.testing.assert_close(sin[50, 1], angle.sin(), atol=1e-5, rtol=0)
