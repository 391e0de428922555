"""KV blocks below the device against recomputing, with memory for a quarter of the running set, on the real engine.

    python benchmarks/kv_tiers.py                # two cases, two policies, four ways side by side, two repeats
    python benchmarks/kv_tiers.py --smoke        # tiny: whether it works; its figures say nothing

Random weights of the llama-0.1b shape, float32. Case `short`: prompts of 100 to 400 tokens and like-sized answers, all
there at the start. Case `long`: prompts of 600 to 1,500 tokens, three answers in four short and one long, one request
after the other. The same requests, greedy, are served by four engines that take turns of half a second, each on a clock
of its own (a tier moves a few blocks in others' turns): with room for all (`whole`), and with a quarter of that:
`recompute` (no tier), `reactive` (a file; nothing is moved before it must be), `proactive` (a file; moved ahead by
estimated next turn, as the engine does). Tokens must be those of `whole`. `moving_share` is the part of all steps' time
in which they were held up by movement. A last part lets a chat come back after other prompts have taken its memory,
with and without the file.
"""

from __future__ import annotations

import argparse
import gc
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


CASES = ("short", "long")
CONTEXTS = {"short": 640, "long": 2048}
ARRIVAL_SECONDS = 0.3  # between the requests of `long`
TURN_SECONDS = 0.5


def make_requests(case: str, count: int) -> list[Request]:
    """The requests of a case, in an order that mixes lengths."""
    requests: list[Request] = []
    for index in range(count):
        spread_prompt, spread_output = index * 7 % count / count, index * 5 % count / count
        if case == "short":
            num_prompt, num_output, arrival = 100 + int(300 * spread_prompt), 32 + int(128 * spread_output), 0.0
        else:
            num_prompt, arrival = 600 + int(900 * spread_prompt), index * ARRIVAL_SECONDS
            num_output = 150 + int(150 * spread_output) if index % 4 == 1 else 8 + int(32 * spread_output)
        prompt = [(index * 7919 + place * 104729) % VOCAB_SIZE for place in range(num_prompt)]
        sampling = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
        requests.append(Request(f"{case}{index}", prompt, sampling, arrival))
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


class Run:
    """The requests on a new engine, one way."""

    def __init__(self, options: dict[str, Any], requests: list[Request], way: str) -> None:
        self.clock = OwnClock()
        self._engine = Engine(EngineConfig(**options), self.clock)
        if way == "reactive":
            self._engine._scheduler._move_ahead = lambda now: None  # type: ignore[method-assign]
        self._recorder = Recorder(self._engine)
        self.tokens = self._recorder.tokens
        self.replay = Replay(self._recorder, self.clock, requests)  # type: ignore[arg-type]

    def figures(self) -> dict[str, float]:
        """What was seen; the engine is closed."""
        stats, block_bytes = self._engine.stats(), self._engine.memory.block_bytes
        self._engine.close()
        return {
            **summarise(self.replay.times),
            "seconds": self.clock(),
            "preemptions": stats.num_preemptions,
            "recomputed_tokens": stats.recomputed_tokens,
            "blocks_out": stats.kv_blocks_kept,
            "blocks_in": stats.kv_blocks_restored,
            "bytes_moved": (stats.kv_blocks_kept + stats.kv_blocks_restored) * block_bytes,
            "errors": stats.kv_errors,
            "moving_share": stats.kv_move_seconds / max(stats.step_seconds, 1e-9),
        }


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


def measure_case(case: str, options: dict[str, Any], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Every way and policy, then the chat; figures of each run by name."""
    requests = make_requests(case, arguments.requests)
    options = {**options, "max_model_len": CONTEXTS[case]}
    probe = Engine(EngineConfig(**options, kv_cache_memory=64 << 20))
    block_bytes = probe.memory.block_bytes
    probe.close()
    whole, least = num_blocks(requests, arguments.running), CONTEXTS[case] // BLOCK_SIZE + 1
    runs: dict[str, list[float]] = {f"{case}.whole_blocks": [whole]}
    for _ in range(arguments.repeats):
        for policy in arguments.policies:
            ways: dict[str, Run] = {}
            for way in WAYS:
                memory = (whole if way == "whole" else max(whole // 4, least)) * block_bytes
                disk = 0 if way in ("whole", "recompute") else 8 * whole * block_bytes
                settings = {**options, "scheduler": policy, "kv_cache_memory": memory, "kv_disk_cache": disk}
                ways[way] = Run(settings, requests, way)
            side_by_side([run.replay for run in ways.values()], TURN_SECONDS)
            for way, run in ways.items():
                figures = run.figures() | {"same_tokens": float(run.tokens == ways["whole"].tokens)}
                for name, value in figures.items():
                    runs.setdefault(f"{case}.{policy}.{way}.{name}", []).append(value)
            del ways, run
            gc.collect()  # engines are in cycles, and four of them take gigabytes
        for disk in (0, 8 * whole * block_bytes):
            settings = {**options, "prefix_caching": True, "kv_cache_memory": least * block_bytes}
            for name, value in returning_chat({**settings, "kv_disk_cache": disk}, requests[-8:]).items():
                runs.setdefault(f"{case}.chat.{'file' if disk else 'recompute'}.{name}", []).append(value)
    return runs


def compared(case: str, policies: list[str], medians: dict[str, float]) -> dict[str, float]:
    """How many times better it is to move ahead than not to, and to read a chat than to compute it."""
    found: dict[str, float] = {}
    for policy in policies:
        for other in ("recompute", "reactive"):
            for figure in ("mean_e2e", "mean_ttft", "p99_e2e", "seconds"):
                proactive, beside = (medians[f"{case}.{policy}.{way}.{figure}"] for way in ("proactive", other))
                found[f"{case}.{policy}.proactive_vs_{other}.{figure}"] = beside / proactive
    chat = f"{case}.chat"
    found[f"{chat}.file_vs_recompute"] = medians[f"{chat}.recompute.again_s"] / medians[f"{chat}.file.again_s"]
    return found


def measure(arguments: argparse.Namespace) -> Report:
    options: dict[str, Any] = {
        "model": arguments.model or str(random_model.make("llama-0.1b")),
        "dtype": "float32",
        "max_batch_sequences": arguments.running,
        "max_batch_tokens": 256,
        "block_size": BLOCK_SIZE,
        "prefix_caching": False,
        "speculation": "off",  # a random network repeats itself
    }
    report = Report("kv_tiers", {**options, "num_requests": arguments.requests, "contexts": CONTEXTS})
    report.repeats = arguments.repeats
    report.limits["before"] = measure_limits()
    medians: dict[str, float] = {}
    for case in arguments.cases:
        runs = measure_case(case, options, arguments)
        for name, values in runs.items():
            report.add_runs(name, values)
            medians[name] = statistics.median(values)
        medians |= compared(case, arguments.policies, medians)
    report.limits["after"] = measure_limits()
    report.metrics = {name: rounded(value) for name, value in medians.items()}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20, help="of each case")
    parser.add_argument("--running", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--policies", nargs="+", default=["aged-srpt", "skip-join-mlfq"])
    parser.add_argument("--model", default="")
    parser.add_argument("--smoke", action="store_true", help="a few requests, once")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.requests, arguments.running, arguments.repeats = 6, 6, 1
    emit(measure(arguments).as_dict())


if __name__ == "__main__":
    main()
