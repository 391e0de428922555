"""Structured outputs against the JSON-Schema draft-7 suite and JSONSchemaBench: counts, no times.

    python benchmarks/schemas.py               # both files of the shared data, some ten seconds
    python benchmarks/schemas.py --smoke       # every tenth schema

For each schema: is it supported, and if not, does the refusal name what is not? For those that are supported: are the
file's invalid instances refused by the grammar, and its valid ones taken? Then texts are made by the masks alone:
random tokens of a real vocabulary among those allowed, no network; what has ended must be valid for `jsonschema`. The
suite's optional parts on formats and regular expressions are counted apart: formats are held to their syntax only.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from fastserve.bench.report import Report, emit, rounded
from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.errors import RequestError
from fastserve.core.structured_outputs import StructuredOutputs
from fastserve.engine.grammar import GrammarCompiler

FILES = {"draft7": "json_schema_test_suite_draft7.jsonl", "bench": "jsonschemabench_public_200.jsonl"}
BY_SYNTAX = ("optional/format/", "optional/ecmascript-regex")
_CLOSING = re.compile(rb'[\s"}\]0-9a-z]*["}\]0]')


@dataclass(slots=True)
class Counts:
    """What was seen with one file; `problems` is a line for each output or instance that breaks a supported schema."""

    numbers: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)


class Walker:
    """Random answers that a grammar's masks allow."""

    def __init__(self, tokenizer: Tokenizer, compiler: GrammarCompiler, max_tokens: int) -> None:
        self._tokens = [tokenizer.token_bytes(token_id) for token_id in range(compiler.vocab_size)]
        self._ends = compiler.end_ids
        self._closing = np.array([bool(_CLOSING.fullmatch(token)) for token in self._tokens])
        self._max_tokens = max_tokens
        self._encode = tokenizer.encode

    def encode(self, text: str) -> list[int]:
        """The text as a model would write it, without tokens around it."""
        return self._encode(text, add_special_tokens=False)

    def walk(self, matcher: Any, seed: int) -> str | None:
        """A text; None when it has not ended within the tokens.

        Raises:
            RuntimeError: the masks lead into a dead end.
        """
        matcher, chance, made = matcher.deep_copy(), random.Random(seed), bytearray()
        for _ in range(self._max_tokens):
            mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
            allowed = np.flatnonzero(mask[: len(self._tokens)])
            if matcher.is_error() or not len(allowed):
                raise RuntimeError(f"no token may follow {made.decode(errors='replace')!r}: {matcher.get_error()}")
            if self._ends & set(allowed[:1000].tolist()) and (len(allowed) == 1 or chance.random() < 0.5):
                return made.decode()
            # Text that closes what is open, more often than chance would.
            closing = allowed[self._closing[allowed]] if chance.random() < 0.7 else allowed[:0]
            token_id = int(chance.choice(closing if len(closing) else allowed))
            if token_id in self._ends:
                return made.decode()
            if not matcher.consume_token(token_id):
                raise RuntimeError(f"token {self._tokens[token_id]!r} was allowed and is refused")
            made += self._tokens[token_id]
        return None


def judge(item: dict[str, Any], compiler: GrammarCompiler, walker: Walker, num_walks: int, counts: Counts) -> None:
    """One schema: its instances, and texts of our own."""
    numbers, name = counts.numbers, f"{item.get('file', item.get('name'))}: {item['description']}"
    numbers["schemas"] += 1
    try:
        matcher = compiler.matcher(StructuredOutputs(json=json.dumps(item["schema"])))
        matcher.compute_bitmask()
        if matcher.is_error():
            raise RequestError(f"the grammar or schema is not supported: {matcher.get_error()}")
    except RequestError as error:
        numbers["refused"] += 1
        counts.refusals[str(error).removeprefix("the grammar or schema is not supported: ")[:70]] += 1
        return
    numbers["supported"] += 1
    if item.get("file", "").startswith(BY_SYNTAX):
        numbers["held_to_syntax"] += 1
        return
    for test in item["tests"]:
        kind = "valid" if test["valid"] else "invalid"
        numbers[f"{kind}_instances"] += 1
        is_taken = accepts(matcher, walker.encode(json.dumps(test["data"], ensure_ascii=False)))
        numbers[f"{kind}_taken"] += is_taken
        if is_taken and not test["valid"]:
            counts.problems.append(f"{name}: {test['description']}: an invalid instance is allowed")
    validator = jsonschema.Draft7Validator(item["schema"])
    for seed in range(num_walks):
        try:
            text = walker.walk(matcher, seed)
        except RuntimeError as error:
            numbers["dead_ends"] += 1
            counts.problems.append(f"{name}: {error}"[:300])
            continue
        numbers["walks_ended" if text is not None else "walks_cut"] += 1
        if text is not None and (broken := fault(validator, text)):
            counts.problems.append(f"{name}: {text[:100]!r} was made: {broken[:150]}")


def fault(validator: Any, text: str) -> str:
    """What is wrong with a text, "" when it fits the schema."""
    try:
        found = next(validator.iter_errors(json.loads(text)), None)
    except ValueError as error:
        return str(error)
    except Exception as error:  # a schema of the suite refers to a file that is not here
        print(f"not judged: {type(error).__name__}", file=sys.stderr)
        return ""
    return "" if found is None else str(found.message)


def accepts(matcher: Any, token_ids: list[int]) -> bool:
    fresh = matcher.deep_copy()
    return bool(fresh.try_consume_tokens(token_ids) == len(token_ids) and fresh.is_accepting())


def main() -> None:
    from shared_data import shared_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--walks", type=int, default=20, help="texts per schema")
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--smoke", action="store_true", help="every tenth schema")
    options = parser.parse_args()
    tokenizer = Tokenizer.load(ModelFolder.open())
    folder = ModelFolder.open()
    compiler = GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size, folder.eos_token_ids)
    walker = Walker(tokenizer, compiler, options.max_tokens)
    report = Report("schemas", {"walks": options.walks, "max_tokens": options.max_tokens, "smoke": options.smoke})
    problems: list[str] = []
    for name, file in FILES.items():
        path: Path = shared_folder() / "data" / "eval_fixtures" / file
        if not path.is_file():
            report.skipped[name] = f"{path} is not there"
            continue
        started, counts = time.monotonic(), Counts()
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
        for line in lines[:: 10 if options.smoke else 1]:
            judge(json.loads(line), compiler, walker, options.walks, counts)
        problems += counts.problems
        for key, count in sorted(counts.numbers.items()):
            report.metrics[f"{name}_{key}"] = count
        report.metrics[f"{name}_supported_share"] = rounded(counts.numbers["supported"] / counts.numbers["schemas"])
        report.metrics[f"{name}_problems"] = len(counts.problems)
        print(f"{name}: {time.monotonic() - started:.0f} s; refused most often:", file=sys.stderr)
        for message, count in counts.refusals.most_common(12):
            print(f"  {count:4d}  {message}", file=sys.stderr)
    for problem in problems[:40]:
        print(f"problem: {problem}", file=sys.stderr)
    emit(report.as_dict())
    if problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
