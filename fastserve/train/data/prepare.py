"""`fastserve data prepare`: any mix of inputs to clean, deduplicated, split text and token shards.

    read    every part of the input, in parallel: clean, rules, leaks, hashes, signatures    -> OUT/parts/
    compare all hashes and signatures: which documents repeat an earlier one                 -> OUT/parts/kept
    write   what stays, split by hash, in parallel                                           -> OUT/text/
    pack    with a tokenizer: token shards, in parallel                                      -> OUT/tokens/
Each part's files are put in place at once, so a run that was stopped goes on where it was. Memory does not grow with
the corpus but for a few numbers per document.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastserve.core.errors import ConfigError
from fastserve.train.data.cleaning import clean
from fastserve.train.data.duplicates import exact_duplicates, near_duplicates
from fastserve.train.data.hashing import SIGNATURE_LENGTH, document_hash, signature
from fastserve.train.data.leaks import LeakFinder, evaluation_texts
from fastserve.train.data.report import PartCounts, write_report
from fastserve.train.data.settings import PrepareSettings
from fastserve.train.data.shards import ShardSize, read_index, read_tokenizer, tokenizer_hash, write_index, write_shard
from fastserve.train.data.sources import Part, find_parts, read_documents

Item = TypeVar("Item")
SPLITS = ("train", "validation")
Progress = Callable[[str, int, int], None]  # stage, parts done, parts


def prepare(
    inputs: list[str],
    out: Path,
    settings: PrepareSettings,
    tokenizer: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Prepare `inputs` into the folder `out`; returns the report.

    Goes on with what an earlier run with the same inputs and settings left. ConfigError if `out` holds another
    preparation, an input is missing or of no known kind, or nothing is left of the text.
    """
    parts = find_parts(inputs, settings.text_documents, out)
    if tokenizer is not None:
        read_tokenizer(tokenizer)  # a wrong one shows before all the work
    _claim(out, parts, settings)
    run = _Run(out, parts, settings, progress)
    if not (out / "report.json").exists():
        run.read()
        run.compare()
        run.write()
        write_report(out, inputs, dataclasses.asdict(settings))
        shutil.rmtree(out / "parts")
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    if not report["documents_out"]:
        raise ConfigError(f"no document passed the rules: see {out / 'report.html'} for what dropped them")
    if tokenizer is not None:
        report["tokens"] = run.pack(tokenizer)
    return report


def _claim(out: Path, parts: list[Part], settings: PrepareSettings) -> None:
    """Make `out` this preparation's, or check that it is. The number of workers does not matter."""
    wanted = {name: value for name, value in dataclasses.asdict(settings).items() if name != "workers"}
    files = sorted({part.path for part in parts if part.kind != "hub"} | set(settings.against))
    for path in settings.against:
        if not Path(path).is_file():
            raise ConfigError(f"against: there is no file {path}")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is no folder; choose another --out")
    stamp = {"parts": [dataclasses.asdict(part) for part in parts], "settings": wanted}
    stamp["files"] = {path: [(stat := os.stat(path)).st_size, stat.st_mtime_ns] for path in files}
    text = json.dumps(stamp, sort_keys=True)
    mark = out / "preparation.json"
    if mark.exists():
        if mark.read_text(encoding="utf-8") != text:
            raise ConfigError(
                f"{out} holds a preparation of other inputs or settings; choose another --out, or remove it"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty and holds no preparation; choose another --out")
    for path in settings.against:
        deque(evaluation_texts(Path(path)), maxlen=0)  # a broken file shows before `out` is claimed
    (out / "parts").mkdir(parents=True, exist_ok=True)
    mark.write_text(text, encoding="utf-8")


class _Run:
    """The stages of one preparation."""

    def __init__(self, out: Path, parts: list[Part], settings: PrepareSettings, progress: Progress) -> None:
        self._out, self._parts, self._settings, self._progress = out, parts, settings, progress
        self._names = [f"{index:05d}" for index in range(len(parts))]

    def read(self) -> None:
        folder = self._out / "parts"
        waiting = [
            (folder / name, part, self._settings)
            for name, part in zip(self._names, self._parts, strict=True)
            if not (folder / f"{name}.json").exists()
        ]
        self._parallel("read", read_part, waiting)

    def compare(self) -> None:
        """Write parts/kept: for each document "" or the rule that drops it, as one byte (0 keeps)."""
        folder = self._out / "parts"
        hashes = np.concatenate([np.fromfile(folder / f"{name}.hashes", dtype=np.uint64) for name in self._names])
        numbers = np.arange(len(hashes))
        dropped = (exact_duplicates(hashes) != numbers).astype(np.uint8)
        if self._settings.near_duplicates and len(hashes):
            with open(folder / "signatures", "wb") as joined:
                for name in self._names:
                    with open(folder / f"{name}.signatures", "rb") as file:
                        shutil.copyfileobj(file, joined, 1 << 20)
            signatures = np.memmap(folder / "signatures", dtype=np.uint32, mode="r").reshape(-1, SIGNATURE_LENGTH)
            candidates = np.flatnonzero(dropped == 0)
            self._progress("compare", 0, 1)
            firsts = near_duplicates(signatures, candidates, self._settings.similarity)
            dropped[(dropped == 0) & (firsts != numbers)] = 2
        self._progress("compare", 1, 1)
        dropped.tofile(folder / "kept.partial")
        os.replace(folder / "kept.partial", folder / "kept")

    def write(self) -> None:
        folder = self._out / "parts"
        (self._out / "text").mkdir(exist_ok=True)
        sizes = [(folder / f"{name}.hashes").stat().st_size // 8 for name in self._names]
        offsets = np.cumsum([0, *sizes])
        jobs = [
            (self._out, name, int(offset), size, self._settings.validation_share)
            for name, offset, size in zip(self._names, offsets[:-1], sizes, strict=True)
        ]
        self._parallel("write", write_part, jobs)

    def pack(self, tokenizer: Path) -> dict[str, int]:
        """Token shards of the text; nothing to do where they are made with the same tokenizer."""
        folder, sha256 = self._out / "tokens", tokenizer_hash(tokenizer)
        if (folder / "tokens.json").exists():
            if read_index(folder)["tokenizer_sha256"] != sha256:
                raise ConfigError(f"{folder} was made with another tokenizer; remove the folder to pack anew")
        else:
            folder.mkdir(exist_ok=True)
            shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True, ignore=_only_tokenizer_files)
            names = [f"{split}-{name}" for split in SPLITS for name in self._names]
            done = self._parallel("pack", pack_part, [(self._out, name, str(tokenizer)) for name in names])
            splits = {
                split: [size for size in sorted(done, key=lambda size: size.name) if size.name.startswith(split)]
                for split in SPLITS
            }
            write_index(folder, sha256, read_tokenizer(tokenizer).get_vocab_size(), splits)
        index = read_index(folder)
        return {split: sum(shard["tokens"] for shard in index["splits"][split]) for split in SPLITS}

    def _parallel(self, stage: str, function: Callable[..., Item], jobs: Sequence[tuple[Any, ...]]) -> list[Item]:
        """Run the jobs in processes (in this one where there is one worker or one job); results in any order."""
        workers = min(self._settings.workers or len(os.sched_getaffinity(0)), len(jobs))
        self._progress(stage, 0, len(jobs))
        results: list[Item] = []
        if workers <= 1:
            for job in jobs:
                results.append(function(*job))
                self._progress(stage, len(results), len(jobs))
            return results
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(function, *job) for job in jobs]
            try:
                for future in as_completed(futures):
                    results.append(future.result())
                    self._progress(stage, len(results), len(jobs))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return results


def read_part(target: Path, part: Part, settings: PrepareSettings) -> None:
    """Clean a part into target.jsonl, .hashes, .signatures and, last, the counts in target.json."""
    counts = PartCounts()
    leaks = LeakFinder.of_files(settings.against, settings.against_words)
    hashes: list[np.uint64] = []
    with (
        open(f"{target}.jsonl", "w", encoding="utf-8") as texts,
        open(f"{target}.signatures", "wb") as signatures,
    ):
        for raw in read_documents(part, settings):
            cleaned = clean(raw, settings)
            rule = cleaned.dropped_by or ("leak" if leaks.is_leak(cleaned.words) else "")
            counts.add(raw, cleaned.text, rule, len(cleaned.words), cleaned.language)
            if rule:
                continue
            row = {"text": cleaned.text, "source": part.path, "language": cleaned.language}
            texts.write(json.dumps(row, ensure_ascii=False) + "\n")
            hashes.append(document_hash(cleaned.words))
            if settings.near_duplicates:
                signatures.write(signature(cleaned.words).tobytes())
    np.array(hashes, dtype=np.uint64).tofile(f"{target}.hashes")
    _put(Path(f"{target}.json"), json.dumps(counts.as_dict()))


def write_part(out: Path, name: str, offset: int, size: int, validation_share: float) -> None:
    """Copy the documents of a part that stay into text/SPLIT-NAME.jsonl, and count the rest."""
    kept: NDArray[np.uint8] = np.fromfile(out / "parts" / "kept", dtype=np.uint8, count=size, offset=offset)
    counts = PartCounts.read(out / "parts" / f"{name}.json")
    targets = [out / "text" / f"{split}-{name}.jsonl" for split in SPLITS]
    with (
        open(out / "parts" / f"{name}.jsonl", encoding="utf-8") as texts,
        open(f"{targets[0]}.partial", "w", encoding="utf-8") as train,
        open(f"{targets[1]}.partial", "w", encoding="utf-8") as validation,
    ):
        for line, fate in zip(texts, kept.tolist(), strict=True):
            document = json.loads(line)["text"]
            if fate:
                counts.drop_later(document, ("exact duplicate", "near duplicate")[fate - 1])
            else:
                (validation if _share_of(document) < validation_share else train).write(line)
    for target in targets:
        os.replace(f"{target}.partial", target)
    _put(out / "parts" / f"{name}.final.json", json.dumps(counts.as_dict()))


def pack_part(out: Path, name: str, tokenizer: str) -> ShardSize:
    """Encode text/NAME.jsonl into a token shard."""
    # The pool has a process per core; the tokenizer's own threads would only get in their way.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def texts() -> Iterator[str]:
        with open(out / "text" / f"{name}.jsonl", encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"]

    return write_shard(out / "tokens", name, texts(), read_tokenizer(Path(tokenizer)))


def _share_of(text: str) -> float:
    """A number in [0, 1) from the text alone: the split of a document never changes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


def _put(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _only_tokenizer_files(folder: str, names: list[str]) -> list[str]:
    wanted = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
    return [name for name in names if name not in wanted]
