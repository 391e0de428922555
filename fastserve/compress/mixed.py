"""Mixed precision: more bits where rounding hurts, within a budget.

One pass over the original measures, for every set of matrices that read the same tensor, how much each number of bits
changes their outputs; then bits are given where they take away most error per bit. Sets stay of one scheme, because
serving merges them into one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import msgspec
from torch import Tensor

from fastserve.compress.activations import observe, siblings
from fastserve.compress.folder_writer import FolderWriter
from fastserve.compress.grid import WeightScheme
from fastserve.compress.network import Network
from fastserve.compress.quantize import Plan, Progress, quantize_matrices, relative_error, scheme_of
from fastserve.compress.recipe import Quantize
from fastserve.compress.walk import walk
from fastserve.core.errors import ConfigError

_BITS = (2, 3, 4, 6, 8)
_FILE = "sensitivity.json"


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Matrices that share a scheme: how many weights, and for each number of bits what it costs.

    Attributes:
        modules: their names.
        num_weights: of all of them.
        errors: bits -> sum of the relative squared errors of their outputs.
        sizes: bits -> bits on disk per weight, scales counted.
    """

    modules: tuple[str, ...]
    num_weights: int
    errors: dict[int, float]
    sizes: dict[int, float]


def plan(
    network: Network, first: Plan, batches: list[Mapping[str, Tensor]], writer: FolderWriter, progress: Progress
) -> Plan:
    """`first` with bits given out within the step's budget.

    Raises:
        ConfigError: the budget is below what the fewest bits take.
    """
    step, known = first.step, writer.recall(_FILE)
    if known is None:
        sets = measure(network, first, batches, progress)
        writer.remember(_FILE, {"sets": msgspec.to_builtins(sets, str_keys=True)})
    else:
        sets = msgspec.convert(known["sets"], list[Sensitivity], strict=False)
    bits = distribute(sets, step.budget)
    schemes = {name: replace(item, weights=_scheme(step, bits[name])) for name, item in first.schemes.items()}
    return Plan(step, schemes, first.head)


def measure(
    network: Network, first: Plan, batches: list[Mapping[str, Tensor]], progress: Progress
) -> list[Sensitivity]:
    """Errors of every set with every number of bits, each alone, on the original's own activations."""
    found = []
    step = first.step
    for number, visit in enumerate(walk(network, batches), 1):
        progress("measure sensitivity", number, len(network.blocks))
        linears = network.linears(visit.block)
        statistics = observe(visit, linears)
        for group in siblings(statistics):
            names = tuple(name for name in group if name in first.schemes)
            if not names:
                continue
            weights, known = [linears[name].weight.data for name in names], statistics[names[0]]
            errors, sizes = {}, {}
            for bits in _candidates(step):
                scheme = _scheme(step, bits)
                rounded = quantize_matrices(weights, step, scheme, known=known)
                pairs = zip(weights, rounded, strict=True)
                errors[bits] = sum(relative_error(weight, quantized, known) for weight, quantized in pairs)
                sizes[bits] = scheme.bits_per_weight(weights[0].shape[1])
            found.append(Sensitivity(names, sum(weight.numel() for weight in weights), errors, sizes))
    return found


def distribute(sets: list[Sensitivity], budget: float) -> dict[str, int]:
    """Module -> bits: those with the least error that keep the mean bits per weight within `budget`."""
    chosen = [min(item.errors) for item in sets]
    left = sum(item.num_weights * (budget - item.sizes[bits]) for item, bits in zip(sets, chosen, strict=True))
    if left < 0:
        total = sum(item.num_weights for item in sets)
        raise ConfigError(
            f"budget = {budget} cannot be met: the fewest bits, with their scales, take {budget - left / total:.3f} "
            "per weight; give fewer bits or larger groups"
        )
    while True:
        best, gain = None, 0.0
        for number, item in enumerate(sets):
            for bits in item.errors:
                cost = item.num_weights * (item.sizes[bits] - item.sizes[chosen[number]])
                if bits > chosen[number] and 0 < cost <= left:
                    saved = (item.errors[chosen[number]] - item.errors[bits]) / cost
                    if saved > gain:
                        best, gain = (number, bits, cost), saved
        if best is None:
            return {name: bits for item, bits in zip(sets, chosen, strict=True) for name in item.modules}
        chosen[best[0]] = best[1]
        left -= best[2]


def _candidates(step: Quantize) -> list[int]:
    return [bits for bits in _BITS if bits >= step.bits]


def _scheme(step: Quantize, bits: int) -> WeightScheme:
    """With more than 4 bits one scale per row, which is what the kernels have."""
    scheme = scheme_of(step)
    return replace(scheme, bits=bits, group_size=scheme.group_size if bits <= 4 else min(0, scheme.group_size))
