"""Perplexity of a model after each way of compressing it, on text that neither it nor the calibration saw.

    python benchmarks/compress_quality.py            # the built-in model, texts of the shared folder
    python benchmarks/compress_quality.py --smoke    # two variants, a few windows
    python benchmarks/compress_quality.py --folder llm-compressor-gptq-int4=PATH    # another tool's folder of it

Every variant is made by `fastserve compress` from the same folder and calibration, and scored as FastServe serves it,
in float32 by the plain PyTorch kernels. What other tools made of the same model is scored the same way: by
llm-compressor on the same windows, and llama.cpp's blocks (without an importance matrix) by the values that they stand
for, embedding and head in bfloat16 as in all others. A peer that is not installed is named in `skipped`. Prints a
table, and one JSON line: metrics.perplexity.METHOD, metrics.bits_per_weight.METHOD (linears of the layers, scales
counted) and metrics.megabytes.METHOD.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers import ENGINES, interpreter, llama_cpp_tools
from precision import perplexity, windows
from shared_data import add_text_options, text_settings

from fastserve.bench.report import Report, emit, rounded
from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.gguf import convert
from fastserve.compress.calibration import windows as calibration_windows
from fastserve.compress.gguf_export import export
from fastserve.compress.recipe import Calibration, make_recipe
from fastserve.compress.run import compress

_QUANTIZE: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8, "search": False},
    "int8-a8": {"bits": 8, "activations": "dynamic", "search": False},
    "smoothquant-int8-a8": {"method": "smoothquant", "bits": 8, "activations": "dynamic", "search": False},
    "float8": {"kind": "float", "bits": 8},
    "rtn-int4": {"group_size": 0, "search": False},
    "kmeans4": {"method": "kmeans"},
    "rtn-int4-g128": {"search": False},
    "search-int4-g128": {},
    "awq-int4-g128": {"method": "awq"},
    "gptq-int4-g128": {"method": "gptq"},
    "gptq-int4-g32": {"method": "gptq", "group_size": 32},
    "gptq-mixed-4.85": {"method": "gptq", "group_size": 64, "budget": 4.85},
    "gptq-int4-g128-asymmetric": {"method": "gptq", "symmetric": False},
    "rtn-int3": {"bits": 3, "group_size": 0, "search": False},
    "kmeans3": {"method": "kmeans", "bits": 3},
    "gptq-kmeans3": {"method": "gptq", "kind": "codebook", "bits": 3},
    "gptq-int3-g128": {"method": "gptq", "bits": 3},
    "mixed-4.2": {"method": "gptq", "bits": 3, "budget": 4.2},
}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    **{name: [{"do": "quantize", **step}] for name, step in _QUANTIZE.items()},
    **{
        f"{method}-50": [{"do": "prune", "method": method, "ratio": 0.5}]
        for method in ("magnitude", "wanda", "sparsegpt")
    },
    "sparsegpt-2:4": [{"do": "prune", "method": "sparsegpt", "pattern": "2:4"}],
    "channels-30": [{"do": "prune", "method": "channels", "ratio": 0.3}],
    "layers-15": [{"do": "prune", "method": "layers", "ratio": 0.15}],
    "channels-30-mended": [
        {"do": "prune", "method": "channels", "ratio": 0.3},
        {"do": "distill", "steps": 300, "learning_rate": 3e-4},
    ],
}
# Of llm-compressor, when benchmarks/peers.py installed it: the same grid and the same windows as our method.
PEER_METHODS = ("rtn", "gptq", "awq")
LLAMA_CPP_TYPES = ("Q8_0", "Q6_K", "Q4_K_M", "Q4_K_S", "Q4_0", "Q3_K_M")
SMOKE = ("rtn-int4-g128", "gptq-int4-g128")
PEERS = ("llm-compressor", "gptqmodel", "llama.cpp")
ENVIRONMENTS = ("llm-compressor", "llama.cpp")  # those that benchmarks/peers.py installs
COMPRESSOR = ENGINES / "compress_llm_compressor.py"


def bits_per_weight(folder: ModelFolder) -> float:
    """Bits on disk per weight of the layers' matrices of a folder of the built-in model's shape."""
    stored = weights = 0
    config = folder.config
    size, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim", size // config["num_attention_heads"])
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    for name in folder.weights.names():
        if ".layers." in name and "norm" not in name and not name.endswith("weight_shape"):
            info = folder.weights.info(name)
            stored += 8 * (info.end - info.start)
    weights = config["num_hidden_layers"] * (2 * size * head * (heads + groups) + 3 * size * inner)
    return stored / weights


def by_llm_compressor(source: ModelFolder, method: str, settings: Calibration, scratch: Path) -> ModelFolder:
    """The peer's folder, calibrated on the windows that ours were."""
    ids, out = scratch / "ids.json", scratch / "out"
    ids.write_text(json.dumps(calibration_windows(source, settings).tolist()))
    command = [str(interpreter("llm-compressor")), str(COMPRESSOR), method, str(ids), str(source.path), str(out)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return ModelFolder.open(str(out))


def by_llama_cpp(source: ModelFolder, kind: str, scratch: Path) -> tuple[ModelFolder, float]:
    """The peer's blocks as a folder of the values that they stand for, and their bits per weight of the layers."""
    from gguf import GGUFReader

    plain, rounded_to, out = scratch / "plain.gguf", scratch / "rounded.gguf", scratch / "out"
    export(source, plain, "f32")
    outside = ["--token-embedding-type", "bf16", "--output-tensor-type", "bf16"]
    command = [str(llama_cpp_tools() / "llama-quantize"), *outside, str(plain), str(rounded_to), kind, "1"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    tensors = [item for item in GGUFReader(rounded_to).tensors if item.name.startswith("blk.") and len(item.shape) == 2]
    bits = 8 * sum(int(item.n_bytes) for item in tensors) / sum(int(item.n_elements) for item in tensors)
    convert([rounded_to], out)
    return ModelFolder.open(str(out)), bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_options(parser, 20000, "calibration", "storybooks_ccby.jsonl")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--peers", default=",".join(PEERS), help="which of the other tools to run, where installed")
    parser.add_argument("--folder", action="append", default=[], metavar="NAME=PATH", help="another tool's result")
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.samples, arguments.length, arguments.tokens, arguments.variants = 8, 64, 600, ",".join(SMOKE)
    report = Report("compress_quality", config=text_settings(arguments, "calibration"))
    source = ModelFolder.open(arguments.model)
    prompts = windows(source, arguments.text, arguments.tokens, 512)
    report.config |= {"weights": "as named", "kv_cache": "float32", "lm_head": str(source.config.get("dtype"))}

    def add(name: str, folder: ModelFolder, bits: float | None = None) -> None:
        report.metrics[f"perplexity.{name}"] = rounded(perplexity(folder.path, "float32", "reference", prompts), 6)
        report.metrics[f"bits_per_weight.{name}"] = rounded(bits or bits_per_weight(folder), 4)
        if bits is None:  # of the folder itself, and not of one with its values written out
            report.metrics[f"megabytes.{name}"] = rounded(folder.weight_bytes / 1e6)
        found = [report.metrics[f"{key}.{name}"] for key in ("perplexity", "bits_per_weight")]
        change = found[0] / report.metrics["perplexity.float32"] - 1
        print(
            f"{name:28s} {found[1]:6.3f} bits  perplexity {found[0]:9.4f}  {change:+.3%}", file=sys.stderr, flush=True
        )
        gc.collect()

    add("float32", source)
    calibration = {"text": str(arguments.calibration), "samples": arguments.samples, "length": arguments.length}
    for name in arguments.variants.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            start = time.perf_counter()
            recipe = make_recipe({"steps": VARIANTS[name], "calibration": calibration})
            add(name, compress(arguments.model, Path(scratch) / "out", recipe))
            report.metrics[f"seconds.{name}"] = rounded(time.perf_counter() - start, 3)
    settings = Calibration(str(arguments.calibration), arguments.samples, arguments.length)
    wanted = [peer for peer in arguments.peers.split(",") if peer in ENVIRONMENTS and interpreter(peer)]
    for method in PEER_METHODS if "llm-compressor" in wanted else ():
        with tempfile.TemporaryDirectory() as scratch:
            add(f"llm-compressor-{method}-int4-g128", by_llm_compressor(source, method, settings, Path(scratch)))
    for kind in LLAMA_CPP_TYPES if "llama.cpp" in wanted else ():
        with tempfile.TemporaryDirectory() as scratch:
            add(f"llama.cpp-{kind}", *by_llama_cpp(source, kind, Path(scratch)))
    for item in arguments.folder:
        name, _, path = item.partition("=")
        add(name, ModelFolder.open(path))
    for peer in PEERS:
        if not any(name.startswith(f"perplexity.{peer}") for name in report.metrics):
            report.skipped[peer] = f"not installed or not asked for, and no folder was given (--folder {peer}-...=PATH)"
    emit(report.as_dict())


if __name__ == "__main__":
    main()
