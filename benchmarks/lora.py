"""Throughput of many LoRA adapters in one batch, against the base model alone.

    python benchmarks/lora.py
    python benchmarks/lora.py --rank 16 --adapters 8
    python benchmarks/lora.py --smoke

Every request of the batch has an adapter of its own, on every linear of every layer (random matrices of one rank). Both
engines get the same prompts and make as many tokens; they take turns. `throughput_ratio` is output tokens per second
with adapters over those of a base model that was loaded without any; `idle_ratio` is the engine that has adapters
loaded, asked for none. That tokens equal those of merged weights is held by tests/parity/test_adapters.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastserve import LLM, SamplingParams
from fastserve.bench import random_model
from fastserve.bench.report import Report, emit, measure_limits
from fastserve.checkpoint.folder import ModelFolder


def write_adapter(folder: Path, base: ModelFolder, rank: int, seed: int) -> str:
    """A peft folder with random matrices for every linear of the base's layers; returns its path."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name in base.weights.names():
        shape = base.weights.shape(name)
        if name.endswith("_proj.weight") and len(shape) == 2:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = (
                torch.randn(rank, shape[1], generator=generator).to(torch.bfloat16) * 0.02
            )
            tensors[f"{module}.lora_B.weight"] = (
                torch.randn(shape[0], rank, generator=generator).to(torch.bfloat16) * 0.02
            )
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def throughput(llm: LLM, prompts: list[list[int]], num_tokens: int, names: list[str]) -> float:
    """Output tokens per second of one batch, prompts included in the time."""
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    started = time.perf_counter()
    llm.generate(prompts, sampling, lora=names, use_tqdm=False)
    return len(prompts) * num_tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--adapters", type=int, default=32)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=96, help="tokens made for each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--smoke", action="store_true", help="a small shape and one repeat: does it run?")
    options = parser.parse_args()
    if options.smoke:
        options.shape, options.adapters, options.tokens, options.repeats = "llama-0.1b", 4, 8, 1
    path = random_model.make(options.shape)
    settings = {"dtype": options.dtype, "max_model_len": options.prompt + options.tokens, "prefix_caching": False}
    settings["speculation"] = "off"  # a random network repeats itself
    settings |= {"max_batch_sequences": options.adapters, "scheduler": "fcfs"}
    config = {name: vars(options)[name] for name in ("shape", "adapters", "rank", "prompt", "tokens")}
    report = Report("lora", {**config, **settings, "kv_cache_dtype": options.dtype, "lm_head": options.dtype})
    report.repeats = options.repeats
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(10, 1000, (options.adapters, options.prompt), generator=generator).tolist()
    report.limits["before"] = measure_limits()
    with tempfile.TemporaryDirectory() as folder:
        base = ModelFolder.open(str(path))
        names = [f"adapter-{index}" for index in range(options.adapters)]
        lora = [
            f"{name}={write_adapter(Path(folder, name), base, options.rank, seed)}" for seed, name in enumerate(names)
        ]
        plain = LLM(str(path), **settings)
        adapted = LLM(str(path), **settings, lora=lora)
    runs = {"base": (plain, [""] * len(names)), "adapters": (adapted, names), "idle": (adapted, [""] * len(names))}
    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(-1, options.repeats):  # the first warms up and is not counted
        for name, (llm, adapters) in runs.items():
            speed = throughput(llm, prompts, options.tokens, adapters)
            if repeat >= 0:
                speeds[name].append(speed)
    for name in runs:
        report.add_runs(f"{name}_tokens_per_second", speeds[name])
    for metric, name in (("throughput_ratio", "adapters"), ("idle_ratio", "idle")):
        report.add_runs(
            metric, [with_it / without for with_it, without in zip(speeds[name], speeds["base"], strict=True)]
        )
    report.limits["after"] = measure_limits()
    emit(report.as_dict())


if __name__ == "__main__":
    main()
