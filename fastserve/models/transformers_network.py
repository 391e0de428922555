"""A transformers model taken apart for serving: body, head, and the attention function that leads to our context.

transformers looks attention up by name and passes unknown keyword arguments down to it, so the step's AttentionContext
goes in with the call. What this attention cannot honour it refuses; `transformers_backend.py` decides what then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastserve.core.errors import CheckpointError, FastServeError
from fastserve.kernels.interface import Scores
from fastserve.kernels.reference import Kernels
from fastserve.models.attention import AttentionContext
from fastserve.models.model import ModelShape, ServingModel

ATTENTION_NAME = "fastserve"
_HARMLESS_TENSORS = frozenset({"position_ids", "cache_position"})
_PROBE_LENGTHS = (7, 5)
# Rounding makes errors of a few hundredths in a deep bfloat16 network; a row with a wrong context is off by about 1.
_LARGEST_ERROR = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.25}


class NotPagedError(FastServeError):
    """Why a model cannot use the paged cache."""


class Network:
    """A transformers model taken apart: its body, and its head with all that the model does to logits.

    The head is the model itself with the body replaced by one that hands back given hidden states, so that logit
    softcaps, scales and the like stay transformers' own.
    """

    def __init__(self, model: Any) -> None:
        self.config = model.config.get_text_config()
        name = model.base_model_prefix if hasattr(model, model.base_model_prefix) else "model"
        if not isinstance(getattr(model, name, None), nn.Module):
            raise CheckpointError(f"{type(model).__name__} is not made of a body and a head; it cannot be served")
        self.body = getattr(model, name)
        self._replay = _Replay()
        self._head = model
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.num_bytes = sum(parameter.nbytes for parameter in model.parameters())
        self.device: torch.device = model.device
        self.dtype: torch.dtype = model.dtype
        setattr(model, name, self._replay)

    def set_attention(self, name: str) -> None:
        """Use transformers' attention function of this name."""
        self.body.set_attn_implementation(name)
        self._head.set_attn_implementation(name)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [R, hidden_size] -> logits [R, V] in float32."""
        self._replay.hidden = hidden.unsqueeze(0)
        dummy = torch.zeros(1, hidden.shape[0], dtype=torch.int64, device=hidden.device)
        logits: Tensor = self._head(input_ids=dummy, use_cache=False).logits[0].float()
        self._replay.hidden = None
        return logits


@dataclass(frozen=True, slots=True)
class Probe:
    """Two short sequences, and the logits that a model itself gives for each of them alone, without a cache.

    Attributes:
        logits: [sum of the lengths, V] float32.
        largest_error: what `error` may be in the model's precision.
    """

    sequences: list[Tensor]
    logits: Tensor
    largest_error: float

    @classmethod
    @torch.inference_mode()
    def of(cls, model: Any) -> Self:
        """Ask a whole transformers model, before anything about it is changed."""
        ids = torch.arange(1, sum(_PROBE_LENGTHS) + 1, device=model.device) * 7919 + 11
        sequences = list((ids % int(model.config.get_text_config().vocab_size)).split(_PROBE_LENGTHS))
        rows = [model(input_ids=item.unsqueeze(0), use_cache=False).logits[0].float() for item in sequences]
        return cls(sequences, torch.cat(rows), _LARGEST_ERROR[model.dtype])

    def error(self, logits: Tensor) -> float:
        """The worst row's error, as a share of the spread of that row's logits."""
        error = (logits - self.logits).square().mean(1).sqrt() / self.logits.std(1).clamp_min(1e-6)
        worst = error.max().item()
        return worst if worst == worst else float("inf")


class _Replay(nn.Module):
    """Stands in for a model's body, or for a part of it that the model calls directly."""

    hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        return _Output(self.hidden)

    @property
    def decoder(self) -> _Replay:
        return self


class _Output:
    """The output of a body: hidden states first, and None for whatever else a head asks for."""

    def __init__(self, hidden: Tensor | None) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]


def run_body(network: Network, input_ids: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
    """One ragged step through the model's body -> hidden states [T, hidden_size]."""
    output = network.body(
        input_ids=input_ids.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        use_cache=False,
        fastserve_context=context,
    )
    return output.last_hidden_state[0]


class TransformersModel(ServingModel):
    """A transformers model whose attention goes through the context."""

    def __init__(self, network: Network, shape: ModelShape) -> None:
        self.shape = shape
        self.device, self.kernels = network.device, Kernels()
        self._network = network

    @torch.inference_mode()
    def forward(
        self, input_ids: Tensor, positions: Tensor, context: AttentionContext, rows: Tensor | None = None
    ) -> Tensor:
        hidden = self._hidden(input_ids, positions, context)
        return hidden if rows is None else hidden[rows]

    def _hidden(self, input_ids: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        """Hidden states [T, hidden_size] of all tokens."""
        return run_body(self._network, input_ids, positions, context)

    def head(self, hidden: Tensor, kernels: Kernels) -> Tensor:
        return self._network.logits(hidden)


def register_attention() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, attend)
    # The context masks by itself. Said aloud, because for transformers a name without a mask function means no mask.
    AttentionMaskInterface.register(ATTENTION_NAME, lambda *args, **kwargs: None)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    fastserve_context: AttentionContext | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]; what we cannot honour is refused."""
    if fastserve_context is None:
        raise NotPagedError("the model does not pass our context to its attention")
    strange = [name for name, item in others.items() if isinstance(item, Tensor) and name not in _HARMLESS_TENSORS]
    if strange or attention_mask is not None:
        raise NotPagedError(f"its attention takes {', '.join(strange) or 'a mask of its own'}")
    if others.get("is_causal", getattr(module, "is_causal", True)) is False:
        raise NotPagedError("its attention is not causal")
    scale = float(scaling if scaling is not None else query.shape[-1] ** -0.5)
    scores = Scores(scale, int(sliding_window or 0), float(softcap or 0.0))
    query, key, value = (item[0].transpose(0, 1) for item in (query, key, value))
    return fastserve_context.attend(module.layer_idx, query, key, value, scores, None).unsqueeze(0), None
