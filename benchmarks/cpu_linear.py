"""Matrix products of the CPU kernels against this machine's limits, measured in the same run.

    python benchmarks/cpu_linear.py                       # all formats, best instruction set, all usable processors
    python benchmarks/cpu_linear.py --isa avx2 --threads 1 --formats bf16,int8-a8

Few rows (1, 4, 16): bytes of weights per second over more than 1 GB of distinct layers, as a share of the memory
reading speed of the same threads. Many rows (1024): operations per second as a share of the same instruction's rate
with every operand in registers; the largest of several short runs, since a neighbour can only take away. Limits are
measured before and after every case, and what is printed are medians (few rows) or best (many rows).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastserve.bench.report import Report, emit, rounded
from fastserve.checkpoint.quantized import QuantizedWeight, QuantScheme
from fastserve.core.machine import usable_cpus
from fastserve.kernels.cpu import CPUKernels
from fastserve.kernels.interface import PackedLinear

FLOAT_RATE, BF16_RATE, INT8_RATE = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Format:
    """A weight format, and which instruction bounds it."""

    scheme: QuantScheme | None
    rate: int


FORMATS = {
    "bf16": Format(None, BF16_RATE),
    "int8": Format(QuantScheme(8), BF16_RATE),
    "int8-a8": Format(QuantScheme(8, activation_bits=8), INT8_RATE),
    "int4-g32": Format(QuantScheme(4, 32), BF16_RATE),
    "int4-g128": Format(QuantScheme(4, 128), BF16_RATE),
    "int4-g32-a8": Format(QuantScheme(4, 32, activation_bits=8), INT8_RATE),
    "int4-g128-a8": Format(QuantScheme(4, 128, activation_bits=8), INT8_RATE),
    "codebook4": Format(QuantScheme(4, has_codebook=True), BF16_RATE),
}


def make_layer(kernels: CPUKernels, form: Format, num_outputs: int, num_inputs: int) -> PackedLinear:
    scheme = form.scheme
    if scheme is None:
        return kernels.pack_linear(torch.randn(num_outputs, num_inputs).to(torch.bfloat16), None)
    values = torch.randint(0, scheme.max_value + 1, (num_outputs, num_inputs), dtype=torch.uint8)
    groups = num_inputs // scheme.group_size if scheme.group_size else 1
    scales = torch.rand(num_outputs, groups).to(torch.bfloat16)
    codebook = torch.randn(16) if scheme.has_codebook else None
    return kernels.pack_linear(QuantizedWeight(scheme, values, scales, codebook=codebook), None)


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def stream_share(
    kernels: CPUKernels, meter: Any, layers: list[PackedLinear], x: Tensor, repeats: int
) -> dict[str, float]:
    """Weight bytes per second over all layers, beside the reading speed before and after each pass."""
    size = sum(layer.native.bytes for layer in layers)
    speeds, limits, shares = [], [], []
    for _ in range(repeats):
        before = meter.measure()
        speeds.append(size / timed(lambda: [kernels.linear(layer, x) for layer in layers]))
        limits += [before, meter.measure()]
        shares.append(speeds[-1] / statistics.mean(limits[-2:]))
    return {
        "bytes_per_second": statistics.median(speeds),
        "read_limit": statistics.median(limits),
        "share": statistics.median(shares),
    }


def compute_share(kernels: CPUKernels, form: Format, layer: PackedLinear, x: Tensor, repeats: int) -> dict[str, float]:
    """Operations per second, beside the register-only rate of the same instruction."""
    native = kernels.native_backend
    rate = form.rate if native.isa in ("avx512_vnni_bf16", "amx") or form.rate == INT8_RATE else FLOAT_RATE
    operations = 2 * x.shape[0] * layer.native.n * layer.native.k
    speeds, limits = [], []
    for _ in range(repeats):
        limits.append(native.peak(rate, 0.004))
        speeds.append(operations / timed(lambda: kernels.linear(layer, x)))
    return {"operations_per_second": max(speeds), "peak": max(limits), "share": max(speeds) / max(limits)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default="", help="an instruction set; the best one when left out")
    parser.add_argument("--threads", type=int, default=len(usable_cpus()))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--rows", default="1,4,16,1024")
    parser.add_argument("--shape", default="4096x1024", help="NxK of a layer")
    parser.add_argument("--megabytes", type=int, default=1100, help="of distinct layers, for few rows")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    from fastserve.kernels.cpu import _native  # type: ignore[attr-defined]

    isa = arguments.isa or _native.available_isas()[-1]
    backend = _native.Backend(isa, arguments.threads)
    kernels = CPUKernels(backend)
    meter = _native.ReadMeter(1 << 30, backend)
    num_outputs, num_inputs = (int(part) for part in arguments.shape.split("x"))
    config = {"isa": isa, "threads": arguments.threads, "shape": arguments.shape, "activations": "bf16"}
    report = Report("cpu_linear", config=config, repeats=arguments.repeats)
    for name in arguments.formats.split(","):
        form = FORMATS[name]
        layers = [make_layer(kernels, form, num_outputs, num_inputs)]
        for rows in (int(part) for part in arguments.rows.split(",")):
            x = torch.randn(rows, num_inputs).to(torch.bfloat16)
            if rows > 64:
                found = compute_share(kernels, form, layers[0], x, 3 * arguments.repeats)
            else:
                wanted = max(2, arguments.megabytes * 1_000_000 // layers[0].native.bytes)
                layers += [make_layer(kernels, form, num_outputs, num_inputs) for _ in range(wanted - len(layers))]
                found = stream_share(kernels, meter, layers, x, arguments.repeats)
            for key, value in found.items():
                report.metrics[f"{name}.rows{rows}.{key}"] = rounded(value)
            speed, limit = list(found.values())[:2]
            print(
                f"{name:14s} {rows:5d} rows: {speed / 1e9:8.1f} of {limit / 1e9:8.1f} G/s, share {found['share']:.2f}",
                file=sys.stderr,
                flush=True,
            )
    emit(report.as_dict())


if __name__ == "__main__":
    main()
