"""Replay a request trace over HTTP against any server that speaks OpenAI's completions, ours or another.

Prompts go as token ids, answers run to their recorded lengths (`ignore_eos`, which FastServe and vLLM know), and every
piece's arrival is recorded at the client. Capacity is measured on the server itself unless a rate is given: the same
requests, all sent at once. A server that asks for a key gets the one in FASTSERVE_API_KEY.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

from fastserve.bench.latencies import RequestTimes, saturated_rate, summarise
from fastserve.bench.loadgen import StreamingClient, StreamResult
from fastserve.bench.report import Report, rounded
from fastserve.bench.traces import Trace, TraceRequest, prompt_ids, read_trace
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
    server_options: Sequence[str] = (),
) -> dict[str, Any]:
    """Replay and return the report; failed requests are counted in `metrics.failed` (`metrics.capacity_failed` for the
    capacity run) and left out of the figures.

    Args:
        url: http://host:port of the server.
        model: its name in the requests; the server's first model when empty.
        load: share of the capacity.
        rate: requests per second instead, without measuring the capacity.
        max_batch_sequences: the server's batch limit, for where saturation begins in the capacity run.
        server_options: what the server was started with, for the report.

    Raises:
        ConfigError: the trace or the address is no good, or every request failed.
    """
    address = urlsplit(url)
    if address.scheme != "http" or not address.hostname:
        raise ConfigError(f"url must be http://host:port, not {url!r}")
    if not (0 < rate < math.inf or (rate == 0 and 0 < load < math.inf)):
        raise ConfigError("give a load above 0 or a rate above 0")
    fitted = read_trace(trace, num_requests, offset).fit(context)
    model = model or _first_model(url)
    client = StreamingClient(address.hostname, address.port or 80, _api_key(), timeout)
    report = Report("serve", {"url": url, "model": model, "trace": fitted.name, "offset": offset, "context": context})
    report.config.update(max_batch_sequences=max_batch_sequences, server_options=list(server_options))

    def answered(part: Trace, seed: int, name: str) -> list[RequestTimes]:
        times, errors = replay(client, model, part, seed)
        if not times:
            raise ConfigError(f"every request failed; {errors[0]}")
        report.metrics[name] = len(errors)
        if errors:
            report.skipped[f"{name} requests"] = f"{len(errors)} of {len(part.requests)}; {errors[0]}"
        return times

    if not rate:
        capacity = saturated_rate(answered(fitted.all_at_once(), 1, "capacity_failed"), max_batch_sequences)
        report.config.update(load=load, capacity_requests_per_s=rounded(capacity))
        rate = load * capacity
    report.config.update(
        requests_per_s=rounded(rate), num_requests=len(fitted.requests), length_scale=fitted.length_scale
    )
    report.metrics.update(summarise(answered(fitted.at_rate(rate), 2, "failed")))
    return report.as_dict()


def replay(client: StreamingClient, model: str, trace: Trace, seed: int) -> tuple[list[RequestTimes], list[str]]:
    """Send every request when it is due; the times (from the start) of those that got as many tokens as they asked for,
    and what went wrong with the others.

    Another seed makes other prompts of the same lengths: a server that keeps prefixes has not seen them.
    """
    return asyncio.run(_replay(client, model, trace, seed))


async def _replay(client: StreamingClient, model: str, trace: Trace, seed: int) -> tuple[list[RequestTimes], list[str]]:
    bodies = [
        {
            "model": model,
            "prompt": [FIRST_ID + number for number in prompt_ids(item, index, _LAST_ID - FIRST_ID, seed)],
            "max_tokens": item.num_output,
            "ignore_eos": True,
            "temperature": 0.0,
        }
        for index, item in enumerate(trace.requests)
    ]
    started = time.perf_counter()

    async def one(item: TraceRequest, body: dict[str, Any]) -> StreamResult:
        await asyncio.sleep(max(0.0, started + item.arrival - time.perf_counter()))
        return await client.stream("/v1/completions", body)

    answers = await asyncio.gather(*map(one, trace.requests, bodies))
    times: list[RequestTimes] = []
    errors: list[str] = []
    for index, (item, result) in enumerate(zip(trace.requests, answers, strict=True)):
        num_tokens = result.num_tokens if result.usage else len(result.times)  # not every server counts
        if result.error or num_tokens != item.num_output or not result.times:
            errors.append(f"request {index}: {result.error or f'{num_tokens} tokens instead of {item.num_output}'}")
        else:
            first, last = result.times[0] - started, result.times[-1] - started
            times.append(RequestTimes(item.arrival, first, last, num_tokens, item.num_prompt, item.tenant))
    return times, errors


def _first_model(url: str) -> str:
    try:
        with _get(f"{url.rstrip('/')}/v1/models", timeout=10) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"no model list at {url}/v1/models ({error}); is a server running there?") from error


def _api_key() -> str:
    return os.environ.get("FASTSERVE_API_KEY", "")


def _get(url: str, timeout: float) -> Any:
    """The answer to a GET with our key.

    Raises:
        ConfigError: the server asks for another key.
    """
    request = urllib.request.Request(url)
    if key := _api_key():
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    try:
        return urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            raise ConfigError(f"{url} asks for a key; set FASTSERVE_API_KEY to one of the server's") from error
        raise


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
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            with contextlib.suppress(OSError), _get(f"{url}/ready", timeout=5):
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
