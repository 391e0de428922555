"""Scale the inputs of linear layers, feature by feature, without changing what the network computes.

A norm or a linear before the layer is divided by the scales, the layer's columns are multiplied with them. Features
that matter much get finer steps (AWQ: Lin et al. 2023), or those that are large become small where activations are
rounded (SmoothQuant: Xiao et al. 2022). N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastserve.compress.activations import InputStatistics
from fastserve.compress.grid import WeightScheme, fit, nearest
from fastserve.compress.walk import Visit

_AWQ_EXPONENTS = [step / 10 for step in range(11)]
_ROUNDING = 1e-4  # by which outputs may differ, as a share; a fold that is wrong changes them altogether
# Module -> linear that may read nothing but its output, by their names within a block; of the linear's siblings all do.
_FOLDS = (
    ("input_layernorm", "self_attn.q_proj"),
    ("input_layernorm", "self_attn.qkv_proj"),
    ("pre_feedforward_layernorm", "mlp.gate_proj"),
    ("post_attention_layernorm", "mlp.gate_proj"),
    ("post_attention_layernorm", "mlp.gate_up_proj"),
    ("self_attn_layer_norm", "self_attn.q_proj"),
    ("final_layer_norm", "fc1"),
    ("layer.0.layer_norm", "layer.0.SelfAttention.q"),
    ("layer.1.layer_norm", "layer.1.EncDecAttention.q"),
    *((f"layer.{at}.layer_norm", f"layer.{at}.DenseReluDense.{wi}") for at in (1, 2) for wi in ("wi", "wi_0")),
    ("self_attn.v_proj", "self_attn.o_proj"),
    ("self_attn.v_proj", "self_attn.out_proj"),
    ("mlp.up_proj", "mlp.down_proj"),
    ("attention.self.value", "attention.output.dense"),
    ("layer.0.SelfAttention.v", "layer.0.SelfAttention.o"),
    ("layer.1.EncDecAttention.v", "layer.1.EncDecAttention.o"),
    *((f"layer.{at}.DenseReluDense.wi_1", f"layer.{at}.DenseReluDense.wo") for at in (1, 2)),
)


@dataclass(frozen=True, slots=True)
class Fold:
    """Linears that read the same tensor, and the module that makes it.

    Attributes:
        source: a norm, or a linear whose outputs may be scaled.
        linears: all readers of its output, by full name.
        repeats: readers' input heads per source's head, where heads share values.
        head_size: features of a head, where repeats is not 1.
    """

    source: nn.Module
    linears: dict[str, nn.Linear]
    repeats: int = 1
    head_size: int = 1


def find_folds(visit: Visit, linears: Mapping[str, nn.Linear], groups: list[list[str]]) -> list[Fold]:
    """What may be scaled in a block without a change of what it computes; `groups` are the linears by what they read.

    A name does not tell whether a norm comes before or after a branch, or what lies between two linears. So every fold
    is tried, and taken if the block puts out the same.
    """
    modules = dict(visit.module.named_modules())
    folds, taken, unscaled = [], set(), _output(visit)
    for source, reader in _FOLDS:
        full = f"{visit.block}.{reader}"
        group = next((item for item in groups if full in item), None)
        has_weight = getattr(modules.get(source), "weight", None) is not None
        if not has_weight or group is None or full in taken or not all(item in linears for item in group):
            continue
        before, width = modules[source], linears[full].in_features
        readers, repeats, head_size = {item: linears[item] for item in group}, 1, width
        if isinstance(before, nn.Linear):
            head_size = getattr(modules.get(source.rpartition(".")[0]), "head_dim", 0)
            repeats, rest = divmod(width, before.out_features)
            if rest or (repeats > 1 and not head_size):
                continue
        fold = Fold(before, readers, repeats, head_size or width)
        if _changes_nothing(fold, visit, unscaled):
            taken.add(full)
            folds.append(fold)
    return folds


def _changes_nothing(fold: Fold, visit: Visit, unscaled: Tensor) -> bool:
    """Whether the block makes the same of the first batch when each feature is scaled by another factor; `unscaled` is
    what it makes without that."""
    modules = (fold.source, *fold.linears.values())
    kept = [(item, item.data.clone()) for module in modules for item in module.parameters(recurse=False)]
    num_features = next(iter(fold.linears.values())).in_features
    _scale(fold, torch.exp2(torch.linspace(-1, 1, num_features)), torch.float32)
    scaled = _output(visit)
    for item, values in kept:
        item.data = values
    return float((scaled - unscaled).abs().mean()) < _ROUNDING * float(unscaled.abs().mean())


def _output(visit: Visit) -> Tensor:
    [output] = Visit(visit.block, visit.module, visit.inputs[:1]).outputs()
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def apply(fold: Fold, scales: Tensor, statistics: Mapping[str, InputStatistics], dtype: torch.dtype) -> None:
    """Multiply the readers' columns with scales [K] and divide the source and the inputs' statistics by them."""
    statistics[next(iter(fold.linears))].rescale(_scale(fold, scales, dtype))


def _scale(fold: Fold, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scale the weights; the result is the scales that the columns got.

    A norm's weight is stored as `dtype`; the scales are made to fit what it becomes, so that nothing is lost by it.
    """
    if isinstance(fold.source, nn.Linear):
        if fold.repeats > 1:
            scales = scales.view(-1, fold.repeats, fold.head_size).mean(1, keepdim=True)
            rows = scales.flatten()
            scales = scales.expand(-1, fold.repeats, -1).flatten()
        else:
            rows = scales
        fold.source.weight.data.div_(rows.unsqueeze(1))
    else:
        offset = 1.0 if type(fold.source).__name__.startswith("Gemma") else 0.0
        weight: Tensor = fold.source.get_parameter("weight").data
        old = weight + offset
        new = (old / scales - offset).to(dtype).float()
        scales = rows = torch.where(new + offset != 0, old / (new + offset), 1.0)
        fold.source.get_parameter("weight").data = new
    bias = getattr(fold.source, "bias", None)
    if bias is not None:
        bias.data.div_(rows)
    for linear in fold.linears.values():
        linear.weight.data.mul_(scales)
    return scales


def awq_scales(fold: Fold, statistics: InputStatistics, scheme: WeightScheme) -> Tensor:
    """The power of the inputs' mean magnitude with which rounding changes the layers' outputs least."""
    size = statistics.importance.sqrt()
    moments = statistics.moments
    best, least = torch.ones_like(size), float("inf")
    for exponent in _AWQ_EXPONENTS:
        scales = (size**exponent).clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = 0.0
        for linear in fold.linears.values():
            weight = linear.weight.data * scales
            change = nearest(weight, fit(weight, scheme)).dequantize().sub_(weight).div_(scales)
            error += float(((change @ moments) * change).sum())
        if error < least:
            best, least = scales, error
    return best


def smoothquant_scales(fold: Fold, statistics: InputStatistics, strength: float) -> Tensor:
    """Largest inputs to the power of `strength` over largest weights to the rest."""
    weights = torch.stack([linear.weight.data.abs().amax(0) for linear in fold.linears.values()]).amax(0)
    scales = statistics.top.clamp(min=1e-5) ** strength / weights.clamp(min=1e-5) ** (1 - strength)
    return (scales / scales.mean()).clamp(min=1e-4)
