"""The same request trace against our server and a peer's, the random Qwen3-0.6B in bfloat16, over HTTP.

    python benchmarks/serve_peers.py                                      # vLLM and llama.cpp, one repeat each
    python benchmarks/serve_peers.py --peer vllm --requests 300 --context 2048 --repeats 3        # hours
    python benchmarks/serve_peers.py --peer llama.cpp --smoke             # tiny: whether it works

Each server's capacity is measured first (the work done while its batch is full, everything there at the start);
arrivals are then scaled to --load of the lower one, and the servers take turns, each repeat swapping who goes first,
while the other one idles. Token ids in, other ones in every run, recorded output lengths, greedy, end tokens ignored.
Every server is left at its defaults but for the context, the number of sequences and its KV memory. Latency counts from
the moment at which a request was due. A ratio above 1 means that ours is better. Without --trace, the Azure
conversations of the shared data are used, if they are there.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peers
from cpu_peers import say
from shared_data import add_trace_options

from fastserve.bench import random_model
from fastserve.bench.latencies import RequestTimes, ratios, saturated_rate, summarise
from fastserve.bench.loadgen import StreamingClient
from fastserve.bench.report import Report, emit, measure_limits, rounded
from fastserve.bench.serve_trace import replay
from fastserve.bench.traces import Trace, read_trace

OURS = "fastserve"
NUM_SEQUENCES = 32
COMPARED = ("mean_e2e", "p99_e2e", "mean_ttft", "p99_ttft")


def command(name: str, model: Path, context: int, port: int) -> list[str]:
    """How to start a server of a model."""
    where = ["--host", "127.0.0.1", "--port", str(port)]
    if name == OURS:
        serve = [sys.executable, "-m", "fastserve.cli.main", "serve", str(model), "--dtype", "bfloat16"]
        serve += ["--speculation", "off"]  # a random network repeats itself
        serve += ["--max-batch-sequences", str(NUM_SEQUENCES), "--max-model-len", str(context), "--name", "model"]
        return [*serve, "--kv-cache-memory", "4GiB", *where]
    if name == "vllm":
        serve = [str(peers.interpreter(name)), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        serve += ["--served-model-name", "model", "--dtype", "bfloat16", "--max-model-len", str(context)]
        return [*serve, "--max-num-seqs", str(NUM_SEQUENCES), *where]
    file = peers.convert("llama.cpp", "bf16", model)
    serve = [str(peers.llama_cpp_tools() / "llama-server"), "-m", str(file), "-t", str(len(os.sched_getaffinity(0)))]
    return [*serve, "-np", str(NUM_SEQUENCES), "-c", str(NUM_SEQUENCES * context), "--no-webui", *where]


class Server:
    """A server of one engine, until it is closed.

    Raises:
        RuntimeError: it ended, or was not ready after ten minutes.
    """

    def __init__(self, name: str, model: Path, context: int) -> None:
        self.name = name
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        cpus = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_NO_USAGE_STATS": "1"}
        environment |= {"VLLM_CPU_OMP_THREADS_BIND": cpus, "VLLM_LOGGING_LEVEL": "WARNING"}
        environment.pop("FASTSERVE_API_KEY", None)
        self._process = subprocess.Popen(
            command(name, model, context, self.port), env=environment, stdout=subprocess.DEVNULL
        )
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        path = "ready" if self.name == OURS else "health"  # ours is healthy before its model is loaded
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/{path}", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
        self.close()
        raise RuntimeError(f"{self.name}'s server did not start; its messages are above")

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def run(self, trace: Trace, seed: int) -> list[RequestTimes]:
        """Send every request when it is due; seconds from the start of the run.

        Another seed makes other prompts of the same lengths: both servers keep prefixes, and have not seen them.

        Raises:
            RuntimeError: requests failed, or came back with another number of tokens than asked for.
        """
        times, errors = replay(StreamingClient("127.0.0.1", self.port, timeout=3600.0), "model", trace, seed)
        if errors:
            raise RuntimeError(f"{self.name}: {len(errors)} of {len(trace.requests)} requests failed; {errors[0]}")
        return times


def compare(
    report: Report,
    servers: Sequence[Server],
    trace: Trace,
    arguments: argparse.Namespace,
    capacities: dict[str, float],
) -> None:
    """Capacities where not known yet, then both servers on the same arrivals; adds figures and ratios to the report."""
    ours, theirs = servers
    for server in servers:
        if server.name not in capacities:
            capacities[server.name] = rounded(saturated_rate(server.run(trace.all_at_once(), seed=0), NUM_SEQUENCES))
    capacities = {server.name: capacities[server.name] for server in servers}
    rate = arguments.load * min(capacities.values())
    say(f"capacity {capacities}, load {rate:.3f} requests/s")
    timed = trace.at_rate(rate)
    found: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
    for repeat in range(arguments.repeats):
        for server in servers if repeat % 2 == 0 else servers[::-1]:
            found[server.name].append(summarise(server.run(timed, seed=1 + repeat)))
            say(f"{server.name}: " + ", ".join(f"{name} {found[server.name][-1][name]}" for name in COMPARED))
    key = theirs.name.replace(".", "_")
    report.config[f"beside_{key}"] = {"capacity_requests_per_s": capacities, "requests_per_s": rounded(rate)}
    medians: dict[str, dict[str, float]] = {}
    for server in servers:
        label = f"{key}.ours" if server is ours else key
        for name in found[server.name][0]:
            report.add_runs(f"{label}.{name}", [run[name] for run in found[server.name]])
        medians[server.name] = {
            name: statistics.median(run[name] for run in found[server.name]) for name in found[server.name][0]
        }
    for name, value in ratios(medians[ours.name], medians[theirs.name], COMPARED).items():
        report.metrics[f"ratio.{key}.{name}"] = value
    report.metrics[f"ratio.{key}.capacity"] = rounded(capacities[ours.name] / capacities[theirs.name])


def measure(arguments: argparse.Namespace) -> Report:
    model = random_model.make(arguments.shape)
    trace = read_trace(arguments.trace, arguments.requests, arguments.offset).fit(arguments.context)
    settings: dict[str, Any] = {"shape": arguments.shape, "trace": trace.name, "offset": trace.offset}
    settings |= {"load": arguments.load, "num_requests": len(trace.requests), "length_scale": trace.length_scale}
    settings |= {"context": arguments.context, "num_sequences": NUM_SEQUENCES}
    precision = {"weights": "bfloat16", "kv_cache": "bfloat16 (llama.cpp: float16)", "lm_head": "bfloat16"}
    report = Report("serve_peers", {**settings, "precision": precision}, repeats=arguments.repeats)
    report.limits["before"] = measure_limits()
    capacities: dict[str, float] = {}
    for name in arguments.peer or ("vllm", "llama.cpp"):
        if peers.interpreter(name) is None:
            report.skipped[name] = f"not installed: python benchmarks/peers.py install {name}"
            continue
        servers: list[Server] = []
        try:
            for one in (OURS, name):
                servers.append(Server(one, model, arguments.context))
            compare(report, servers, trace, arguments, capacities)
        except RuntimeError as error:
            report.skipped[name] = str(error)
        finally:
            for server in servers:
                server.close()
    report.limits["after"] = measure_limits()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_trace_options(parser, context=512)
    parser.add_argument("--peer", choices=("vllm", "llama.cpp"), action="append", help="may be repeated; both")
    parser.set_defaults(requests=64)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--shape", default="qwen3-0.6b", help="a decoder shape of make_model.py")
    parser.add_argument("--smoke", action="store_true", help="six short requests to a smaller model")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.requests, arguments.context, arguments.shape = 6, 128, "llama-0.1b"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are closed then too
    if not arguments.trace.exists():
        report = Report("serve_peers", skipped={"trace": f"{arguments.trace} is not there; give one with --trace"})
    else:
        report = measure(arguments)
    emit(report.as_dict())


if __name__ == "__main__":
    main()
