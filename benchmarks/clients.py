"""A thousand slow or vanishing clients: the server must hold nothing of them afterwards.

    python benchmarks/clients.py               # 1,000 clients on the built-in model
    python benchmarks/clients.py --smoke       # 150

Heads and bodies that stop halfway, streams that are left after their first bytes or never read, answers that nobody
waits for, requests sent behind one another, connections half closed. Before and after: open descriptors and threads of
the server and of its engine, running and waiting sequences, KV blocks of live sequences, and the answer to one prompt.
Starts the real server on a free port of the loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import socket
import sys
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

from fastserve.bench.report import Report, emit

_AT_ONCE = 100
_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
_GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
_SETTLE_SECONDS = 60.0
_MORE_DESCRIPTORS = 3  # that may be open later than before: connections that are kept alive


def request(**fields: object) -> bytes:
    body = json.dumps({"prompt": "Once upon a time", "ignore_eos": True, **fields}).encode()
    return _HEAD % len(body) + body


STREAM = request(max_tokens=400, stream=True)
WHOLE = request(max_tokens=400)
MANY = request(max_tokens=400, stream=True, n=4, logprobs=5)


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a server holds."""

    descriptors: int
    threads: int
    sequences: float
    kv_share: float
    answer: str


async def vanish(port: int, count: int) -> None:
    """`count` clients of all kinds, some at once; returns when the last has gone."""
    limit = asyncio.Semaphore(_AT_ONCE)

    async def one(number: int) -> None:
        async with limit:
            await _KINDS[number % len(_KINDS)](port)

    await asyncio.gather(*(one(number) for number in range(count)))


async def _cut(port: int, data: bytes, *, reads: int = 0, stays: float = 0.0, half_closes: bool = False) -> None:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=connection, limit=1024)
    with contextlib.suppress(OSError):
        writer.write(data)
        await writer.drain()
        if half_closes:
            writer.write_eof()
        if reads:
            await reader.read(reads)
        await asyncio.sleep(stays)
    writer.transport.abort()


async def _trickle(port: int) -> None:
    """A head that comes a few bytes at a time and never ends."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(OSError):
        for start in range(0, 60, 3):
            writer.write(STREAM[start : start + 3])
            await writer.drain()
            await asyncio.sleep(0.02)
    writer.transport.abort()


_KINDS = (
    lambda port: _cut(port, STREAM[:20]),
    lambda port: _cut(port, STREAM[:-5], stays=0.2),
    lambda port: _cut(port, STREAM),
    lambda port: _cut(port, STREAM, reads=50),
    lambda port: _cut(port, WHOLE, stays=0.1),
    lambda port: _cut(port, WHOLE + STREAM, stays=0.1),
    lambda port: _cut(port, MANY, stays=0.5),
    lambda port: _cut(port, STREAM, reads=1, half_closes=True),
    _trickle,
)


def holdings(process_id: int, port: int) -> Holdings:
    """What the server and its engine hold, once nothing runs; waits for that.

    Raises:
        RuntimeError: something still runs after a minute.
    """
    end = time.monotonic() + _SETTLE_SECONDS
    while any((values := gauges(port)).values()):
        if time.monotonic() > end:
            raise RuntimeError(f"something is still held after {_SETTLE_SECONDS:g} s: {values}")
        time.sleep(0.1)
    ids = [process_id, *map(int, Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split())]
    fields = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
    ask = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        json.dumps(fields).encode(),
        {"Content-Type": "application/json", "Connection": "close"},
    )
    with urllib.request.urlopen(ask, timeout=60) as reply:
        answer = json.load(reply)["choices"][0]["text"]
    return Holdings(
        descriptors=sum(len(list(Path(f"/proc/{one}/fd").iterdir())) for one in ids),
        threads=sum(len(list(Path(f"/proc/{one}/task").iterdir())) for one in ids),
        sequences=values["num_requests_running"] + values["num_requests_waiting"],
        kv_share=values["kv_cache_usage_perc"],
        answer=answer,
    )


def gauges(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as reply:
        text = reply.read().decode()
    found = {name: re.search(rf"^fastserve_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE) for name in _GAUGES}
    return {name: float(match[1]) for name, match in found.items() if match}


def faults(before: Holdings, after: Holdings) -> list[str]:
    """What is held of clients that have gone."""
    found = []
    if after.descriptors > before.descriptors + _MORE_DESCRIPTORS:
        found.append(f"{after.descriptors - before.descriptors} descriptors more")
    if after.threads > before.threads:
        found.append(f"{after.threads - before.threads} threads more")
    if after.sequences or after.kv_share:
        found.append(f"{after.sequences:g} sequences, {after.kv_share:g} of the KV cache")
    if after.answer != before.answer:
        found.append(f"another answer: {after.answer!r}, before {before.answer!r}")
    return found


def main() -> None:
    from soak import running_server

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--smoke", action="store_true", help="150 clients")
    options = parser.parse_args()
    count = 150 if options.smoke else options.clients
    arguments = ["--max-waiting", "2000", "--kv-cache-memory", "64MiB"]
    with running_server("", arguments) as (port, process, _):
        asyncio.run(vanish(port, _AT_ONCE))  # threads and buffers that stay are made by the first clients
        before = holdings(process.pid, port)
        started = time.monotonic()
        asyncio.run(vanish(port, count))
        seconds = time.monotonic() - started
        after = holdings(process.pid, port)
        found = faults(before, after)
    report = Report("clients", {"clients": count})
    for name in ("descriptors", "threads", "sequences", "kv_share"):
        report.metrics[f"{name}_before"] = asdict(before)[name]
        report.metrics[f"{name}_after"] = asdict(after)[name]
    report.metrics |= {"faults": len(found), "seconds": round(seconds, 1)}
    for fault in found:
        print(f"fault: {fault}", file=sys.stderr)
    emit(report.as_dict())
    if found:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
