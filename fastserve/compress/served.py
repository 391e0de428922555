"""A folder as FastServe serves it: what it writes, and how fast. For the report's comparison of before and after."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastserve.checkpoint.folder import ModelFolder
from fastserve.compress.calibration import max_length
from fastserve.core.sampling_params import SamplingParams
from fastserve.models.families import FAMILIES

if TYPE_CHECKING:
    from fastserve.offline.llm import LLM

_SAMPLES, _SAMPLE_TOKENS, _PROMPT_TOKENS = 3, 48, 16
_PREFILL, _DECODE, _REPEATS = 256, 32, 3


def is_served(folder: ModelFolder) -> bool:
    """Whether FastServe's own modules run it, quantised or not."""
    return folder.architecture in FAMILIES


def run(folder: ModelFolder, ids: Sequence[int], with_speed: bool) -> tuple[list[str], list[str], dict[str, float]]:
    """Prompts (parts of ids), their greedy continuations, and tokens per second of prefill and decode."""
    from fastserve.offline.llm import LLM

    length = min(_PREFILL + _DECODE + 1, max_length(folder))
    llm = LLM(str(folder.path), max_model_len=length, max_batch_sequences=_SAMPLES, prefix_caching=False)
    try:
        starts = [part * len(ids) // _SAMPLES for part in range(_SAMPLES)]
        prompts = [[int(item) for item in ids[start : start + _PROMPT_TOKENS]] for start in starts]
        count = min(_SAMPLE_TOKENS, length - _PROMPT_TOKENS - 1)
        answers = llm.generate(prompts, SamplingParams(max_tokens=count, temperature=0.0), use_tqdm=False)
        texts = [answer.outputs[0].text for answer in answers]
        speed = _speed(llm, [int(item) for item in ids[: length - _DECODE - 1]]) if with_speed else {}
        return [llm.tokenizer.decode(prompt) for prompt in prompts], texts, speed
    finally:
        llm.engine.close()


def _speed(llm: LLM, prompt: list[int]) -> dict[str, float]:
    def seconds(num_tokens: int) -> float:
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        found = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            llm.generate([prompt], params, use_tqdm=False)
            found.append(time.perf_counter() - start)
        return statistics.median(found)

    first, all_tokens = seconds(1), seconds(_DECODE)
    return {"prefill": len(prompt) / first, "decode": (_DECODE - 1) / max(1e-9, all_tokens - first)}
