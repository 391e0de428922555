"""Every model of one engine process: the server's own, which generates, and any number of others: encoders,
encoder-decoders, networks of the user's own.

Each is a runtime with a queue of its own; the `Arbiter` says which takes the next step. Further models may be loaded
and unloaded while the others work: loading goes on in a thread, and the memory that is left decides.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from fastserve.checkpoint.folder import TEXT_TO_TEXT, ModelFolder, is_servable
from fastserve.core.arrays import ArrayBatch, ArrayOutput, ArrayRequest, ModelInfo, ModelSpec
from fastserve.core.errors import ConfigError, FastServeError, RequestError
from fastserve.core.request import Request, TokenOutput
from fastserve.engine.arbiter import Arbiter
from fastserve.engine.messages import EngineStats, FromEngine, Loaded

GENERATOR = ""  # its name for the arbiter; no other model can have it
_log = logging.getLogger(__name__)


class RunnableEngine(Protocol):
    """What is needed of an engine that generates (`engine.engine.Engine`; tests bring a small one)."""

    max_model_len: int
    vocab_size: int
    report: str

    def add(self, request: Request) -> None: ...
    def abort(self, request_ids: Iterable[str]) -> None: ...
    def has_work(self) -> bool: ...
    def step(self) -> list[TokenOutput]: ...
    def stats(self) -> EngineStats: ...
    def tend(self) -> None: ...
    def load_adapter(self, name: str, path: str) -> None: ...
    def unload_adapter(self, name: str) -> None: ...


class Runtime(Protocol):
    """One of the others.

    Attributes:
        info: what clients are told.
        weight: of its share of step time.
        num_tokens, num_computed: asked for and computed so far (see `ArrayBatch`).
    """

    info: ModelInfo
    weight: float
    num_tokens: int
    num_computed: int

    @property
    def num_waiting(self) -> int: ...
    def add(self, request: Any) -> None: ...
    def abort(self, request_ids: Iterable[str]) -> None: ...
    def has_work(self) -> bool: ...
    def step(self) -> Sequence[TokenOutput | ArrayOutput]: ...


def load_runtime(spec: ModelSpec) -> Runtime:
    """Load one of the others. Imported here because this is where torch comes in.

    Raises:
        FastServeError: it cannot be loaded or does not fit.
    """
    import torch

    from fastserve.engine.pooling_runtime import PoolingRuntime
    from fastserve.engine.servable_runtime import ServableRuntime
    from fastserve.engine.text_runtime import TextRuntime

    torch.set_num_threads(int(spec.options.get("num_threads") or 0) or len(os.sched_getaffinity(0)))
    model = str(spec.options["model"])
    if is_servable(model):
        return ServableRuntime(spec)
    return TextRuntime(spec) if ModelFolder.open(model).task == TEXT_TO_TEXT else PoolingRuntime(spec)


class Runtimes:
    """The models of this process.

    Args:
        generate: makes the model that generates; None: there is none. It is made last, when the others have their
            memory, and takes for its KV cache what is planned of the rest.
        specs: the others.
        load: makes one of the others.
        clock: seconds.
    """

    def __init__(
        self,
        generate: Callable[[], RunnableEngine] | None,
        specs: Iterable[ModelSpec] = (),
        load: Callable[[ModelSpec], Runtime] = load_runtime,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load = load
        self._clock = clock
        self._arbiter = Arbiter()
        self._others = {spec.name: load(spec) for spec in specs}
        self._generator = generate() if generate is not None else None
        self._loader = ThreadPoolExecutor(1, "model loader")
        self._loading: dict[str, Future[Runtime]] = {}
        self._stats = EngineStats()
        self._batch: ArrayBatch | None = None
        self.max_model_len = self._generator.max_model_len if self._generator is not None else 0
        self.vocab_size = self._generator.vocab_size if self._generator is not None else 0
        reports = [runtime.info.report for runtime in self._others.values()]
        self.report = "\n".join([*reports, *([self._generator.report] if self._generator is not None else [])])

    @property
    def models(self) -> list[ModelInfo]:
        """Those that do not generate."""
        return [runtime.info for runtime in self._others.values()]

    def add(self, request: Request | ArrayRequest) -> None:
        """Queue a request for the model that it names; without a name, for the one that generates.

        Raises:
            RequestError: there is none, or it cannot serve this.
        """
        if request.model in self._others:
            self._others[request.model].add(request)
        elif request.model or not isinstance(request, Request):
            raise RequestError(f"there is no model {request.model!r} here", "model")
        elif self._generator is None:
            raise RequestError("no model of this server generates text", "model")
        else:
            self._generator.add(request)

    def abort(self, request_ids: list[str]) -> None:
        """Stop requests; no output follows for them. Unknown ids are ignored."""
        if self._generator is not None:
            self._generator.abort(request_ids)
        for runtime in self._others.values():
            runtime.abort(request_ids)

    def has_work(self) -> bool:
        return bool(self._busy())

    def step(self) -> list[TokenOutput | ArrayOutput]:
        """One step of the model whose turn it is; there must be work."""
        busy = self._busy()
        name = self._arbiter.pick(busy)
        started = self._clock()
        if name == GENERATOR:
            assert self._generator is not None
            outputs: list[TokenOutput | ArrayOutput] = [*self._generator.step()]
            seconds = self._clock() - started
        else:
            runtime = self._others[name]
            tokens, computed = runtime.num_tokens, runtime.num_computed
            outputs = [*runtime.step()]
            seconds = self._clock() - started
            counts = (runtime.num_tokens - tokens, runtime.num_computed - computed)
            ended = sum(isinstance(item, ArrayOutput) or item.finish_reason is not None for item in outputs)
            self._batch = ArrayBatch(name, ended, *counts, seconds)
        self._arbiter.charge(name, seconds, busy[name])
        if self._generator is None:
            self._stats.num_steps += 1
            self._stats.step_seconds += seconds
        return outputs

    def take_batch(self) -> ArrayBatch | None:
        """What the last step was, if a model took it that does not generate; told once."""
        batch, self._batch = self._batch, None
        return batch

    def load(self, spec: ModelSpec) -> None:
        """Begin to load a further model; `tend` tells when it is there.

        Raises:
            ConfigError: the name is taken.
        """
        if spec.name in self._others or spec.name in self._loading or spec.name == GENERATOR:
            raise ConfigError(f"there is a model {spec.name!r} already; choose another name")
        self._loading[spec.name] = self._loader.submit(self._load, spec)

    def unload(self, name: str) -> None:
        """Forget a model and what waits for it; its memory is given back.

        Raises:
            ConfigError: there is none of this name.
        """
        runtime = self._others.pop(name, None)
        if runtime is None:
            raise ConfigError(f"there is no model {name!r} that can be unloaded")
        self._arbiter.forget(name)
        close = getattr(runtime, "close", None)
        if close is not None:
            close()
        del runtime, close
        # A network of the user's own may refer to itself, and what was loaded at the start is frozen.
        gc.unfreeze()
        gc.collect()
        gc.freeze()

    def tend(self) -> list[FromEngine]:
        """What is to be done from time to time, busy or idle; returns news of models that were being loaded."""
        if self._generator is not None:
            self._generator.tend()
        news: list[FromEngine] = []
        for name, future in list(self._loading.items()):
            if not future.done():
                continue
            del self._loading[name]
            error = future.exception()
            if error is None:
                self._others[name] = future.result()
                news.append(Loaded(name, self._others[name].info))
            else:
                if not isinstance(error, FastServeError):
                    _log.error("model %s could not be loaded", name, exc_info=error)
                news.append(Loaded(name, error=str(error), kind=type(error).__name__))
        return news

    def stats(self) -> EngineStats:
        """The server's own model's, or, without one, steps of the others and what waits for them."""
        if self._generator is not None:
            return self._generator.stats()
        self._stats.num_waiting = sum(runtime.num_waiting for runtime in self._others.values())
        return self._stats

    def change_adapter(self, name: str, path: str) -> None:
        """Load a LoRA adapter, or without a path forget it; see `Adapters`."""
        if self._generator is None:
            raise RequestError("LoRA adapters need a model that generates; there is none here", "lora_name")
        if path:
            self._generator.load_adapter(name, path)
        else:
            self._generator.unload_adapter(name)

    def _busy(self) -> dict[str, float]:
        """Name -> weight of those that have work."""
        busy = {name: runtime.weight for name, runtime in self._others.items() if runtime.has_work()}
        if self._generator is not None and self._generator.has_work():
            busy[GENERATOR] = 1.0
        return busy
