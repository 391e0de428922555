"""Data preparation: speed beside datatrove, memory of a large file, precision and recall of near-duplicates.

    python benchmarks/prepare.py            1 GB for the memory, 40 MB for the speed; about 15 minutes on two cores
    python benchmarks/prepare.py --smoke    a minute
    python benchmarks/prepare.py --part large    the memory of a large file alone

datatrove runs in an environment of its own (python benchmarks/peers.py install datatrove). Both sides do length limits,
Gopher's quality and repetition rules and MinHash deduplication on two processes, from JSON lines; ours repairs besides.
Ratios above 1: ours is faster.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from peers import interpreter
from shared_data import shared_folder

from fastserve.bench.report import Report, emit

PARTS = ("duplicates", "speed", "large")
_WORDS = 20_000  # of the made-up language, where there are no corpora


def documents(size: int, seed: int) -> Iterator[str]:
    """Texts of about 2,000 characters: pieces of the shared corpora where they are, else of made-up words."""
    chooser = random.Random(seed)
    source = shared_folder() / "data" / "corpora" / "tinyshakespeare.txt"
    if source.exists():
        words = source.read_text(encoding="utf-8").split()
    else:
        words = ["".join(chooser.choices("abcdefghijklmnoprstuvw", k=chooser.randint(2, 9))) for _ in range(_WORDS)]
    written = 0
    while written < size:
        lines = [" ".join(chooser.choices(words, k=chooser.randint(8, 16))).capitalize() + "." for _ in range(25)]
        text = "\n".join(lines)
        written += len(text)
        yield text


def planted(size: int, seed: int) -> tuple[list[str], set[int]]:
    """Documents, and which of them are copies of earlier ones with 1 to 4 % of the words changed, or other case."""
    chooser = random.Random(seed)
    texts = list(documents(size, seed))
    copies: set[int] = set()
    for text in texts[: len(texts) // 3]:
        words = text.split(" ")
        for _ in range(max(1, round(len(words) * chooser.uniform(0.01, 0.04)))):
            words[chooser.randrange(len(words))] = chooser.choice(words)
        copies.add(len(texts))
        edited = " ".join(words)
        texts.append(chooser.choice([edited, edited.upper(), edited.replace(".", " !")]))
    return texts, copies


def write(path: Path, texts: Iterator[str]) -> Path:
    with open(path, "w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path


def ours(source: Path, out: Path) -> tuple[float, int]:
    """(seconds, most resident bytes of all processes together) of `fastserve data prepare`."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "fastserve.cli.main", "data", "prepare", str(source), "--out", str(out)]
    return timed([*command, "--workers", "2", "--validation-share", "0"])


def timed(command: list[str]) -> tuple[float, int]:
    start, most, is_over = time.monotonic(), 0, threading.Event()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def watch() -> None:
        nonlocal most
        while not is_over.wait(0.1):
            total = 0
            try:
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
            for member in family:
                try:
                    total += member.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            most = max(most, total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, errors = process.communicate()
    is_over.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{command[0]} failed: {errors[-2000:]}")
    return time.monotonic() - start, most


_DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor as Run
from datatrove.pipeline.dedup import MinhashDedupSignature, MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
if __name__ == "__main__":
    source, out = sys.argv[1:]
    config = MinhashConfig(n_grams=3, num_buckets=24, hashes_per_bucket=5)
    Run([JsonlReader(source), GopherQualityFilter(min_stop_words=0, min_doc_words=10), GopherRepetitionFilter(),
         JsonlWriter(out + "/kept", compression=None)], tasks=2, workers=2, logging_dir=out + "/l1").run()
    Run([JsonlReader(out + "/kept"), MinhashDedupSignature(out + "/signatures", config=config)], tasks=2, workers=2,
        logging_dir=out + "/l2").run()
    Run([MinhashDedupBuckets(out + "/signatures", out + "/buckets", config=config)], tasks=24, workers=2,
        logging_dir=out + "/l3").run()
    Run([MinhashDedupCluster(out + "/buckets", out + "/remove", config=config)], tasks=1, logging_dir=out + "/l4").run()
    final = JsonlWriter(out + "/final", compression=None)
    Run([JsonlReader(out + "/kept"), MinhashDedupFilter(out + "/remove"), final],
        tasks=2, workers=2, logging_dir=out + "/l5").run()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--large-bytes", type=int, default=1_000_000_000)
    parser.add_argument("--speed-bytes", type=int, default=40_000_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--part", action="append", choices=PARTS, help="measure this alone; repeat it for several")
    parser.add_argument("--smoke", action="store_true", help="sizes that take a minute")
    options = parser.parse_args()
    if options.smoke:
        options.large_bytes, options.speed_bytes, options.repeats = 40_000_000, 4_000_000, 1
    config = {"large_bytes": options.large_bytes, "speed_bytes": options.speed_bytes, "workers": 2}
    report = Report("prepare", config=config, repeats=options.repeats)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        parts = options.part or PARTS
        if "duplicates" in parts:
            measure_duplicates(root, report, options.speed_bytes // 4)
        if "speed" in parts:
            measure_speed(root, report, options)
        if "large" in parts:
            measure_large(root, report, options.large_bytes)
    emit(report.as_dict())


def measure_large(root: Path, report: Report, size: int) -> None:
    """One file of so many bytes: the most memory of all processes together, and the speed."""
    large = write(root / "large.jsonl", documents(size, 3))
    seconds, most = ours(large, root / "large")
    report.metrics["large_file_bytes"] = large.stat().st_size
    report.metrics["large_file_peak_bytes"] = most
    report.metrics["large_file_mb_per_second"] = round(large.stat().st_size / seconds / 1e6, 3)


def measure_duplicates(root: Path, report: Report, size: int) -> None:
    texts, copies = planted(size, 1)
    ours(write(root / "planted.jsonl", iter(texts)), root / "planted")
    kept: set[str] = set()
    for path in (root / "planted" / "text").glob("*.jsonl"):
        kept.update(json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines())
    dropped = {index for index, text in enumerate(texts) if text.strip() not in kept}
    report.metrics["precision"] = round(len(dropped & copies) / max(1, len(dropped)), 5)
    report.metrics["recall"] = round(len(dropped & copies) / len(copies), 5)


def measure_speed(root: Path, report: Report, options: argparse.Namespace) -> None:
    folder = root / "speed"
    folder.mkdir()
    half = options.speed_bytes // 2
    for part in range(2):  # two files: datatrove gives each process whole files
        write(folder / f"{part}.jsonl", documents(half, 10 + part))
    size = sum(path.stat().st_size for path in folder.iterdir())
    script = root / "with_datatrove.py"
    script.write_text(_DATATROVE, encoding="utf-8")
    datatrove = interpreter("datatrove")
    mine, theirs = [], []
    for _ in range(options.repeats):
        mine.append(ours(folder, root / "ours")[0])
        if datatrove:
            shutil.rmtree(root / "theirs", ignore_errors=True)
            theirs.append(timed([str(datatrove), str(script), str(folder), str(root / "theirs")])[0])
    report.add_runs("mb_per_second", [size / seconds / 1e6 for seconds in mine])
    if theirs:
        report.add_runs("datatrove_mb_per_second", [size / seconds / 1e6 for seconds in theirs])
        report.add_runs("ratio_vs_datatrove", [other / own for own, other in zip(mine, theirs, strict=True)])
    else:
        report.skipped["datatrove"] = "not installed: python benchmarks/peers.py install datatrove"


if __name__ == "__main__":
    main()
