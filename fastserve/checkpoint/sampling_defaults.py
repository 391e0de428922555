"""Sampling values that a model folder sets for requests which leave them out, as vLLM reads them."""

from __future__ import annotations

from typing import Any

from fastserve.checkpoint.folder import ModelFolder
from fastserve.core.errors import CheckpointError, RequestError
from fastserve.core.sampling_params import SamplingParams

FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def sampling_defaults(folder: ModelFolder) -> dict[str, Any]:
    """Values of generation_config.json for fields of SamplingParams; {} when it sets none.

    Raises:
        CheckpointError: one of them is out of its range.
    """
    given = folder.generation_config
    defaults = {name: given[name] for name in FIELDS if given.get(name) is not None}
    try:
        SamplingParams(**defaults)
    except (RequestError, TypeError) as error:
        raise CheckpointError(f"{folder.path / 'generation_config.json'}: {error}") from error
    return defaults
