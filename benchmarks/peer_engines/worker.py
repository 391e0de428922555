"""The child's half of a comparison: one engine in one process, asked by lines of JSON on stdin, answering on stdout.

Runs in the peer's own environment, so it needs the standard library only. A question is
{"case": "decode" | "prefill" | "throughput", "prompts": [[ids, number of outputs], ...]}; the answer has `value`
(tokens per second after the first ones, seconds to the first token, or output tokens per second of all the requests)
and `tokens`, the ids that came back, where the engine gives them. Each case is timed around whole calls of the
engine, on the wall clock, in the same way for every engine unless that engine says otherwise.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

Ids = list[int]

KV_GIB = 2  # of KV cache for every engine that is told how much: more than the largest case needs


class Engine:
    """One engine that generates greedily, end tokens ignored, prefix reuse off.

    Attributes:
        precision: of weights, kv_cache, lm_head and activations, in words.
        settings: what else was chosen for it.
        packages: distributions whose versions belong into the report.
    """

    precision: dict[str, str]
    settings: dict[str, Any]
    packages: tuple[str, ...] = ()

    def generate(self, prompts: Sequence[Ids], num_outputs: Sequence[int]) -> list[Ids]:
        """Exactly `num_outputs[i]` new tokens for each prompt."""
        raise NotImplementedError

    def generate_many(self, prompts: Sequence[Ids], num_outputs: Sequence[int]) -> list[Ids]:
        """The same for many requests at once, in the way in which this engine does that best."""
        return self.generate(prompts, num_outputs)

    def decode_speed(self, prompt: Ids, num_outputs: int) -> float:
        """Tokens per second once the prompt has been read: the difference of a whole and a short run."""
        short = timed(lambda: self.generate([prompt], [2]))
        whole = timed(lambda: self.generate([prompt], [num_outputs]))
        return (num_outputs - 2) / (whole - short)

    def first_token_seconds(self, prompt: Ids) -> float:
        return timed(lambda: self.generate([prompt], [1]))

    def close(self) -> None:
        """End what the engine started."""


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_batches(
    engine: Engine, prompts: Sequence[Ids], num_outputs: Sequence[int], size: int, pad_id: int = 0
) -> list[Ids]:
    """Requests in batches of like output lengths, for an engine without continuous batching.

    Prompts of a batch are padded on the left to one length, and each batch runs to its longest output; what a request
    did not ask for is cut off, and not counted.
    """
    order = sorted(range(len(prompts)), key=lambda index: num_outputs[index])
    tokens: list[Ids] = [[] for _ in prompts]
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        longest = max(len(prompts[index]) for index in chosen)
        padded = [[pad_id] * (longest - len(prompts[index])) + list(prompts[index]) for index in chosen]
        outputs = engine.generate(padded, [max(num_outputs[index] for index in chosen)] * len(chosen))
        for index, output in zip(chosen, outputs, strict=True):
            tokens[index] = output[: num_outputs[index]]
    return tokens


def answer(engine: Engine, question: dict[str, Any]) -> dict[str, Any]:
    prompts = [ids for ids, _ in question["prompts"]]
    num_outputs = [count for _, count in question["prompts"]]
    if question["case"] == "decode":
        return {"value": engine.decode_speed(prompts[0], num_outputs[0])}
    if question["case"] == "prefill":
        return {"value": engine.first_token_seconds(prompts[0])}
    if question["case"] == "tokens":
        return {"tokens": engine.generate(prompts, num_outputs)}
    start = time.perf_counter()
    tokens = engine.generate_many(prompts, num_outputs)
    seconds = time.perf_counter() - start
    if tokens and [len(ids) for ids in tokens] != num_outputs:
        raise RuntimeError(f"asked for {num_outputs} tokens, got {[len(ids) for ids in tokens]}")
    return {"value": sum(num_outputs) / seconds}


def serve(make_engine: Callable[[str, str], Engine]) -> None:
    """Make the engine from the two arguments (model, precision) and answer until stdin closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    start = time.perf_counter()
    engine = make_engine(sys.argv[1], sys.argv[2])
    ready = {
        "load_seconds": time.perf_counter() - start,
        "precision": engine.precision,
        "settings": engine.settings,
        "versions": {name: importlib.metadata.version(name) for name in engine.packages},
    }
    print(json.dumps(ready), file=answers, flush=True)
    try:
        for line in sys.stdin:
            print(json.dumps(answer(engine, json.loads(line))), file=answers, flush=True)
    finally:
        engine.close()
