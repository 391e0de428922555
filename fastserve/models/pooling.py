"""From the hidden states of a ragged batch to one vector per sequence.

Legend: T tokens of all sequences, one after the other; B sequences; `starts` are B + 1 ints, the tokens of sequence b
are starts[b] : starts[b + 1], at least one.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from fastserve.checkpoint.sentence import DenseModule, SentenceModules
from fastserve.checkpoint.weights import WeightReader


def _per_sequence(reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor, list[int]], Tensor]:
    return lambda hidden, starts: torch.stack([reduce(hidden[start:end].float()) for start, end in pairwise(starts)])


def _weighted_mean(rows: Tensor) -> Tensor:
    """Later tokens count more: weights 1, 2, 3, ... (Muennighoff, 2022)."""
    weights = torch.arange(1, len(rows) + 1, device=rows.device).float()
    return weights @ rows / weights.sum()


# Name, as sentence-transformers has it -> hidden [T, K], starts -> [B, K] float32.
POOLS: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    "cls": lambda hidden, starts: hidden[starts[:-1]].float(),
    "lasttoken": lambda hidden, starts: hidden[[end - 1 for end in starts[1:]]].float(),
    "mean": _per_sequence(lambda rows: rows.mean(0)),
    "max": _per_sequence(lambda rows: rows.amax(0)),
    "mean_sqrt_len_tokens": _per_sequence(lambda rows: rows.sum(0) / len(rows) ** 0.5),
    "weightedmean": _per_sequence(_weighted_mean),
}


class Embedder:
    """Hidden states of a ragged batch to one vector per text, as the folder's sentence-transformers modules say.

    Raises:
        CheckpointError: a dense module's weights are missing or have another shape.
    """

    def __init__(self, modules: SentenceModules, device: torch.device) -> None:
        self._modules = modules
        self._dense = [_read_dense(module, device) for module in modules.dense]

    @torch.inference_mode()
    def __call__(self, hidden: Tensor, starts: list[int]) -> Tensor:
        """hidden [T, K] -> [B, N] float32."""
        vectors = torch.cat([POOLS[name](hidden, starts) for name in self._modules.poolings], dim=-1)
        for module, (weight, bias) in zip(self._modules.dense, self._dense, strict=True):
            vectors = functional.linear(vectors, weight, bias)
            vectors = getattr(functional, module.activation)(vectors) if module.activation else vectors
        return functional.normalize(vectors, dim=-1) if self._modules.normalize else vectors


def _read_dense(module: DenseModule, device: torch.device) -> tuple[Tensor, Tensor | None]:
    reader = WeightReader([module.folder / "model.safetensors"])
    try:
        weight = torch.empty(module.num_outputs, module.num_inputs)
        reader.read_into("linear.weight", weight)
        bias = torch.empty(module.num_outputs) if module.has_bias else None
        if bias is not None:
            reader.read_into("linear.bias", bias)
    finally:
        reader.close()
    return weight.to(device), None if bias is None else bias.to(device)
