"""What only text completions have: text to fill in between two parts, and the best of several candidates."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from fastserve.checkpoint.tokenizer import Tokenizer, check_unicode
from fastserve.core.errors import RequestError
from fastserve.serve.generation import Answer

# The tokens that say where the text before the gap, the text after it and the answer begin. All of these models want
# them in this order.
_GAP_TOKENS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite Code
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001 (DeepSeek-Coder)
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)


def fill_in_prompt(tokenizer: Tokenizer, before: str | Sequence[int], after: str) -> list[int]:
    """Token ids that ask for the text between `before` and `after`.

    Raises:
        RequestError: the model was not trained to fill gaps, or a part is no valid text.
    """
    found = next((ids for ids in (_token_ids(tokenizer, names) for names in _GAP_TOKENS) if ids), None)
    if found is None:
        raise RequestError(
            "this model has no tokens for filling in text (fill-in-the-middle), so suffix cannot be used with it",
            "suffix",
        )
    if not isinstance(before, str):
        raise RequestError("suffix needs prompts that are text, not token ids", "suffix")
    check_unicode(before)
    check_unicode(after, "suffix")
    start = tokenizer.encode("")[:1]
    bos = start if start == [tokenizer.bos_token_id] else []
    prefix, suffix, middle = found
    texts = [tokenizer.encode(text, add_special_tokens=False) for text in (before, after)]
    return [*bos, prefix, *texts[0], suffix, *texts[1], middle]


def _token_ids(tokenizer: Tokenizer, names: tuple[str, str, str]) -> list[int]:
    """All three ids, or none."""
    ids = [tokenizer.token_id(name) for name in names]
    return [token_id for token_id in ids if token_id is not None] if None not in ids else []


def best_of(answers: list[Answer], count: int) -> list[Answer]:
    """The `count` answers of each prompt with the highest mean log probability per token, best first, numbered anew."""
    kept: list[Answer] = []
    for _, candidates in groupby(answers, key=lambda answer: answer.choice.prompt_index):
        kept += sorted(candidates, key=_mean_logprob, reverse=True)[:count]
    for index, answer in enumerate(kept):
        answer.choice.index = index
    return kept


def _mean_logprob(answer: Answer) -> float:
    values = [item.logprobs[0] for item in answer.logprobs]
    return sum(values) / len(values) if values else 0.0


def without_text(answers: list[Answer]) -> list[Answer]:
    """The answers less their one token, which the engine had to make (echo with max_tokens 0)."""
    for answer in answers:
        answer.text, answer.logprobs = "", []
        answer.choice.num_tokens, answer.choice.finish_reason, answer.choice.stop_reason = 0, "length", None
    return answers
