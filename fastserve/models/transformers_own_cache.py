"""Models of transformers that cannot use our paged cache: each sequence on its own, with the model's own cache object.

Covers attention that is not exchangeable (Falcon, BLOOM), positions inside the attention (ALiBi), and recurrent state
(Mamba). Slower, and prefixes cannot be shared; but what is served is what the model says, checked at load.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from fastserve.core.errors import CheckpointError
from fastserve.models.attention import AttentionContext, PagedContext
from fastserve.models.model import ModelShape
from fastserve.models.transformers_network import Network, Probe, TransformersModel

_STATE_NAMES = ("past_key_values", "cache_params", "state")


class OwnCacheModel(TransformersModel):
    """Runs one sequence at a time.

    Raises CheckpointError when, with its own cache, the model does not give the probe's logits.
    """

    has_own_cache = True

    def __init__(self, network: Network, shape: ModelShape, probe: Probe) -> None:
        super().__init__(network, shape)
        self.report: list[str] = []
        self._states: dict[str, dict[str, Any]] = {}  # keyword arguments for the next call of a request
        self._num_tokens: Counter[str] = Counter()  # that they hold
        self._one_by_one = False
        problem = self._problem(probe)
        if problem:
            self._one_by_one = True
            self.report.append("a continued prompt is run token by token: the model cannot take several at once there")
            problem = self._problem(probe)
        if problem:
            raise CheckpointError(f"this model cannot be served with its own cache: {problem}")

    def _hidden(self, input_ids: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        assert isinstance(context, PagedContext), "which request a token belongs to is in the batch"
        batch = context.batch
        assert len(batch.request_ids) == len(batch.context_lens), "models with their own cache need request ids"
        rows = []
        for index, request_id in enumerate(batch.request_ids):
            start, end = batch.query_starts[index], batch.query_starts[index + 1]
            first_position = batch.context_lens[index] - (end - start)
            rows.append(self._run(request_id, input_ids[start:end], first_position))
        return torch.cat(rows)

    def release(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._states.pop(request_id, None)
            del self._num_tokens[request_id]

    def _run(self, request_id: str, input_ids: Tensor, first_position: int) -> Tensor:
        """Tokens of one sequence; a first position of 0 begins it anew."""
        if first_position == 0:
            self.release([request_id])
        assert self._num_tokens[request_id] == first_position, "a sequence's tokens must come in order"
        step = 1 if self._one_by_one and first_position else len(input_ids)
        return torch.cat([self._call(request_id, chunk) for chunk in input_ids.split(step)])

    def _call(self, request_id: str, input_ids: Tensor) -> Tensor:
        state = self._states.get(request_id, {})
        output = self._network.body(input_ids=input_ids.unsqueeze(0), use_cache=True, **state)
        state = {name: output[name] for name in _STATE_NAMES if output.get(name) is not None}
        if not state:
            raise CheckpointError("it returns no cache")
        self._states[request_id] = state
        self._num_tokens[request_id] += len(input_ids)
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    @torch.inference_mode()
    def _problem(self, probe: Probe) -> str:
        """What is wrong when each sequence comes as a beginning, a continuation and single tokens; "" when nothing."""
        rows = []
        try:
            for ids in probe.sequences:
                position = 0
                for chunk in ids.split((2, 2, *(1 for _ in ids[4:]))):
                    rows.append(self._run("probe", chunk, position))
                    position += len(chunk)
        except Exception as error:  # a model's code may raise anything
            return f"{type(error).__name__}: {error}"
        finally:
            self.release(["probe"])
        error_found = probe.error(self._network.logits(torch.cat(rows)))
        return "" if error_found <= probe.largest_error else f"its logits differ, relative error {error_found:.2g}"
