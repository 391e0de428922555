"""Decode speed with guesses from the prompt (speculation=auto) against without, on answers that repeat and that do not.

    python benchmarks/speculation.py            # Qwen3-0.6B's shape, under four minutes
    python benchmarks/speculation.py --smoke    # a small shape and few tokens
    python benchmarks/speculation.py --shape llama-0.1b --repeats 5
    python benchmarks/speculation.py --draft llama-0.1b    # a model of this shape guesses

Weights are random, so the answers are given: in place of what the sampler found, the next token of a fixed text is
taken (the argmax is computed all the same, for both). Code edit: a function of Python's standard library with a name
changed. Quotes: every other sentence of the prompt. Fresh: an answer that has nothing of the prompt. Speed is output
tokens over the time from the first to the last token; both engines take turns. A ratio above 1 is faster with guesses.

With --draft the draft model computes its guesses, but as its weights are random, too, each is replaced by the answer's
next token with the chance that the case names, and by a wrong one else: the figures say what a draft model of that size
is worth if so many of its guesses are right, not that any is.
"""

from __future__ import annotations

import argparse
import inspect
import random
import statistics
import textwrap
import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastserve import LLM, SamplingParams
from fastserve.bench import random_model
from fastserve.bench.report import Report, emit, measure_limits, rounded
from fastserve.core.request import Request
from fastserve.engine import draft_model, speculation
from fastserve.engine.sampler import SamplingState
from fastserve.kernels.reference import Kernels

_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt, the answer to it, and how many such requests run at once."""

    name: str
    prompt: str
    answer: str
    batch: int
    right: float = 1.0


def make_draft_cases() -> list[Case]:
    text, fresh = inspect.getsource(textwrap.TextWrapper._wrap_chunks), inspect.getsource(statistics.quantiles)
    pairs = [(batch, right) for batch in (1, 8) for right in (0.9, 0.7, 0.5, 0.1)]
    return [Case(f"right_{right:.1f}_batch_{batch}", text, fresh, batch, right) for batch, right in pairs]


def make_cases() -> list[Case]:
    code = inspect.getsource(textwrap.TextWrapper._wrap_chunks)
    fresh = inspect.getsource(statistics.quantiles)
    text = inspect.cleandoc(inspect.getdoc(argparse.ArgumentParser) or "") + inspect.cleandoc(textwrap.__doc__ or "")
    text += inspect.cleandoc(inspect.getdoc(statistics) or "")
    sentences = text.split("\n")
    cases = []
    for batch in (1, 8):
        cases.append(Case(f"code_edit_batch_{batch}", code, code.replace("cur_line", "current"), batch))
        cases.append(Case(f"quotes_batch_{batch}", text, "\n".join(sentences[::2]), batch))
        cases.append(Case(f"fresh_batch_{batch}", text, fresh, batch))
    return cases


class Forced:
    """Stands in for the sampler: the seed says whose answer it is."""

    def __init__(self) -> None:
        self.answer: list[int] = []
        self.right = 1.0

    def guess(
        self, logits: Tensor, states: list[SamplingState], kernels: Kernels, greedy: list[int] | None = None
    ) -> list[int]:
        """As for the answer's tokens, but only so many are right; the same ones in each run."""
        tokens = self(logits, states, kernels, greedy)
        places = [random.Random(state.num_output).random() for state in states]
        return [token if place < self.right else 0 for token, place in zip(tokens, places, strict=True)]

    def __call__(
        self, logits: Tensor, states: list[SamplingState], kernels: Kernels, greedy: list[int] | None = None
    ) -> list[int]:
        logits.argmax(dim=-1).tolist()
        return [self.answer[min(state.num_output, len(self.answer) - 1)] for state in states]


def decode_speed(llm: LLM, case: Case, forced: Forced, num_tokens: int, name: str) -> tuple[float, float]:
    """(tokens per second, tokens per step) after the first token."""
    prompt = llm.tokenizer.encode(case.prompt)
    forced.answer, forced.right = llm.tokenizer.encode(case.answer), case.right
    length = min(num_tokens, len(forced.answer))
    sampling = SamplingParams(temperature=1.0, seed=0, max_tokens=length, ignore_eos=True)
    for index in range(case.batch):
        llm.engine.add(Request(f"{name}-{index}", prompt, sampling, time.monotonic()))
    made, started, steps = 0, 0.0, 0
    while llm.engine.has_work():
        outputs = llm.engine.step()
        if started:
            made += sum(len(output.token_ids) for output in outputs)
            steps += 1
        elif len(outputs) == case.batch:
            started = time.perf_counter()
    return made / (time.perf_counter() - started), made / steps / case.batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--draft", default="", help="shape of a model that guesses; without it the prompt is looked up")
    parser.add_argument("--tokens", type=int, default=96, help="most tokens of an answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="llama-0.1b, 24 tokens, once")
    options = parser.parse_args()
    if options.smoke:
        options.shape, options.tokens, options.repeats = "llama-0.1b", 24, 1
    folder = random_model.make(options.shape)
    settings: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 2048, "max_batch_sequences": 8}
    settings |= {"kv_cache_memory": "1500MiB", "max_batch_tokens": 2048}
    report = Report(
        "speculation", {"shape": options.shape, "draft": options.draft, "tokens": options.tokens, **settings}
    )
    report.repeats = options.repeats
    if not options.smoke:
        report.limits["before"] = measure_limits()
    draft = str(random_model.make(options.draft)) if options.draft else ""
    engines = {
        "off": LLM(str(folder), speculation="off", **settings),
        "auto": LLM(str(folder), speculation="auto", draft_model=draft, **settings),
    }
    forced = Forced()
    vars(speculation)["sample"] = forced
    vars(draft_model)["sample"] = forced.guess
    for case in make_draft_cases() if draft else make_cases():
        speeds: dict[str, list[float]] = {mode: [] for mode in engines}
        for repeat in range(-1, options.repeats):  # the first fills the prefix cache, and is not counted
            for mode, llm in engines.items():
                num_tokens = options.tokens if repeat >= 0 else _WARM_UP_TOKENS
                speed, per_step = decode_speed(llm, case, forced, num_tokens, f"{case.name}-{repeat}")
                if repeat >= 0:
                    speeds[mode].append(speed)
        for mode in engines:
            report.add_runs(f"{case.name}_{mode}_tokens_per_second", speeds[mode])
        report.metrics[f"{case.name}_tokens_per_step"] = rounded(per_step)
        ratios = [auto / off for auto, off in zip(speeds["auto"], speeds["off"], strict=True)]
        report.add_runs(f"{case.name}_ratio", ratios)
    if not options.smoke:
        report.limits["after"] = measure_limits()
    emit(report.as_dict())


if __name__ == "__main__":
    main()
