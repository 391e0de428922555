"""Text to ids and back: agreement with the tokenizers library, exact bytes, folders of other kinds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.errors import CheckpointError, RequestError
from tests import folders

TEXTS = ["", "Once upon a time.", " two  spaces ", "naïve café\n\ttab", "漢字と emoji 👩‍👩‍👧 😀", "a<|im_end|>b"]


def open_folder(path: Path) -> ModelFolder:
    """A folder with everything but weights that mean something."""
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    return ModelFolder.open(str(path))


@pytest.fixture
def byte_level(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(open_folder(folders.write_tokenizer(tmp_path)))


def sentencepiece(path: Path) -> Path:
    """A Llama-2-like vocabulary: visible spaces, byte tokens, one space dropped at the beginning."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "▁fox", "the", "fox", "e", "t", "h", "f", "o", "x", "é"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("f", "o"), ("fo", "x"), ("▁", "fox")]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    backend.save(str(path / "tokenizer.json"))
    settings = {"bos_token": {"content": "<s>", "__type": "AddedToken"}, "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_round_trip(byte_level: Tokenizer, tmp_path: Path, text: str) -> None:
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = byte_level.encode(text)
    assert ids == backend.encode(text).ids
    assert byte_level.decode(ids, skip_special_tokens=False) == text
    assert byte_level.decode(ids) == backend.decode(ids)
    assert b"".join(byte_level.token_bytes(token_id) for token_id in ids) == text.encode()


def test_byte_level_agrees_on_every_token(byte_level: Tokenizer, tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for token_id in range(byte_level.vocab_size):
        expected = backend.decode([token_id], skip_special_tokens=False)
        assert byte_level.token_text(token_id) == expected
    single_bytes = {byte_level.token_bytes(token_id) for token_id in range(byte_level.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= single_bytes


def test_special_tokens(byte_level: Tokenizer) -> None:
    assert byte_level.vocab_size == folders.VOCAB_SIZE
    assert byte_level.special_ids == {0, 1, 2}
    assert byte_level.eos_token_id == folders.IM_END
    assert byte_level.bos_token_id is None
    assert byte_level.decode([folders.IM_START, *byte_level.encode("hi"), folders.IM_END]) == "hi"
    assert byte_level.token_text(folders.IM_END) == "<|im_end|>"


def test_ids_without_a_token_have_no_text(byte_level: Tokenizer) -> None:
    assert byte_level.token_bytes(folders.VOCAB_SIZE + 5) == b""
    assert byte_level.decode([folders.VOCAB_SIZE + 5, -1]) == ""
    assert max(byte_level._bytes, default=0) < folders.VOCAB_SIZE  # what is no token is not kept, either


def test_a_long_text_is_encoded_as_the_library_does(byte_level: Tokenizer) -> None:
    text, backend = "the é fox " * 2500, byte_level._backend
    assert byte_level.encode(text) == backend.encode(text).ids
    [pair] = byte_level.encode_parts("who", text)
    assert (pair.ids, pair.type_ids) == (backend.encode("who", text).ids, backend.encode("who", text).type_ids)


def test_parts_of_a_text_are_bounded_together(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the fox " * 40
    assert len(byte_level.encode_parts("who", text, 20, 5)) > 5
    monkeypatch.setattr("fastserve.checkpoint.tokenizer._MAX_PARTS_TOKENS", 100)
    with pytest.raises(RequestError, match="parts of 20 tokens"):
        byte_level.encode_parts("who", text, 20, 5)
    assert len(byte_level.encode_parts("who", text, 20, is_cut=True)) == 1


@pytest.mark.parametrize("text", ["the fox", "the  fox the", "é😀 the", "thefox\n"])
def test_sentencepiece(tmp_path: Path, text: str) -> None:
    tokenizer = Tokenizer.load(open_folder(sentencepiece(tmp_path)))
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id == 1
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    assert tokenizer.eos_token_id == 2
    assert tokenizer.decode(ids) == backend.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids[1:])) == b" " + text.encode()


def test_sentencepiece_keeps_what_is_valid(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(open_folder(sentencepiece(tmp_path)))
    ids = [3 + byte for byte in b"\xff\xe4\xbd\xa0"]
    assert tokenizer.decode(ids) == "\ufffd你"


def test_other_decoders_go_through_the_library(tmp_path: Path) -> None:
    vocabulary = {"[UNK]": 0, "play": 1, "##ing": 2, "fox": 3}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(open_folder(tmp_path))
    assert tokenizer.byte_rules is None
    assert tokenizer.decode(tokenizer.encode("playing fox")) == "playing fox"


def test_saved_truncation_is_ignored(tmp_path: Path) -> None:
    folder = open_folder(folders.write_tokenizer(tmp_path))
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(folder).decode(Tokenizer.load(folder).encode("a longer text")) == "a longer text"


def test_folder_without_tokenizer_json(tmp_path: Path) -> None:
    """vocab.json with merges.txt, as GPT-2 was published."""
    whole = folders.write_tokenizer(tmp_path / "whole")
    old = tmp_path / "old"
    old.mkdir()
    tokenizers.Tokenizer.from_file(str(whole / "tokenizer.json")).model.save(str(old))
    shutil.copy(whole / "tokenizer_config.json", old)
    settings = json.loads((old / "tokenizer_config.json").read_text())
    settings.update(tokenizer_class="GPT2Tokenizer", unk_token="<|endoftext|>", bos_token="<|im_start|>")
    (old / "tokenizer_config.json").write_text(json.dumps(settings))
    folder = open_folder(old)
    (old / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    tokenizer = Tokenizer.load(folder)
    text = "Once upon a time 😀"
    assert tokenizer.encode(text, add_special_tokens=False) == Tokenizer.load(open_folder(whole)).encode(text)


def test_errors(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(folder)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Tokenizer.load(folder)


def test_no_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(open_folder(folders.write_tokenizer(tmp_path, chat_template=None)))
    assert not tokenizer.has_chat_template
    with pytest.raises(RequestError, match="completions"):
        tokenizer.render_chat([{"role": "user", "content": "hi"}])


def test_given_template(tmp_path: Path) -> None:
    folder = open_folder(folders.write_tokenizer(tmp_path))
    messages = [{"role": "user", "content": "hi"}]
    assert Tokenizer.load(folder, "{{ messages[0].content }}!").render_chat(messages) == "hi!"
    (tmp_path / "mine.jinja").write_text("{{ messages[0].content }}?")
    assert Tokenizer.load(folder, str(tmp_path / "mine.jinja")).render_chat(messages) == "hi?"
    with pytest.raises(CheckpointError, match="cannot read the chat template"):
        Tokenizer.load(folder, str(tmp_path / "none.jinja"))


def test_imports_neither_torch_nor_transformers(tmp_path: Path, repository: Path) -> None:
    open_folder(folders.write_tokenizer(tmp_path))
    code = (
        "import sys\n"
        "from fastserve.checkpoint.folder import ModelFolder\n"
        "from fastserve.checkpoint.text_stream import TextStream\n"
        "from fastserve.checkpoint.tokenizer import Tokenizer\n"
        "tokenizer = Tokenizer.load(ModelFolder.open(sys.argv[1]))\n"
        "tokenizer.render_chat([{'role': 'user', 'content': 'hi'}])\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60, cwd=repository)
