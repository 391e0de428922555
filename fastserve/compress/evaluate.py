"""What a compressed model lost: perplexity, KL divergence from the original, and how often both would say the same.

Both models run as transformers' modules in float32 on the same windows, quantised weights as what their values stand
for, so that it works for every architecture and scheme. 8-bit activations are not simulated: what FastServe serves is
measured by `benchmarks/compress_quality.py`. B windows, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.compress.calibration import max_length, text_ids
from fastserve.compress.network import load_dense
from fastserve.compress.recipe import Evaluation
from fastserve.core.errors import ConfigError

Progress = Callable[[str, int, int], None]
_MASKED_SHARE = 0.15
_BATCH = 4


@dataclass(frozen=True, slots=True)
class Loss:
    """What differs between two models on a text.

    Attributes:
        perplexity, original_perplexity: of the tokens that the models had to tell.
        kl: mean divergence of the compressed model's next token from the original's, in nats.
        same_top: share of places at which both find the same token likeliest.
        tokens: places compared.
    """

    perplexity: float
    original_perplexity: float
    kl: float
    same_top: float
    tokens: int

    @property
    def increase(self) -> float:
        """How much the perplexity grew, as a share."""
        return self.perplexity / self.original_perplexity - 1

    def as_dict(self) -> dict[str, float]:
        return {**asdict(self), "increase": self.increase}


def compare(original: ModelFolder, compressed: ModelFolder, settings: Evaluation, progress: Progress) -> Loss:
    """Run both models on the text of `settings`.

    Raises:
        ConfigError: the text is too short, or the architecture has no token logits.
    """
    ids = text_ids(original, Path(settings.text), settings.tokens)
    length = min(settings.length, max_length(original), max_length(compressed))
    windows = ids[: len(ids) // length * length].view(-1, length)
    if not len(windows):
        raise ConfigError(
            f"evaluation.text has {len(ids)} tokens, fewer than one window of {length}; give a longer one"
        )
    before, after = load_dense(original), load_dense(compressed)
    sums = torch.zeros(4, dtype=torch.float64)
    count = 0
    for start in range(0, len(windows), _BATCH):
        progress("evaluate", start, len(windows))
        inputs, targets = task(original, windows[start : start + _BATCH])
        found = _differences(_logits(before, inputs), _logits(after, inputs), targets)
        sums += torch.tensor(found, dtype=torch.float64)
        count += int((targets >= 0).sum())
    progress("evaluate", len(windows), len(windows))
    loss, original_loss, kl, same = (sums / count).tolist()
    return Loss(math.exp(min(loss, 700)), math.exp(original_loss), kl, same, count)


def task(folder: ModelFolder, windows: Tensor, seed: int = 0) -> tuple[Mapping[str, Tensor], Tensor]:
    """The forward's arguments for windows [B, L], and the token that belongs at each place [B, L'], -1 for none.

    Decoders tell the next token; encoder-decoders the second half of a window from the first; others masked tokens,
    which `seed` chooses.
    """
    if folder.config.get("is_encoder_decoder"):
        half = windows.shape[1] // 2
        start = int(folder.config.get("decoder_start_token_id") or 0)
        begun = torch.cat([torch.full((len(windows), 1), start), windows[:, half:-1]], dim=1)
        return {"input_ids": windows[:, :half], "decoder_input_ids": begun}, windows[:, half:]
    if folder.task == "fill-mask":
        draw = torch.rand(windows.shape, generator=torch.Generator().manual_seed(seed)) < _MASKED_SHARE
        draw[:, 0] = True
        return {"input_ids": windows.masked_fill(draw, _mask_id(folder))}, windows.masked_fill(~draw, -1)
    targets = torch.cat([windows[:, 1:], torch.full((len(windows), 1), -1)], dim=1)
    return {"input_ids": windows}, targets


def check_task(folder: ModelFolder) -> None:
    """ConfigError when `task` cannot be set for a folder."""
    if folder.task == "fill-mask":
        _mask_id(folder)


@lru_cache(maxsize=4)  # asked for at every step of a training
def _mask_id(folder: ModelFolder) -> int:
    tokenizer = Tokenizer.load(folder)
    found = tokenizer.token_id(tokenizer.special_tokens.get("mask_token", ""))
    if found is None:
        raise ConfigError(
            f"the tokenizer of {folder.path} names no mask token, by which {folder.architecture} is compared and "
            "trained; add mask_token to tokenizer_config.json, or leave out evaluation.text and distill"
        )
    return found


def _logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = getattr(model(**inputs), "logits", None)
    if found is None or found.dim() != 3:
        raise ConfigError(f"{type(model).__name__} has no logits per token to compare; leave out evaluation.text")
    return found.float()


def _differences(before: Tensor, after: Tensor, targets: Tensor) -> tuple[float, float, float, float]:
    """Sums over the places that count: loss after, loss before, KL, agreement."""
    counts = targets >= 0
    old, new = before[counts].log_softmax(-1), after[counts].log_softmax(-1)
    answers = targets[counts].unsqueeze(1)
    kl = (old.exp() * (old - new)).sum()
    same = (old.argmax(-1) == new.argmax(-1)).sum()
    return -float(new.gather(1, answers).sum()), -float(old.gather(1, answers).sum()), float(kl), float(same)
