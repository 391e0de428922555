"""Open the engine under test, the same way for every in-process benchmark, and say what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastserve.offline.llm import LLM


def open_engine(model: str, options: dict[str, Any]) -> LLM:
    """The engine for `model`. The prefix cache is off unless `options` say otherwise: a benchmark that sends the same
    prompts again must not be answered from memory."""
    from fastserve.offline.llm import LLM

    return LLM(model, **{"prefix_caching": False, "speculation": "off", **options})


def describe(llm: LLM, model: str, options: dict[str, Any]) -> dict[str, Any]:
    """The report's `config`: model and options as given, and what the engine said it made of them (number formats of
    weights and KV cache, kernels, memory)."""
    return {"model": model or "built-in", **options, "engine": llm.engine.report.splitlines()}
