"""The step "prune": zeros, fewer channels, heads or layers; one block in memory at a time.

`sparse.py` and `structure.py` have the methods for a matrix or a block. Results are folders of the same architecture
with plain tensors, which load everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastserve.checkpoint import bitmask, factors
from fastserve.compress import low_rank, operators, sparse, structure, vocabulary
from fastserve.compress.activations import InputStatistics, observe
from fastserve.compress.folder_writer import FolderWriter
from fastserve.compress.network import Network, layer_lists, unsupported
from fastserve.compress.quantize import Progress, is_named
from fastserve.compress.recipe import Prune
from fastserve.compress.walk import Visit, walk
from fastserve.core.errors import ConfigError

Thin = tuple[Tensor, Tensor]  # the factors of a matrix
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")


def check(network: Network, step: Prune) -> None:
    """ConfigError for what cannot be done with this network, before work starts."""
    config = network.folder.config
    blocks = (item for name in network.blocks for item in network.block(name).named_modules(prefix=name))
    if step.method not in ("layers", "vocabulary") and (found := unsupported(blocks)):
        raise ConfigError(f"{found} holds a matrix but is no Linear; of this architecture only layers can be left out")
    if step.method == "vocabulary":
        vocabulary.check(network.folder)
    elif step.method == "operators":
        for name in network.blocks:
            operators.find(name, network.linears(name))
    if step.method in ("heads", "kv-heads"):
        for name in network.blocks:
            structure.check_attention(network.block(name), name)
    if step.method == "heads":
        structure.HeadPlan.make(config, step.ratio)
    elif step.method == "kv-heads":
        structure.kept_kv_heads(config, step.ratio)
    elif step.method in ("channels", "rank"):
        for name in network.blocks:
            structure.feed_forward(name, network.linears(name))
        channels(network, step)
    elif step.method == "layers":
        _num_dropped(network, step)
    if step.pattern == "2:4":
        for block in network.blocks:
            for name, linear in network.linears(block).items():
                if linear.in_features % 4 and not is_named(name, step.ignore):
                    raise ConfigError(
                        f"{name} has {linear.in_features} inputs, which fours do not divide; add it to ignore"
                    )


def run(
    network: Network, step: Prune, batches: list[Mapping[str, Tensor]], writer: FolderWriter, progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the tensors; returns what changes in config.json, and what the card says."""
    if step.method == "layers":
        return _drop_layers(network, step, batches, writer, progress)
    if step.method == "operators":
        return _drop_operators(network, step, batches, writer, progress)
    total = len(network.blocks)
    writer.write("0000", outside(network))
    if not batches:  # nothing looks at inputs
        for number, name in enumerate(network.blocks, 1):
            progress("prune", number - 1, total)
            network.fill(name)
            thin = _prune_block(network, Visit(name, network.block(name), []), step)
            writer.write(f"{number:04d}", _stored(network, name, step, thin))
            network.drop(name)
    else:
        for number, visit in enumerate(walk(network, batches), 1):
            progress("prune", number - 1, total)
            if writer.has(f"{number:04d}"):
                _restore(network, visit, writer, f"{number:04d}", step)
            else:
                thin = _prune_block(network, visit, step)
                writer.write(f"{number:04d}", _stored(network, visit.block, step, thin))
    progress("prune", total, total)
    return _changes(network, step), {}


def _changes(network: Network, step: Prune) -> dict[str, Any]:
    config = network.folder.config
    if step.method == "heads":
        return dict(structure.HeadPlan.make(config, step.ratio).new_config())
    if step.method == "kv-heads":
        return {"num_key_value_heads": structure.kept_kv_heads(config, step.ratio)}
    if step.method == "channels":
        return dict(channels(network, step))
    return _stored_config(step)


def _stored_config(step: Prune) -> dict[str, Any]:
    if step.store == "factors":
        return {"quantization_config": factors.config()}
    is_short = step.store == "bitmask"
    return {"quantization_config": bitmask.config(0.5 if step.pattern else step.ratio)} if is_short else {}


def _stored(network: Network, block: str, step: Prune, thin: Mapping[str, Thin]) -> dict[str, Tensor]:
    """The block's tensors as they are written: as factors (`thin`, by parameter) or without zeros, where that was
    asked for and takes less."""
    tensors = tensors_of(network, block)
    if step.store == "dense":
        return tensors
    if step.store == "factors":
        for name, (left, right) in thin.items():
            del tensors[network.tensor_name(name)]
            tensors |= factors.pack(network.tensor_name(name).removesuffix(".weight"), left, right)
        return tensors
    found: dict[str, Tensor] = {}
    linears = {network.tensor_name(f"{name}.weight") for name in network.linears(block)}
    for name, values in tensors.items():
        is_smaller = name in linears and bitmask.packed_bytes(values) < values.nbytes
        found |= bitmask.pack(name.removesuffix(".weight"), values) if is_smaller else {name: values}
    return found


def channels(network: Network, step: Prune) -> dict[str, int]:
    """How many channels of the feed-forwards the step leaves, by the config's keys; none when it is not about them."""
    if step.method != "channels":
        return {}
    parts = ((name, structure.feed_forward(name, network.linears(name))) for name in network.blocks)
    return dict(structure.kept_channels(network.folder.config, name, part, step.ratio) for name, part in parts)


def _prune_block(network: Network, visit: Visit, step: Prune) -> dict[str, Thin]:
    """Change the block's matrices; the result is the factors of those that became of a lower rank, by parameter."""
    linears = network.linears(visit.block)
    known = observe(visit, linears) if visit.inputs else {}
    config = network.folder.config
    if step.method == "rank":
        return _lower_ranks(network, visit.block, known, step)
    if step.method == "channels":
        part = structure.feed_forward(visit.block, linears)
        _, kept = structure.kept_channels(config, visit.block, part, step.ratio)
        structure.prune_channels(linears, part, known[part.reader], kept)
        return {}
    if step.method == "heads":
        plan = structure.HeadPlan.make(config, step.ratio)
        structure.prune_heads(visit.module, visit.block, linears, known[f"{visit.block}.self_attn.o_proj"], plan)
        return {}
    if step.method == "kv-heads":
        structure.merge_kv_heads(visit.module, visit.block, linears, structure.kept_kv_heads(config, step.ratio))
        return {}
    is_2_of_4 = step.pattern == "2:4"
    for name, linear in linears.items():
        if is_named(name, step.ignore):
            continue
        weight = linear.weight.data
        if step.method == "magnitude":
            linear.weight.data = sparse.magnitude(weight, step.ratio, is_2_of_4)
        elif step.method == "wanda":
            linear.weight.data = sparse.wanda(weight, known[name].importance.sqrt(), step.ratio, is_2_of_4)
        else:
            linear.weight.data = sparse.sparsegpt(weight, known[name].moments, step.ratio, is_2_of_4)
    return {}


def _lower_ranks(network: Network, block: str, known: Mapping[str, InputStatistics], step: Prune) -> dict[str, Thin]:
    """Give the feed-forward's matrices their nearest ones of a lower rank; their factors by parameter."""
    linears = network.linears(block)
    part = structure.feed_forward(block, linears)
    found: dict[str, Thin] = {}
    for name in (*part.makers, part.reader):
        if is_named(name, step.ignore):
            continue
        weight, dtype = linears[name].weight.data, network.dtype_of(f"{name}.weight")
        rank = low_rank.rank_of((weight.shape[0], weight.shape[1]), step.ratio)
        left, right = low_rank.factor(weight, known[name].moments, rank)
        found[f"{name}.weight"] = (left.to(dtype), right.to(dtype))
        linears[name].weight.data = factors.product(*found[f"{name}.weight"]).float()
    return found


def _restore(network: Network, visit: Visit, writer: FolderWriter, shard: str, step: Prune) -> None:
    """Give a block the weights that were written for it, of their new shapes."""
    reader = writer.shard(shard)
    for parameter in network.parameters_of(visit.block):
        name = network.tensor_name(parameter)
        module = name.removesuffix(".weight")
        if f"{module}.bitmask" in reader:
            rows, columns = network.model.get_parameter(parameter).shape
            network.set(parameter, bitmask.read(reader, module, (rows, columns)).float())
            continue
        if f"{module}.left_factor" in reader:
            rows, columns = network.model.get_parameter(parameter).shape
            network.set(parameter, factors.read(reader, module, (rows, columns)).float())
            continue
        values = torch.empty(reader.shape(name))
        reader.read_into(name, values)
        network.set(parameter, values)
    if step.method == "heads":
        attention: Any = visit.module.get_submodule("self_attn")
        attention.num_key_value_groups = structure.HeadPlan.make(network.folder.config, step.ratio).kept_in_group


def tensors_of(network: Network, block: str) -> dict[str, Tensor]:
    """The block's parameters as they are now, of the types they had; the module computes with what is written."""
    found = {}
    for parameter in network.parameters_of(block):
        values = network.model.get_parameter(parameter).data.to(network.dtype_of(parameter))
        network.set(parameter, values.float())
        found[network.tensor_name(parameter)] = values
    return found


def outside(network: Network) -> dict[str, Tensor]:
    """All tensors outside of the blocks, as they lie in the folder."""
    found = {network.tensor_name(name): network.read(name, None) for name in network.parameters_of("")}
    return found | {name: network.read_other(name) for name in network.others}


def _num_dropped(network: Network, step: Prune) -> int:
    if network.folder.config.get("is_encoder_decoder"):
        raise ConfigError("layers can be left out of decoders and encoders alone, not of networks that are both")
    count = round(step.ratio * len(network.blocks))
    if not 0 < count < len(network.blocks):
        raise ConfigError(
            f"leaving out {step.ratio:.0%} of {len(network.blocks)} layers leaves out {count}; choose another ratio"
        )
    return count


def _drop_layers(
    network: Network, step: Prune, batches: list[Mapping[str, Tensor]], writer: FolderWriter, progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Leave out the layers whose outputs are most like their inputs (Men et al., "ShortGPT", 2024)."""
    influence: dict[str, float] = {}
    total = len(network.blocks)
    for number, visit in enumerate(walk(network, batches), 1):
        progress("look at layers", number, total)
        influence[visit.block] = _influence(visit)
    own = [_own_names(network, name) for name in network.blocks]
    movable = [name for name, names in zip(network.blocks, own, strict=True) if names == own[-1]]
    dropped = set(sorted(movable, key=lambda name: influence[name])[: _num_dropped(network, step)])
    kept = [name for name in network.blocks if name not in dropped]
    return write_layers(network, [network.blocks.index(name) for name in kept], writer), {"layer_influence": influence}


def _drop_operators(
    network: Network, step: Prune, batches: list[Mapping[str, Tensor]], writer: FolderWriter, progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    dropped, influence = operators.least(network, batches, step.ratio)
    writer.write("0000", outside(network))
    for number, name in enumerate(network.blocks, 1):
        progress("prune", number - 1, len(network.blocks))
        network.fill(name)
        operators.clear(network.linears(name), dropped)
        writer.write(f"{number:04d}", _stored(network, name, step, {}))
        network.drop(name)
    return _stored_config(step), {"operator_influence": influence, "dropped": dropped}


def drop_tokens(network: Network, kept: list[int], writer: FolderWriter) -> dict[str, Any]:
    """Write the network with these tokens alone; returns what changes in config.json."""
    writer.write("0000", vocabulary.tensors(network, kept))
    for number, name in enumerate(network.blocks, 1):
        tensors = {network.tensor_name(item): network.read(item, None) for item in network.parameters_of(name)}
        writer.write(f"{number:04d}", tensors)
    return vocabulary.config(network.folder, kept)


def write_layers(network: Network, kept: list[int], writer: FolderWriter) -> dict[str, Any]:
    """Write the network with these layers alone; returns what changes in config.json.

    Raises:
        ConfigError: a layer would come into the place of one that has other parameters.
    """
    for number, index in enumerate(kept):
        if _own_names(network, network.blocks[index]) != _own_names(network, network.blocks[number]):
            raise ConfigError(
                f"layer {index} would take the place of layer {number}, which has other parameters; keep layer {number}"
            )
    writer.write("0000", outside(network))
    for number, name in enumerate(network.blocks[index] for index in kept):
        tensors = {}
        for parameter in network.parameters_of(name):
            rest = parameter.removeprefix(f"{name}.")
            stem = network.tensor_name(parameter).removesuffix(f"{name.rpartition('.')[2]}.{rest}")
            tensors[f"{stem}{number}.{rest}"] = network.read(parameter, None)
        writer.write(f"{number + 1:04d}", tensors)
    return _fewer_layers(network, kept)


def _own_names(network: Network, block: str) -> set[str]:
    """What a block's parameters are called within it (ModernBERT's first layer has no norm before its attention)."""
    return {name.removeprefix(block) for name in network.parameters_of(block)}


def _influence(visit: Visit) -> float:
    total, count = 0.0, 0
    for (args, kwargs), output in zip(visit.inputs, visit.outputs(), strict=True):
        before = args[0] if args else kwargs["hidden_states"]
        after = output[0] if isinstance(output, tuple) else output
        total += float((1 - torch.nn.functional.cosine_similarity(before, after, dim=-1)).sum())
        count += before.shape[0] * before.shape[1]
    return total / count


def _fewer_layers(network: Network, kept: list[int]) -> dict[str, Any]:
    """config.json with fewer layers: counts, and lists with an entry per layer."""
    config, total = network.folder.config, len(network.blocks)
    changes: dict[str, Any] = {key: len(kept) for key in _LAYER_COUNTS if config.get(key) == total}
    changes = changes or {"num_hidden_layers": len(kept)}  # the class's default, which config.json leaves out
    return changes | layer_lists(network.model.config, kept)
