"""Each operation of a decoder's step alone, against the roofline: used by cpu_roofline.py.

An operation must move so many bytes and make so many multiply-adds; the machine's limit for it is the longer of the
two at the reading speed and the register-only rate of its instruction. Operands rotate over more memory than the
caches hold, so an operation whose operands would be warm in a real step can be faster there than here.
"""

from __future__ import annotations

import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cpu_linear import Format, make_layer

from fastserve.bench.report import rounded
from fastserve.checkpoint.quantized import QuantScheme
from fastserve.kernels.cpu import CPUKernels, create
from fastserve.kernels.interface import Batch, Scores

BF16_RATE, INT8_RATE = 1, 2
FORMATS = {
    "bf16": Format(None, BF16_RATE),
    "int8": Format(QuantScheme(8, activation_bits=8), INT8_RATE),
    "int4": Format(QuantScheme(4, 128, activation_bits=8), INT8_RATE),
}
HEAD_FORMATS = {"bf16": FORMATS["bf16"], "int8": FORMATS["int8"], "int4": FORMATS["int8"]}
ROTATE_BYTES = 400_000_000
BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation on one shape.

    Attributes:
        bytes: read and written by one call, at least.
        operations: multiplications and additions of one call.
        rate: which instruction bounds it, as in the library's `peak`.
        calls: the same on different memory.
    """

    name: str
    bytes: int
    operations: int
    rate: int
    calls: Sequence[Callable[[], Any]]


def linears(kernels: CPUKernels, config: dict[str, Any], precision: str) -> Iterator[Operation]:
    """The shapes of a layer's products and of the head: one row, and for the layer's 1,024 rows too."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    shapes = {
        "qkv": (queries + 2 * keys, hidden),
        "attention_output": (hidden, queries),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
        "lm_head": (config["vocab_size"], hidden),
    }
    for name, (num_outputs, num_inputs) in shapes.items():
        form = HEAD_FORMATS[precision] if name == "lm_head" else FORMATS[precision]
        first = make_layer(kernels, form, num_outputs, num_inputs)
        count = max(2, ROTATE_BYTES // first.native.bytes)
        layers = [first, *(make_layer(kernels, form, num_outputs, num_inputs) for _ in range(count - 1))]
        for rows in (1,) if name == "lm_head" else (1, 1024):
            x = torch.randn(rows, num_inputs).to(torch.bfloat16)
            moved = first.native.bytes + 2 * rows * (num_inputs + num_outputs)
            used = layers if rows == 1 else layers[:4]
            calls = [functools.partial(kernels.linear, layer, x) for layer in used]
            yield Operation(f"{name}.rows{rows}", moved, 2 * rows * num_outputs * num_inputs, form.rate, calls)
        del layers


def attentions(kernels: CPUKernels, config: dict[str, Any]) -> Iterator[Operation]:
    """One query over 1,024 cached tokens, and 1,024 queries over themselves."""
    heads, kv_heads, size = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    context = 1024
    kv_bytes = 2 * 2 * context * kv_heads * size
    blocks = context // BLOCK_SIZE
    caches = [
        [torch.randn(blocks, BLOCK_SIZE, kv_heads, size).to(torch.bfloat16) for _ in range(2)]
        for _ in range(ROTATE_BYTES // 2 // kv_bytes)
    ]
    table = list(range(blocks))
    for name, rows in (("attention.decode", 1), ("attention.prefill", context)):
        query = torch.randn(rows, heads, size).to(torch.bfloat16)
        batch = Batch([], [], [], [0, rows], [context], [table], [])
        pairs = context if rows == 1 else context * (context + 1) // 2
        calls = [
            functools.partial(kernels.paged_attention, query, keys, values, batch, Scores(size**-0.5))
            for keys, values in (caches if rows == 1 else caches[:4])
        ]
        yield Operation(name, kv_bytes + 4 * rows * heads * size, 4 * heads * size * pairs, BF16_RATE, calls)


def elementwise(kernels: CPUKernels, config: dict[str, Any]) -> Iterator[Operation]:
    """Operations on 1,024 rows that only move memory; argmax over the logits of 32 rows."""
    rows, hidden, size = 1024, config["hidden_size"], config["head_dim"]
    heads, kv_heads, vocabulary = config["num_attention_heads"], config["num_key_value_heads"], config["vocab_size"]
    weight = torch.ones(hidden, dtype=torch.bfloat16)
    cos = sin = torch.randn(rows, size // 2).to(torch.bfloat16)
    slots = torch.arange(rows)

    def many(*shape: int) -> list[torch.Tensor]:
        one = torch.randn(*shape).to(torch.bfloat16)
        return [one.clone() for _ in range(max(2, ROTATE_BYTES // 4 // one.nbytes))]

    inputs = many(rows, hidden)
    calls: Sequence[Callable[[], Any]] = [functools.partial(kernels.rms_norm, x, weight, 1e-6) for x in inputs]
    yield Operation("rms_norm", 2 * inputs[0].nbytes, 0, BF16_RATE, calls)
    inputs = many(rows, heads, size)
    calls = [functools.partial(kernels.apply_rope, x, cos, sin) for x in inputs]
    yield Operation("rope", 2 * inputs[0].nbytes, 0, BF16_RATE, calls)
    inputs = many(rows, kv_heads, size)
    caches = many(rows // BLOCK_SIZE, BLOCK_SIZE, kv_heads, size)
    calls = [
        functools.partial(kernels.store_kv, x, x, keys, values, slots)
        for x, keys, values in zip(inputs, caches, reversed(caches), strict=True)
    ]
    yield Operation("store_kv", 3 * inputs[0].nbytes, 0, BF16_RATE, calls)  # the same rows are key and value
    inputs = many(32, vocabulary)
    calls = [functools.partial(kernels.argmax, x) for x in inputs]
    yield Operation("argmax", inputs[0].nbytes, 0, BF16_RATE, calls)


def against_limit(operation: Operation, kernels: CPUKernels, meter: Any, repeats: int) -> dict[str, float]:
    """Share of the roofline, and achieved rates: medians over `repeats` passes over all the calls."""
    backend = kernels.native_backend
    shares, seconds, reads, peaks = [], [], [], []
    for call in operation.calls[:2]:
        call()
    for _ in range(repeats):
        limits = [(meter.measure(), backend.peak(operation.rate, 0.01))]
        start = time.perf_counter()
        for call in operation.calls:
            call()
        seconds.append((time.perf_counter() - start) / len(operation.calls))
        limits.append((meter.measure(), backend.peak(operation.rate, 0.01)))
        reads.append(statistics.mean(read for read, _ in limits))
        peaks.append(statistics.mean(peak for _, peak in limits))
        shares.append(max(operation.bytes / reads[-1], operation.operations / peaks[-1]) / seconds[-1])
    median = statistics.median(seconds)
    return {
        "share": rounded(statistics.median(shares)),
        "microseconds": rounded(median * 1e6),
        "gb_s": rounded(operation.bytes / median / 1e9),
        "gop_s": rounded(operation.operations / median / 1e9),
        "operations_per_byte": rounded(operation.operations / operation.bytes),
        "read_limit_gb_s": rounded(statistics.median(reads) / 1e9),
        "peak_gop_s": rounded(statistics.median(peaks) / 1e9),
    }


def measure(folder: Path, precision: str, repeats: int) -> dict[str, float]:
    """`OPERATION.FIGURE` of every operation of the folder's shape; what no weight is in, with bf16 only."""
    from fastserve.kernels.cpu import _native  # type: ignore[attr-defined]

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kernels = create()
    meter = _native.ReadMeter(1 << 30, kernels.native_backend)
    rest = (attentions(kernels, config), elementwise(kernels, config)) if precision == "bf16" else ()
    found: dict[str, float] = {}
    for operation in itertools.chain(linears(kernels, config, precision), *rest):
        figures = against_limit(operation, kernels, meter, repeats)
        found.update({f"{operation.name}.{figure}": value for figure, value in figures.items()})
    return found
