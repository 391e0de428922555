"""MarianMT's tokenizer from its own files: source.spm (a sentencepiece model) and vocab.json, without sentencepiece.

transformers tokenises these folders in Python alone. Here the pieces and their scores become a Unigram model of the
tokenizers library whose ids are vocab.json's: the same ids, but for runs of characters that the source's model does not
know; of these, those that the vocabulary has (from the target's side) keep their own instead of one unknown for all. Of
the model file (Protocol Buffers) four fields are read; layout: google/sentencepiece, sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from fastserve.checkpoint.folder import ModelFolder, read_json
from fastserve.core.errors import CheckpointError

_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_UNIGRAM = 1
_SPACE, _END, _UNKNOWN, _PADDING = "▁", "</s>", "<unk>", "<pad>"
# Of tokens that the source's model does not have (the target's): taken for what it has no piece for, and only then.
_LAST_RESORT = -1e4


def is_marian(folder: ModelFolder) -> bool:
    """Whether the folder has Marian's files."""
    return folder.has("source.spm") and folder.has("vocab.json")


def marian_tokenizer(folder: ModelFolder) -> tokenizers.Tokenizer:
    """The tokenizer of texts to be translated, and of answers.

    Raises:
        CheckpointError: a damaged file, another kind of model, or a second vocabulary for answers.
    """
    if folder.has("target_vocab.json"):
        raise CheckpointError(f"{folder.path} has a vocabulary of its own for answers, which is not supported")
    file = folder.path / "source.spm"
    try:
        pieces, charsmap = read_model(file)
    except (ValueError, IndexError, struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); copy or download it again") from error
    ids = {str(token): int(number) for token, number in read_json(folder.path / "vocab.json").items()}
    order = sorted(ids, key=lambda token: ids[token])
    if [ids[token] for token in order] != [*range(len(order))] or not {_END, _UNKNOWN} <= ids.keys():
        raise CheckpointError(f"{folder.path / 'vocab.json'} lacks numbers, {_END} or {_UNKNOWN}; it is damaged")
    vocabulary = [(token, pieces.get(token, _LAST_RESORT)) for token in order]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=ids[_UNKNOWN], byte_fallback=False))
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE, prepend_scheme="always")
    languages = [token for token in order if token.startswith(">>") and token.endswith("<<")]
    special = [token for token in (_END, _UNKNOWN, _PADDING) if token in ids]
    tokenizer.add_special_tokens([AddedToken(token, rstrip=True, normalized=False) for token in languages])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {_END}", special_tokens=[(_END, ids[_END])])
    return tokenizer


def read_model(file: Path) -> tuple[dict[str, float], bytes]:
    """Scores of the pieces of a Unigram model, and its table of normalisation.

    Raises:
        ValueError: another kind of model.
        IndexError, struct.error, UnicodeDecodeError: the file is damaged.
    """
    pieces: dict[str, float] = {}
    charsmap = b""
    for field, value in _fields(file.read_bytes()):
        if field == _PIECES:
            piece = dict(_fields(value))
            pieces[piece[1].decode()] = struct.unpack("<f", piece.get(2, b"\0\0\0\0"))[0]
        elif field == _TRAINER:
            kind = dict(_fields(value)).get(3, _UNIGRAM)
            if kind != _UNIGRAM:
                raise ValueError("it is no Unigram model")
        elif field == _NORMALIZER:
            charsmap = dict(_fields(value)).get(2, b"")
    return pieces, charsmap


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a message's fields: integers, or bytes."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield tag >> 3, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, place = _varint(data, place)
        if size is None or place + size > len(data):
            raise ValueError("it ends too early, or is no sentencepiece model")
        yield tag >> 3, data[place : place + size]
        place += size


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
