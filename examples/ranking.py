"""Advertisements ranked for a visitor: a user's own network, with text and numbers in and a probability out.

    fastserve serve examples/ranking.py:servable
    curl http://127.0.0.1:8000/v2/models/ranking/infer -d '{"inputs": [
        {"name": "advertisement", "datatype": "BYTES", "shape": [2, 1], "data": ["shoes", "garden"]},
        {"name": "visitor", "datatype": "FP32", "shape": [2, 3], "data": [[0.2, 1, 0], [0.2, 1, 0]]}]}'

The network is small and its weights are seeded random numbers; put your own in its place. Requests that come at the
same time are joined along the first axis.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch

import fastserve

NUM_BUCKETS, SIZE = 1000, 16


class Ranker(torch.nn.Module):
    """A wide and deep network (Cheng et al., 2016) over one category and three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = torch.nn.Embedding(NUM_BUCKETS, 1)
        self.embedding = torch.nn.Embedding(NUM_BUCKETS, SIZE)
        self.deep = torch.nn.Sequential(torch.nn.Linear(SIZE + 3, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))

    def forward(self, bucket: torch.Tensor, visitor: torch.Tensor) -> dict[str, torch.Tensor]:
        """bucket [N] int64, visitor [N, 3] -> logit [N, 1]."""
        together = torch.cat([self.embedding(bucket), visitor], dim=1)
        return {"logit": self.wide(bucket) + self.deep(together)}


def preprocess(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names of advertisements to buckets."""
    names = arrays["advertisement"].ravel()
    buckets = np.array([zlib.crc32(name) % NUM_BUCKETS for name in names], dtype=np.int64)
    return {"bucket": buckets, "visitor": arrays["visitor"]}


def postprocess(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Logits to probabilities of a click."""
    return {"probability": 1 / (1 + np.exp(-arrays["logit"]))}


def servable() -> fastserve.Servable:
    """What is served."""
    torch.manual_seed(0)
    return fastserve.Servable(
        Ranker(),
        inputs={"advertisement": ("bytes", [-1, 1]), "visitor": ("float32", [-1, 3])},
        outputs={"probability": ("float32", [-1, 1])},
        preprocess=preprocess,
        postprocess=postprocess,
    )
