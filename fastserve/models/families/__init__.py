"""The table of native families: Hugging Face architecture -> what its config means and what its tensors are called."""

from __future__ import annotations

from fastserve.models.families import gemma, gpt, llama
from fastserve.models.families.family import Family

FAMILIES: dict[str, Family] = {**llama.FAMILIES, **gemma.FAMILIES, **gpt.FAMILIES}

__all__ = ["FAMILIES", "Family"]
