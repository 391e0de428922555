"""Sentences per second of a Marian- and a T5-base-shaped network, greedy and with four beams, beside other engines.

    python benchmarks/translation.py              # float32, bfloat16, int8; 256 sentences; three interleaved repeats,
                                                  # but one of transformers: about ten minutes on two cores
    python benchmarks/translation.py --smoke      # 6 short sentences with the Marian shape, to see that it runs

Lengths are those of Tatoeba's English sentences (sources) and their Chinese ones (answers, rounded up to a multiple of
four, so that engines that batch by length have batches) where the shared data is there, else a stated distribution.
Every engine makes exactly as many tokens: the weights are random, and their end token means nothing. Engines without
continuous batching get the best of several batch sizes. In float32, transformers' greedy tokens must be ours, but for
near-ties. Ratios above 1 mean that ours is better. Peers: transformers in this environment; ctranslate2 where
`benchmarks/peers.py install ctranslate2` has put it: float32 and int8, for its wheel computes nothing in bfloat16 here.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peers
from peer_process import PipedProcess
from shared_data import shared_folder

from fastserve.bench import random_model
from fastserve.bench.report import Report, emit, rounded
from fastserve.checkpoint.folder import ModelFolder
from fastserve.core.cache import cache_folder

ENGINES = Path(__file__).resolve().parent / "peer_engines"
OURS, SHAPES = "fastserve", ("marian", "t5-base")
BATCH_SIZES = (8, 32, 64)
# The precisions that a peer has.
PEERS = {"transformers": ("fp32", "bf16"), "ctranslate2": ("fp32", "int8")}
ONCE = "transformers"  # of the slow, one repeat is enough
Sentences = tuple[list[list[int]], list[int]]  # sources, lengths of answers


class Worker(PipedProcess):
    """One engine in a process of its own."""

    def __init__(self, name: str, model: Path, precision: str, threads: int) -> None:
        python = str(peers.interpreter(name)) if name == "ctranslate2" else sys.executable
        self.batch_size = BATCH_SIZES[0]
        super().__init__(name, [python, str(ENGINES / "run_translator.py"), name, str(model), precision, str(threads)])

    def translate(self, sentences: Sentences, num_beams: int) -> dict[str, Any]:
        """Seconds and tokens."""
        sources, lengths = sentences
        return self._ask(
            {"sources": sources, "lengths": lengths, "num_beams": num_beams, "batch_size": self.batch_size}
        )

    def choose_batch_size(self, sentences: Sentences, num_beams: int) -> None:
        """The quickest for a sample; the first question of all is not counted."""
        seconds = {}
        self.translate((sentences[0][:2], sentences[1][:2]), num_beams)
        for size in BATCH_SIZES if self.name != OURS and len(sentences[0]) > BATCH_SIZES[0] else BATCH_SIZES[:1]:
            self.batch_size = size
            seconds[size] = self.translate(sentences, num_beams)["seconds"]
        self.batch_size = min(seconds, key=lambda size: seconds[size])


def read_lengths(count: int) -> tuple[list[tuple[int, int]], str]:
    """Tokens of sources and answers, and where they are from: 1.3 tokens for a word, 0.7 for a Chinese character."""
    file = shared_folder() / "data" / "tasks" / "tatoeba_cmn_eng_train.tsv"
    if file.is_file():
        with file.open(encoding="utf-8", newline="") as opened:
            rows = [row for row in csv.reader(opened, delimiter="\t", quoting=csv.QUOTE_NONE) if len(row) >= 2]
        rows = rows[1:][:: max(1, len(rows) // count)][:count]
        pairs = [(1 + int(1.3 * len(row[0].split())), 1 + int(0.7 * len(row[1]))) for row in rows]
        return [(source, -(-answer // 4) * 4) for source, answer in pairs], "Tatoeba English-Chinese"
    generator = np.random.default_rng(0)
    drawn = np.clip(generator.lognormal(2.2, 0.4, (count, 2)), 3, 60).astype(int).tolist()
    return [(source, -(-answer // 4) * 4) for source, answer in drawn], "log-normal, median 9 tokens (no shared data)"


def our_model(folder: Path, shape: str, precision: str) -> Path:
    """The folder for our engine: for int8 weights and activations, those of the head too, quantised once."""
    return random_model.make_quantized(shape, "int8-a8", "int8-a8") if precision == "int8" else folder


def peer_model(name: str, folder: Path, shape: str, precision: str) -> Path:
    """The folder in the peer's own form."""
    if name != "ctranslate2":
        return folder
    out = cache_folder() / "peers" / "models" / shape / f"ctranslate2-{precision}"
    if not (out / "model.bin").is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        script = str(ENGINES / "convert_ctranslate2.py")
        kind = {"fp32": "float32"}.get(precision, precision)
        subprocess.run(
            [str(peers.interpreter(name)), script, str(folder), str(out), kind], check=True, stdout=sys.stderr
        )
    return out


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of tokens before the first that differs."""
    same = total = 0
    for one, other in zip(ours, theirs, strict=True):
        total += len(one)
        same += next((place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), len(one))
    return same / total


def compare(
    report: Report, case: str, workers: dict[str, Worker], sentences: Sentences, num_beams: int, repeats: int
) -> None:
    """Sentences per second of each engine, into the report; they take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    num_tokens = sum(sentences[1])
    for worker in workers.values():
        step = max(1, len(sentences[0]) // 64)
        worker.choose_batch_size((sentences[0][::step], sentences[1][::step]), num_beams)
        report.config[f"batch_size.{worker.name}.{case}"] = worker.batch_size
    for repeat in range(repeats):
        names = [name for name in workers if repeat == 0 or name != ONCE][:: 1 if repeat % 2 == 0 else -1]
        answers = {name: workers[name].translate(sentences, num_beams) for name in names}
        for name, answer in answers.items():
            made = sum(map(len, answer["tokens"]))
            if made != num_tokens:
                raise RuntimeError(f"{name} made {made} tokens, not {num_tokens}")
            seconds[name].append(answer["seconds"])
        if "transformers" in answers and case.endswith("fp32") and num_beams == 1:
            share = agreement(answers[OURS]["tokens"], answers["transformers"]["tokens"])
            report.metrics[f"same_tokens.{case}"] = rounded(share)
            if share < 0.9:
                raise RuntimeError(f"only {share:.0%} of the tokens are transformers'")
    for name in workers:
        report.add_runs(f"sentences_per_second.{name}.{case}", [len(sentences[0]) / item for item in seconds[name]])
    values = report.metrics
    for name in workers.keys() - {OURS}:
        ours, theirs = (values[f"sentences_per_second.{item}.{case}"] for item in (OURS, name))
        values[f"ratio.{name}.{case}"] = rounded(ours / theirs)


def run_shape(report: Report, shape: str, options: argparse.Namespace, lengths: list[tuple[int, int]]) -> None:
    """All precisions of one shape."""
    folder = random_model.make(shape)
    vocab_size = int(ModelFolder.open(str(folder)).config["vocab_size"])
    generator = np.random.default_rng(1)
    sources = [generator.integers(10, vocab_size - 10, source).tolist() for source, _ in lengths]
    sentences = (sources, [answer for _, answer in lengths])
    threads = int(report.config["threads"])
    for precision in options.precisions.split(","):
        workers: dict[str, Worker] = {}
        try:
            workers[OURS] = Worker(OURS, our_model(folder, shape, precision), precision, threads)
            for name, precisions in PEERS.items():
                if precision not in precisions:
                    report.skipped[f"{name}.{precision}"] = f"no {precision} form of it is made here"
                elif name == "ctranslate2" and peers.interpreter(name) is None:
                    report.skipped[name] = "not installed: python benchmarks/peers.py install ctranslate2"
                else:
                    workers[name] = Worker(name, peer_model(name, folder, shape, precision), precision, threads)
            for kind, num_beams in (("greedy", 1), ("beam4", 4)):
                compare(report, f"{shape}.{kind}.{precision}", workers, sentences, num_beams, options.repeats)
        finally:
            for worker in workers.values():
                worker.close()


def summarise(report: Report) -> None:
    """`ratio.PEER.PRECISION`: the worst of shapes and searches."""
    by_peer: dict[str, list[float]] = {}
    for key, value in report.metrics.items():
        if key.startswith("ratio."):
            _, name, *_, precision = key.split(".")
            by_peer.setdefault(f"ratio.{name}.{precision}", []).append(value)
    report.metrics.update({key: min(values) for key, values in by_peer.items()})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precisions", default="fp32,bf16,int8")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--smoke", action="store_true", help="6 short sentences, the Marian shape, two repeats")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.sentences, options.repeats, options.shapes = 6, 2, "marian"
    lengths, source = read_lengths(options.sentences)
    report = Report("translation", repeats=options.repeats)
    report.config = {"sentences": len(lengths), "source_tokens": sum(item for item, _ in lengths)}
    report.config |= {"answer_tokens": sum(item for _, item in lengths), "lengths": source}
    report.config |= {"threads": len(os.sched_getaffinity(0))}  # of every engine; `taskset` chooses
    for shape in options.shapes.split(","):
        run_shape(report, shape, options, lengths)
    summarise(report)
    emit(report.as_dict())


if __name__ == "__main__":
    main()
