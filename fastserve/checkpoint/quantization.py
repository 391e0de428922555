"""What config.json says about quantised weights: which scheme a module has, and how it lies on disk.

Reads the `quantization_config` of compressed-tensors (pack-, int- and float-quantized, sparse-bitmask, and codebooks
of our own), GPTQ and AWQ. What cannot be served is refused here, before a tensor is read, with what can be. Turning
tensors into weights is `checkpoint/quantized.py`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastserve.core.errors import CheckpointError

FACTORS_FORMAT = "fastserve-factors"  # see `checkpoint/factors.py`
CODEBOOK_FORMAT = "fastserve-codebook"  # with a weights.type "codebook", at which other programs stop
KV_CACHE_SCALES = r".*\.[qkv]_(scale|zero_point)"  # tensors of a kv_cache_scheme
SUPPORTED = (
    "compressed-tensors with integer weights (pack-quantized or int-quantized; 2 to 8 bits per tensor, channel or "
    "group; activations as they are, or 8 bits, symmetric, dynamic per token or static), 8-bit floats "
    "(float-quantized) or zeros left out (sparse-bitmask), GPTQ (4 bits, no reordered columns), AWQ (4 bits, gemm), "
    f"and formats {CODEBOOK_FORMAT} (3- and 4-bit k-means) and {FACTORS_FORMAT} (low rank)"
)
# The tensor by which a quantised module is told from one that was left as it was.
_MARKERS = {
    "pack-quantized": "weight_packed",
    "int-quantized": "weight_scale",
    "float-quantized": "weight_scale",
    "gptq": "qweight",
    "gptq_v2": "qweight",
    "awq": "qweight",
    "codebook": "weight_codebook",
    "sparse-bitmask": "bitmask",
    FACTORS_FORMAT: "left_factor",
}
_CLASSES = ("Linear", "Embedding")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class QuantizedFormat:
    """A scheme, its layout on disk, and the modules that have it.

    Attributes:
        layout: a key of the table above.
        bits, is_symmetric: of the weights.
        group_size: weights of a row that share a scale; 0: all.
        activation_bits: 16, or 8: quantised per token as they come.
        targets: names of modules, "re:" and a pattern, or classes ("Linear", "Embedding").
    """

    layout: str
    bits: int
    group_size: int = 0
    is_symmetric: bool = True
    activation_bits: int = 16
    targets: tuple[str, ...] = ("Linear",)

    @property
    def is_dense(self) -> bool:
        """Whether no kernel has this scheme, so that the weights are turned into floats when they are read."""
        is_integer = self.layout in ("pack-quantized", "int-quantized")
        has_kernel = self.group_size == 0 or (self.bits <= 4 and self.group_size in (32, 64, 128))
        return self.layout in ("float-quantized", "sparse-bitmask", FACTORS_FORMAT) or (is_integer and not has_kernel)

    @property
    def marker(self) -> str:
        """Suffix of the tensor that every module of this format has."""
        return _MARKERS[self.layout]

    def names(self, module: str) -> bool:
        """Whether the targets name this module itself, and not just its class."""
        return any(re.match(item[3:], module) if item.startswith("re:") else item == module for item in self.targets)


class Quantization:
    """The formats of a folder; a module's own name counts before its class."""

    def __init__(self, formats: list[QuantizedFormat]) -> None:
        self.formats = formats

    def format_of(self, module: str, class_name: str = "Linear") -> QuantizedFormat | None:
        """The format that the config gives to a module, or None."""
        for item in self.formats:
            if item.names(module):
                return item
        return next((item for item in self.formats if class_name in item.targets), None)


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """The `quantization_config` of a config.json; None when the weights are not quantised.

    Raises:
        CheckpointError: a scheme that is not supported; the message says which are.
    """
    entry = config.get("quantization_config")
    if not entry:
        return None
    try:
        method = str(entry["quant_method"])
        reader = {"compressed-tensors": _compressed_tensors, "gptq": _gptq, "awq": _awq}
        if method not in reader:
            raise _unsupported(f"quant_method {method!r}")
        return Quantization(reader[method](entry))
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise _unsupported(f"a quantization_config that cannot be read ({type(error).__name__}: {error})") from error


def _compressed_tensors(entry: Mapping[str, Any]) -> list[QuantizedFormat]:
    if entry.get("kv_cache_scheme"):
        _log.info("the folder's scales of keys and values are not used: int8 caches have one per token and head")
    formats = []
    sparsity = (entry.get("sparsity_config") or {}).get("format", "dense")
    groups = entry.get("config_groups") or {}
    if sparsity == "sparse-bitmask" and not groups:
        formats.append(QuantizedFormat(sparsity, 16))
    elif sparsity != "dense":
        raise _unsupported(f"sparse weights of format {sparsity!r}" + " that are quantised, too" * bool(groups))
    for group in groups.values():
        weights, activations = group["weights"], group.get("input_activations")
        layout = str(group.get("format") or entry.get("format"))
        strategy, targets = str(weights["strategy"]), tuple(str(item) for item in group["targets"])
        bits, is_symmetric = int(weights["num_bits"]), bool(weights.get("symmetric", True))
        if layout == CODEBOOK_FORMAT and bits in (3, 4) and not activations:
            formats.append(QuantizedFormat("codebook", bits, targets=targets))
            continue
        if layout == FACTORS_FORMAT:
            formats.append(QuantizedFormat(layout, 16, targets=targets))
            continue
        kind = {"pack-quantized": "int", "int-quantized": "int", "float-quantized": "float"}.get(layout)
        if kind is None:
            raise _unsupported(f"compressed-tensors format {layout!r}")
        if weights.get("type", "int") != kind or strategy not in ("group", "channel", "tensor"):
            raise _unsupported(f"weights of type {weights.get('type')!r} and strategy {strategy!r}")
        if weights.get("actorder") == "group":
            raise _unsupported("reordered columns (actorder: group)")
        for name in targets:
            if name.startswith("re:"):
                re.compile(name[3:])
        group_size = int(weights["group_size"]) if strategy == "group" else 0
        if not 2 <= bits <= 8 or (kind == "float" and (bits, group_size, is_symmetric) != (8, 0, True)):
            raise _unsupported(f"{kind} weights of {bits} bits, {strategy}")
        activation_bits = _activation_bits(activations, kind)
        formats.append(QuantizedFormat(layout, bits, group_size, is_symmetric, activation_bits, targets))
    return formats


def _activation_bits(entry: Mapping[str, Any] | None, kind: str) -> int:
    """Static ranges are not used: a token's own range is never wider. Float weights are multiplied as floats."""
    if not entry:
        return 16
    found = {name: entry.get(name) for name in ("num_bits", "type", "strategy", "dynamic", "symmetric")}
    usual = {"num_bits": 8, "type": kind, "symmetric": True}
    if found not in (
        {**usual, "strategy": "token", "dynamic": True},
        {**usual, "strategy": "tensor", "dynamic": False},
    ):
        raise _unsupported(f"activations quantised as {found}")
    return 8 if kind == "int" else 16


def _gptq(entry: Mapping[str, Any]) -> list[QuantizedFormat]:
    layout = str(entry.get("checkpoint_format") or "gptq")
    if layout not in ("gptq", "gptq_v2") or entry.get("dynamic"):
        raise _unsupported(f"GPTQ with checkpoint_format {layout!r} or settings per module")
    if int(entry["bits"]) != 4:
        raise _unsupported(f"GPTQ with {entry['bits']} bits")
    group_size = max(0, int(entry["group_size"]))  # -1: a whole row
    return [QuantizedFormat(layout, int(entry["bits"]), group_size, bool(entry.get("sym", True)))]


def _awq(entry: Mapping[str, Any]) -> list[QuantizedFormat]:
    version = str(entry.get("version", "gemm")).lower()
    if version != "gemm" or int(entry["bits"]) != 4:
        raise _unsupported(f"AWQ version {version!r} with {entry['bits']} bits")
    group_size = max(0, int(entry["group_size"]))
    return [QuantizedFormat("awq", int(entry["bits"]), group_size, not entry.get("zero_point", True))]


def _unsupported(what: str) -> CheckpointError:
    return CheckpointError(
        f"the folder's weights are quantised in a way that is not supported: {what}. Supported are {SUPPORTED}"
    )
