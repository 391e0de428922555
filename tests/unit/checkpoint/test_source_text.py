"""Texts of encoder-decoders: languages, prefixes, what the decoder begins with, what requests leave out; and Marian's
tokenizer from a model file that is written here field by field."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.source_text import SourceText
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.errors import CheckpointError, RequestError
from tests.encoder_decoder_folders import add_tokens
from tests.folders import write_tokenizer

EOS = 2


def write(folder: Path, architecture: str, generation: dict[str, Any] | None = None, **config: Any) -> Path:
    """A folder without weights worth the name."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"architectures": [architecture], "is_encoder_decoder": True, "eos_token_id": EOS, **config}
    (folder / "config.json").write_text(json.dumps({"decoder_start_token_id": EOS, **content}))
    (folder / "generation_config.json").write_text(json.dumps(generation or {}))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    return folder


def open_text(folder: Path) -> SourceText:
    opened = ModelFolder.open(str(folder))
    return SourceText(opened, Tokenizer.load(opened))


def with_languages(folder: Path, architecture: str, tokens: list[str], config: dict[str, Any], **settings: Any) -> Any:
    write_tokenizer(write(folder, architecture, **config), chat_template=None)
    return open_text(add_tokens(folder, tokens, **settings))


@pytest.mark.parametrize(
    ("tokens", "architecture", "names"),
    [
        (["__de__", "__en__"], "M2M100ForConditionalGeneration", ["de", "en"]),
        (["deu_Latn", "eng_Latn"], "M2M100ForConditionalGeneration", ["deu_Latn", "eng_Latn"]),
        (["de_DE", "en_XX"], "MBartForConditionalGeneration", ["de_DE", "en_XX"]),
    ],
)
def test_languages_are_tokens(tmp_path: Path, tokens: list[str], architecture: str, names: list[str]) -> None:
    """The source's before the text, the target's begins the answer; a beginning of a name is enough."""
    text = with_languages(tmp_path, architecture, tokens, {})
    german, english = (text.tokenizer.token_id(token) for token in tokens)
    plain = text.tokenizer.encode("the fox", add_special_tokens=False)
    assert list(text.languages) == names
    assert text.encode("the fox", names[1], names[0]) == ([english, *plain, EOS], [EOS, german])
    short = names[0].partition("_")[0]
    assert text.encode("the fox", names[1], short)[1] == [EOS, german]
    with pytest.raises(RequestError, match=f"no language 'xx' here; target_language may be one of {', '.join(names)}"):
        text.encode("the fox", names[1], "xx")
    with pytest.raises(RequestError, match="a language is needed here; source_language"):
        text.encode("the fox", "", names[0])


def test_a_folder_has_languages_of_its_own(tmp_path: Path) -> None:
    tokens = ["__de__", "__en__"]
    config = {"generation": {"forced_bos_token_id": 318}}
    text = with_languages(tmp_path, "M2M100ForConditionalGeneration", tokens, config, src_lang="en")
    source, start = text.encode("the fox")
    assert source[0] == text.tokenizer.token_id("__en__") and start == [EOS, 318]
    assert text.encode("the fox", target="en")[1] == [EOS, text.tokenizer.token_id("__en__")]


def test_the_first_mbart_has_its_language_last(tmp_path: Path) -> None:
    tokens = ["en_XX", "ro_RO"]
    config = {"decoder_start_token_id": 319}
    settings = {"src_lang": "en_XX", "tokenizer_class": "MBartTokenizer"}
    text = with_languages(tmp_path, "MBartForConditionalGeneration", tokens, config, **settings)
    source, start = text.encode("the fox")
    assert source[-2:] == [EOS, 318] and start == [319]
    assert text.encode("the fox", "ro", "en")[1] == [318]


def test_t5_says_pairs_in_words(tmp_path: Path) -> None:
    tasks = {
        "translation_en_to_de": {"prefix": "translate English to German: ", "num_beams": 4, "max_length": 300},
        "summarization": {"prefix": "summarize: ", "min_length": 30, "max_length": 200, "no_repeat_ngram_size": 3},
    }
    folder = write(tmp_path, "T5ForConditionalGeneration", task_specific_params=tasks)
    write_tokenizer(folder, chat_template=None)
    text = open_text(folder)
    assert text.encode("x", "en", "de") == (text.tokenizer.encode("translate English to German: x"), [EOS])
    assert text.encode("x", target="de") == text.encode("x", "en", "de")
    with pytest.raises(RequestError, match="known: en to de"):
        text.encode("x", "de", "en")
    found = text.defaults("summarization")
    assert (found["min_tokens"], found["max_tokens"], found["no_repeat_ngram_size"]) == (29, 199, 3)
    assert text.defaults("translation_en_to_de")["num_beams"] == 4


def test_defaults_are_the_folders(tmp_path: Path) -> None:
    generation = {
        "num_beams": 6,
        "length_penalty": 2.0,
        "early_stopping": True,
        "max_length": 142,
        "min_length": 56,
        "no_repeat_ngram_size": 3,
        "forced_eos_token_id": 2,
        "bad_words_ids": [[7], [8, 9]],
        "temperature": 0.3,
    }
    write_tokenizer(write(tmp_path, "BartForConditionalGeneration", generation, num_beams=2), chat_template=None)
    assert open_text(tmp_path).defaults() == {
        "num_beams": 6,
        "length_penalty": 2.0,
        "early_stopping": True,
        "max_tokens": 141,
        "min_tokens": 55,
        "no_repeat_ngram_size": 3,
        "forced_eos_token_id": 2,
        "suppress_token_ids": (7,),
        "temperature": 0.0,
    }
    write(tmp_path, "BartForConditionalGeneration", {"do_sample": True, "temperature": 0.3, "num_beams": 3})
    found = open_text(tmp_path).defaults()
    assert found["temperature"] == 0.3 and "num_beams" not in found and found["max_tokens"] == 256
    write(tmp_path, "BartForConditionalGeneration", {"num_beams": 1000})
    with pytest.raises(CheckpointError, match="num_beams"):
        open_text(tmp_path).defaults()
    write(tmp_path, "BartForConditionalGeneration", decoder_start_token_id=None)
    with pytest.raises(CheckpointError, match="decoder_start_token_id"):
        open_text(tmp_path)


def field(number: int, value: bytes | int | float) -> bytes:
    """One field of a Protocol Buffers message, for values below 128 bytes."""
    if isinstance(value, bytes):
        return bytes([number << 3 | 2, len(value)]) + value
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    return bytes([number << 3, value])


def write_marian(folder: Path, kind: int = 1) -> Path:
    scores = {
        "<unk>": 0.0,
        "</s>": 0.0,
        "▁the": -2.0,
        "▁": -3.0,
        "f": -4.0,
        "ox": -4.5,
        "▁fox": -5.0,
        "o": -6.0,
        "x": -6.5,
    }
    pieces = [field(1, field(1, piece.encode()) + field(2, score)) for piece, score in scores.items()]
    (folder / "source.spm").write_bytes(b"".join(pieces) + field(2, field(3, kind)) + field(3, field(3, 1)))
    vocabulary = ["</s>", "<unk>", ">>deu<<", *list(scores)[2:], "▁Fuchs", "ü", "<pad>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocabulary)}))
    settings = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_marians_own_files(tmp_path: Path) -> None:
    folder = write_marian(write(tmp_path, "MarianMTModel", eos_token_id=0, decoder_start_token_id=12))
    text = open_text(folder)
    tokens = {name: text.tokenizer.token_id(name) for name in ("▁the", "▁fox", ">>deu<<", "<unk>", "f", "ü")}
    assert text.tokenizer.encode("  the   fox ") == [tokens["▁the"], tokens["▁fox"], 0]
    assert text.encode("the fox", target="deu") == ([tokens[">>deu<<"], tokens["▁the"], tokens["▁fox"], 0], [12])
    assert text.tokenizer.encode("füQ")[-4:] == [tokens["f"], tokens["ü"], tokens["<unk>"], 0]
    answer = [text.tokenizer.token_id(name) or 0 for name in ("▁the", "▁Fuchs", "</s>")]
    assert text.tokenizer.decode(answer) == "the Fuchs"
    for spoil, message in (("target_vocab.json", "vocabulary of its own"), ("source.spm", "cannot be read")):
        (folder / spoil).write_bytes(b"\x0a\x7f{}")
        with pytest.raises(CheckpointError, match=message):
            open_text(folder)
        (folder / spoil).unlink()
        write_marian(folder)
    write_marian(folder, kind=2)
    with pytest.raises(CheckpointError, match="no Unigram"):
        open_text(folder)
