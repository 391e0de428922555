"""A random encoder-decoder as CTranslate2 has it: convert_ctranslate2.py MODEL OUT PRECISION.

Random folders have no tokenizer that it could read, so tokens are called by their numbers: t0, t1, ...
"""

from __future__ import annotations

import sys
from typing import Any

from ctranslate2.converters import TransformersConverter


class Numbers:
    """What the converter asks of a tokenizer."""

    def __init__(self, config: Any) -> None:
        self._size = config.vocab_size
        self._has_pad = config.model_type == "marian"  # there the last token is the padding
        self.bos_token = self.pad_token = "t0"
        self.eos_token, self.unk_token = f"t{config.eos_token_id}", "t3"

    def get_vocab(self) -> dict[str, int]:
        names = [f"t{number}" for number in range(self._size)]
        return {name: number for number, name in enumerate([*names[:-1], "<pad>"] if self._has_pad else names)}

    def convert_ids_to_tokens(self, number: int) -> str:
        return f"t{number}"


class Converter(TransformersConverter):
    """The library's own, with our names of tokens."""

    def load_tokenizer(self, tokenizer_class: Any, name: str, **arguments: Any) -> Numbers:
        from transformers import AutoConfig

        return Numbers(AutoConfig.from_pretrained(name))


if __name__ == "__main__":
    model, out, precision = sys.argv[1:]
    Converter(model).convert(out, quantization=precision, force=True)
