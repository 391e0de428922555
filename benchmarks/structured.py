"""What structured outputs cost: time of a decode step with a grammar for every sequence, against without.

    python benchmarks/structured.py            # Qwen3-0.6B's shape, 16 sequences
    python benchmarks/structured.py --smoke    # a small shape and few steps
    python benchmarks/structured.py --tokenizer ../shared/data/tokenizers/gpt-neox-20b --batch 16

Random weights; prompts, batch and number of steps are the same, and runs with and without take turns. The schema never
lets the answer end within them. `mask_cost` is the share of a step that the grammar adds: 1 - (without / with).
What schemas can be asked for, and whether they are kept, is counted by benchmarks/schemas.py.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from shared_data import shared_folder

from fastserve import LLM, SamplingParams, StructuredOutputs
from fastserve.bench import random_model
from fastserve.bench.report import Report, emit, measure_limits, rounded
from fastserve.core.request import Request

SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"type": "string"}},
            "kind": {"enum": ["person", "place", "thing"]},
        },
        "required": ["name", "age", "kind"],
        "additionalProperties": False,
    },
}


def with_tokenizer(model: Path, tokenizer: Path | None, folder: Path) -> Path:
    """A folder with the model's files and another tokenizer; the model's own folder without one."""
    if tokenizer is None:
        return model
    for file in model.iterdir():
        if not file.name.startswith("tokenizer"):
            (folder / file.name).symlink_to(file)
    shutil.copy(tokenizer / "tokenizer.json", folder / "tokenizer.json")
    return folder


def step_seconds(llm: LLM, batch: int, num_steps: int, wanted: StructuredOutputs | None, name: str) -> float:
    """Median time of a step in which all sequences decode."""
    for index in range(batch):
        sampling = SamplingParams(
            temperature=0.0, seed=index, max_tokens=num_steps + 2, ignore_eos=wanted is None, structured_outputs=wanted
        )
        prompt = [5 + (7 * index + 3 * place) % 200 for place in range(32)]
        llm.engine.add(Request(f"{name}-{index}", prompt, sampling, time.monotonic()))
    times = []
    while llm.engine.has_work():
        started = time.perf_counter()
        outputs = llm.engine.step()
        if len(outputs) == batch:
            times.append(time.perf_counter() - started)
        assert all(output.error is None for output in outputs), outputs
    return statistics.median(times[1:-1])


def main() -> None:
    found = shared_folder() / "data" / "tokenizers" / "gpt-neox-20b"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--tokenizer", type=Path, default=found if found.is_dir() else None)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--smoke", action="store_true", help="llama-0.1b, 6 steps, once")
    options = parser.parse_args()
    if options.smoke:
        options.shape, options.steps, options.repeats = "llama-0.1b", 6, 1
    settings: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 512, "speculation": "off"}
    settings |= {"max_batch_sequences": options.batch, "kv_cache_memory": "1500MiB", "prefix_caching": False}
    with tempfile.TemporaryDirectory() as temporary:
        folder = with_tokenizer(random_model.make(options.shape), options.tokenizer, Path(temporary))
        measure(LLM(str(folder), **settings), options, settings)


def measure(llm: LLM, options: argparse.Namespace, settings: dict[str, Any]) -> None:
    """Take turns, and print the report."""
    wanted = StructuredOutputs(json=SCHEMA)  # type: ignore[arg-type]
    config = {"shape": options.shape, "batch": options.batch, "steps": options.steps, **settings}
    report = Report("structured", {**config, "vocabulary": llm.tokenizer.vocab_size}, repeats=options.repeats)
    if not options.smoke:
        report.limits["before"] = measure_limits()
    times: dict[str, list[float]] = {"without": [], "with": []}
    for repeat in range(-1, options.repeats):  # the first compiles, and is not counted
        for name, form in (("without", None), ("with", wanted)):
            seconds = step_seconds(llm, options.batch, options.steps, form, f"{name}-{repeat}")
            if repeat >= 0:
                times[name].append(seconds * 1000)
    for name, values in times.items():
        report.add_runs(f"step_ms_{name}", values)
    costs = [1 - without / with_ for without, with_ in zip(times["without"], times["with"], strict=True)]
    report.add_runs("mask_cost", costs)
    report.metrics["ratio"] = rounded(statistics.median(times["without"]) / statistics.median(times["with"]))
    if not options.smoke:
        report.limits["after"] = measure_limits()
    emit(report.as_dict())


if __name__ == "__main__":
    main()
