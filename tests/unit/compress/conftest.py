"""Tiny folders of the three kinds of network, and text to calibrate on."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests import folders

WORDS = (
    "the", "fox", "and", "bear", "went", "to", "a", "river", "where", "old", "king", "of", "north", "wind", "sat"
)  # fmt: skip


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand words in no order."""
    draw = random.Random(0)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text(" ".join(draw.choice(WORDS) for _ in range(3000)))
    return file


def llama(folder: Path) -> Path:
    return folders.llama(folder, hidden_size=64, intermediate_size=128)


def bert(folder: Path) -> Path:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=folders.VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
    )
    save(BertForMaskedLM, config, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "mask_token": folders.SPECIAL_TOKENS[folders.IM_START]})
    )
    return folder


def t5(folder: Path) -> Path:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=folders.VOCAB_SIZE, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4,
        decoder_start_token_id=0, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    return save(T5ForConditionalGeneration, config, folder)


def save(network: type, config: object, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    deviation = 0.5 if "embed" in name or "shared" in name else 0.02 if ".q." in name else 0.1
                    parameter.normal_(0.0, deviation)  # T5 does not scale its scores
    model.save_pretrained(folder)
    return folders.write_tokenizer(folder, None)


KINDS: dict[str, Callable[[Path], Path]] = {"llama": llama, "bert": bert, "t5": t5}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder of each kind."""
    return {name: make(tmp_path_factory.mktemp("models") / name) for name, make in KINDS.items()}
