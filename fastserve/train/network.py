"""The network that is trained: transformers' own module, made anew or opened, checked against tokenizer and recipe."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.checkpoint.folder import ModelFolder
from fastserve.core.errors import CheckpointError, ConfigError
from fastserve.train.settings import ModelSection

if TYPE_CHECKING:
    import torch

NETWORK_CLASSES = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "sentence-order": "AutoModelForPreTraining",
    "span-corruption": "AutoModelForSeq2SeqLM",
}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
_BEHIND_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")
_RELATIVE = ("t5", "mt5", "umt5", "longt5")  # their positions have no end
# A folder may come from anywhere: nothing in it is run, and pickled weights can run code.
SAFELY: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}


def open_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a folder; ConfigError if there is none."""
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").exists():
        raise ConfigError(f"{folder} has no tokenizer.json; make a tokenizer with `fastserve tokenizer train`")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def open_config(folder: str | Path, **values: Any) -> Any:
    """transformers' configuration of a folder, some values replaced; CheckpointError where it knows none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, **values)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot open {folder}: {str(error).splitlines()[0]}") from error


def make_config(section: ModelSection, tokenizer: Any, objective: str, longest_row: int) -> Any:
    """The configuration of the network. ConfigError for an unknown type or key, or one that does not fit the rest."""
    import transformers
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config = _opened_config(section) if section.folder else _new_config(section, tokenizer)
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if section.attention not in known and "/" not in section.attention:  # kernels of the hub are OWNER/NAME
        raise ConfigError(f"recipe key model.attention: must be one of {', '.join(known)}, not {section.attention!r}")
    if type(config) not in getattr(transformers, NETWORK_CLASSES[objective])._model_mapping:
        raise ConfigError(
            f"a network of type {config.model_type!r} cannot learn the objective {objective!r}; choose another"
        )
    text = config.get_text_config()
    if text.vocab_size < len(tokenizer):
        raise ConfigError(
            f"the network has {text.vocab_size} tokens, the tokenizer {len(tokenizer)}: prepare the data with the "
            f"tokenizer of {section.folder or 'this model'}"
        )
    check_length(config, longest_row, "data.length")
    return config


def first_position(config: Any) -> int:
    """The number of an input's first position: RoBERTa and its like count from behind the padding's id."""
    return config.pad_token_id + 1 if config.model_type in _BEHIND_PADDING else 0


def num_positions(config: Any) -> int | None:
    """The longest input in tokens; None where the network names no limit."""
    text = config.get_text_config()
    room = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
    return int(room) - first_position(config) if room and config.model_type not in _RELATIVE else None


def check_length(config: Any, length: int, key: str) -> None:
    """ConfigError if the network has fewer positions than the `length` that `key` names."""
    room = num_positions(config)
    if room is not None and length > room:
        raise ConfigError(f"{length} tokens exceed the {room} positions of the network: {key} must be at most {room}")


def make_network(section: ModelSection, config: Any, objective: str, seed: int) -> Any:
    """The module, in float32: new with random weights that follow from `seed`, or with those of `section.folder`."""
    import torch
    import transformers

    kind = getattr(transformers, NETWORK_CLASSES[objective])
    torch.manual_seed(seed)
    try:
        if section.folder:
            folder = ModelFolder.open(section.folder).path
            return kind.from_pretrained(folder, config=config, dtype=torch.float32, **SAFELY)
        return kind.from_config(config)
    except OSError as error:
        raise CheckpointError(f"cannot open {section.folder}: {error}") from error


def num_parameters(network: Any) -> int:
    """Tied weights count once."""
    return sum(parameter.numel() for parameter in network.parameters())


def save_model_folder(
    folder: Path,
    network: Any,
    weights: dict[str, torch.Tensor],
    tokenizer_folder: Path,
    dtype: str,
    card: dict[str, Any],
) -> None:
    """Write a complete model folder, in place at once: a kill leaves the old one or none."""
    import torch

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    network.config.dtype = getattr(torch, dtype)
    converted = {
        name: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
    }
    network.save_pretrained(partial, state_dict=converted)
    for name in _TOKENIZER_FILES:
        if (tokenizer_folder / name).exists():
            shutil.copyfile(tokenizer_folder / name, partial / name)
    (partial / "fastserve.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)


def bare_config(section: ModelSection) -> Any:
    """The configuration without a tokenizer, for a plan of what it would take."""
    from transformers import CONFIG_MAPPING

    if section.type not in CONFIG_MAPPING:
        raise ConfigError(f"recipe key model.type: transformers knows no {section.type!r}")
    _check_keys(CONFIG_MAPPING[section.type](), section.config)
    return CONFIG_MAPPING[section.type](**section.config, attn_implementation=section.attention)


def _opened_config(section: ModelSection) -> Any:
    config = open_config(ModelFolder.open(section.folder).path, attn_implementation=section.attention)
    _check_keys(config, section.config)
    for name, value in section.config.items():
        setattr(config, name, value)
    return config


def _new_config(section: ModelSection, tokenizer: Any) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    if section.type not in CONFIG_MAPPING:
        raise ConfigError(
            f"recipe key model.type: transformers knows no {section.type!r}; write llama, qwen3, gpt2, bert, t5..."
        )
    kind = CONFIG_MAPPING[section.type]
    _check_keys(kind(), section.config)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if section.type == "t5":
        ids["decoder_start_token_id"] = tokenizer.pad_token_id
    defaults = kind().to_dict()
    # ModernBERT's lie beyond a small vocabulary.
    ids |= {name: getattr(tokenizer, name) for name in ("cls_token_id", "sep_token_id") if name in defaults}
    # transformers' gelu_new takes eight operations for what this name computes in one.
    fused = {name: "gelu_pytorch_tanh" for name, value in defaults.items() if value == "gelu_new"}
    values = {"vocab_size": len(tokenizer), **ids, **fused, **section.config}
    try:
        return kind(**values, attn_implementation=section.attention)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ConfigError(f"recipe section [model.config]: {error}") from error


def _check_keys(config: Any, given: dict[str, Any]) -> None:
    """transformers keeps any key it is given; a misspelt one would do nothing."""
    known = {*config.to_dict(), *getattr(config, "attribute_map", {})}
    if unknown := sorted(set(given) - known):
        raise ConfigError(
            f"recipe section [model.config]: unknown key {unknown[0]!r} for type {config.model_type!r}; known keys are "
            f"{', '.join(sorted(known))}"
        )
