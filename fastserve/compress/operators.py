"""Leave out operators: the attention or the feed-forward of a layer that adds least to what goes past it.

The other layers keep theirs, which no architecture has a config for, so an operator goes by becoming zero: with
`store = "bitmask"` its matrices take a sixteenth on disk, and served in bfloat16 hardly any time
(`csrc/sparse_weight.h`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from fastserve.compress.network import Network
from fastserve.compress.structure import feed_forward
from fastserve.compress.walk import Visit, walk
from fastserve.core.errors import ConfigError

# What writes an attention's result, and the part of the block that is the attention.
_ATTENTIONS = (
    ("self_attn.o_proj", "self_attn"),
    ("self_attn.out_proj", "self_attn"),
    ("encoder_attn.out_proj", "encoder_attn"),
    ("attention.output.dense", "attention"),
    ("layer.0.SelfAttention.o", "layer.0"),
    ("layer.1.EncDecAttention.o", "layer.1"),
)


def find(block: str, linears: Mapping[str, nn.Linear]) -> dict[str, list[str]]:
    """What writes an operator's result -> all linears of the operator; ConfigError where none is known."""
    found = {}
    for writer, part in _ATTENTIONS:
        if f"{block}.{writer}" in linears:
            found[f"{block}.{writer}"] = [name for name in linears if name.startswith(f"{block}.{part}.")]
    with suppress(ConfigError):
        inner = feed_forward(block, linears)
        found[inner.reader] = [*inner.makers, inner.reader]
    if not found:
        raise ConfigError(f"{block} has no attention or feed-forward of a known form; leave out layers instead")
    return found


def least(network: Network, batches: list[Mapping[str, Tensor]], ratio: float) -> tuple[list[str], dict[str, float]]:
    """The linears of the operators to leave out, and every operator's influence by what writes its result."""
    influence: dict[str, float] = {}
    members: dict[str, list[str]] = {}
    for visit in walk(network, batches):
        parts = find(visit.block, network.linears(visit.block))
        members |= parts
        influence |= _influences(visit, {name: network.linears(visit.block)[name] for name in parts})
    order = sorted(influence, key=lambda name: influence[name])
    dropped = order[: max(1, round(ratio * len(order)))]
    return [name for writer in dropped for name in members[writer]], influence


def clear(linears: Mapping[str, nn.Linear], dropped: list[str]) -> None:
    """Make the dropped linears zero."""
    for name in dropped:
        if name in linears:
            for values in linears[name].parameters(recurse=False):
                values.data = torch.zeros_like(values.data)


def _influences(visit: Visit, writers: Mapping[str, nn.Linear]) -> dict[str, float]:
    """Sum of squares of what each operator writes, over that of what goes into the block."""
    sums = dict.fromkeys(writers, 0.0)

    def look(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            sums[name] += float(output.square().sum())

        return hook

    handles = [linear.register_forward_hook(look(name)) for name, linear in writers.items()]
    before = 0.0
    try:
        for (args, kwargs), _ in zip(visit.inputs, visit.outputs(), strict=True):
            hidden = args[0] if args else kwargs["hidden_states"]
            before += float(hidden.square().sum())
    finally:
        for handle in handles:
            handle.remove()
    return {name: value / max(before, 1e-30) for name, value in sums.items()}
