"""How near the CPU kernels and the engine over them are to this machine's limits, on the random Qwen3-0.6B.

    python benchmarks/cpu_roofline.py                               # everything, about ten minutes
    python benchmarks/cpu_roofline.py --precision bf16 --part decode
    python benchmarks/cpu_roofline.py --plot docs/img/cpu_roofline.svg

decode: bytes of weights and KV that a token must read (as the folder stores them; packing's own overhead counts
against us) over the time per token of one request, as a share of the reading speed: of the faster of two loops, one of
which fetches ahead past the caches, and once more of the other, which is how most programs read ("usual"). prefill:
operations of a whole 1,024-token prompt over its time, as a share of the rate of the same instruction with every
operand in registers (int8: of the int8 rate, though attention runs in bf16). start: process start to first token,
pages in the page cache. ops: each operation alone. Limits are measured by the same threads right before and after each
value; medians of shares. Each precision runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cpu_peers import PRECISIONS, our_model, say

from fastserve.bench import workload
from fastserve.bench.report import Report, emit, rounded

PARTS = ("decode", "prefill", "start", "ops")
BF16_RATE, INT8_RATE = 1, 2
PREFILL_RATE = {"bf16": BF16_RATE, "int8": INT8_RATE, "int4": INT8_RATE}
_START = """
import sys
from fastserve import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="bfloat16", kv_cache_memory=256 << 20)
params = SamplingParams(temperature=0.0, max_tokens=1)
print(llm.generate([list(range(300, 308))], params, use_tqdm=False)[0], flush=True)
"""


class Shape:
    """What a decoder's folder says about the work of a token.

    Attributes:
        weight_bytes: of the tensors that every token reads: all, but for an embedding that is not the head as well.
        kv_bytes: of one token's keys and values in all layers, in bfloat16.
    """

    def __init__(self, folder: Path) -> None:
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.weight_bytes = stored_bytes(folder)
        config = self.config
        self.kv_bytes = 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]

    def prefill_operations(self, num_tokens: int) -> int:
        """Multiplications and additions of the products and of causal attention.

        What comes after the last layer's attention is for one row, like the head: nobody reads more of it.
        """
        config = self.config
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        queries = config["num_attention_heads"] * config["head_dim"]
        keys = config["num_key_value_heads"] * config["head_dim"]
        before, after = hidden * (queries + 2 * keys), queries * hidden + 3 * hidden * inner
        pairs, layers = num_tokens * (num_tokens + 1) // 2, config["num_hidden_layers"]
        attention = layers * (before * num_tokens + 2 * queries * pairs)
        return 2 * (attention + after * ((layers - 1) * num_tokens + 1) + config["vocab_size"] * hidden)


def stored_bytes(folder: Path) -> int:
    """Bytes of the folder's tensors, without an input embedding that is not the output projection too."""
    from safetensors import safe_open

    total, embedding, has_head = 0, 0, False
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                size = tensors.get_tensor(name).nbytes
                total += size
                embedding += size if "embed_tokens" in name else 0
                has_head |= name.startswith("lm_head")
    return total - embedding if has_head else total


def measure_engine(part: str, folder: Path, precision: str, repeats: int) -> dict[str, Any]:
    """Values of `decode` or `prefill`, and the limit around each; in this process."""
    from fastserve import LLM, SamplingParams
    from fastserve.kernels.cpu import _native, create  # type: ignore[attr-defined]

    shape = Shape(folder)
    settings = {"kv_cache_memory": shape.kv_bytes * 4200, "prefix_caching": False, "speculation": "off"}
    llm = LLM(str(folder), dtype="bfloat16", kernels="cpu", **settings)
    backend = create().native_backend
    meter = _native.ReadMeter(1 << 30, backend) if part == "decode" else None

    def run(length: int, num_outputs: int, seed: int) -> float:
        params = SamplingParams(temperature=0.0, max_tokens=num_outputs, ignore_eos=True)
        prompt = list(workload.random_ids(length, seed=seed))
        start = time.perf_counter()
        llm.generate([prompt], params, use_tqdm=False)
        return time.perf_counter() - start

    def limit() -> list[float]:
        """The peak; or the reading speed: the faster of two ways, and the usual one."""
        if not meter:
            return [backend.peak(PREFILL_RATE[precision], 0.05)]
        usual = meter.read(past_caches=False)
        return [max(usual, meter.read(past_caches=True)), usual]

    def decode_rate(seed: int) -> float:
        seconds = (run(128, 128, seed) - run(128, 2, seed)) / 126
        return (shape.weight_bytes + shape.kv_bytes * (128 + 65)) / seconds

    def prefill_rate(seed: int) -> float:
        return shape.prefill_operations(1024) / run(1024, 1, seed)

    rate = decode_rate if part == "decode" else prefill_rate
    rate(99)
    found: dict[str, list[float]] = {"rate": [], "limit": [], "share": []}
    if meter:
        found["usual_share"] = []
    for repeat in range(repeats):
        before = limit()
        value = rate(repeat)
        around = [statistics.mean(pair) for pair in zip(before, limit(), strict=True)]
        shares = [value / speed for speed in around]
        for name, number in zip(found, (value, around[0], *shares), strict=True):
            found[name].append(rounded(number))
    return {**found, "isa": backend.isa, "weight_bytes": shape.weight_bytes, "kv_bytes_per_token": shape.kv_bytes}


def start_seconds(folder: Path, repeats: int) -> list[float]:
    """Seconds from starting a process to its first token; a first run, not counted, fills the page cache."""
    found = []
    for _ in range(repeats + 1):
        command, start = [sys.executable, "-c", _START, str(folder)], time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            found.append(rounded(time.perf_counter() - start))
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command)
    return found[1:]


def child(part: str, folder: Path, precision: str, repeats: int) -> dict[str, Any]:
    """The same as `measure_engine` or the operations alone, in a process of its own."""
    command = [sys.executable, __file__, "--worker", part, str(folder), precision, "--repeats", str(repeats)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def measure(report: Report, part: str, shape: str, precision: str, repeats: int) -> None:
    """Add one part of one precision to the report."""
    folder = our_model(shape, precision)
    if part == "start":
        name = "start_to_first_token_s" if precision == "bf16" else f"start_to_first_token_{precision}_s"
        report.add_runs(name, start_seconds(folder, repeats))
        say(f"start {precision}: {report.metrics[name]:.2f} s")
        return
    found = child(part, folder, precision, repeats)
    if part == "ops":
        report.metrics.update({f"ops.{precision}.{name}": value for name, value in found.items()})
        return
    limit, name = ("read_gb_s", "decode_bandwidth_share") if part == "decode" else ("tflop_s", "prefill_peak_share")
    scale = 1e9 if part == "decode" else 1e12
    report.add_runs(f"{name}.{precision}", found["share"])
    if part == "decode":
        report.add_runs(f"decode_usual_bandwidth_share.{precision}", found["usual_share"])
    report.add_runs(f"{part}_{limit}.{precision}", [value / scale for value in found["rate"]])
    report.limits[f"{part}.{precision}"] = {limit: rounded(statistics.median(found["limit"]) / scale)}
    report.config[f"{part}.{precision}"] = {key: value for key, value in found.items() if not isinstance(value, list)}
    say(f"{part} {precision}: share {report.metrics[f'{name}.{precision}']:.3f} {found['share']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="may be repeated; all")
    parser.add_argument("--precision", choices=PRECISIONS, action="append", help="may be repeated; all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--shape", default="qwen3-0.6b", help="a decoder shape of make_model.py")
    parser.add_argument("--plot", type=Path, help="write the roofline plot of the operations here (SVG)")
    parser.add_argument("--worker", nargs=3, metavar=("PART", "FOLDER", "PRECISION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        part, folder, precision = arguments.worker
        if part == "ops":
            import cpu_operations

            found = cpu_operations.measure(Path(folder), precision, arguments.repeats)
        else:
            found = measure_engine(part, Path(folder), precision, arguments.repeats)
        print(json.dumps(found))
        return
    report = Report("cpu_roofline", config={"shape": arguments.shape}, repeats=arguments.repeats)
    report.config["kv_cache"] = "bfloat16"
    for precision in arguments.precision or PRECISIONS:
        for part in arguments.part or PARTS:
            try:
                measure(report, part, arguments.shape, precision, arguments.repeats)
            except subprocess.CalledProcessError as error:
                report.skipped[f"{part}.{precision}"] = str(error)
    if arguments.plot:
        import roofline_plot

        roofline_plot.draw(report.metrics, arguments.plot)
    emit(report.as_dict())


if __name__ == "__main__":
    main()
