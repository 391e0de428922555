"""Tiny random encoder-decoder folders, one function for all families; the counterpart of `tests/encoder_folders.py`.

folder = encoder_decoder(tmp_path / "model", "Bart")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.folders import VOCAB_SIZE, write_tokenizer

PAD, EOS = 0, 2
_T5 = dict(
    vocab_size=VOCAB_SIZE,
    d_model=64,
    d_kv=16,
    d_ff=96,
    num_layers=2,
    num_heads=4,
    pad_token_id=PAD,
    eos_token_id=EOS,
    decoder_start_token_id=PAD,
)
_BART = dict(
    vocab_size=VOCAB_SIZE,
    d_model=64,
    encoder_layers=2,
    decoder_layers=3,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=96,
    decoder_ffn_dim=96,
    max_position_embeddings=160,
    pad_token_id=1,
    bos_token_id=PAD,
    eos_token_id=EOS,
    decoder_start_token_id=EOS,
    scale_embedding=True,
)
# Our name -> transformers' classes and the configuration.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5Config", "T5ForConditionalGeneration", _T5),
    "t5-v1.1": (
        "T5Config",
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "mt5": ("MT5Config", "MT5ForConditionalGeneration", _T5),
    "bart": ("BartConfig", "BartForConditionalGeneration", _BART),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", _BART),
    "marian": ("MarianConfig", "MarianMTModel", {**_BART, "pad_token_id": VOCAB_SIZE - 1}),
    "marian-two-vocabularies": (
        "MarianConfig",
        "MarianMTModel",
        {**_BART, "share_encoder_decoder_embeddings": False, "decoder_vocab_size": VOCAB_SIZE, "pad_token_id": 1},
    ),
    "m2m100": ("M2M100Config", "M2M100ForConditionalGeneration", _BART),
    "pegasus": ("PegasusConfig", "PegasusForConditionalGeneration", {**_BART, "activation_function": "relu"}),
}


def encoder_decoder(
    folder: Path, family: str, *, dtype: str = "float32", generation: dict[str, Any] | None = None, **options: Any
) -> Path:
    """A folder with random weights, saved by transformers itself; `options` go to its configuration, `generation` to
    generation_config.json."""
    import torch
    import transformers

    config_class, model_class, fields = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**fields, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                is_fixed = "embed_positions" in name and family.startswith(("marian", "pegasus"))
                if parameter.ndim > 1 and not is_fixed:
                    parameter.normal_(0.0, 0.15 if "t5" in family else 0.3)  # T5 does not scale its scores
                elif not is_fixed:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            if "final_logits_bias" in dict(model.named_buffers()):
                model.final_logits_bias.normal_(0.0, 0.5)
            if family == "t5-v1.1":
                model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB_SIZE, 64) * 0.3)
            if family == "t5":
                model.shared.weight.normal_(0.0, 2.0)  # its logits are scaled down
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    write_tokenizer(folder, chat_template=None)
    if generation is not None:
        file = folder / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **generation}))
    return folder


def add_tokens(folder: Path, tokens: list[str], **settings: Any) -> Path:
    """Put special tokens in place of the last of the vocabulary, such as languages; `settings` go to
    tokenizer_config.json."""
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    by_id = {token_id: token for token, token_id in vocabulary.items()}
    for token_id, token in enumerate(tokens, VOCAB_SIZE - len(tokens)):
        merged = by_id[token_id]
        del vocabulary[merged]
        content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != merged]
        vocabulary[token] = token_id
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        content["added_tokens"].append({"id": token_id, "content": token, **flags})
    file.write_text(json.dumps(content))
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    return folder
