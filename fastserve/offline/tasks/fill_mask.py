"""The likeliest tokens for each mask of a text."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastserve.core.errors import RequestError
from fastserve.offline.tasks.text import EncoderText, Floats, Job, piece, softmax


def fill_mask(text: EncoderText, sentence: str, *, top_k: int = 5, targets: list[str] | None = None) -> Job:
    """As transformers answers: `[{score, token, token_str, sequence}, ...]`, a list of such lists for several masks.

    Args:
        targets: only these are candidates, each by its first token; their scores stay shares of the whole vocabulary.

    Raises:
        RequestError: no mask in the text, or no target is a token.
    """
    text.check_task("fill-mask")
    encoding = text.encode(sentence)
    mask = text.tokenizer.special_tokens.get("mask_token", "")
    mask_id = text.tokenizer.token_id(mask)
    places = [place for place, token_id in enumerate(encoding.ids) if token_id == mask_id]
    if not places:
        raise RequestError(f"the text has no {mask or 'mask token'}, which is where words are filled in", "inputs")
    candidates = _candidates(text, targets) if targets else None

    def finish(scores: list[Floats]) -> list[Any]:
        rows = zip(places, scores[0], strict=True)  # [masks, vocabulary]
        filled = [_best(text, list(encoding.ids), place, row, top_k, candidates) for place, row in rows]
        return filled if len(filled) > 1 else filled[0]

    return Job([piece(encoding, rows=places)], finish)


def _candidates(text: EncoderText, targets: list[str]) -> list[int]:
    found = []
    for target in targets:
        token_id = text.tokenizer.token_id(target)
        if token_id is None:
            ids = text.tokenizer.encode(target, add_special_tokens=False)
            token_id = ids[0] if ids else None
        if token_id is not None and token_id not in found:
            found.append(token_id)
    if not found:
        raise RequestError("none of the targets is a token of this model", "targets")
    return found


def _best(
    text: EncoderText, ids: list[int], place: int, row: Floats, top_k: int, candidates: list[int] | None
) -> list[dict[str, Any]]:
    shares = softmax(row)
    among = np.arange(len(row)) if candidates is None else np.array(candidates)
    values = shares[among]
    count = min(top_k, len(values))
    best = np.flatnonzero(~(values < np.partition(values, -count)[-count]))  # with all that are as good as the last
    order = among[best[np.argsort(-values[best], kind="stable")[:count]]]
    shown = ids.count(ids[place]) > 1  # as transformers: the other masks are seen, and all special tokens with them
    results = []
    for token_id in map(int, order):
        filled = [*ids[:place], token_id, *ids[place + 1 :]]
        results.append(
            {
                "score": float(shares[token_id]),
                "token": token_id,
                "token_str": text.tokenizer.decode([token_id], skip_special_tokens=False),
                "sequence": text.tokenizer.decode(filled, skip_special_tokens=not shown),
            }
        )
    return results
