"""FastServe: train, compress, serve, explain and operate transformer language models.

Names are loaded when they are first used, so that `import fastserve` is quick and imports neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastserve.core.outputs import CompletionOutput, RequestOutput
    from fastserve.core.sampling_params import SamplingParams
    from fastserve.core.structured_outputs import StructuredOutputs
    from fastserve.models.servable import Servable
    from fastserve.offline.llm import LLM
    from fastserve.offline.pipeline import pipeline

__version__ = "0.1.0"

_LAZY = {
    "LLM": "fastserve.offline.llm",
    "SamplingParams": "fastserve.core.sampling_params",
    "StructuredOutputs": "fastserve.core.structured_outputs",
    "RequestOutput": "fastserve.core.outputs",
    "CompletionOutput": "fastserve.core.outputs",
    "Servable": "fastserve.models.servable",
    "pipeline": "fastserve.offline.pipeline",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "Servable",
    "StructuredOutputs",
    "__version__",
    "pipeline",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fastserve' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
