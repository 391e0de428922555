"""Tiny random encoder folders with every head, and a WordPiece tokenizer; the counterpart of `tests/folders.py`.

folder = encoder(tmp_path / "model", "Bert", "ForQuestionAnswering")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.folders import _CORPUS

VOCAB_SIZE = 300
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAD, UNKNOWN, CLS, SEP, MASK = range(5)
HEADS = ["Model", "ForMaskedLM", "ForQuestionAnswering", "ForSequenceClassification", "ForTokenClassification"]
_COMMON = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=160,
    pad_token_id=PAD,
    num_labels=3,
)
_FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "XLMRoberta": {"pad_token_id": 1, "type_vocab_size": 1},
    "Albert": {"embedding_size": 32, "num_hidden_layers": 4, "num_hidden_groups": 2},
    "DistilBert": {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
    "Electra": {"embedding_size": 32},
    "MPNet": {"pad_token_id": 1},
    "ModernBert": {
        "num_hidden_layers": 4,
        "local_attention": 16,
        "cls_token_id": CLS,
        "sep_token_id": SEP,
        "bos_token_id": CLS,
        "eos_token_id": SEP,
    },
}
FAMILIES = list(_FAMILIES)


def encoder(folder: Path, family: str, head: str = "Model", *, seed: int = 0, **options: Any) -> Path:
    """A folder of this class with random weights, saved by transformers itself; `options` go to its configuration."""
    import torch
    import transformers

    fields = {**_COMMON, **_FAMILIES[family], **options}
    if "id2label" in options:
        del fields["num_labels"]
    if head == "ForQuestionAnswering":
        fields["num_labels"] = 2
    if family == "DistilBert":
        fields = {name: value for name, value in fields.items() if name not in ("hidden_size", "num_hidden_layers")}
    config = getattr(transformers, f"{family}Config")(**fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, family + head)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.15)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return write_tokenizer(folder)


def write_tokenizer(folder: Path, texts: list[str] | None = None, vocab_size: int = VOCAB_SIZE) -> Path:
    """A WordPiece tokenizer of at most so many tokens: BERT's normalisation, single and pair templates."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False)
    tokenizer.train_from_iterator(
        texts or [*_CORPUS, "abcdefghijklmnopqrstuvwxyz 0123456789 , . : ? ! ' - \" ( )"], trainer
    )
    assert tokenizer.get_vocab_size() <= vocab_size
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **dict(unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]"),
        "model_max_length": 128,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
