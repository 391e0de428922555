"""Texts to vectors, and how alike two vectors are."""

from __future__ import annotations

import numpy as np

from fastserve.core.errors import RequestError
from fastserve.offline.tasks.text import EncoderText, Floats, Job, Piece, piece


def embed(
    text: EncoderText,
    inputs: list[str] | list[list[int]],
    *,
    prompt_name: str = "",
    dimensions: int = 0,
    truncate: bool = False,
) -> Job:
    """One vector per input (a text, or token ids as they are): a list of [N] float32.

    Args:
        prompt_name: which of the folder's prompts goes before; "" takes the folder's default.
        dimensions: keep the first so many numbers (Kusupati et al., 2022), at length 1 where the model's vectors are.

    Raises:
        RequestError: no such prompt, or a text that is too long or empty.
    """
    prompts = text.sentence.prompts
    name = prompt_name or text.sentence.default_prompt
    if prompt_name and prompt_name not in prompts:
        known = ", ".join(prompts) or "none"
        raise RequestError(f"this model has no prompt {prompt_name!r}; it has: {known}", "prompt_name")
    before = prompts.get(name, "")
    pieces = [
        piece(text.encode(before + item, truncate=truncate), "embed")
        if isinstance(item, str)
        else Piece(item[: text.max_length] if truncate else item, [], "embed")
        for item in inputs
    ]

    def finish(vectors: list[Floats]) -> list[Floats]:
        return [shorten(vector, dimensions, text.sentence.normalize) for vector in vectors] if dimensions else vectors

    return Job(pieces, finish)


def shorten(vector: Floats, dimensions: int, normalize: bool) -> Floats:
    """The first `dimensions` numbers, at length 1 if `normalize`."""
    if dimensions > len(vector):
        raise RequestError(f"this model's vectors have {len(vector)} numbers, not {dimensions}", "dimensions")
    short = vector[:dimensions]
    return short / max(float(np.linalg.norm(short)), 1e-12) if normalize else short


def cosine(first: Floats, second: Floats) -> float:
    """Of the angle between two vectors."""
    return float(first @ second / max(float(np.linalg.norm(first) * np.linalg.norm(second)), 1e-12))
