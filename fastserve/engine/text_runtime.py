"""An encoder-decoder beside other models of the process: an engine of its own, with its own queue and KV cache."""

from __future__ import annotations

from collections.abc import Iterable

from fastserve.core.arrays import ArrayRequest, ModelInfo, ModelSpec
from fastserve.core.config import EngineConfig
from fastserve.core.errors import CheckpointError, RequestError
from fastserve.core.request import Request, TokenOutput
from fastserve.engine.engine import Engine
from fastserve.engine.messages import EngineStats


class TextRuntime:
    """Load an encoder-decoder and answer requests step by step, several tokens' worth of steps each.

    Attributes:
        info: what clients are told.
        weight: of its share of step time.
        num_tokens, num_computed: always 0; its engine has counters of its own.

    Raises:
        CheckpointError, ConfigError, MemoryPlanError: it cannot be loaded or does not fit.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._engine = Engine(EngineConfig.from_options(spec.options))
        limits = self._engine.source_limits
        if limits is None:
            raise CheckpointError(f"{spec.name} is no encoder-decoder")
        self.weight = spec.weight
        self.num_tokens = self.num_computed = 0
        self.info = ModelInfo(
            spec.name,
            "text",
            limits.max_source,
            f"{spec.name}: {'; '.join(self._engine.report.splitlines())}",
            max_answer=limits.max_target,
            vocab_size=self._engine.vocab_size,
        )

    @property
    def num_waiting(self) -> int:
        """Requests without a place in the batch."""
        return self._engine.stats().num_waiting

    def add(self, request: ArrayRequest | Request) -> None:
        """Queue a request.

        Raises:
            RequestError: not for a model that makes text, or one that it cannot serve.
        """
        if not isinstance(request, Request):
            raise RequestError(f"{self.info.name} makes text; ask for completions or translations", "model")
        self._engine.add(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Stop requests; unknown ids are ignored."""
        self._engine.abort(request_ids)

    def has_work(self) -> bool:
        return self._engine.has_work()

    def step(self) -> list[TokenOutput]:
        """Compute one step; returns the new tokens."""
        return self._engine.step()

    def stats(self) -> EngineStats:
        """Its counters and gauges."""
        return self._engine.stats()

    def close(self) -> None:
        """End its threads."""
        self._engine.close()
