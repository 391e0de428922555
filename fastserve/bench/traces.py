"""Request traces: when requests arrive, how long prompts and outputs are, and which prompts begin alike.

Reads the published formats (told apart by extension and column names) and fits a run of requests to an engine: one
factor scales prompts and outputs to the context, one factor scales arrival times to a load. Prompts are made-up token
ids; equal prefix hashes give equal ids, so the prefix cache works as it would have. Plain Python: nothing heavy.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from fastserve.bench.report import percentile, rounded
from fastserve.core.errors import ConfigError

MOONCAKE_BLOCK = 512  # tokens behind one hash id
HEAVY_TAILED = "heavy-tailed"  # the name of the made-up trace


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One recorded request.

    Attributes:
        arrival: seconds after the first request of the trace.
        num_prompt, num_output: tokens.
        tenant: who asked, "" where the trace does not say.
        prefix_hashes: one id per `hash_tokens` prompt tokens; equal leading ids mean an equal beginning.
        hash_tokens: tokens behind each of them.
    """

    arrival: float
    num_prompt: int
    num_output: int
    tenant: str = ""
    prefix_hashes: tuple[int, ...] = ()
    hash_tokens: int = MOONCAKE_BLOCK


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival, and how they were made from the file.

    Attributes:
        name: the file's stem.
        has_arrivals: whether the file records arrivals (else they are Poisson, at one per second before scaling).
        offset: how many requests of the file come before the first.
        length_scale: the factor on prompt and output lengths.
    """

    name: str
    requests: tuple[TraceRequest, ...]
    has_arrivals: bool
    offset: int = 0
    length_scale: float = 1.0

    @property
    def requests_per_second(self) -> float:
        """Mean arrival rate, between the first and the last arrival."""
        span = self.requests[-1].arrival - self.requests[0].arrival
        return (len(self.requests) - 1) / span if span > 0 else float("inf")

    def at_rate(self, requests_per_second: float) -> Trace:
        """The same requests with arrival times scaled by one factor to a mean rate, the first at 0."""
        first = self.requests[0].arrival
        factor = self.requests_per_second / requests_per_second
        if factor == float("inf"):
            raise ConfigError("all requests of the trace arrive at once; take more of them")
        return self._with(lambda request: replace(request, arrival=(request.arrival - first) * factor))

    def all_at_once(self) -> Trace:
        """The same requests, all there at the start."""
        return self._with(lambda request: replace(request, arrival=0.0))

    def fit(self, context: int, length_scale: float = 0.0) -> Trace:
        """Scale lengths by one factor; outputs are at least 1, prompts are clipped to what the output leaves.

        Args:
            context: longest prompt + output in tokens.
            length_scale: the factor; 0 chooses the one at which 99 % of the requests fit, at most 1.

        Raises:
            ConfigError: a context without room for a prompt and an answer.
        """
        if context < 2:
            raise ConfigError(f"a context of {context} tokens has no room for a prompt and an answer; give 2 or more")
        totals = [request.num_prompt + request.num_output for request in self.requests]
        scale = length_scale or rounded(min(1.0, context / max(1.0, percentile(totals, 0.99))), 2)

        def scaled(request: TraceRequest) -> TraceRequest:
            num_output = min(max(1, round(request.num_output * scale)), context - 1)
            num_prompt = min(max(1, round(request.num_prompt * scale)), context - num_output)
            hash_tokens = max(1, round(request.hash_tokens * scale))
            return replace(request, num_prompt=num_prompt, num_output=num_output, hash_tokens=hash_tokens)

        return replace(self._with(scaled), length_scale=scale)

    def _with(self, change: Callable[[TraceRequest], TraceRequest]) -> Trace:
        return replace(self, requests=tuple(change(request) for request in self.requests))


def prompt_ids(request: TraceRequest, index: int, vocab_size: int, seed: int = 0) -> list[int]:
    """Token ids for a request: its own, but equal to others' where their prefix hashes are equal.

    Args:
        index: the request's number, which makes ids of requests without hashes differ.
        vocab_size: ids are below it.
    """
    if not request.prefix_hashes:
        return random.Random(f"{seed}:request:{index}").choices(range(vocab_size), k=request.num_prompt)
    token_ids: list[int] = []
    for block in request.prefix_hashes:
        token_ids += random.Random(f"{seed}:block:{block}").choices(range(vocab_size), k=request.hash_tokens)
        if len(token_ids) >= request.num_prompt:
            break
    missing = request.num_prompt - len(token_ids)  # lengths and hashes round differently
    token_ids += random.Random(f"{seed}:request:{index}").choices(range(vocab_size), k=max(0, missing))
    return token_ids[: request.num_prompt]


def read_trace(file: str | Path, num_requests: int = 0, offset: int = 0, seed: int = 0) -> Trace:
    """Consecutive requests of a trace file.

    Args:
        file: Azure (TIMESTAMP, ContextTokens, GeneratedTokens), ServeGen and ShareGPT (arrival_s, input_tokens,
            output_tokens, client_id if known) or Vidur (num_prefill_tokens, num_decode_tokens) as CSV; Mooncake
            (timestamp in ms, input_length, output_length, hash_ids) as JSONL. "heavy-tailed" makes one up.
        num_requests: how many; 0 for all.
        offset: how many to leave out before them.
        seed: of the arrivals, where the file has none.

    Raises:
        ConfigError: the file cannot be read, is in none of these formats, or has too few requests; or num_requests or
            offset is no such number.
    """
    if num_requests < 0 or num_requests == 1 or offset < 0:
        raise ConfigError(
            f"give 2 requests or more (0: all) and an offset of 0 or more, not {num_requests} and {offset}"
        )
    path = Path(file)
    if str(file) == HEAVY_TAILED:
        return heavy_tailed(num_requests or 300, offset, seed)
    number = 0

    def numbered(lines: Iterable[str]) -> Iterator[str]:
        nonlocal number
        for line in lines:
            number += 1
            yield line

    try:
        with path.open(encoding="utf-8", newline="") as lines:
            rows = _mooncake(numbered(lines)) if path.suffix == ".jsonl" else _csv(numbered(lines), path)
            read = list(rows)
    except ConfigError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"trace {path} cannot be read: {error}") from error
    except (ValueError, LookupError, TypeError, csv.Error) as error:
        raise ConfigError(f"trace {path} cannot be read, line {number}: {type(error).__name__}: {error}") from error
    has_arrivals = bool(read) and read[0].arrival == read[0].arrival  # nan where there are none
    if not has_arrivals:
        clock, draws = 0.0, random.Random(seed)
        for index, request in enumerate(read):
            clock += draws.expovariate(1.0)
            read[index] = replace(request, arrival=clock)
    read.sort(key=lambda request: request.arrival)
    chosen = read[offset : offset + num_requests if num_requests else None]
    if len(chosen) < max(2, num_requests):
        raise ConfigError(f"trace {path} has {len(read)} requests; {num_requests or 2} from {offset} on are not there")
    return Trace(path.stem, tuple(chosen), has_arrivals, offset)


def heavy_tailed(num_requests: int, offset: int = 0, seed: int = 0) -> Trace:
    """A made-up trace: one answer in twenty has 1,500 to 3,500 tokens, the others 8 to 40, and the prompts (16 to 64
    tokens) tell nothing of it; Poisson arrivals. The long answers are nearly all of the work."""
    draws = random.Random(f"{seed}:heavy-tailed")
    clock = 0.0
    requests: list[TraceRequest] = []
    for _ in range(offset + num_requests):
        clock += draws.expovariate(1.0)
        num_output = draws.randrange(1500, 3500) if draws.random() < 0.05 else draws.randrange(8, 40)
        requests.append(TraceRequest(clock, draws.randrange(16, 64), num_output))
    return Trace(HEAVY_TAILED, tuple(requests[offset:]), False, offset)


def _mooncake(lines: Iterator[str]) -> Iterator[TraceRequest]:
    for line in lines:
        row = json.loads(line)
        arrival, hashes = float(row["timestamp"]) / 1e3, tuple(map(int, row["hash_ids"]))
        yield TraceRequest(arrival, int(row["input_length"]), int(row["output_length"]), prefix_hashes=hashes)


def _csv(lines: Iterator[str], path: Path) -> Iterator[TraceRequest]:
    reader = csv.DictReader(lines)
    columns = set(reader.fieldnames or ())
    for needed, read in _FORMATS:
        if needed <= columns:
            return (read(row) for row in reader)
    raise ConfigError(f"{path}: no known trace format has the columns {', '.join(sorted(columns))}")


def _azure(row: Mapping[str, str]) -> TraceRequest:
    arrival = datetime.fromisoformat(row["TIMESTAMP"])
    if arrival.tzinfo is None:
        arrival = arrival.replace(tzinfo=UTC)
    return TraceRequest(arrival.timestamp(), int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _arrivals(row: Mapping[str, str]) -> TraceRequest:
    tenant = row.get("client_id", "")
    return TraceRequest(float(row["arrival_s"]), int(row["input_tokens"]), int(row["output_tokens"]), tenant)


def _vidur(row: Mapping[str, str]) -> TraceRequest:
    return TraceRequest(float("nan"), int(row["num_prefill_tokens"]), int(row["num_decode_tokens"]))


_FORMATS: tuple[tuple[set[str], Callable[[Mapping[str, str]], TraceRequest]], ...] = (
    ({"TIMESTAMP", "ContextTokens", "GeneratedTokens"}, _azure),
    ({"arrival_s", "input_tokens", "output_tokens"}, _arrivals),
    ({"num_prefill_tokens", "num_decode_tokens"}, _vidur),
)
