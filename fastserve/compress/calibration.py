"""Inputs for methods that look at activations: windows of a text, or of what the model itself writes.

The same settings give the same windows on every machine, so that work that was interrupted goes on with the same bytes.
A network of encoder and decoder gets a window as both inputs.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastserve.checkpoint.folder import ModelFolder
from fastserve.compress.recipe import Calibration
from fastserve.core.errors import ConfigError

GENERATED = "generated"
_SEEDS_PER_RUN = 16  # samples that the model writes at once


def check_text(text: str, what: str) -> None:
    """ConfigError when a text file cannot be read; what: the key that names it."""
    if not Path(text).is_file() and (text != GENERATED or what not in _ALSO):
        raise ConfigError(f"{what} = {text!r} is no file; give a plain text file" + _ALSO.get(what, ""))


_ALSO = {"calibration.text": ', or "generated" for samples of the model itself'}


def windows(folder: ModelFolder, settings: Calibration) -> Tensor:
    """Token ids [samples, length] for calibration.

    Raises:
        ConfigError: the text is shorter than one window.
    """
    length = min(settings.length, max_length(folder))
    if settings.text == GENERATED:
        return _generated(folder, settings, length)
    ids = text_ids(folder, Path(settings.text))
    if len(ids) < length + 1:
        raise ConfigError(
            f"calibration.text has {len(ids)} tokens, fewer than one window of {length}; give a longer text or a "
            "smaller calibration.length"
        )
    draw = random.Random(settings.seed)
    starts = [draw.randrange(len(ids) - length) for _ in range(settings.samples)]
    return torch.stack([ids[start : start + length] for start in starts])


def text_ids(folder: ModelFolder, text: Path, num_tokens: int = 0) -> Tensor:
    """Token ids [T] int64 of a file, or of its beginning."""
    from fastserve.checkpoint.tokenizer import Tokenizer

    content = text.read_text(encoding="utf-8", errors="replace")
    content = content[: 20 * num_tokens] if num_tokens else content
    ids = Tokenizer.load(folder).encode(content, add_special_tokens=False)
    return torch.tensor(ids[:num_tokens] if num_tokens else ids, dtype=torch.int64)


def max_length(folder: ModelFolder) -> int:
    """Positions that the network has; many where it names no limit."""
    names = ("max_position_embeddings", "n_positions", "n_ctx")
    found = [folder.config[name] for name in names if isinstance(folder.config.get(name), int)]
    return min(found, default=1 << 20)


def batches(folder: ModelFolder, ids: Tensor, batch_size: int) -> list[Mapping[str, Tensor]]:
    """Arguments of the network's forward for windows [S, L]."""
    return [inputs_of(folder, part) for part in ids.split(batch_size)]


def inputs_of(folder: ModelFolder, ids: Tensor) -> dict[str, Tensor]:
    """Arguments of the forward for windows [B, L]."""
    if folder.config.get("is_encoder_decoder"):
        return {"input_ids": ids, "decoder_input_ids": ids}
    return {"input_ids": ids}


def _generated(folder: ModelFolder, settings: Calibration, length: int) -> Tensor:
    """Samples that begin with a random token each, at temperature 1."""
    from fastserve.core.sampling_params import SamplingParams
    from fastserve.offline.llm import LLM

    llm = LLM(str(folder.path), max_model_len=length + 1, max_batch_sequences=_SEEDS_PER_RUN, seed=settings.seed)
    draw = random.Random(settings.seed)
    size = int(folder.config["vocab_size"])
    prompts = [[draw.randrange(size)] for _ in range(settings.samples)]
    params = [
        SamplingParams(max_tokens=length - 1, temperature=1.0, ignore_eos=True, seed=settings.seed + number)
        for number in range(settings.samples)
    ]
    try:
        outputs = llm.generate(prompts, params)
    finally:
        llm.engine.close()
    rows = [[*prompt, *output.outputs[0].token_ids] for prompt, output in zip(prompts, outputs, strict=True)]
    return torch.tensor(rows, dtype=torch.int64)
