"""Leave out whole parts of a block: channels of its feed-forward, or heads of its attention, and make up for them.

What a part does is measured on the inputs of the matrix that reads it; that matrix is then fitted anew to the parts
that stay, by least squares on the same inputs. The result is a smaller network of the same architecture. K inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastserve.compress.activations import InputStatistics
from fastserve.core.errors import ConfigError

_RIDGE = 1e-3
_HEADS = "heads can be left out or merged in attention like Llama's alone. Prune channels or layers instead"
# Names within a block: what makes the channels, what reads them, and the config's key for their number (after
# "encoder_" or "decoder_" where each side has its own).
_FEED_FORWARDS = (
    (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "intermediate_size"),
    (("intermediate.dense",), "output.dense", "intermediate_size"),
    (("fc1",), "fc2", "ffn_dim"),
    *(
        (tuple(f"layer.{at}.DenseReluDense.{name}" for name in names), f"layer.{at}.DenseReluDense.wo", "d_ff")
        for at in (1, 2)
        for names in (("wi",), ("wi_0", "wi_1"))
    ),
)


@dataclass(frozen=True, slots=True)
class FeedForward:
    """Linears that make the channels, the one that reads them, and the config's key for how many there are."""

    makers: tuple[str, ...]
    reader: str
    key: str


def feed_forward(block: str, linears: Mapping[str, nn.Linear]) -> FeedForward:
    """The feed-forward of a block; ConfigError when it has none that is known."""
    for makers, reader, key in _FEED_FORWARDS:
        names = tuple(f"{block}.{name}" for name in makers)
        if all(name in linears for name in (*names, f"{block}.{reader}")):
            return FeedForward(names, f"{block}.{reader}", key)
    raise ConfigError(f"{block} has no feed-forward of a known form; channels cannot be left out")


def prune_channels(linears: Mapping[str, nn.Linear], part: FeedForward, known: InputStatistics, num_kept: int) -> None:
    """Keep the channels that do most, in their order; known: inputs of the reader."""
    reader = linears[part.reader]
    effects = known.importance * reader.weight.data.square().sum(0)
    kept = effects.argsort(descending=True, stable=True)[:num_kept].sort().values
    refit(reader, known, kept)
    for name in part.makers:
        keep_rows(linears[name], kept)


def kept_channels(config: Mapping[str, Any], block: str, part: FeedForward, ratio: float) -> tuple[str, int]:
    """The config's key for the block's channels, and how many stay: a multiple of what kernels and groups like, where
    there were as many.
    """
    side = "encoder" if ".encoder." in block else "decoder"
    key = next((key for key in (part.key, f"{side}_{part.key}") if isinstance(config.get(key), int)), None)
    if key is None:
        raise ConfigError(f"config.json lacks {part.key}, the number of channels, which is to become less; add it")
    before = int(config[key])
    multiple = next(size for size in (128, 32, 8, 1) if (before % size == 0 and before >= 16 * size) or size == 1)
    return key, max(multiple, round((1 - ratio) * before / multiple) * multiple)


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """How many heads there are and stay: of queries in each group that shares keys and values, or whole groups.

    Whichever comes nearest to what was asked among what transformers takes: Llama's heads divide its hidden size.
    """

    num_groups: int
    group_size: int
    head_size: int
    kept_groups: int
    kept_in_group: int

    @classmethod
    def make(cls, config: Mapping[str, Any], ratio: float) -> HeadPlan:
        """ConfigError when the architecture ties the number of heads to other sizes, or has too few."""
        heads, head_size = config.get("num_attention_heads"), config.get("head_dim")
        if not heads or not head_size or config.get("is_encoder_decoder"):
            raise ConfigError(
                "heads can be left out where config.json has num_attention_heads and a head_dim of its own (Llama and "
                "its relatives); prune channels or layers instead"
            )
        groups = int(config.get("num_key_value_heads") or heads)
        size = int(heads) // groups
        ways = [(groups, kept) for kept in range(1, size + 1)] + [(kept, size) for kept in range(1, groups + 1)]
        plans = [cls(groups, size, int(head_size), *way) for way in ways]
        plans.sort(key=lambda plan: abs(plan.kept_groups * plan.kept_in_group / int(heads) - (1 - ratio)))
        plan = next((plan for plan in plans if _is_possible({**config, **plan.new_config()})), plans[0])
        if (plan.kept_groups, plan.kept_in_group) == (groups, size):
            raise ConfigError(f"leaving out {ratio:.0%} of {heads} heads leaves out none; choose a larger ratio")
        return plan

    def new_config(self) -> dict[str, int]:
        return {
            "num_attention_heads": self.kept_groups * self.kept_in_group,
            "num_key_value_heads": self.kept_groups,
            "head_dim": self.head_size,
        }


def _is_possible(config: Mapping[str, Any]) -> bool:
    """Whether transformers takes these sizes together."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    rest = {key: value for key, value in config.items() if key != "model_type"}
    try:
        AutoConfig.for_model(config.get("model_type", ""), **rest)
    except (TypeError, ValueError, StrictDataclassError):
        return False
    return True


def check_attention(block: nn.Module, name: str, purpose: str = "") -> None:
    """ConfigError unless a block's attention is made as Llama's: matrices of their own, heads in groups."""
    attention: Any = getattr(block, "self_attn", None)
    parts = [f"{role}_proj" for role in "qkvo"] + ["num_key_value_groups", "head_dim"]
    if missing := [part for part in parts if not hasattr(attention, part)]:
        raise ConfigError(f"{name} has no self_attn.{missing[0]}; {purpose or _HEADS}")
    norms = [getattr(getattr(attention, role, None), "weight", None) for role in ("q_norm", "k_norm")]
    if not purpose and any(weight is not None and weight.numel() != attention.head_dim for weight in norms):
        raise ConfigError(f"{name} norms the queries or keys of all heads together; {_HEADS}")


def prune_heads(
    module: nn.Module, block: str, linears: Mapping[str, nn.Linear], known: InputStatistics, plan: HeadPlan
) -> None:
    """Keep the heads that do most; known: inputs of the output projection."""
    names = {role: f"{block}.self_attn.{role}_proj" for role in "qkvo"}
    output = linears[names["o"]]
    effects = known.importance * output.weight.data.square().sum(0)
    by_head = effects.view(plan.num_groups, plan.group_size, plan.head_size).sum(-1)
    groups = by_head.sum(1).argsort(descending=True, stable=True)[: plan.kept_groups].sort().values
    within = by_head[groups].argsort(dim=1, descending=True, stable=True)[:, : plan.kept_in_group].sort(dim=1).values
    heads = (groups.unsqueeze(1) * plan.group_size + within).flatten()
    columns = _rows_of(heads, plan.head_size)
    refit(output, known, columns)
    keep_rows(linears[names["q"]], columns)
    for role in "kv":
        keep_rows(linears[names[role]], _rows_of(groups, plan.head_size))
    attention: Any = module.get_submodule("self_attn")
    attention.num_key_value_groups = plan.kept_in_group


def kept_kv_heads(config: Mapping[str, Any], ratio: float) -> int:
    """How many heads of keys and values stay, a divisor of how many there are; ConfigError when that is all."""
    heads = config.get("num_key_value_heads")
    if not heads or config.get("is_encoder_decoder"):
        raise ConfigError("kv-heads can be merged where config.json has num_key_value_heads (Llama and its relatives)")
    kept = max(count for count in range(1, heads + 1) if heads % count == 0 and count <= max(1, (1 - ratio) * heads))
    if kept == heads:
        raise ConfigError(f"there is one head of keys and values already; {ratio:.0%} of it cannot go")
    return kept


def merge_kv_heads(module: nn.Module, block: str, linears: Mapping[str, nn.Linear], kept: int) -> None:
    """Keys and values of neighbouring heads become one, their mean (Ainslie et al., "GQA", 2023)."""
    attention: Any = module.get_submodule("self_attn")
    head_size = int(attention.head_dim)
    for role in "kv":
        name = f"{block}.self_attn.{role}_proj"
        for values in linears[name].parameters(recurse=False):
            merged = values.data.view(kept, -1, head_size, *values.shape[1:]).mean(1)
            values.data = merged.reshape(kept * head_size, *values.shape[1:])
        linears[name].out_features = kept * head_size


def _rows_of(heads: Tensor, head_size: int) -> Tensor:
    return (heads.unsqueeze(1) * head_size + torch.arange(head_size)).flatten()


def refit(reader: nn.Linear, known: InputStatistics, kept: Tensor) -> None:
    """Make a linear read the inputs `kept` alone, so that its outputs change least."""
    moments = known.moments
    within = moments[kept][:, kept].double()
    within += torch.eye(len(kept), dtype=torch.float64) * (_RIDGE * within.diagonal().mean() + 1e-12)
    target = (reader.weight.data @ moments[:, kept]).double() + _RIDGE * within.diagonal().mean() * reader.weight.data[
        :, kept
    ]
    reader.weight.data = torch.linalg.solve(within, target.t()).t().float().contiguous()
    reader.in_features = len(kept)


def keep_rows(linear: nn.Linear, kept: Tensor) -> None:
    """Leave out all outputs of a linear but `kept`."""
    linear.weight.data = linear.weight.data[kept].contiguous()
    if linear.bias is not None:
        linear.bias.data = linear.bias.data[kept].contiguous()
    linear.out_features = len(kept)
