"""A decoder, an encoder and a translator in one server: what each gets, and what the encoder's tail pays for it.

    python benchmarks/mixed.py             # 60 s alone, 60 s together, 60 s of more than they can take
    python benchmarks/mixed.py --smoke     # 3 s of each with tiny models, to see that it runs

One server holds the built-in model, a random BERT-base and a random Marian (bfloat16). First the encoder alone gets 5
requests of 128 tokens a second; then the same while 8 streams generate without pause and 2 translations a second (12
tokens, 12 made, 4 beams) come; then all get more than they can take (32 streams, 128 texts and 32 searches that wait),
for the shares of step time, which the server's metrics tell. `p99_ratio_alone` is the encoder's P99 alone over its P99
beside the others: 1 is no loss, 0.4 is what may be lost. `share_error` is how far any model's share of step time is
from its weight's (a third) when all are busy.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx

from fastserve.bench import random_model
from fastserve.bench.report import Report, emit, percentile, rounded

RATE, NUM_STREAMS, LENGTH = 5.0, 8, 128
TRANSLATION_RATE, SENTENCE = 2.0, 12
SOURCE = list(range(100, 100 + SENTENCE))
_STARTED = re.compile(r"at (http://\S+) after")


@contextlib.contextmanager
def running_server(encoder: Path, translator: Path, threads: int) -> Iterator[str]:
    """The server's address."""
    command = [sys.executable, "-m", "fastserve.cli.main", "serve", ""]
    command += [f"{encoder}?dtype=bfloat16", f"{translator}?dtype=bfloat16"]
    options = [
        "--name",
        "decoder,encoder,translator",
        "--port",
        "0",
        "--num-threads",
        str(threads),
        "--kv-cache-memory",
        "256MiB",
    ]
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

    body = {"model": "encoder", "input": ids, "encoding_format": "base64"}
    return await at_rate(client, "/v1/embeddings", body, seconds, rate)


def translation() -> dict[str, object]:
    """The body of one translation."""
    return {"model": "translator", "prompt": SOURCE, "max_tokens": SENTENCE, "ignore_eos": True, "num_beams": 4}


async def at_rate(
    client: httpx.AsyncClient, path: str, body: Mapping[str, object], seconds: float, rate: float
) -> list[float]:
    """Latencies of requests that come at a fixed rate."""

    async def one() -> float:
        started = time.perf_counter()
        reply = await client.post(path, json=body)
        reply.raise_for_status()
        return time.perf_counter() - started

    started, tasks = time.perf_counter(), []
    while (now := time.perf_counter() - started) < seconds:
        tasks.append(asyncio.create_task(one()))
        await asyncio.sleep(max(0.0, len(tasks) / rate - now))
    return list(await asyncio.gather(*tasks))


async def translate_without_pause(client: httpx.AsyncClient, seconds: float) -> int:
    """Sentences translated while 32 are always here."""
    end = time.perf_counter() + seconds

    async def one() -> int:
        count = 0
        while time.perf_counter() < end:
            reply = await client.post("/v1/completions", json=translation())
            reply.raise_for_status()
            count += 1
        return count

    return sum(await asyncio.gather(*(one() for _ in range(32))))


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


async def step_seconds(client: httpx.AsyncClient) -> dict[str, float]:
    """Time that each model's steps took so far."""
    text = (await client.get("/metrics")).text
    found = re.findall(
        r'^fastserve_(engine|array)_step_seconds_total\{.*model_name="([^"]*)".*\} (\S+)$', text, re.MULTILINE
    )
    return {name: float(seconds) for _, name, seconds in found}


async def shares_of_steps(client: httpx.AsyncClient, seconds: float) -> dict[str, float]:
    """Each model's part of step time from a tenth to nine tenths of `seconds`, while nobody begins or ends."""
    await asyncio.sleep(0.1 * seconds)
    before = await step_seconds(client)
    await asyncio.sleep(0.8 * seconds)
    taken = {name: now - before.get(name, 0.0) for name, now in (await step_seconds(client)).items()}
    return {name: value / sum(taken.values()) for name, value in taken.items()}


async def measure(url: str, seconds: float, report: Report) -> None:
    """All three parts, into the report."""
    translations = "/v1/completions"
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        warm = at_rate(client, translations, translation(), 1.0, TRANSLATION_RATE)
        await asyncio.gather(encode(client, 1.0, RATE), generate(client, 1.0), warm)
        alone = await encode(client, seconds, RATE)
        beside, tokens, translated = await asyncio.gather(
            encode(client, seconds, RATE),
            generate(client, seconds),
            at_rate(client, translations, translation(), seconds, TRANSLATION_RATE),
        )
        busy_tokens, texts, sentences, shares = await asyncio.gather(
            generate(client, seconds, 32, 160),
            encode_without_pause(client, seconds),
            translate_without_pause(client, seconds),
            shares_of_steps(client, seconds),
        )
    p99_alone, p99_beside = percentile(alone, 0.99), percentile(beside, 0.99)
    report.metrics = {
        "p99_ratio_alone": rounded(p99_alone / p99_beside),
        "encoder_p99_alone_seconds": rounded(p99_alone),
        "encoder_p99_beside_seconds": rounded(p99_beside),
        "encoder_p50_alone_seconds": rounded(percentile(alone, 0.5)),
        "encoder_p50_beside_seconds": rounded(percentile(beside, 0.5)),
        "translation_p50_beside_seconds": rounded(percentile(translated, 0.5)),
        "decoder_tokens_per_second": rounded(tokens / seconds),
        "share_error": rounded(max(abs(share * len(shares) - 1) for share in shares.values())),
        "busy_decoder_tokens_per_second": rounded(busy_tokens / seconds),
        "busy_encoder_texts_per_second": rounded(texts / seconds),
        "busy_translator_sentences_per_second": rounded(sentences / seconds),
    }
    report.metrics |= {f"busy_{name}_share": rounded(share) for name, share in shares.items()}


def make_tiny_encoder(folder: Path) -> Path:
    """A BERT of two narrow layers, for --smoke."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    BertModel(config).save_pretrained(folder)
    random_model.write_tokenizer(folder)
    return folder


def make_tiny_translator(folder: Path) -> Path:
    """A Marian of two narrow layers, for --smoke."""
    from transformers import MarianConfig, MarianMTModel

    layers = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
    sizes = dict(vocab_size=4096, d_model=64, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=128)
    MarianMTModel(
        MarianConfig(**layers, **sizes, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0)
    ).save_pretrained(folder)
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
        encoder = make_tiny_encoder(Path(folder) / "encoder") if options.smoke else random_model.make("bert-base")
        translator = make_tiny_translator(Path(folder) / "translator") if options.smoke else random_model.make("marian")
        report = Report("mixed", repeats=1)
        report.config = {"seconds": seconds, "rate": RATE, "streams": NUM_STREAMS, "tokens": LENGTH, "threads": threads}
        report.config["encoder"] = "tiny" if options.smoke else "bert-base, random weights, bfloat16"
        report.config["translator"] = "tiny" if options.smoke else "marian, random weights, bfloat16, 4 beams"
        report.config |= {"translation_rate": TRANSLATION_RATE, "sentence_tokens": SENTENCE}
        with running_server(encoder, translator, threads) as url:
            asyncio.run(measure(url, seconds, report))
    emit(report.as_dict())


if __name__ == "__main__":
    main()
