"""Held-out loss of the model in training, per token and as bits per byte of UTF-8 text.

Bits per byte do not depend on the tokenizer, so they compare models of different vocabularies.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fastserve.train.storyteller.corpus import Document
from fastserve.train.storyteller.model import batch_loss
from fastserve.train.storyteller.packing import IGNORED, Tokens
from fastserve.train.storyteller.tokenizer import END_OF_TEXT, token_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM


def encode_documents(tokenizer: Tokenizer, documents: list[Document]) -> list[Tokens]:
    """Token ids of each document, opened by the end-of-text token that separates documents."""
    end = token_id(tokenizer, END_OF_TEXT)
    return [
        np.array([end, *encoding.ids], dtype=np.uint16)
        for encoding in tokenizer.encode_batch([item.text for item in documents])
    ]


def held_out_loss(
    model: LlamaForCausalLM, tokenizer: Tokenizer, documents: list[Document], length: int, max_tokens: int | None = None
) -> dict[str, float]:
    """`loss` (nats per token) and `bits_per_byte` over documents laid end to end in windows of `length` tokens."""
    import torch

    tokens = np.concatenate(encode_documents(tokenizer, documents)).astype(np.int64)[: max_tokens and max_tokens + 1]
    num_targets = len(tokens) - 1
    num_rows = math.ceil(num_targets / length)
    inputs, targets = np.zeros(num_rows * length, dtype=np.int64), np.full(num_rows * length, IGNORED, dtype=np.int64)
    inputs[:num_targets], targets[:num_targets] = tokens[:-1], tokens[1:]
    device, total = next(model.parameters()).device, 0.0
    with torch.no_grad():
        for start in range(0, num_rows, 16):
            rows = slice(start * length, (start + 16) * length)
            part = torch.from_numpy(targets[rows].reshape(-1, length)).to(device)
            loss = batch_loss(model, torch.from_numpy(inputs[rows].reshape(-1, length)).to(device), part)
            total += loss.item() * int((part != IGNORED).sum())
    num_bytes = len(tokenizer.decode(tokens[1:].tolist(), skip_special_tokens=True).encode())
    return {"loss": total / num_targets, "bits_per_byte": total / math.log(2) / num_bytes}
