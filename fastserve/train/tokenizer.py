"""`fastserve tokenizer train`: learn a tokenizer from texts and write it as a folder that transformers opens.

Three kinds: byte-level BPE (every text comes back exactly), WordPiece (BERT's, lower case if asked) and Unigram with
byte fallback (T5's). Chinese and Japanese text has no spaces: byte-level BPE and Unigram learn its words, WordPiece
takes each character as a word. The report says how well the vocabulary fits texts that it was not learnt from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.core.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

KINDS = ("bpe", "wordpiece", "unigram")
CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' ~ message.role ~ '\\n' }}"
    "{%- if message.content is string -%}{{ message.content | trim }}"
    "{%- else -%}"
    "{%- for part in message.content if part.type == 'text' -%}{{ part.text | trim }}{%- endfor -%}"
    "{%- endif -%}"
    "{{ '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
_CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
_SENTINELS = tuple(f"<extra_id_{number}>" for number in range(100))
_HELD_OUT_EVERY = 50  # one text in so many is kept from learning, for the report
_MAX_REPORT_CHARACTERS = 2_000_000


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """What kind of tokenizer to learn.

    Attributes:
        kind: bpe (byte-level; GPT-2, Llama, Qwen), wordpiece (BERT) or unigram (T5, ALBERT).
        vocab_size: tokens, special ones included.
        lowercase: fold case and accents (wordpiece only).
        chat: add the tokens and the template of ChatML (bpe only); the end of a turn becomes the end of text.
        chat_template: file with a template to use instead; name its tokens with special_tokens.
        special_tokens: further tokens that are never split.
        max_length: longest input that the tokenizer's configuration states.
    """

    kind: str = "bpe"
    vocab_size: int = 32_000
    lowercase: bool = False
    chat: bool = False
    chat_template: str = ""
    special_tokens: tuple[str, ...] = ()
    max_length: int = 2048

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"kind must be one of {', '.join(KINDS)}, not {self.kind!r}")
        if self.lowercase and self.kind != "wordpiece":
            raise ConfigError(f"lowercase is for wordpiece; a tokenizer of kind {self.kind} keeps every text as it is")
        if self.chat and self.kind != "bpe":
            raise ConfigError(f"chat is for bpe; a tokenizer of kind {self.kind} is for models that do not chat")
        if self.kind == "bpe" and self.vocab_size < (least := 256 + len(self.all_special_tokens)):
            raise ConfigError(f"vocab_size must be at least {least}: all bytes and the special tokens")

    @property
    def all_special_tokens(self) -> tuple[str, ...]:
        """In the order of their ids."""
        own = {
            "bpe": ("<|endoftext|>", "<|pad|>", *(_CHAT_TOKENS if self.chat else ())),
            "wordpiece": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
            "unigram": ("<pad>", "</s>", "<unk>", "[CLS]", "[SEP]", "[MASK]", *_SENTINELS),
        }
        return (*own[self.kind], *(token for token in self.special_tokens if token not in own[self.kind]))


def train_tokenizer(texts: Iterable[str], settings: TokenizerSettings) -> Tokenizer:
    """Learn a tokenizer from an iterable of texts, which is read once."""
    tokenizer = {"bpe": _train_bpe, "wordpiece": _train_wordpiece, "unigram": _train_unigram}[settings.kind](
        iter(texts), settings
    )
    if settings.kind != "bpe":
        _add_encoder_template(tokenizer)
    return tokenizer


def make_tokenizer_folder(texts: Iterable[str], out: Path, settings: TokenizerSettings) -> dict[str, Any]:
    """Learn from `texts`, write the folder `out`, and return the report (also OUT/tokenizer_report.json).

    One text in fifty is left out of learning and measures fertility (tokens per word), compression (bytes per token)
    and whether texts come back exactly. ConfigError without text.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is no folder; choose another --out")
    held_out: list[str] = []
    tokenizer = train_tokenizer(_without_held_out(texts, held_out), settings)
    if not held_out:
        raise ConfigError("there is no text to learn a tokenizer from; give files, folders or a prepared folder")
    report = {"kind": settings.kind, "vocab_size": tokenizer.get_vocab_size(), **fertility(tokenizer, held_out)}
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": _json(tokenizer_config(settings)),
        "tokenizer_report.json": _json(report),
    }
    if template := _chat_template(settings):
        files["chat_template.jinja"] = template
    for name, text in files.items():
        partial = out / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, out / name)
    return report


def tokenizer_config(settings: TokenizerSettings) -> dict[str, Any]:
    """tokenizer_config.json, for any tool that opens Hugging Face folders."""
    roles = {
        "bpe": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"},
        "wordpiece": {"unk_token": "[UNK]", "pad_token": "[PAD]"},
        "unigram": {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"},
    }[settings.kind]
    if settings.kind != "bpe":
        roles.update(cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
    inputs = ["input_ids", "attention_mask"]
    if settings.kind == "wordpiece":  # BERT tells two texts apart by types, which tools leave out unless they are named
        inputs.insert(1, "token_type_ids")
    if settings.chat:
        roles["eos_token"] = "<|im_end|>"
    others = [token for token in settings.all_special_tokens if token not in roles.values()]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
        **({"additional_special_tokens": others} if others else {}),
        "model_input_names": inputs,
        "model_max_length": settings.max_length,
        "clean_up_tokenization_spaces": False,
    }
    if template := _chat_template(settings):
        config["chat_template"] = template
    return config


def fertility(tokenizer: Tokenizer, texts: list[str]) -> dict[str, Any]:
    """How well a vocabulary fits texts: tokens per word, bytes per token, unknown tokens, exact round trips."""
    from fastserve.train.data.hashing import word_hashes

    unknown = next((number for token in ("<unk>", "[UNK]") if (number := tokenizer.token_to_id(token)) is not None), -1)
    used: set[int] = set()
    tokens = words = num_bytes = unknowns = round_trips = characters = counted = 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        used.update(ids)
        tokens, words, num_bytes = tokens + len(ids), words + len(word_hashes(text)), num_bytes + len(text.encode())
        unknowns += sum(number == unknown for number in ids) if unknown >= 0 else 0
        round_trips += tokenizer.decode(ids) == text
        counted += 1
        characters += len(text)
        if characters > _MAX_REPORT_CHARACTERS:
            break
    return {
        "texts_measured": counted,
        "tokens_per_word": round(tokens / max(1, words), 4),
        "bytes_per_token": round(num_bytes / max(1, tokens), 4),
        "unknown_share": round(unknowns / max(1, tokens), 6),
        "exact_round_trips": round(round_trips / max(1, counted), 4),
        "vocabulary_used": round(len(used) / tokenizer.get_vocab_size(), 4),
    }


def _train_bpe(texts: Iterator[str], settings: TokenizerSettings) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=list(settings.all_special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=32,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_wordpiece(texts: Iterator[str], settings: TokenizerSettings) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=settings.lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=settings.vocab_size, special_tokens=list(settings.all_special_tokens), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_unigram(texts: Iterator[str], settings: TokenizerSettings) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=list(settings.all_special_tokens),
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _add_encoder_template(tokenizer: Tokenizer) -> None:
    """Single texts and pairs as BERT takes them; T5 closes a text with </s> alone."""
    from tokenizers import processors

    if (end := tokenizer.token_to_id("</s>")) is not None:
        single, pair, special = "$A </s>", "$A </s> $B </s>", [("</s>", end)]
    else:
        single, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
        special = [(token, int(tokenizer.token_to_id(token) or 0)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)


def _without_held_out(texts: Iterable[str], held_out: list[str]) -> Iterator[str]:
    """All texts but one in fifty (by their hash); the first text is both, so that a small corpus has a report."""
    for number, text in enumerate(texts):
        is_held_out = (
            int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") % _HELD_OUT_EVERY == 0
        )
        if is_held_out or number == 0:
            held_out.append(text)
        if not is_held_out or number == 0:
            yield text


def _chat_template(settings: TokenizerSettings) -> str:
    if not settings.chat_template:
        return CHATML if settings.chat else ""
    try:
        return Path(settings.chat_template).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the chat template {settings.chat_template}: {error.strerror}") from error


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def texts_of(inputs: list[str], text_key: str = "text") -> Iterator[str]:
    """The texts of prepared folders (their training split), or of raw files and folders as they are."""
    from fastserve.train.data.settings import PrepareSettings
    from fastserve.train.data.shards import split_texts
    from fastserve.train.data.sources import find_parts, read_documents

    for item in inputs:
        if (Path(item) / "report.json").exists():
            yield from split_texts(Path(item), "train")
        else:
            for part in find_parts([item], "auto"):
                yield from read_documents(part, PrepareSettings(text_key=text_key))
