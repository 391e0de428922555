"""Tiny random model folders, made on the fly: one function per family, all seeded, nothing downloaded.

Every function writes a Hugging Face folder (config, safetensors, generation_config, byte-level tokenizer with a chat
template) and returns its path. Weights are large enough that logits are far apart and greedy output is not constant.
Keyword arguments replace fields of the transformers configuration; `shard_size` splits the weights into several files.

    folder = llama(tmp_path / "model", tie_word_embeddings=True)
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCAB_SIZE = 320
END_OF_TEXT, IM_START, IM_END = 0, 1, 2  # ids of the special tokens
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_CORPUS = [
    "Once upon a time there was a little fox who lived in the deep green wood.",
    "The fox said to the bear: where is the river, and what is there to eat?",
    "And the bear went to the river, and there they sat until the sun went down.",
    "Tell me a story about the sea, the ship and the old king of the north wind.",
]


def write_tokenizer(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A byte-level BPE of exactly VOCAB_SIZE tokens: three special ones, all bytes, and merges from a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": SPECIAL_TOKENS[IM_END],
        "pad_token": SPECIAL_TOKENS[END_OF_TEXT],
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return folder


def write_model(
    folder: Path,
    config: Any,
    *,
    seed: int = 0,
    dtype: str = "float32",
    shard_size: str = "5GB",
    chat_template: str | None = CHAT_TEMPLATE,
    embedding_deviation: float = 0.5,
) -> Path:
    """Random weights for a transformers configuration, saved by transformers itself, plus the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    config.dtype = dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _randomise(name, parameter, embedding_deviation)
    model.generation_config.eos_token_id = IM_END
    model.generation_config.pad_token_id = END_OF_TEXT
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
    return write_tokenizer(folder, chat_template)


def _randomise(name: str, parameter: Any, embedding_deviation: float) -> None:
    if parameter.ndim < 2:
        is_norm_weight = "weight" in name and bool((parameter == 1).all())
        parameter.normal_(1.0 if is_norm_weight else 0.0, 0.1)
    elif "embed" in name or "wte" in name or "wpe" in name:
        parameter.normal_(0.0, embedding_deviation)
    else:
        parameter.normal_(0.0, 0.2)


_WRITING = ("seed", "dtype", "shard_size", "chat_template", "embedding_deviation")


def _options(options: dict[str, Any], **defaults: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword arguments into those of the configuration (over the defaults) and those of `write_model`."""
    writing = {name: options.pop(name) for name in _WRITING if name in options}
    return {**defaults, **options}, writing


_DECODER = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=IM_END,
    pad_token_id=END_OF_TEXT,
)


def llama(folder: Path, **options: Any) -> Path:
    """Llama with grouped key/value heads."""
    from transformers import LlamaConfig

    config, writing = _options(options, **_DECODER)
    return write_model(folder, LlamaConfig(**config), **writing)


def llama3(folder: Path, **options: Any) -> Path:
    """Llama 3: llama3 rope scaling, stretched from 64 positions to 512, tied embeddings."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return llama(folder, **{"rope_parameters": rope, "tie_word_embeddings": True, **options})


def qwen2(folder: Path, **options: Any) -> Path:
    """Qwen2: biases on q, k and v."""
    from transformers import Qwen2Config

    config, writing = _options(options, **_DECODER)
    return write_model(folder, Qwen2Config(**config), **writing)


def qwen3(folder: Path, **options: Any) -> Path:
    """Qwen3: norms on queries and keys, a head size that is not hidden_size / heads, tied embeddings."""
    from transformers import Qwen3Config

    config, writing = _options(options, **{**_DECODER, "head_dim": 32, "tie_word_embeddings": True})
    return write_model(folder, Qwen3Config(**config), **writing)


def mistral(folder: Path, **options: Any) -> Path:
    """Mistral with a sliding window of 24 tokens."""
    from transformers import MistralConfig

    config, writing = _options(options, **_DECODER, sliding_window=24)
    return write_model(folder, MistralConfig(**config), **writing)


def gpt2(folder: Path, **options: Any) -> Path:
    """GPT-2: learned positions, LayerNorm, transposed weights, tied embeddings."""
    from transformers import GPT2Config

    config, writing = _options(
        options,
        vocab_size=VOCAB_SIZE,
        n_positions=512,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=END_OF_TEXT,
        eos_token_id=IM_END,
    )
    return write_model(folder, GPT2Config(**config), **writing)


def other(folder: Path, config_class: str, **options: Any) -> Path:
    """Any architecture of transformers, by the name of its configuration class."""
    import transformers

    config, writing = _options(options, **_DECODER)
    return write_model(folder, getattr(transformers, config_class)(**config), **writing)


def _as_other(config_class: str, **defaults: Any) -> Callable[..., Path]:
    return lambda folder, **options: other(folder, config_class, **{**defaults, **options})


FAMILIES: dict[str, Callable[..., Path]] = {
    "llama": llama,
    "llama3": llama3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mistral": mistral,
    "gpt2": gpt2,
    # Gemma multiplies embeddings by 8 at this size.
    "gemma2": _as_other(
        "Gemma2Config",
        head_dim=16,
        sliding_window=24,
        query_pre_attn_scalar=16,
        embedding_deviation=0.1,
    ),
    "gemma3": _as_other(
        "Gemma3TextConfig",
        head_dim=16,
        sliding_window=24,
        query_pre_attn_scalar=16,
        num_hidden_layers=3,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        embedding_deviation=0.1,
    ),
    "phi3": _as_other("Phi3Config", sliding_window=24),
    "phi": _as_other("PhiConfig"),
    "gpt-neox": _as_other("GPTNeoXConfig"),
    "opt": _as_other("OPTConfig", ffn_dim=96, word_embed_proj_dim=64),
    "falcon": _as_other("FalconConfig"),
    "starcoder2": _as_other("Starcoder2Config", sliding_window=24),
    "olmo2": _as_other("Olmo2Config"),
    "granite": _as_other(
        "GraniteConfig",
        embedding_multiplier=2.0,
        logits_scaling=0.5,
        residual_multiplier=0.7,
        attention_multiplier=0.2,
    ),
    "smollm3": _as_other("SmolLM3Config", num_hidden_layers=4, no_rope_layer_interval=2),
    "mixtral": _as_other("MixtralConfig", num_local_experts=4),
    "qwen3-moe": _as_other(
        "Qwen3MoeConfig", head_dim=32, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=48
    ),
    "stablelm": _as_other("StableLmConfig"),
    "gpt-bigcode": _as_other("GPTBigCodeConfig", tie_word_embeddings=True),
}


def lora(
    folder: Path, base: Path, *, rank: int = 4, seed: int = 0, targets: str = r"layers\.|^h\.|\.h\.", **config: Any
) -> Path:
    """A random LoRA adapter of `base` as peft writes it, for the linears whose names match `targets`.

    Left out are embeddings, heads, routers and experts. Keyword arguments are fields of adapter_config.json.
    """
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(seed)
    transposed = _is_transposed(base)
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        if weight.ndim != 2 or not re.search(targets, name) or re.search(r"expert|router|mlp\.gate\.", name):
            continue
        module = f"base_model.model.{name.removesuffix('.weight')}"
        rows, columns = reversed(weight.shape) if transposed else weight.shape
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.3
        tensors[f"{module}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.3
    assert tensors
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", "fan_in_fan_out": transposed}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return folder


def merge_lora(folder: Path, base: Path, adapter: Path) -> Path:
    """The base model with the adapter's matrices added to its own, in float32."""
    from safetensors.torch import load_file, save_file

    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config.get("use_rslora") else config["r"])
    shutil.copytree(base, folder)
    weights, matrices = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, a in matrices.items():
        if name.endswith("lora_A.weight"):
            delta = scale * (matrices[name.replace("lora_A", "lora_B")] @ a)
            weight = weights[name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")]
            weight += delta.t() if _is_transposed(base) else delta
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _is_transposed(folder: Path) -> bool:
    return json.loads((folder / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
