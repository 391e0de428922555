"""Any causal model that transformers can run, served over our paged cache where its attention allows it.

transformers calls an attention function by name; ours passes queries, keys and values to the step's AttentionContext,
so that masking, windows and softcaps are the kernels' business. Whether a model really goes that way is not believed
but checked at load: two sequences in one ragged step must give the logits that the model's own attention gives for
each alone. Models that do not pass keep their own cache (`transformers_own_cache.py`). Slower than the native
modules: nothing is merged or packed.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastserve.checkpoint.folder import ModelFolder
from fastserve.core.errors import CheckpointError, FastServeError
from fastserve.kernels import select
from fastserve.kernels.interface import Batch, HeadTransform, KernelSpec, Scores
from fastserve.kernels.reference import Kernels
from fastserve.models.attention import AttentionContext, PagedContext, VarlenContext
from fastserve.models.model import ModelShape, ServingModel
from fastserve.models.transformers_network import (
    ATTENTION_NAME,
    Network,
    NotPagedError,
    Probe,
    TransformersModel,
    register_attention,
    run_body,
)
from fastserve.models.transformers_own_cache import OwnCacheModel

_logger = logging.getLogger(__name__)


def load(
    folder: ModelFolder, dtype: torch.dtype, device: torch.device, kernels: str, block_size: int, trust_code: bool
) -> tuple[ServingModel, Kernels, list[str]]:
    """Load through transformers; the model, its kernels, and lines for the report.

    Raises:
        CheckpointError: transformers does not know the architecture, tensors are missing, or no way to run it with a
            cache gives the model's own logits.
    """
    model = _load_causal_model(folder, dtype, device, trust_code)
    probe = Probe.of(model)
    register_attention()
    can_switch = model._can_set_attn_implementation()
    own_attentions = ["sdpa", "eager"] if model._supports_sdpa else ["eager"]
    network = Network(model)
    try:
        if not can_switch:
            raise NotPagedError(f"{type(model).__name__} has no exchangeable attention")
        network.set_attention(ATTENTION_NAME)
        shape, error_found = _check_paged(network, probe)
    except Exception as error:  # remote or exotic code may raise anything; the reason is said
        _logger.debug("paged attention is not possible", exc_info=True)
        own = _with_own_cache(network, probe, own_attentions if can_switch else [])
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, FastServeError) else str(error)
        lines = [f"attention: the model's own, one sequence at a time, no prefix caching ({reason})", *own.report]
        return own, Kernels(), lines
    spec = KernelSpec(device.type, dtype, shape.num_heads, shape.num_kv_heads, shape.head_size, block_size)
    chosen, lines = select.select(kernels, spec)
    checked = f"attention: paged; logits checked against the model's own attention (relative error {error_found:.1e})"
    return TransformersModel(network, shape), chosen, [checked, *lines]


def _with_own_cache(network: Network, probe: Probe, attentions: list[str]) -> OwnCacheModel:
    """Run by the model itself, with the first of these attention functions that gives its own logits."""
    for name in attentions[:-1]:
        network.set_attention(name)
        try:
            return OwnCacheModel(network, _config_shape(network), probe)
        except CheckpointError:
            _logger.debug("attention %s does not give the model's own logits", name, exc_info=True)
    if attentions:
        network.set_attention(attentions[-1])
    return OwnCacheModel(network, _config_shape(network), probe)


def _load_causal_model(folder: ModelFolder, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> Any:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = folder.architecture
    if name and name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and not trust_remote_code:
        code = " The folder brings code of its own; read it, then allow it with trust_remote_code."
        raise CheckpointError(
            f"architecture {name} of {folder.path} is neither native nor a causal language model that transformers "
            f"{transformers.__version__} knows.{code if folder.config.get('auto_map') else ''}"
        )
    transformers.utils.logging.disable_progress_bar()
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            str(folder.path),
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises many kinds here
        raise CheckpointError(f"transformers cannot load {folder.path}: {error}") from error
    for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        names = sorted(str(item) for item in loading.get(kind) or ())
        if names:
            raise CheckpointError(
                f"{folder.path} has {kind.replace('_', ' ')}: {', '.join(names[:5])}; is it complete?"
            )
    return model.eval().requires_grad_(False).to(device)


@torch.inference_mode()
def _check_paged(network: Network, probe: Probe) -> tuple[ModelShape, float]:
    """Shape and error of a ragged step and of paged ones, or NotPagedError with the reason."""
    lengths = [len(ids) for ids in probe.sequences]
    recorder = _Recorder(VarlenContext(Kernels(), [*accumulate(lengths, initial=0)], is_causal=True))
    positions = torch.cat([torch.arange(length, device=network.device) for length in lengths])
    error = _check_logits(network, run_body(network, torch.cat(probe.sequences), positions, recorder), probe)
    shapes = {call[:3] for call in recorder.calls.values()}
    if not recorder.calls or list(recorder.calls) != list(range(len(recorder.calls))) or len(shapes) != 1:
        raise NotPagedError("its layers have attention of different shapes")
    ((num_heads, num_kv_heads, head_size),) = shapes
    windows = tuple(call[3] for call in recorder.calls.values())
    _check_windows(network.config, windows)
    shape = replace(_config_shape(network), num_layers=len(windows), windows=windows, head_size=head_size)
    shape = replace(shape, num_heads=num_heads, num_kv_heads=num_kv_heads)
    return shape, max(error, _check_logits(network, _run_in_steps(network, shape, probe.sequences), probe))


def _check_logits(network: Network, hidden: Tensor, probe: Probe) -> float:
    error = probe.error(network.logits(hidden))
    if error > probe.largest_error:
        raise NotPagedError(f"its logits would differ, relative error {error:.2g}")
    return error


def _run_in_steps(network: Network, shape: ModelShape, sequences: list[Tensor]) -> Tensor:
    """The probe over a small paged cache: both sequences in three steps, the last ones single tokens."""
    device, block_size = network.device, 4
    size = (4, block_size, shape.num_kv_heads, shape.head_size)
    keys, values = ([torch.zeros(size, dtype=shape.dtype, device=device) for _ in shape.windows] for _ in range(2))
    rows: list[list[Tensor]] = [[], []]
    for starts, ends in (((0, 0), (4, 2)), ((4, 2), (6, 4)), ((6, 4), (7, 5))):
        spans = [range(start, end) for start, end in zip(starts, ends, strict=True)]
        parts = [ids[span.start : span.stop] for ids, span in zip(sequences, spans, strict=True)]
        batch = Batch(
            input_ids=torch.cat(parts).tolist(),
            positions=[*spans[0], *spans[1]],
            slot_mapping=[*spans[0], *(position + 2 * block_size for position in spans[1])],
            query_starts=[0, len(spans[0]), len(spans[0]) + len(spans[1])],
            context_lens=list(ends),
            block_tables=[[0, 1], [2, 3]],
            logit_rows=[],
            device=device,
        )
        context = PagedContext(Kernels(), keys, values, batch)
        ids, positions = batch.tensors()[:2]
        hidden = run_body(network, ids, positions, context)
        for kept, part in zip(rows, hidden.split([len(span) for span in spans]), strict=True):
            kept.append(part)
    return torch.cat([part for kept in rows for part in kept])


class _Recorder:
    """Notes what each layer asks for: layer -> (H, G, D, window)."""

    def __init__(self, context: AttentionContext) -> None:
        self.kernels, self.longest = context.kernels, context.longest
        self._context = context
        self.calls: dict[int, tuple[int, int, int, int]] = {}

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores, how: HeadTransform | None
    ) -> Tensor:
        if layer in self.calls:
            raise NotPagedError(f"layer {layer} attends twice")
        self.calls[layer] = (query.shape[1], key.shape[1], key.shape[2], scores.window)
        return self._context.attend(layer, query, key, value, scores, how)


def _check_windows(config: Any, windows: tuple[int, ...]) -> None:
    """A window that a model knows only through its mask would be lost on us; the probe is too short to see it."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        strange = set(types) - {"full_attention", "sliding_attention"}
        expected = [kind == "sliding_attention" for kind in types]
        if strange or expected != [window > 0 for window in windows]:
            raise NotPagedError(f"its layers are of kinds {sorted(set(types))}, which it does not tell its attention")
    elif getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True) and not any(windows):
        raise NotPagedError("it does not tell its attention about the sliding window")


def _config_shape(network: Network) -> ModelShape:
    config = network.config
    num_heads = int(getattr(config, "num_attention_heads", 0) or 1)
    return ModelShape(
        num_layers=int(config.num_hidden_layers),
        num_heads=num_heads,
        num_kv_heads=int(getattr(config, "num_key_value_heads", 0) or num_heads),
        head_size=int(getattr(config, "head_dim", 0) or config.hidden_size // num_heads),
        hidden_size=int(config.hidden_size),
        vocab_size=int(config.vocab_size),
        max_positions=_max_positions(config),
        dtype=network.dtype,
        windows=(0,) * int(config.num_hidden_layers),
        num_parameters=network.num_parameters,
        weight_bytes=network.num_bytes,
    )


def _max_positions(config: Any) -> int:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        # Beyond this these ropes change with the longest sequence of a batch, and with it every other sequence.
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        return int(original)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return 2048
