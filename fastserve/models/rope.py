"""Rotary position embedding: from a config's numbers to cos and sin tables.

Reads both spellings of the config: `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling` (older
folders). Known kinds: default, linear, dynamic and longrope (within their original length), llama3 and yarn. The
rotation itself is a kernel (`Kernels.apply_rope`). Legend: T tokens, R rotated numbers per head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastserve.core.errors import CheckpointError

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_FIRST_ROWS = 32768


@dataclass(frozen=True, slots=True)
class Rope:
    """One way to rotate. `size` is R; `parameters` are the numbers of its kind, sorted pairs so that it hashes."""

    kind: str
    theta: float
    size: int
    parameters: tuple[tuple[str, Any], ...] = ()

    def frequencies(self) -> tuple[Tensor, float]:
        """Angle per position [R/2] in float32, and the factor on cos and sin."""
        exponents = torch.arange(0, self.size, 2, dtype=torch.int64).float() / self.size
        base = 1.0 / (self.theta**exponents)
        numbers = dict(self.parameters)
        if self.kind == "linear":
            return base / numbers["factor"], 1.0
        if self.kind == "llama3":
            return _llama3(base, numbers), 1.0
        if self.kind == "yarn":
            return _yarn(base, numbers, self.theta, self.size)
        if self.kind == "longrope":
            return base / torch.tensor(numbers["short_factor"]), _longrope_attention_factor(numbers)
        return base, 1.0


class RopeTable:
    """cos and sin for every position, made in float32; long tables grow when a position needs it."""

    def __init__(self, rope: Rope, max_positions: int, device: torch.device) -> None:
        if rope.size % 2:
            raise CheckpointError(f"config.json: {rope.size} numbers of a head cannot be rotated in pairs")
        self._frequencies, self._factor = rope.frequencies()
        self._max_positions = max_positions
        self._device = device
        self._extend(min(max_positions, _FIRST_ROWS))

    def rotation(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin [positions, R/2] float32, with at least `num_positions` rows (as far as there are positions)."""
        if num_positions > self._num_rows and self._num_rows < self._max_positions:
            self._extend(min(self._max_positions, max(num_positions, 2 * self._num_rows)))
        return self._cos, self._sin

    def _extend(self, num_rows: int) -> None:
        angles = torch.outer(torch.arange(num_rows).float(), self._frequencies)
        self._cos = (angles.cos() * self._factor).to(self._device)
        self._sin = (angles.sin() * self._factor).to(self._device)
        self._num_rows = num_rows


def read_rope(config: Mapping[str, Any], head_size: int, layer_type: str = "", theta: float = 10000.0) -> Rope:
    """The rope of a config; `layer_type` picks one where the config has several, `theta` is the family's default.

    Raises:
        CheckpointError: a kind that is not known here, or numbers missing.
    """
    parameters = dict(config.get("rope_parameters") or {})
    if layer_type and isinstance(parameters.get(layer_type), Mapping):
        parameters = dict(parameters[layer_type])
    if not parameters:
        parameters = dict(config.get("rope_scaling") or {})
    kind = parameters.pop("rope_type", None) or parameters.get("type") or "default"
    if kind not in KINDS:
        raise CheckpointError(f"rope kind {kind!r} is not known to the native modules (known: {', '.join(KINDS)})")
    base = float(parameters.pop("rope_theta", None) or config.get("rope_theta") or theta)
    share = parameters.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    if kind in ("llama3", "yarn", "longrope"):
        original = config.get("original_max_position_embeddings") or config.get("max_position_embeddings") or 2048
        parameters.setdefault("original_max_position_embeddings", original)
    needed = {"linear": ("factor",), "yarn": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    for name in needed.get(kind, ()):
        if not isinstance(parameters.get(name), (int, float)):
            raise CheckpointError(f"config.json: rope of kind {kind} lacks the number {name}")
    size = int(head_size * share)
    if not 0 < size <= head_size:
        raise CheckpointError(f"config.json: partial_rotary_factor={share} does not fit heads of {head_size} numbers")
    known: dict[str, Any] = {
        name: value for name, value in parameters.items() if isinstance(value, (int, float, str)) and name != "type"
    }
    if kind == "longrope":
        factors = parameters.get("short_factor")
        if not isinstance(factors, list) or len(factors) != size // 2:
            raise CheckpointError(f"config.json: rope kind longrope needs a list short_factor of {size // 2} numbers")
        known["short_factor"] = tuple(map(float, factors))
        longest = config.get("max_position_embeddings") or original
        known.setdefault("factor", longest / parameters["original_max_position_embeddings"])
    return Rope(kind, base, size, tuple(sorted(known.items())))


def _longrope_attention_factor(numbers: dict[str, Any]) -> float:
    """LongRoPE (Ding et al., 2024) as Phi-3 has it: longer contexts get sharper attention."""
    if numbers.get("attention_factor") is not None:
        return float(numbers["attention_factor"])
    factor, original = numbers["factor"], numbers["original_max_position_embeddings"]
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _llama3(base: Tensor, numbers: dict[str, Any]) -> Tensor:
    """Llama 3.1: keep short wavelengths, stretch long ones by `factor`, blend between."""
    original = numbers["original_max_position_embeddings"]
    low, high = numbers["low_freq_factor"], numbers["high_freq_factor"]
    wavelength = 2 * math.pi / base
    blend = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - blend) * base / numbers["factor"] + blend * base


def _yarn(base: Tensor, numbers: dict[str, Any], theta: float, size: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al., 2023, section 3.2 and 3.4): blend by the number of turns over the original length."""
    original = numbers["original_max_position_embeddings"]
    factor = numbers["factor"]

    def dimension(turns: float) -> float:
        return size * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = dimension(numbers.get("beta_fast") or 32), dimension(numbers.get("beta_slow") or 1)
    if numbers.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    ramp = (torch.arange(size // 2).float() - first) / (last - first or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return base / factor * (1 - kept) + base * kept, _yarn_attention_factor(numbers, factor)


def _yarn_attention_factor(numbers: dict[str, Any], factor: float) -> float:
    if numbers.get("attention_factor") is not None:
        return float(numbers["attention_factor"])

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if numbers.get("mscale") and numbers.get("mscale_all_dim"):
        return mscale(numbers["mscale"]) / mscale(numbers["mscale_all_dim"])
    return mscale(1.0)
