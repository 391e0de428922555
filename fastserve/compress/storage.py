"""How a quantised matrix lies on disk: compressed-tensors where it has a format, codebooks in a form of our own.

`tensors` and `config` are what `checkpoint/quantized.py` and `checkpoint/quantization.py` read; transformers and vLLM
read them too, but for codebooks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastserve.checkpoint.quantization import CODEBOOK_FORMAT
from fastserve.checkpoint.quantized import pack_words
from fastserve.compress.grid import FLOAT8_MAX, Quantized, WeightScheme

KV_CACHE_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


@dataclass(frozen=True, slots=True)
class ModuleScheme:
    """How a module is stored and run.

    Attributes:
        weights: their grid.
        activations: "none", "dynamic" or "static" 8-bit ones.
        packs_bytes: 8-bit integers without rounded activations are stored four to a word, which is the form in which
            vLLM takes them; otherwise one by one, which is the form that transformers takes in T5, too.
    """

    weights: WeightScheme
    activations: str = "none"
    packs_bytes: bool = True

    @property
    def format(self) -> str:
        if self.weights.kind == "codebook":
            return CODEBOOK_FORMAT
        if self.weights.kind == "float":
            return "float-quantized"
        is_plain = self.weights.bits == 8 and (self.activations != "none" or not self.packs_bytes)
        return "int-quantized" if is_plain else "pack-quantized"


def tensors(
    module: str, weight: Quantized, scheme: ModuleScheme, input_scale: float | None = None
) -> dict[str, Tensor]:
    """Name -> tensor for one module; `input_scale` is that of static activations."""
    grid = weight.scheme
    scales = weight.scales[:1, 0].clone() if grid.group_size < 0 else weight.scales
    found = {"weight_scale": scales.contiguous()}
    if scheme.format == "float-quantized":
        found["weight"] = weight.values
    elif scheme.format == "int-quantized":
        found["weight"] = _signed(weight.values, grid)
        if weight.zeros is not None:
            found["weight_zero_point"] = _signed(weight.zeros[:1, 0] if grid.group_size < 0 else weight.zeros, grid)
    else:
        found["weight_packed"] = pack_words(weight.values, grid.bits)
        found["weight_shape"] = torch.tensor(weight.values.shape)
        if weight.zeros is not None:
            found["weight_zero_point"] = pack_words(weight.zeros.t().contiguous(), grid.bits).t().contiguous()
    if weight.codebook is not None:
        found["weight_codebook"] = weight.codebook.clone()
    if input_scale is not None:
        found["input_scale"] = torch.tensor([input_scale], dtype=weight.scales.dtype)
    return {f"{module}.{suffix}": tensor for suffix, tensor in found.items()}


def cache_scales(attention: str, keys: float, values: float) -> dict[str, Tensor]:
    """Scales of an attention's cache in 8-bit floats, from the largest magnitudes of its keys and values."""
    tops = {"k_scale": keys, "v_scale": values}
    return {f"{attention}.{name}": torch.tensor([top / FLOAT8_MAX]) for name, top in tops.items()}


def _signed(values: Tensor, grid: WeightScheme) -> Tensor:
    return (values.to(torch.int16) - grid.centre).to(torch.int8)


def config(modules: Mapping[str, ModuleScheme], ignored: Sequence[str], has_embedding: bool = False) -> dict[str, Any]:
    """The `quantization_config` for modules by name, and the linears that were left as they are.

    has_embedding: an embedding is among the modules, which "Linear" does not mean.
    """
    schemes = list(dict.fromkeys(modules.values()))
    groups = {}
    for number, scheme in enumerate(schemes):
        names = sorted(name for name, own in modules.items() if own == scheme)
        groups[f"group_{number}"] = group(scheme, ["Linear"] if len(schemes) == 1 and not has_embedding else names)
    return config_of(groups, ignored)


def config_of(groups: Mapping[str, dict[str, Any]], ignored: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` for groups of modules (see `group`)."""
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": dict(groups),
        "ignore": sorted(ignored),
    }


def group(scheme: ModuleScheme, targets: list[str]) -> dict[str, Any]:
    """The entry for modules that share a scheme; targets are their names, or classes of theirs."""
    grid = scheme.weights
    strategy = "tensor" if grid.group_size < 0 else "group" if grid.group_size else "channel"
    weights: dict[str, Any] = {"num_bits": grid.bits, "type": grid.kind, "symmetric": grid.is_symmetric}
    weights |= {"strategy": strategy} | ({"group_size": grid.group_size} if strategy == "group" else {})
    activations: dict[str, Any] | None = None
    if scheme.activations != "none":
        is_dynamic = scheme.activations == "dynamic"
        activations = {"num_bits": 8, "type": grid.kind, "symmetric": True, "dynamic": is_dynamic}
        activations["strategy"] = "token" if is_dynamic else "tensor"
    return {"targets": targets, "weights": weights, "input_activations": activations, "format": scheme.format}
