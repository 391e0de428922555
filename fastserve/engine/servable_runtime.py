"""A user's own network with its queue: requests are joined along the axis that the user named, and answers split."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fastserve.core.arrays import (
    ArrayOutput,
    ArrayRequest,
    ModelInfo,
    ModelSpec,
    TensorRequest,
    check_inputs,
    signature,
)
from fastserve.core.errors import RequestError
from fastserve.engine.array_codec import NumpyArray, from_numpy, to_numpy
from fastserve.models.servable import Servable, load_servable

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request's arrays; `size` is its part of the batch, `kind` what it must share with others to be joined."""

    request: TensorRequest
    arrays: dict[str, NumpyArray]
    size: int
    kind: tuple[tuple[int, ...], ...]


class ServableRuntime:
    """Load a user's network and answer requests batch by batch. Attributes as `PoolingRuntime`'s; it has no tokens."""

    num_tokens = num_computed = 0

    def __init__(self, spec: ModelSpec) -> None:
        self._servable: Servable = load_servable(str(spec.options["model"]), int(spec.options.get("num_threads") or 0))
        self.weight = spec.weight
        self._waiting: dict[str, _Waiting] = {}
        inputs, outputs = self._servable.inputs, self._servable.outputs
        report = f"{spec.name}: {spec.options['model']}, {signature(inputs)} -> {signature(outputs)}"
        self.info = ModelInfo(spec.name, "tensors", 0, report, inputs=inputs, outputs=outputs)

    def add(self, request: ArrayRequest) -> None:
        """Queue a request.

        Raises:
            RequestError: inputs of other names, types or shapes; the message has the signature.
        """
        if not isinstance(request, TensorRequest):
            raise RequestError(f"{self.info.name} takes tensors: {signature(self.info.inputs)}", "model")
        check_inputs(self.info, request.inputs)
        arrays = {name: to_numpy(array) for name, array in request.inputs.items()}
        axis = self._servable.batch_axis
        sizes = {1} if axis is None else {array.shape[axis] for array in arrays.values()}
        if len(sizes) > 1:
            raise RequestError(f"inputs have different sizes along axis {axis}: {sorted(sizes)}", "inputs")
        kind = tuple(_without(array.shape, axis) for _, array in sorted(arrays.items()))
        self._waiting[request.request_id] = _Waiting(request, arrays, sizes.pop(), kind)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Forget requests that have not been computed; unknown ids are ignored."""
        for request_id in request_ids:
            self._waiting.pop(request_id, None)

    def has_work(self) -> bool:
        return bool(self._waiting)

    @property
    def num_waiting(self) -> int:
        """Requests that have not been computed."""
        return len(self._waiting)

    def step(self) -> list[ArrayOutput]:
        """Compute one batch. What the user's code raises is told to those who asked, and logged."""
        taken, axis = self._take(), self._servable.batch_axis
        try:
            joined = taken[0].arrays
            if len(taken) > 1:
                assert axis is not None
                joined = {name: np.concatenate([item.arrays[name] for item in taken], axis) for name in joined}
            results = self._servable(joined)
            parts = [results] if len(taken) == 1 else self._split(results, [item.size for item in taken])
            return [
                ArrayOutput(item.request.request_id, {name: from_numpy(array) for name, array in part.items()})
                for item, part in zip(taken, parts, strict=True)
            ]
        except Exception as error:
            _log.exception("the network %s failed", self.info.name)
            text = f"{self.info.name} failed: {type(error).__name__}: {error}"
            is_refused = isinstance(error, RequestError)
            return [ArrayOutput(item.request.request_id, error=text, is_refused=is_refused) for item in taken]

    def _take(self) -> list[_Waiting]:
        """The most urgent request and those that can be joined with it."""
        ordered = sorted(self._waiting.values(), key=lambda item: (item.request.priority, item.request.arrival_time))
        first, size = ordered[0], 0
        taken: list[_Waiting] = []
        for item in ordered if self._servable.batch_axis is not None else ordered[:1]:
            if item.kind == first.kind and (not taken or size + item.size <= self._servable.max_batch_size):
                size += item.size
                taken.append(self._waiting.pop(item.request.request_id))
        return taken

    def _split(self, results: dict[str, NumpyArray], sizes: list[int]) -> list[dict[str, NumpyArray]]:
        axis = self._servable.batch_axis
        assert axis is not None
        for name, array in results.items():
            if array.ndim <= axis or array.shape[axis] != sum(sizes):
                raise RequestError(f"output {name} has shape {list(array.shape)} for a batch of {sum(sizes)}")
        ends = np.cumsum(sizes)[:-1]
        split = {name: np.split(array, ends, axis) for name, array in results.items()}
        return [{name: pieces[index] for name, pieces in split.items()} for index in range(len(sizes))]


def _without(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return shape if axis is None else shape[:axis] + shape[axis + 1 :]
