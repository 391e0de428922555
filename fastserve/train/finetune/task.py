"""What every kind of fine-tuning gives to the run: encoded examples, batches, losses, scores.

A kind is small: it names transformers' class for its network, turns a row of the file into arrays, and scores rows with
a network. Order, packing into steps, checkpoints and export are common.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fastserve.train.finetune.examples import Example
from fastserve.train.objectives import IGNORED, Batch

if TYPE_CHECKING:
    import torch

Encoded = dict[str, Any]  # names of the network's inputs -> list of ints or an int
_TYPES = "token_type_ids"
_MULTIPLE = 8  # lengths are padded to it


class Kind(Protocol):
    """One kind of fine-tuning; made with tokenizer and settings."""

    network_class: str  # of transformers

    def configure(self, config: Any, rows: list[Example]) -> None:
        """Set what the network's configuration must know of the examples (labels)."""

    def use_labels(self, config: Any) -> None:
        """Take what `configure` set from the configuration of a tuned folder."""

    def encode(self, rows: list[Example]) -> list[Encoded]:
        """What is trained on; may be more or fewer than the rows."""

    def batch(self, items: list[Encoded]) -> Batch:
        """Padded arrays with `labels`."""

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sum over labels."""

    def score(self, network: Any, rows: list[Example]) -> dict[str, float]:
        """What is measured of a network in evaluation mode; no gradients."""


def give_types(tokenizer: Any, config: Any) -> None:
    """Have the tokenizer give types of tokens to a network that tells two texts apart by them, as serving does."""
    names = tokenizer.model_input_names
    if getattr(config, "type_vocab_size", 0) > 1 and _TYPES not in names:
        tokenizer.model_input_names = [*names, _TYPES]


def padded(items: list[Encoded], fill: dict[str, int], keys: tuple[str, ...] | None = None) -> Batch:
    """Lists under a key as one array [B, longest], ints as [B]; shorter lists are filled with `fill[key]`, else 0."""
    batch: Batch = {}
    for key in keys or tuple(items[0]):
        values = [item[key] for item in items]
        if not isinstance(values[0], list):
            batch[key] = np.array(values, dtype=np.int64)
            continue
        longest = -(-max(map(len, values)) // _MULTIPLE) * _MULTIPLE
        missing = IGNORED if key == "labels" else fill.get(key, 0)
        batch[key] = np.array([value + [missing] * (longest - len(value)) for value in values], dtype=np.int64)
    return batch


def batches_of(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def on_device(batch: Batch, network: Any) -> dict[str, torch.Tensor]:
    import torch

    device = next(network.parameters()).device
    return {name: torch.from_numpy(values).to(device) for name, values in batch.items()}
