"""KV blocks below the device against recomputing, with memory for a quarter of the running set, on the real engine.

    python benchmarks/kv_tiers.py                # two policies, four ways, interleaved, three repeats
    python benchmarks/kv_tiers.py --repeats 1 --requests 24     # a first look

Random weights of the llama-0.1b shape, float32. The same requests, all there at the start, greedy, served with room for
all (`whole`), and with a quarter of that: `recompute` (no tier), `reactive` (a file; nothing is moved before it must
be), `proactive` (a file; moved ahead by estimated next turn, as the engine does). Tokens must be those of `whole`. A
second part lets a chat come back after other prompts have taken its memory, with and without the file.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from fastserve.bench import random_model
from fastserve.bench.latencies import summarise
from fastserve.bench.replay import OwnClock, Replay, side_by_side
from fastserve.bench.report import Report, emit, measure_limits, rounded
from fastserve.core.config import EngineConfig
from fastserve.core.request import Request
from fastserve.core.sampling_params import SamplingParams
from fastserve.engine.engine import Engine

VOCAB_SIZE = 8000
BLOCK_SIZE = 16
WAYS = ("whole", "recompute", "reactive", "proactive")


def make_requests(count: int) -> list[Request]:
    """Prompts of 100 to 400 tokens, answers of 32 to 160, in an order that mixes them."""
    requests: list[Request] = []
    for index in range(count):
        num_prompt, num_output = 100 + 300 * (index * 7 % count) // count, 32 + 128 * (index * 5 % count) // count
        prompt = [(index * 7919 + place * 104729) % VOCAB_SIZE for place in range(num_prompt)]
        sampling = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
        requests.append(Request(str(index), prompt, sampling, 0.0))
    return requests


def num_blocks(requests: list[Request], running: int) -> int:
    """Blocks that the `running` largest requests need."""
    sizes = [-(-(len(item.prompt_ids) + (item.sampling.max_tokens or 0)) // BLOCK_SIZE) + 1 for item in requests]
    return sum(sorted(sizes)[-running:])


class Recorder:
    """An engine whose tokens are kept, for `Replay`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.tokens: dict[str, list[int]] = {}
        self.add, self.has_work = engine.add, engine.has_work

    def step(self) -> Any:
        outputs = self._engine.step()
        for output in outputs:
            self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
        return outputs


def serve(options: dict[str, Any], requests: list[Request], way: str) -> tuple[dict[str, float], dict[str, list[int]]]:
    """One run on a new engine: figures, and the tokens."""
    clock = OwnClock()
    engine = Engine(EngineConfig(**options), clock)
    if way == "reactive":
        engine._scheduler._move_ahead = lambda now: None  # type: ignore[method-assign]
    recorder = Recorder(engine)
    try:
        replay = Replay(recorder, clock, requests)  # type: ignore[arg-type]
        side_by_side([replay])
        stats = engine.stats()
    finally:
        engine.close()
    figures = summarise(replay.times)
    figures.update(
        seconds=clock(),
        preemptions=stats.num_preemptions,
        recomputed_tokens=stats.recomputed_tokens,
        blocks_out=stats.kv_blocks_kept,
        blocks_in=stats.kv_blocks_restored,
        errors=stats.kv_errors,
        moving_share=stats.kv_move_seconds / max(stats.step_seconds, 1e-9),
    )
    return figures, recorder.tokens


def returning_chat(options: dict[str, Any], requests: list[Request]) -> dict[str, float]:
    """Time to the first token of a prompt whose blocks other prompts have overwritten since it was first seen."""
    engine = Engine(EngineConfig(**options))
    first_token: dict[str, float] = {}
    try:
        for name in ("first", "again"):
            for index, item in enumerate(requests):
                is_chat = index == 0
                sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
                request = Request(f"{name}{index}", item.prompt_ids, sampling, time.monotonic())
                began = time.perf_counter()
                engine.add(request)
                while engine.has_work():
                    engine.step()
                if is_chat:
                    first_token[name] = time.perf_counter() - began
        return {"first_s": first_token["first"], "again_s": first_token["again"]}
    finally:
        engine.close()


def measure(arguments: argparse.Namespace) -> Report:
    model = arguments.model or str(random_model.make("llama-0.1b"))
    requests = make_requests(arguments.requests)
    options: dict[str, Any] = {
        "model": model,
        "dtype": "float32",
        "max_batch_sequences": arguments.running,
        "max_batch_tokens": 256,
        "max_model_len": 640,
        "block_size": BLOCK_SIZE,
        "prefix_caching": False,
        "speculation": "off",  # a random network repeats itself
    }
    probe = Engine(EngineConfig(**options, kv_cache_memory=64 << 20))
    block_bytes = probe.memory.block_bytes
    probe.close()
    whole = num_blocks(requests, arguments.running)
    report = Report("kv_tiers", {**options, "num_requests": len(requests), "whole_blocks": whole})
    report.repeats = arguments.repeats
    report.limits["before"] = measure_limits()
    runs: dict[str, list[float]] = {}
    for _ in range(arguments.repeats):
        for policy in arguments.policies:
            expected: dict[str, list[int]] = {}
            for way in WAYS:
                memory = (whole if way == "whole" else max(whole // 4, 41)) * block_bytes
                disk = 0 if way in ("whole", "recompute") else 8 * whole * block_bytes
                settings = {**options, "scheduler": policy, "kv_cache_memory": memory, "kv_disk_cache": disk}
                figures, tokens = serve(settings, requests, way)
                expected = expected or tokens
                figures["same_tokens"] = float(tokens == expected)
                for name, value in figures.items():
                    runs.setdefault(f"{policy}.{way}.{name}", []).append(value)
        for disk in (0, 8 * whole * block_bytes):
            settings = {**options, "prefix_caching": True, "kv_cache_memory": 41 * block_bytes, "kv_disk_cache": disk}
            for name, value in returning_chat(settings, requests[-8:]).items():
                runs.setdefault(f"chat.{'file' if disk else 'recompute'}.{name}", []).append(value)
    report.limits["after"] = measure_limits()
    for name, values in runs.items():
        report.add_runs(name, values)
    medians = {name: statistics.median(values) for name, values in runs.items()}
    for policy in arguments.policies:
        for other in ("recompute", "reactive"):
            for figure in ("mean_e2e", "seconds"):
                ratio = medians[f"{policy}.{other}.{figure}"] / medians[f"{policy}.proactive.{figure}"]
                medians[f"{policy}.proactive_vs_{other}.{figure}"] = ratio
    medians["chat.file_vs_recompute"] = medians["chat.recompute.again_s"] / medians["chat.file.again_s"]
    report.metrics = {name: rounded(value) for name, value in medians.items()}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--running", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--policies", nargs="+", default=["fcfs", "skip-join-mlfq"])
    parser.add_argument("--model", default="")
    emit(measure(parser.parse_args()).as_dict())


if __name__ == "__main__":
    main()
