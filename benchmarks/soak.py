"""Sixty-four streaming clients on one server for a minute: no error, no token lost or repeated, memory flat.

    python benchmarks/soak.py                       # the built-in model
    python benchmarks/soak.py --seconds 600 --model ./my-model --dtype float32

Starts the real server on a free port of the loopback. Every prompt is first answered alone, greedily; then 64 clients
send the same prompts in random order, by both endpoints, and each answer must be that one: same text, same number of
tokens, same finish; a quarter of the requests ask for logprobs and are compared token by token. The precision is the
server's default; only float32 promises the same output in any batch, so in bfloat16 a different answer may be rounding:
run it again with --dtype float32. Memory is the resident set of the server and its engine; growth compares the median
of the last third of the time with the first third after a warm-up.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastserve.bench.loadgen import StreamingClient, StreamResult
from fastserve.bench.report import Report, emit, measure_limits, percentile, rounded

HOST = "127.0.0.1"
SAMPLE_SECONDS = 0.5
START_SECONDS = 120
SUBJECTS = ["a fox", "the sea", "two brothers", "a lost bell", "the old mill", "a white horse", "a garden", "the moon"]
OPENINGS = ["Once upon a time there was", "In the deep of the winter,", "Tell me about", "The king said to"]


@dataclass(frozen=True, slots=True)
class Task:
    """One request, and the fields of its body."""

    path: str
    body: dict[str, Any]


@dataclass(slots=True)
class Outcome:
    """What the clients saw: a line per problem, and the results that were right."""

    problems: list[str] = field(default_factory=list)
    results: list[StreamResult] = field(default_factory=list)


def tasks(has_chat: bool) -> list[Task]:
    """Prompts of a few to a few hundred tokens, answers of 8 to 96, half of them ending where the model ends them."""
    generator = random.Random(5)
    made = []
    for index in range(32):
        text = " ".join(f"{generator.choice(OPENINGS)} {generator.choice(SUBJECTS)}." for _ in range(1 + index % 8 * 2))
        body = {"temperature": 0, "max_tokens": generator.randint(8, 96), "ignore_eos": index % 4 < 2}
        is_chat = has_chat and index % 2 == 1
        if index % 8 < 2:
            body["logprobs"] = True if is_chat else 0
        if is_chat:
            made.append(Task("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}))
        else:
            made.append(Task("/v1/completions", {**body, "prompt": text}))
    return made


def check(result: StreamResult, expected: StreamResult | None) -> str:
    """What is wrong with a result, "" when nothing is; `expected` is the answer that was obtained alone."""
    if result.error:
        return result.error
    if result.finish_reason is None or result.usage is None:
        return "no finish_reason or no usage"
    if len(result.pieces) > result.num_tokens:
        return f"{len(result.pieces)} events for {result.num_tokens} tokens"
    if result.tokens and len(result.tokens) != result.num_tokens:
        return f"{len(result.tokens)} tokens came, {result.num_tokens} were counted"
    if expected is None:
        return ""
    if result.text != expected.text or result.tokens != expected.tokens:
        return f"another answer than alone: {result.text!r}, alone {expected.text!r}"
    if (result.num_tokens, result.finish_reason) != (expected.num_tokens, expected.finish_reason):
        return f"{result.num_tokens} tokens, {result.finish_reason}; alone {expected.num_tokens}"
    return ""


async def answer_alone(client: StreamingClient, jobs: list[Task]) -> list[StreamResult]:
    """Each job's answer with nothing else running.

    Raises:
        RuntimeError: a job fails even then.
    """
    answers = []
    for job in jobs:
        answer = await send(client, job)
        if problem := check(answer, None):
            raise RuntimeError(f"{job.path} fails with one client already: {problem}")
        answers.append(answer)
    return answers


async def send(client: StreamingClient, job: Task) -> StreamResult:
    result = await client.stream(job.path, job.body)
    if job.path.endswith("chat/completions") and result.pieces and result.pieces[0] == "":
        # The first event of a chat carries the role and no token.
        del result.pieces[0], result.times[0]
    return result


async def load(
    client: StreamingClient, jobs: list[Task], alone: list[StreamResult], num_clients: int, seconds: float
) -> Outcome:
    """Keep `num_clients` requests running for `seconds`; those running then are finished."""
    outcome = Outcome()
    end = time.monotonic() + seconds

    async def one(number: int) -> None:
        generator = random.Random(number)
        while time.monotonic() < end:
            index = generator.randrange(len(jobs))
            result = await send(client, jobs[index])
            if problem := check(result, alone[index]):
                outcome.problems.append(f"prompt {index}: {problem}")
                await asyncio.sleep(0.1)  # a server that refuses at once must not be hammered
            else:
                outcome.results.append(result)

    await asyncio.gather(*(one(number) for number in range(num_clients)))
    return outcome


class MemoryWatch:
    """Samples the resident set of a process and all its descendants.

    Attributes:
        samples: (seconds since the start, bytes).
    """

    def __init__(self, process_id: int) -> None:
        self.samples: list[tuple[float, int]] = []
        self._process_id = process_id

    async def run(self) -> None:
        start = time.monotonic()
        while True:
            self.samples.append((time.monotonic() - start, sum(map(resident_bytes, self._family()))))
            await asyncio.sleep(SAMPLE_SECONDS)

    def growth(self, warm_up: float) -> float:
        """Median of the last third over the median of the first third, after `warm_up` seconds, less one."""
        values = [value for moment, value in self.samples if moment >= warm_up]
        third = len(values) // 3
        if third < 3:
            raise RuntimeError("too few memory samples; run for longer")
        return statistics.median(values[-third:]) / statistics.median(values[:third]) - 1

    def _family(self) -> Iterator[int]:
        waiting = [self._process_id]
        while waiting:
            process_id = waiting.pop()
            yield process_id
            for children in Path(f"/proc/{process_id}/task").glob("*/children"):
                waiting.extend(map(int, children.read_text().split()))


def resident_bytes(process_id: int) -> int:
    """Resident set; 0 for a process that has gone."""
    try:
        pages = int(Path(f"/proc/{process_id}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def running_server(model: str, options: list[str]) -> Iterator[tuple[int, subprocess.Popen[bytes], float]]:
    """A server on a free port: (port, process, seconds from start to ready); ended by SIGTERM.

    Raises:
        RuntimeError: it did not get ready; its log is in the message.
    """
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "fastserve.cli.main", "serve", *([model] if model else [])]
    command += ["--host", HOST, "--port", str(port), *options]
    with tempfile.TemporaryFile() as log:
        start = time.monotonic()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not is_ready(port):
                if process.poll() is not None or time.monotonic() - start > START_SECONDS:
                    log.seek(0)
                    raise RuntimeError(f"the server did not start:\n{log.read().decode()[-4000:]}")
                time.sleep(0.05)
            yield port, process, time.monotonic() - start
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/ready", timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.HTTPError):
        return False


async def soak(
    port: int, process_id: int, num_clients: int, seconds: float, warm_up: float
) -> tuple[Outcome, float, MemoryWatch, dict[str, str]]:
    client = StreamingClient(HOST, port, timeout=300)
    skipped: dict[str, str] = {}
    chat = Task("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1})
    probe = await send(client, chat)
    if probe.status == 400:
        skipped["chat"] = probe.error
    jobs = tasks(has_chat=not skipped)
    alone = await answer_alone(client, jobs)
    watch = MemoryWatch(process_id)
    watching = asyncio.create_task(watch.run())
    start = time.monotonic()
    outcome = await load(client, jobs, alone, num_clients, warm_up + seconds)
    elapsed = time.monotonic() - start
    watching.cancel()
    return outcome, elapsed, watch, skipped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="", help="folder; the built-in model when left out")
    parser.add_argument("--seconds", type=float, default=60.0, help="after the warm-up")
    parser.add_argument("--warm-up", type=float, default=10.0, help="seconds that memory is not judged by")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    with running_server(arguments.model, ["--dtype", arguments.dtype]) as (port, process, start_seconds):
        outcome, elapsed, watch, skipped = asyncio.run(
            soak(port, process.pid, arguments.clients, arguments.seconds, arguments.warm_up)
        )
        if process.poll() is not None:
            outcome.problems.append(f"the server ended with status {process.returncode}")
    report = Report("soak", skipped=skipped)
    report.limits["after"] = measure_limits()
    report.config = {
        "model": arguments.model or "built-in",
        "num_clients": arguments.clients,
        "seconds": arguments.seconds,
        "warm_up_seconds": arguments.warm_up,
        "precision": dict.fromkeys(("weights", "kv_cache", "lm_head"), arguments.dtype),
    }
    report.metrics = {
        "errors": len(outcome.problems),
        "rss_growth": rounded(watch.growth(arguments.warm_up)),
        "rss_mib": rounded(watch.samples[-1][1] / 2**20),
        "requests": len(outcome.results),
        "output_tokens_per_second": rounded(sum(result.num_tokens for result in outcome.results) / elapsed),
        "ttft_p50_seconds": rounded(percentile([result.ttft for result in outcome.results], 0.5)),
        "ttft_p99_seconds": rounded(percentile([result.ttft for result in outcome.results], 0.99)),
        "tpot_p50_ms": rounded(1000 * percentile([result.tpot for result in outcome.results], 0.5)),
        "tpot_p99_ms": rounded(1000 * percentile([result.tpot for result in outcome.results], 0.99)),
        "start_seconds": rounded(start_seconds),
    }
    for problem in outcome.problems[:20]:
        print(f"problem: {problem[:500]}", file=sys.stderr)
    emit(report.as_dict())
    if outcome.problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
