"""The step "quantize": every linear of every block on a grid, one block in memory at a time.

What could fail is looked at first (`Plan.make`); then each block is filled, its inputs observed, its matrices rounded
by the step's method and written, and the next block sees what the rounded one puts out. Work that was interrupted
reads back the shards that are there, and ends with the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastserve.checkpoint.quantization import read_quantization
from fastserve.checkpoint.quantized import read_quantized
from fastserve.checkpoint.weights import WeightReader
from fastserve.compress import codebook, gptq, smoothing, storage, structure
from fastserve.compress.activations import InputStatistics, cache_ranges, observe, siblings
from fastserve.compress.folder_writer import FolderWriter
from fastserve.compress.grid import Quantized, WeightScheme, fit, nearest
from fastserve.compress.network import Network, unsupported
from fastserve.compress.recipe import Quantize
from fastserve.compress.storage import ModuleScheme
from fastserve.compress.walk import Visit, walk
from fastserve.core.errors import ConfigError

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much
HEAD = WeightScheme(8, 0)
_PROBE = torch.zeros(1, 8, dtype=torch.int64)  # enough to see which layers read the same tensor


def scheme_of(step: Quantize) -> WeightScheme:
    """The grid that a step asks for; ConfigError when there is none."""
    kind = "codebook" if step.method == "kmeans" else step.kind
    group_size = step.group_size
    if group_size is None:
        group_size = 128 if kind == "int" and step.bits < 5 and step.activations == "none" else 0
    return WeightScheme(8 if kind == "float" else step.bits, group_size, step.symmetric, kind)


@dataclass(frozen=True, slots=True)
class Plan:
    """Which modules get which scheme.

    Attributes:
        step: as asked.
        schemes: linears in blocks by name.
        head: the output projection (or the tied embedding) that becomes 8-bit; "" for none.
    """

    step: Quantize
    schemes: dict[str, ModuleScheme]
    head: str = ""

    @classmethod
    def make(cls, network: Network, step: Quantize) -> Plan:
        """Look at everything that could fail.

        Raises:
            ConfigError: a layer that cannot be quantised as asked; the message names it.
        """
        if found := unsupported(
            item for name in network.blocks for item in network.block(name).named_modules(prefix=name)
        ):
            raise ConfigError(f"{found} holds a matrix but is no Linear; this architecture cannot be quantised")
        if step.kv_cache:
            for name in network.blocks:
                structure.check_attention(network.block(name), name, "kv_cache is for decoders like Llama")
        packs_bytes = not network.folder.config.get("is_encoder_decoder")
        scheme = ModuleScheme(scheme_of(step), step.activations, packs_bytes)
        schemes = {}
        for block in network.blocks:
            for name, linear in network.linears(block).items():
                if is_named(name, step.ignore):
                    continue
                if linear.in_features % scheme.weights.group(linear.in_features):
                    raise ConfigError(
                        f"{name} has {linear.in_features} inputs, which groups of {scheme.weights.group_size} do not "
                        "divide; choose another group_size (0: one scale per row) or add the module to ignore"
                    )
                schemes[name] = scheme
        if not schemes:
            raise ConfigError("ignore names every linear layer; nothing would be quantised")
        return cls(step, schemes, _head_of(network) if step.head else "")


def _head_of(network: Network) -> str:
    head = network.model.get_output_embeddings()
    names = {id(module): name for name, module in network.model.named_modules()}
    if head is None:
        raise ConfigError(f"{network.folder.architecture} has no output projection; leave out head")
    name = names[id(head)]
    if f"{name}.weight" in network.tied:
        name = names[id(network.model.get_input_embeddings())]
    return name


def is_named(module: str, patterns: tuple[str, ...]) -> bool:
    """Whether one of the names, or "re:" patterns, is that of the module."""
    return any(re.fullmatch(item[3:], module) if item.startswith("re:") else item == module for item in patterns)


def run(
    network: Network, plan: Plan, batches: list[Mapping[str, Tensor]], writer: FolderWriter, progress: Progress
) -> dict[str, float]:
    """Write the quantised tensors; the result is the relative error of each layer."""
    errors: dict[str, float] = {}
    total = len(network.blocks)
    if not writer.has("0000"):
        writer.write("0000", _outside(network, plan))
    inputs = batches or [_probe(network)]
    for number, visit in enumerate(walk(network, inputs), 1):
        progress("quantize", number - 1, total)
        shard = f"{number:04d}"
        if writer.has(shard):
            _restore(network, visit, plan, writer.shard(shard))
        else:
            own: dict[str, float] = {}
            writer.write(shard, _quantize_block(network, visit, plan, bool(batches), own), own)
        errors.update(writer.notes(shard))
    progress("quantize", total, total)
    return errors


def _probe(network: Network) -> Mapping[str, Tensor]:
    from fastserve.compress.calibration import inputs_of

    return inputs_of(network.folder, _PROBE)


def quantization_config(network: Network, plan: Plan) -> dict[str, Any]:
    """What config.json says of the result."""
    schemes = dict(plan.schemes)
    if plan.head:
        schemes[plan.head] = ModuleScheme(HEAD)
    linears = [name for name, module in network.model.named_modules() if isinstance(module, nn.Linear)]
    renamed = {_on_disk(network, name): scheme for name, scheme in schemes.items()}
    ignored = [_on_disk(network, name) for name in linears if name not in schemes]
    entry = storage.config(renamed, ignored, has_embedding=bool(plan.head) and plan.head not in linears)
    return entry | ({"kv_cache_scheme": storage.KV_CACHE_SCHEME} if plan.step.kv_cache else {})


def _on_disk(network: Network, module: str) -> str:
    parameter = f"{module}.weight"
    known = parameter not in network.tied
    return network.tensor_name(parameter).removesuffix(".weight") if known else module


def _outside(network: Network, plan: Plan) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for parameter in network.parameters_of(""):
        values = network.read(parameter, None)
        if plan.head and parameter == f"{plan.head}.weight":
            head = nearest(values, fit(values, HEAD, _scale_dtype(values.dtype)))
            found.update(storage.tensors(_on_disk(network, plan.head), head, ModuleScheme(HEAD)))
        else:
            found[network.tensor_name(parameter)] = values
    return found | {name: network.read_other(name) for name in network.others}


def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32


def _quantize_block(
    network: Network, visit: Visit, plan: Plan, is_calibrated: bool, errors: dict[str, float]
) -> dict[str, Tensor]:
    linears = {name: linear for name, linear in network.linears(visit.block).items() if name in plan.schemes}
    is_static = plan.step.activations == "static"
    statistics = observe(visit, network.linears(visit.block), is_static)
    if _smooth(network, visit, plan, linears, statistics) and is_static:
        statistics = observe(visit, network.linears(visit.block), True)  # of single values, which are others now
    found: dict[str, Tensor] = {}
    for group in siblings(statistics):
        names = [name for name in group if name in linears]
        if not names:
            continue
        known = statistics[names[0]] if is_calibrated else None
        weights = [linears[name].weight.data for name in names]
        dtype = _scale_dtype(network.dtype_of(f"{names[0]}.weight"))
        scheme = plan.schemes[names[0]]
        input_scale = None
        if scheme.activations == "static" and known is not None:
            input_scale = known.static_scale(plan.step.observer)
        for name, quantized in zip(
            names, quantize_matrices(weights, plan.step, scheme.weights, dtype, known), strict=True
        ):
            errors[name] = relative_error(linears[name].weight.data, quantized, known)
            linears[name].weight.data = quantized.dequantize()
            found.update(storage.tensors(_on_disk(network, name), quantized, scheme, input_scale))
    for parameter in network.parameters_of(visit.block):
        if parameter.removesuffix(".weight") not in linears:
            values = network.model.get_parameter(parameter).data.to(network.dtype_of(parameter))
            network.set(parameter, values.float())
            found[network.tensor_name(parameter)] = values
    if plan.step.kv_cache:
        attention = _on_disk(network, f"{visit.block}.self_attn.o_proj").removesuffix(".o_proj")
        found.update(storage.cache_scales(attention, *cache_ranges(visit)))
    return found


def quantize_matrices(
    weights: list[Tensor],
    step: Quantize,
    scheme: WeightScheme,
    scale_dtype: torch.dtype = torch.float32,
    known: InputStatistics | None = None,
) -> Iterator[Quantized]:
    """Round matrices [N, K] that read the same inputs by a step's method; known: those inputs, or None."""
    importance = None if known is None else known.importance
    if scheme.kind == "codebook":
        grids = codebook.fit(weights, scheme, scale_dtype, importance)
    else:
        grids = [fit(weight, scheme, scale_dtype, importance, step.search) for weight in weights]
    for weight, grid in zip(weights, grids, strict=True):
        if step.method == "gptq" and known is not None:
            yield gptq.quantize(weight, known.moments, grid)
        else:
            yield nearest(weight, grid)


def relative_error(weight: Tensor, quantized: Quantized, known: InputStatistics | None) -> float:
    """Squared error of the layer's outputs (of its weights, without inputs) over their square."""
    change = quantized.dequantize() - weight
    if known is None:
        return float(change.square().sum() / weight.square().sum().clamp(min=1e-30))
    moments = known.moments
    size = ((weight @ moments) * weight).sum().clamp(min=1e-30)
    return float(((change @ moments) * change).sum() / size)


def _smooth(
    network: Network,
    visit: Visit,
    plan: Plan,
    linears: Mapping[str, nn.Linear],
    statistics: Mapping[str, InputStatistics],
) -> bool:
    if plan.step.method not in ("awq", "smoothquant"):
        return False
    folds = smoothing.find_folds(visit, linears, siblings(statistics))
    for fold in folds:
        first = next(iter(fold.linears))
        if plan.step.method == "awq":
            scales = smoothing.awq_scales(fold, statistics[first], plan.schemes[first].weights)
        else:
            scales = smoothing.smoothquant_scales(fold, statistics[first], plan.step.smoothing)
        smoothing.apply(fold, scales, statistics, network.dtype_of(f"{first}.weight"))
    return bool(folds)


def _restore(network: Network, visit: Visit, plan: Plan, shard: WeightReader) -> None:
    """Give a block the weights that were written for it."""
    quantization = read_quantization({"quantization_config": quantization_config(network, plan)})
    assert quantization is not None
    linears = network.linears(visit.block)
    for parameter in network.parameters_of(visit.block):
        module = parameter.removesuffix(".weight")
        if module in plan.schemes and parameter.endswith(".weight"):
            on_disk = _on_disk(network, module)
            layout = quantization.format_of(on_disk)
            assert layout is not None
            shape = (linears[module].out_features, linears[module].in_features)
            weight = read_quantized(shard, on_disk, shape, layout)
            dense = weight if isinstance(weight, Tensor) else weight.dequantize()
            network.set(parameter, dense)
        else:
            name = network.tensor_name(parameter)
            values = torch.empty(shard.shape(name))
            shard.read_into(name, values)
            network.set(parameter, values)
