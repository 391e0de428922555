# ruff: noqa: RUF001 - texts in Chinese
from __future__ import annotations

import random
from pathlib import Path

import pytest

from fastserve.core.errors import ConfigError
from fastserve.train.tokenizer import TokenizerSettings, make_tokenizer_folder, texts_of, train_tokenizer

TEXTS = [
    text
    for number in range(60)
    for text in (
        f"The fox number {number} lived by the river and hunted mice in the evening. Café, naïve!",
        f"从前有{number}只狐狸住在森林里，它们每天早上都到河边去喝水。",
    )
]
NEW = "A wolf went to the river in the morning; 狐狸到河边去。"


@pytest.mark.parametrize("settings", [TokenizerSettings(vocab_size=420), TokenizerSettings(vocab_size=420, chat=True)])
def test_byte_level_bpe_brings_every_text_back(tmp_path: Path, settings: TokenizerSettings) -> None:
    from transformers import AutoTokenizer

    report = make_tokenizer_folder(TEXTS, tmp_path, settings)
    assert report["vocab_size"] == 420 and report["exact_round_trips"] == 1.0 and report["unknown_share"] == 0
    assert 0.1 < report["tokens_per_word"] < 6
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in (NEW, "\x00 \t\n emoji 🦊 ", ""):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.bos_token == "<|endoftext|>" and tokenizer.pad_token == "<|pad|>"
    assert tokenizer.eos_token == ("<|im_end|>" if settings.chat else "<|endoftext|>")
    if settings.chat:
        messages = [{"role": "user", "content": " hi "}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert len(tokenizer.encode("<|im_start|>", add_special_tokens=False)) == 1


def test_chinese_words_are_learnt() -> None:
    chooser, words = random.Random(1), ["狐狸", "森林", "河边", "早上", "喝水", "老虎", "高山", "月亮", "朋友", "故事"]
    texts = ["".join(chooser.choices(words, k=8)) + "。" for _ in range(400)]
    tokenizer = train_tokenizer(texts, TokenizerSettings(vocab_size=360))
    assert sum(len(tokenizer.encode(word).ids) == 1 for word in words) >= 8


def test_wordpiece_is_berts(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    make_tokenizer_folder(TEXTS, tmp_path, TokenizerSettings(kind="wordpiece", vocab_size=300, lowercase=True))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    pair = tokenizer("The Fox", "the RIVER", return_token_type_ids=True)
    tokens = ["[CLS]", "the", "fox", "[SEP]", "the", "river", "[SEP]"]
    assert tokenizer.convert_ids_to_tokens(pair["input_ids"]) == tokens
    assert pair["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    assert tokenizer.mask_token == "[MASK]" and tokenizer.tokenize("狐狸") == ["狐", "狸"]


def test_unigram_is_t5s(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    report = make_tokenizer_folder(TEXTS[::2], tmp_path, TokenizerSettings(kind="unigram", vocab_size=300))
    assert report["exact_round_trips"] == 1.0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("The fox <extra_id_0> mice <extra_id_99>")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.convert_tokens_to_ids("<extra_id_99>") in ids
    assert tokenizer.decode(ids[:-1], skip_special_tokens=False).startswith("The fox")


def test_special_tokens_and_own_templates(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "template").write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}")
    settings = TokenizerSettings(
        vocab_size=300, special_tokens=("<|user|>", "<tool>"), chat_template=str(tmp_path / "template")
    )
    make_tokenizer_folder(TEXTS, tmp_path / "out", settings)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "<|user|>x"
    assert len(tokenizer.encode("<|user|><tool>", add_special_tokens=False)) == 2


def test_texts_come_from_raw_files_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one tale", encoding="utf-8")
    assert list(texts_of([str(tmp_path)])) == ["one tale"]


def test_mistakes_are_named(tmp_path: Path) -> None:
    for values, message in (
        ({"kind": "bytes"}, "kind must be one of"),
        ({"lowercase": True}, "lowercase is for wordpiece"),
        ({"kind": "unigram", "chat": True}, "chat is for bpe"),
        ({"vocab_size": 100}, "at least 258"),
    ):
        with pytest.raises(ConfigError, match=message):
            TokenizerSettings(**values)
    with pytest.raises(ConfigError, match="no text"):
        make_tokenizer_folder([], tmp_path, TokenizerSettings(vocab_size=300))
    with pytest.raises(ConfigError, match="cannot read the chat template"):
        make_tokenizer_folder(TEXTS, tmp_path, TokenizerSettings(vocab_size=300, chat_template="/none"))
