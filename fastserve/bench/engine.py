"""Open the engine under test, the same way for every in-process benchmark, and say what it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastserve.bench.workload import Prompt
from fastserve.core.config import EngineConfig
from fastserve.core.errors import ConfigError

if TYPE_CHECKING:
    from fastserve.offline.llm import LLM


@dataclasses.dataclass(frozen=True, slots=True)
class BenchConfig(EngineConfig):
    """Options of the engine under test. A benchmark that sends the same prompts again must not be answered from memory,
    so its defaults differ in these:

    Attributes:
        prefix_caching: reuse the KV blocks of equal prompt beginnings.
        speculation: guess tokens and verify several in one step: off, auto, ngram or draft. Left out: auto with
            draft_model, else off.
    """

    prefix_caching: bool = False
    speculation: str = ""

    def __post_init__(self) -> None:
        if not self.speculation:
            object.__setattr__(self, "speculation", "auto" if self.draft_model else "off")
        EngineConfig.__post_init__(self)


def open_engine(config: BenchConfig) -> LLM:
    """The engine of these options."""
    from fastserve.offline.llm import LLM

    return LLM(**dataclasses.asdict(config))


def check_lengths(llm: LLM, prompts: Sequence[Prompt]) -> None:
    """Raise ConfigError if the engine cannot answer one of them in full."""
    longest = max(len(prompt.token_ids) + prompt.num_outputs for prompt in prompts)
    if longest > llm.engine.max_model_len:
        raise ConfigError(
            f"input and output have up to {longest} tokens together, but this engine takes {llm.engine.max_model_len}; "
            "give smaller lengths, or raise max_model_len if the model has more"
        )


def describe(llm: LLM, config: BenchConfig) -> dict[str, Any]:
    """The report's `config`: all options as they were merged, and what the engine said it made of them (number formats
    of weights and KV cache, kernels, memory)."""
    options = dataclasses.asdict(config)
    return {**options, "model": config.model or "built-in", "engine": llm.engine.report.splitlines()}
