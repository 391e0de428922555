"""Replay a request trace over HTTP against any server that speaks OpenAI's completions, ours or another.

Prompts go as token ids, answers run to their recorded lengths (`ignore_eos`, which FastServe and vLLM know), and every
piece's arrival is recorded at the client. Capacity is measured on the server itself unless a rate is given: the same
requests, all sent at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from fastserve.bench.latencies import RequestTimes, saturated_rate, summarise
from fastserve.bench.loadgen import StreamingClient, StreamResult
from fastserve.bench.report import Report, rounded
from fastserve.bench.traces import Trace, prompt_ids, read_trace
from fastserve.bench.workload import FIRST_ID
from fastserve.core.errors import ConfigError

_START_SECONDS = 120.0
_LAST_ID = 4000  # any server is asked, and the built-in model has 4,096 tokens


def run(
    trace: str,
    *,
    url: str,
    model: str = "",
    load: float = 0.9,
    rate: float = 0.0,
    num_requests: int = 300,
    offset: int = 0,
    context: int = 1024,
    timeout: float = 600.0,
    max_batch_sequences: int = 16,
) -> dict[str, Any]:
    """Replay and return the report; failed requests are counted in `metrics.failed` and left out of the figures.

    Args:
        url: http://host:port of the server.
        model: its name in the requests; the server's first model when empty.
        load: share of the capacity.
        rate: requests per second instead, without measuring the capacity.
        max_batch_sequences: the server's batch limit, for where saturation begins in the capacity run.

    Raises:
        ConfigError: the trace or the address is no good, or every request failed.
    """
    address = urlsplit(url)
    if address.scheme != "http" or not address.hostname:
        raise ConfigError(f"url must be http://host:port, not {url!r}")
    if load <= 0 and rate <= 0:
        raise ConfigError("give a load above 0 or a rate above 0")
    fitted = read_trace(trace, num_requests, offset).fit(context)
    model = model or _first_model(url)
    client = StreamingClient(address.hostname, address.port or 80, timeout=timeout)
    report = Report("serve", {"url": url, "model": model, "trace": fitted.name, "offset": offset})
    if not rate:
        together, _ = asyncio.run(_send(client, model, fitted.all_at_once(), seed=1))
        capacity = saturated_rate(together, max_batch_sequences)
        report.config.update(load=load, capacity_requests_per_s=rounded(capacity))
        rate = load * capacity
    times, errors = asyncio.run(_send(client, model, fitted.at_rate(rate), seed=2))
    report.config.update(
        requests_per_s=rounded(rate), num_requests=len(fitted.requests), length_scale=fitted.length_scale
    )
    report.metrics.update(summarise(times))
    report.metrics["failed"] = len(errors)
    if errors:
        report.skipped["failed requests"] = errors[0]
    return report.as_dict()


async def _send(client: StreamingClient, model: str, trace: Trace, seed: int) -> tuple[list[RequestTimes], list[str]]:
    """Every request at its time; the times of those that were answered in full, and the errors of the others.

    Another seed makes other prompts of the same lengths: a server that keeps prefixes has not seen them.
    """
    started = time.perf_counter()

    async def one(index: int) -> StreamResult:
        item = trace.requests[index]
        body = {
            "model": model,
            "prompt": [FIRST_ID + number for number in prompt_ids(item, index, _LAST_ID - FIRST_ID, seed)],
            "max_tokens": item.num_output,
            "ignore_eos": True,
            "temperature": 0.0,
        }
        await asyncio.sleep(max(0.0, started + item.arrival - time.perf_counter()))
        return await client.stream("/v1/completions", body)

    answers = await asyncio.gather(*(one(index) for index in range(len(trace.requests))))
    times: list[RequestTimes] = []
    errors: list[str] = []
    for item, result in zip(trace.requests, answers, strict=True):
        if result.error or not result.times:
            errors.append(result.error or "no token came")
        else:
            first, last = result.times[0] - started, result.times[-1] - started
            num_tokens = result.num_tokens or len(result.times)
            times.append(RequestTimes(item.arrival, first, last, num_tokens, item.num_prompt, item.tenant))
    if not times:
        raise ConfigError(f"every request failed, the first with: {errors[0]}")
    return times, errors


def _first_model(url: str) -> str:
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/v1/models", timeout=10) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ConfigError(f"no model list at {url}/v1/models ({error}); is a server running there?") from error


@contextlib.contextmanager
def own_server(model: str, options: list[str]) -> Iterator[str]:
    """`fastserve serve` as a process of its own on a free loopback port, ended afterwards; gives its address.

    Raises:
        ConfigError: it did not start.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "fastserve.cli.main",
        "serve",
        *([model] if model else []),
        "--port",
        str(port),
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/ready", timeout=5):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise ConfigError("the server did not start; its messages are above")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
