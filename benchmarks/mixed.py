"""A decoder and an encoder in one server: what each gets of the machine, and what the encoder's tail pays for it.

    python benchmarks/mixed.py             # 60 s alone and 60 s together
    python benchmarks/mixed.py --smoke     # 3 s of each with tiny models, to see that it runs

One server holds the built-in model and a random BERT-base (bfloat16). First the encoder alone gets 5 requests of 128
tokens a second; then the same while 8 streams generate without pause; then both more than they can take (32 streams,
128 texts that wait), for the shares of step time, which the server's metrics tell. `p99_ratio_alone` is the encoder's
P99 alone over its P99 beside the decoder: 1 is no loss, 0.4 is what may be lost. `share_error` is how far the decoder's
share of step time is from its weight's (a half) when both are busy. A translator is to join when encoder-decoders are
served.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from fastserve.bench import random_model
from fastserve.bench.report import Report, emit, percentile, rounded

RATE, NUM_STREAMS, LENGTH = 5.0, 8, 128
_STARTED = re.compile(r"at (http://\S+) after")


@contextlib.contextmanager
def running_server(encoder: Path, threads: int) -> Iterator[str]:
    """The server's address."""
    command = [sys.executable, "-m", "fastserve.cli.main", "serve", "", f"{encoder}?dtype=bfloat16"]
    options = ["--name", "decoder,encoder", "--port", "0", "--num-threads", str(threads), "--kv-cache-memory", "256MiB"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if match := _STARTED.search(line):
                break
        else:
            raise RuntimeError(f"the server ended with status {process.wait()}")
        yield match[1]
    finally:
        process.terminate()
        process.wait(30)


async def encode(client: httpx.AsyncClient, seconds: float, rate: float) -> list[float]:
    """Latencies of embedding requests that come at a fixed rate, whatever the answers do."""
    ids = [2, *([1000] * (LENGTH - 2)), 3]

    async def one() -> float:
        started = time.perf_counter()
        reply = await client.post(
            "/v1/embeddings", json={"model": "encoder", "input": ids, "encoding_format": "base64"}
        )
        reply.raise_for_status()
        return time.perf_counter() - started

    started, tasks = time.perf_counter(), []
    while (now := time.perf_counter() - started) < seconds:
        tasks.append(asyncio.create_task(one()))
        await asyncio.sleep(max(0.0, len(tasks) / rate - now))
    return list(await asyncio.gather(*tasks))


async def encode_without_pause(client: httpx.AsyncClient, seconds: float) -> int:
    """Requests answered while 8 of 16 texts each are always here."""
    ids = [2, *([1000] * (LENGTH - 2)), 3]
    end = time.perf_counter() + seconds

    async def one() -> int:
        count = 0
        while time.perf_counter() < end:
            reply = await client.post("/v1/embeddings", json={"model": "encoder", "input": [ids] * 16})
            reply.raise_for_status()
            count += 16
        return count

    return sum(await asyncio.gather(*(one() for _ in range(8))))


async def generate(client: httpx.AsyncClient, seconds: float, streams: int = NUM_STREAMS, length: int = 64) -> int:
    """Tokens that streams without pause make; of unlike lengths, so that they do not all end in one step."""
    end = time.perf_counter() + seconds

    async def one(number: int) -> int:
        count = 0
        body = {"prompt": "Once upon a time", "max_tokens": length + 4 * number, "ignore_eos": True, "stream": False}
        while time.perf_counter() < end:
            reply = await client.post("/v1/completions", json=body)
            reply.raise_for_status()
            count += int(reply.json()["usage"]["completion_tokens"])
        return count

    return sum(await asyncio.gather(*(one(number) for number in range(streams))))


async def step_seconds(client: httpx.AsyncClient) -> tuple[float, float]:
    """Time that the decoder's steps took so far, and the encoder's."""
    text = (await client.get("/metrics")).text
    found = [
        re.search(rf"^fastserve_{name}_step_seconds_total\{{.*\}} (\S+)$", text, re.MULTILINE)
        for name in ("engine", "array")
    ]
    assert found[0] is not None and found[1] is not None
    return float(found[0][1]), float(found[1][1])


async def decoder_share(client: httpx.AsyncClient, seconds: float) -> float:
    """The decoder's part of step time from a tenth to nine tenths of `seconds`, while nobody begins or ends."""
    await asyncio.sleep(0.1 * seconds)
    before = await step_seconds(client)
    await asyncio.sleep(0.8 * seconds)
    decoder, encoder = (now - then for now, then in zip(await step_seconds(client), before, strict=True))
    return decoder / (decoder + encoder)


async def measure(url: str, seconds: float, report: Report) -> None:
    """All three parts, into the report."""
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        await asyncio.gather(encode(client, 1.0, RATE), generate(client, 1.0))  # warm
        alone = await encode(client, seconds, RATE)
        beside, tokens = await asyncio.gather(encode(client, seconds, RATE), generate(client, seconds))
        busy_tokens, texts, share = await asyncio.gather(
            generate(client, seconds, 32, 160), encode_without_pause(client, seconds), decoder_share(client, seconds)
        )
    p99_alone, p99_beside = percentile(alone, 0.99), percentile(beside, 0.99)
    report.metrics = {
        "p99_ratio_alone": rounded(p99_alone / p99_beside),
        "encoder_p99_alone_seconds": rounded(p99_alone),
        "encoder_p99_beside_seconds": rounded(p99_beside),
        "encoder_p50_alone_seconds": rounded(percentile(alone, 0.5)),
        "encoder_p50_beside_seconds": rounded(percentile(beside, 0.5)),
        "decoder_tokens_per_second": rounded(tokens / seconds),
        "busy_decoder_share": rounded(share),
        "share_error": rounded(abs(share - 0.5) / 0.5),
        "busy_decoder_tokens_per_second": rounded(busy_tokens / seconds),
        "busy_encoder_texts_per_second": rounded(texts / seconds),
    }


def make_tiny_encoder(folder: Path) -> Path:
    """A BERT of two narrow layers, for --smoke."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    BertModel(config).save_pretrained(folder)
    random_model.write_tokenizer(folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args(arguments)
    seconds = 3.0 if options.smoke else options.seconds
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        encoder = make_tiny_encoder(Path(folder)) if options.smoke else random_model.make("bert-base")
        report = Report("mixed", repeats=1)
        report.config = {"seconds": seconds, "rate": RATE, "streams": NUM_STREAMS, "tokens": LENGTH, "threads": threads}
        report.config["encoder"] = "tiny" if options.smoke else "bert-base, random weights, bfloat16"
        with running_server(encoder, threads) as url:
            asyncio.run(measure(url, seconds, report))
    report.skipped["translator"] = "encoder-decoders are not served yet"
    emit(report.as_dict())


if __name__ == "__main__":
    main()
