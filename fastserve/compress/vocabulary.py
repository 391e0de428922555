"""Leave out tokens that a text uses least: fewer rows of the embedding and of the head, and a tokenizer without them.

The likeliest tokens of the calibration text stay, with the merges that lead to them; so do single characters and bytes
and everything special, so that any text can still be written. V tokens, D hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastserve.checkpoint.folder import ModelFolder
from fastserve.compress.calibration import text_ids
from fastserve.compress.network import Network
from fastserve.core.errors import ConfigError

_KINDS = ("BPE", "WordPiece", "Unigram")
_STALE = ("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "special_tokens_map.json")


def check(folder: ModelFolder) -> None:
    """ConfigError for tokenizers that cannot lose tokens."""
    if not folder.has("tokenizer.json"):
        raise ConfigError(f"{folder.path} has no tokenizer.json, from which tokens could be left out")
    kind = _read(folder)["model"]["type"]
    if kind not in _KINDS:
        raise ConfigError(f"tokens of a tokenizer of type {kind} cannot be left out; of {', '.join(_KINDS)} they can")
    if folder.config["vocab_size"] in (folder.config.get("hidden_size"), folder.config.get("d_model")):
        raise ConfigError("the network has as many tokens as features; which rows are tokens' cannot be told")


def choose(folder: ModelFolder, text: Path, ratio: float) -> list[int]:
    """Ids that stay, in order: a share 1 - ratio of all, or more where what must stay is more."""
    content = _read(folder)
    tokens = _tokens(content)
    counts = torch.bincount(text_ids(folder, text), minlength=max(tokens) + 1)
    kept = {item["id"] for item in content["added_tokens"]} | set(_special_ids(folder).values())
    kept |= {index for index, token in tokens.items() if _is_basic(token)}
    parts = _parts(content)
    budget = round((1 - ratio) * len(tokens))
    for index in counts.argsort(descending=True, stable=True).tolist():
        needed = _with_parts(index, parts) - kept if index in tokens else set()
        if len(kept) + len(needed) <= budget:
            kept |= needed
    return sorted(kept)


def tensors(network: Network, kept: list[int]) -> dict[str, Tensor]:
    """All tensors outside of the blocks, those with a row (or place) per token shortened."""
    size, rows = int(network.folder.config["vocab_size"]), torch.tensor(kept)

    def shortened(values: Tensor) -> Tensor:
        if values.dim() and values.shape[0] == size:
            return values[rows]
        return values[:, rows] if values.dim() == 2 and values.shape == (1, size) else values

    found = {network.tensor_name(name): network.read(name, None) for name in network.parameters_of("")}
    found |= {name: network.read_other(name) for name in network.others}
    return {name: shortened(values) for name, values in found.items()}


def files(folder: ModelFolder, kept: list[int]) -> dict[str, str | None]:
    """Small files of the folder that change, by name; None: those that go."""
    new = {old: index for index, old in enumerate(kept)}
    content = _read(folder)
    model = content["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][old] for old in kept if old < len(model["vocab"])]
        model["unk_id"] = None if model.get("unk_id") is None else new[model["unk_id"]]
    else:
        model["vocab"] = {token: new[index] for token, index in model["vocab"].items() if index in new}
    if "merges" in model:
        pairs = [item if isinstance(item, list) else item.split(" ") for item in model["merges"]]
        model["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= set(model["vocab"])]
    content["added_tokens"] = [{**item, "id": new[item["id"]]} for item in content["added_tokens"]]
    content["post_processor"] = _renumbered(content.get("post_processor"), new)
    found: dict[str, str | None] = dict.fromkeys(_STALE)
    found["tokenizer.json"] = json.dumps(content, ensure_ascii=False)
    for name in ("tokenizer_config.json", "generation_config.json"):
        if folder.has(name):
            values = json.loads((folder.path / name).read_text(encoding="utf-8"))
            if decoder := values.get("added_tokens_decoder"):
                values["added_tokens_decoder"] = {str(new[int(old)]): item for old, item in decoder.items()}
            found[name] = json.dumps({**values, **_ids(values, new)}, indent=2, ensure_ascii=False)
    return found


def config(folder: ModelFolder, kept: list[int]) -> dict[str, Any]:
    """What changes in config.json."""
    return {"vocab_size": len(kept), **_ids(folder.config, {old: index for index, old in enumerate(kept)})}


def _read(folder: ModelFolder) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder.path / "tokenizer.json").read_text(encoding="utf-8"))
    return found


def _tokens(content: Mapping[str, Any]) -> dict[int, str]:
    vocab = content["model"]["vocab"]
    pairs = vocab.items() if isinstance(vocab, dict) else ((item[0], index) for index, item in enumerate(vocab))
    return {index: token for token, index in pairs} | {item["id"]: item["content"] for item in content["added_tokens"]}


def _is_basic(token: str) -> bool:
    """A single character, alone or within a word, or a byte."""
    return len(token.removeprefix("##").removeprefix("\u2581")) <= 1 or (len(token) == 6 and token.startswith("<0x"))


def _parts(content: Mapping[str, Any]) -> dict[int, tuple[int, int]]:
    """Token -> the two that the first merge to it joins."""
    vocab = content["model"]["vocab"]
    found: dict[int, tuple[int, int]] = {}
    for item in content["model"].get("merges", []):
        left, right = item if isinstance(item, list) else item.split(" ")
        if left + right in vocab:
            found.setdefault(vocab[left + right], (vocab[left], vocab[right]))
    return found


def _with_parts(index: int, parts: Mapping[int, tuple[int, int]]) -> set[int]:
    found, left = set(), [index]
    while left:
        index = left.pop()
        if index not in found:
            found.add(index)
            left += parts.get(index, ())
    return found


def _special_ids(folder: ModelFolder) -> dict[str, int]:
    config = {**folder.generation_config, **folder.config}
    return {
        f"{key}.{place}": item
        for key, value in config.items()
        if key.endswith("_token_id")
        for place, item in enumerate(value if isinstance(value, list) else [value])
        if isinstance(item, int) and not isinstance(item, bool)
    }


def _ids(values: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """The values of keys that name tokens, in new numbers."""
    found = {}
    for key, value in values.items():
        if key.endswith("_token_id") and value is not None:
            found[key] = [new[item] for item in value] if isinstance(value, list) else new[value]
    return found


def _renumbered(processor: Any, new: Mapping[int, int]) -> Any:
    """A post-processor with new numbers in its "ids" and its pairs of token and number."""
    if isinstance(processor, dict):
        return {
            key: [new[item] for item in value] if key == "ids" else _renumbered(value, new)
            for key, value in processor.items()
        }
    if isinstance(processor, list):
        if len(processor) == 2 and isinstance(processor[0], str) and isinstance(processor[1], int):
            return [processor[0], new[processor[1]]]
        return [_renumbered(item, new) for item in processor]
    return processor
