"""How much faster compressed folders decode, and what compressing takes, on the shape of Qwen3-0.6B.

    python benchmarks/compress_speed.py             # about half an hour on two cores; GPTQ is most of it
    python benchmarks/compress_speed.py --smoke     # the 0.1B shape, a few tokens

Folders are made by `fastserve compress` in processes of their own, whose time and peak memory are measured; then all
are served, in turns, and the median of each one's decode speed is held against bfloat16's. `structured_30` leaves a
third of the channels and a quarter of the heads out of every layer, which is 30 % of its weights; `channels_30` and
`layers_30` leave out one kind of part. Metrics: decode_ratio_vs_bf16.VARIANT (above 1: faster) and
prefill_ratio_vs_bf16.VARIANT of int8, int4, gptq, channels_30, structured_30, layers_30 and unstructured_80; seconds.*,
peak_memory_gb.* of the work, peak_over_source.* (peak memory less that of an idle process, over the source's bytes).
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fastserve.bench import random_model, workload
from fastserve.bench.latency import generate_seconds
from fastserve.bench.report import Report, emit, measure_limits, rounded
from fastserve.checkpoint.folder import ModelFolder
from fastserve.offline.llm import LLM

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "old",
    "kings",
    "wait",
    "for",
    "rain",
    "by",
    "the",
    "river",
    "in",
    "the",
    "north",
]


def recipes(text: Path, samples: int, length: int) -> dict[str, str]:
    """Name -> TOML."""
    looked_at = f'[calibration]\ntext = "{text}"\nsamples = {samples}\nlength = {length}\n'
    prune = looked_at + '[[steps]]\ndo = "prune"\nmethod = "channels"\nratio = {}\n'
    heads = '[[steps]]\ndo = "prune"\nmethod = "heads"\nratio = 0.25\n'
    return {
        "int8": '[[steps]]\ndo = "quantize"\nbits = 8\nsearch = false\nhead = "int8"\n',
        "int4": '[[steps]]\ndo = "quantize"\nbits = 4\nsearch = false\nhead = "int8"\n',
        "gptq": looked_at + '[[steps]]\ndo = "quantize"\nmethod = "gptq"\nhead = "int8"\n',
        "channels_30": prune.format(0.3),
        "structured_30": prune.format(0.3333) + heads,
        "unstructured_80": '[[steps]]\ndo = "prune"\nmethod = "magnitude"\nratio = 0.8\nstore = "bitmask"\n',
        "layers_30": looked_at + '[[steps]]\ndo = "prune"\nmethod = "layers"\nratio = 0.3\n',
    }


def run_measured(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident bytes of a command."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed: {error.decode()[-2000:]}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--input-length", type=int, default=256)
    parser.add_argument("--output-length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="names of variants, with commas; all when left out")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.shape, arguments.samples, arguments.length = "llama-0.1b", 2, 64
        arguments.input_length, arguments.output_length, arguments.repeats = 32, 8, 1
    source = ModelFolder.open(str(random_model.make(arguments.shape)))
    report = Report("compress_speed", config={**vars(arguments), "model": source.name}, repeats=arguments.repeats)
    report.config |= {
        "dtype": "bfloat16",
        "kv_cache": "bfloat16",
        "lm_head": "int8 beside int8 and int4, else bfloat16",
    }
    scratch = Path(tempfile.mkdtemp(prefix="fastserve-compress-"))
    try:
        folders = {"bf16": source.path, **_make(source, scratch, arguments, report)}
        _time(folders, arguments, report)
    finally:
        shutil.rmtree(scratch)
    emit(report.as_dict())


def _make(source: ModelFolder, scratch: Path, arguments: argparse.Namespace, report: Report) -> dict[str, Path]:
    text = scratch / "text.txt"
    text.write_text(" ".join(WORDS[index * index % len(WORDS)] for index in range(4 * arguments.length + 2000)))
    idle = run_measured([sys.executable, "-c", "import torch, transformers.models.qwen3"])[1]
    folders = {}
    for name, content in recipes(text, arguments.samples, arguments.length).items():
        if arguments.only and name not in arguments.only.split(","):
            continue
        file = scratch / f"{name}.toml"
        file.write_text(content)
        command = [sys.executable, "-m", "fastserve.cli.main", "compress", str(source.path)]
        seconds, peak = run_measured([*command, "--recipe", str(file), "--out", str(scratch / name)])
        report.metrics[f"seconds.{name}"] = rounded(seconds, 3)
        report.metrics[f"peak_memory_gb.{name}"] = rounded(peak / 1e9, 3)
        report.metrics[f"peak_over_source.{name}"] = rounded((peak - idle) / source.weight_bytes, 3)
        print(f"{name}: {seconds:.1f} s, {peak / 1e9:.2f} GB at most", file=sys.stderr, flush=True)
        folders[name] = scratch / name
    return folders


def _time(folders: dict[str, Path], arguments: argparse.Namespace, report: Report) -> None:
    length = arguments.input_length + arguments.output_length + 1
    # A random network repeats itself, which guesses would be paid for.
    settings = {"dtype": "bfloat16", "max_model_len": length, "max_batch_sequences": 1, "speculation": "off"}
    settings |= {"prefix_caching": False}
    engines = {name: LLM(str(folder), **settings) for name, folder in folders.items()}
    size = min(llm.engine.vocab_size for llm in engines.values())
    [prompt] = workload.fit([workload.decode_case(arguments.input_length, arguments.output_length)], size)
    report.limits["before"] = measure_limits()
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for number in range(arguments.repeats + 1):
        for name, llm in engines.items():
            first = generate_seconds(llm, prompt.token_ids, 2)
            whole = generate_seconds(llm, prompt.token_ids, arguments.output_length)
            if number:  # the first round warms up
                speeds[name].append((arguments.input_length / first, (arguments.output_length - 2) / (whole - first)))
    report.limits["after"] = measure_limits()
    for kind, place in (("prefill", 0), ("decode", 1)):
        for name, pairs in speeds.items():
            report.add_runs(f"{kind}_tokens_per_second.{name}", [pair[place] for pair in pairs])
        for name in speeds.keys() - {"bf16"}:
            ratios = [mine[place] / base[place] for mine, base in zip(speeds[name], speeds["bf16"], strict=True)]
            report.metrics[f"{kind}_ratio_vs_bf16.{name}"] = rounded(statistics.median(ratios), 4)
    for llm in engines.values():
        llm.engine.close()


if __name__ == "__main__":
    main()
