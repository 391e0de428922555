"""Text to token ids and back, for one model folder, without torch.

`tokenizer.json` is read by the tokenizers library; transformers is imported only for folders that lack one. Besides
encoding there are the exact bytes of a token, which streaming (`text_stream.py`) and logprobs need, and the chat
prompt (`chat_template.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import tokenizers

from fastserve.checkpoint.chat_template import ChatTemplate, find_template
from fastserve.checkpoint.folder import ModelFolder, read_json
from fastserve.checkpoint.sentencepiece import is_marian, marian_tokenizer
from fastserve.core.errors import CheckpointError, RequestError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
LONG_TEXT = 20_000  # characters, which take long enough for others to wait
_MAX_PARTS_TOKENS = 1 << 21  # of all parts of one text, together


@dataclass(frozen=True, slots=True)
class ByteRules:
    """How a vocabulary spells bytes. Without such rules (`Tokenizer.byte_rules` None) tokens are only known as text.

    Attributes:
        is_byte_level: one character stands for one byte (GPT-2's alphabet).
        replacements: text -> text within a token, such as the visible space of sentencepiece.
        has_byte_tokens: tokens such as <0x0A> stand for a byte.
        num_stripped: spaces dropped at the very beginning of a text.
    """

    is_byte_level: bool
    replacements: tuple[tuple[str, str], ...] = ()
    has_byte_tokens: bool = False
    num_stripped: int = 0


class Tokenizer:
    """The tokenizer of a model folder; use `Tokenizer.load`.

    Attributes:
        vocab_size: number of tokens that have a text (the model's output may be wider).
        special_tokens: bos_token, eos_token, ... -> text.
        bos_token_id, eos_token_id: None when the tokenizer names none.
        special_ids: ids left out of texts with skip_special_tokens.
        byte_rules: how tokens spell bytes, None when unknown.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        templates: tuple[str, str],
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._bytes: dict[int, bytes] = {}
        self.vocab_size = backend.get_vocab_size()
        self.special_tokens = dict(special_tokens)
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        self.byte_rules = _byte_rules(backend)
        self._template, self._tool_template = (
            ChatTemplate(source, self.special_tokens) if source else None for source in templates
        )

    @classmethod
    def load(cls, folder: ModelFolder, chat_template: str = "") -> Self:
        """Read the folder's tokenizer. `chat_template` (a file, or jinja2 text) replaces the folder's own.

        Raises:
            CheckpointError: no tokenizer, or a damaged one.
        """
        if chat_template:
            source = _read_template(chat_template)
            templates = (source, source)
        else:
            templates = (find_template(folder), find_template(folder, has_tools=True))
        return cls(_load_backend(folder), _special_tokens(folder), templates)

    @classmethod
    def without_model(cls) -> Self:
        """One that knows no text, for a server without a model that reads any."""
        return cls(tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, "")), {}, ("", ""))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with the tokens that the model expects around it, unless told otherwise."""
        return list(self._encode(text, None, add_special_tokens).ids)

    def _encode(self, first: str, second: str | None, add_special_tokens: bool) -> tokenizers.Encoding:
        if len(first) + len(second or "") < LONG_TEXT:
            return self._backend.encode(first, second, add_special_tokens=add_special_tokens)
        # All other threads wait while the library encodes a text, but not while it encodes a batch.
        texts = first if second is None else (first, second)
        return self._backend.encode_batch([texts], add_special_tokens=add_special_tokens)[0]

    def encode_parts(
        self, first: str, second: str | None = None, max_length: int = 0, stride: int = 0, is_cut: bool = False
    ) -> list[tokenizers.Encoding]:
        """A text or a pair as an encoder takes it, with special tokens, types and places of the characters.

        Args:
            max_length: a longer input becomes several, of which each has at most this many tokens and another part of
                the last text; 0: never.
            stride: tokens that such parts have in common.
            is_cut: only the first of them is wanted.

        Raises:
            RequestError: no room for the last text beside the first one, or too many parts.
        """
        for text in (first, second or ""):
            check_unicode(text)
        if not max_length:
            return [self._encode(first, second, True)]
        parts = [self._encode(text, None, False) for text in (first, second) if text is not None]
        room = max_length - self._backend.num_special_tokens_to_add(is_pair=second is not None)
        room -= sum(len(part) for part in parts[:-1])
        if room <= stride:
            raise RequestError(
                f"{len(parts[0])} tokens of the first text leave no room for more than {stride} of the second within "
                f"{max_length}; shorten it, or lower stride"
            )
        num_parts = -(-(len(parts[-1]) - stride) // (room - stride))
        if num_parts * max_length > _MAX_PARTS_TOKENS and not is_cut:
            raise RequestError(
                f"this makes {num_parts} parts of {max_length} tokens, and {_MAX_PARTS_TOKENS} tokens are taken at "
                "once; shorten the text, allow longer parts, or lower stride"
            )
        parts[-1].truncate(room, stride=stride)
        process = self._backend.post_process  # one by one: types of what overflows would be wrong (tokenizers 0.23)
        windows = [parts[-1]] if is_cut else [parts[-1], *parts[-1].overflowing]
        return [process(part) if second is None else process(parts[0], part) for part in windows]

    @property
    def has_subword_prefix(self) -> bool:
        """Whether tokens within a word are marked, such as ##ing."""
        return bool(getattr(self._backend.model, "continuing_subword_prefix", None))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD. Ids without a token have no text."""
        rules = self.byte_rules
        if rules is None:
            return str(self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens))
        shown = (token_id for token_id in ids if not (skip_special_tokens and token_id in self.special_ids))
        data = b"".join(map(self.token_bytes, shown))
        return strip_start(data.decode("utf-8", errors="replace"), rules.num_stripped)

    def token_id(self, token: str) -> int | None:
        """Id of a token as the vocabulary spells it; None when there is none."""
        found: int | None = self._backend.token_to_id(token)
        return found

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id, special tokens included."""
        found: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return found

    def token_text(self, token_id: int) -> str:
        """Text of one token on its own, for showing; part of a character becomes U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; b"" when there is no such token."""
        data = self._bytes.get(token_id)
        if data is None:
            data = self._find_bytes(token_id)
            if data:  # clients may send any id, and those that are no token must not fill the memory
                self._bytes[token_id] = data
        return data

    @property
    def tool_template(self) -> str:
        """Source of the chat template that is used with tools; "" when there is none."""
        return "" if self._tool_template is None else self._tool_template.source

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for a chat; encode it with add_special_tokens=False, for templates write those themselves.

        Raises:
            RequestError: no template, or the template cannot render these messages; with its own words.
        """
        template = self._tool_template if tools else self._template
        if template is None:
            raise RequestError(
                "this model has no chat template; use /v1/completions with a plain prompt, or give one with "
                "--chat-template FILE"
            )
        return template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        token_id = self._backend.token_to_id(text) if text else None
        return None if token_id is None else int(token_id)

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        rules = self.byte_rules
        if token is None:
            return b""
        if rules is None:
            return str(self._backend.decode([token_id], skip_special_tokens=False)).encode()
        if rules.is_byte_level:
            if all(character in _BYTE_OF_CHARACTER for character in token):
                return bytes(_BYTE_OF_CHARACTER[character] for character in token)
            return str(token).encode()
        byte = _BYTE_TOKEN.fullmatch(token) if rules.has_byte_tokens else None
        if byte is not None:
            return bytes([int(byte.group(1), 16)])
        for old, new in rules.replacements:
            token = token.replace(old, new)
        return str(token).encode()


def check_unicode(text: str, param: str = "prompt") -> None:
    """Raise RequestError for half of a surrogate pair, which JSON can write and no text can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the text is not valid Unicode at character {error.start}", param) from error


def strip_start(text: str, num_stripped: int) -> str:
    """Drop at most this many spaces at the beginning."""
    for _ in range(num_stripped):
        text = text.removeprefix(" ")
    return text


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the other 68 for the characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()


def _byte_rules(backend: tokenizers.Tokenizer) -> ByteRules | None:
    """Read the decoder's own description; None when it does something that is not plain bytes."""
    if backend.decoder is None:
        return None
    description = json.loads(backend.decoder.__getstate__())
    steps = description["decoders"] if description["type"] == "Sequence" else [description]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteRules(is_byte_level=True)
    if kinds == ["Metaspace"]:
        spaces = ((steps[0]["replacement"], " "),)
        return ByteRules(False, spaces, num_stripped=int(steps[0].get("prepend_scheme") != "never"))
    if not kinds or kinds != [kind for kind in ("Replace", "ByteFallback", "Fuse", "Strip") if kind in kinds]:
        return None
    by_kind = dict(zip(kinds, steps, strict=True))
    strip = by_kind.get("Strip", {"content": " ", "start": 0, "stop": 0})
    pattern = by_kind.get("Replace", {}).get("pattern", {})
    if strip["content"] != " " or strip["stop"] or "Regex" in pattern or "Fuse" not in kinds:
        return None
    replacements = ((pattern["String"], by_kind["Replace"]["content"]),) if pattern else ()
    return ByteRules(False, replacements, "ByteFallback" in kinds, int(strip["start"]))


def _special_tokens(folder: ModelFolder) -> dict[str, str]:
    """bos_token and the like -> text, from whichever file has them."""
    found: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        content = read_json(folder.path / file) if folder.has(file) else {}
        for name, value in content.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                found[name] = text
    return found


def _load_backend(folder: ModelFolder) -> tokenizers.Tokenizer:
    if folder.has("tokenizer.json"):
        file = folder.path / "tokenizer.json"
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{file} cannot be read ({error}); copy or download it again") from error
    return marian_tokenizer(folder) if is_marian(folder) else _convert_backend(folder)


def _convert_backend(folder: ModelFolder) -> tokenizers.Tokenizer:
    """Let transformers build a tokenizer from older files, such as vocab.json with merges.txt."""
    from transformers import AutoTokenizer

    advice = "give a folder with a tokenizer.json (transformers writes one: tokenizer.save_pretrained(folder))"
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder.path), local_files_only=True)
    except Exception as error:  # transformers raises many kinds here
        raise CheckpointError(f"{folder.path} has no tokenizer that can be read ({error}); {advice}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise CheckpointError(
            f"the tokenizer {type(tokenizer).__name__} of {folder.path} runs in Python only; {advice}"
        )
    return backend


def _read_template(chat_template: str) -> str:
    if "{" in chat_template or "\n" in chat_template:
        return chat_template
    try:
        return Path(chat_template).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot read the chat template {chat_template}: {error}") from error
