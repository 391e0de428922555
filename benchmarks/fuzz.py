"""Random requests over the server's own OpenAPI description: none may be answered with a 5xx.

    python benchmarks/fuzz.py                              # 100,000 requests to the built-in model
    python benchmarks/fuzz.py --requests 2000 --url http://127.0.0.1:8000

schemathesis (dev extra) makes requests that fit the description and requests that do not, for every route in turn.
Without --url a server of the built-in model with a short context is started on a free port of the loopback.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from fastserve.bench.report import Report, emit, rounded

_EXAMPLES_AT_ONCE = 200
# The server's own words for "not now" are no faults; without them a fuzzer that is too quick would fail.
_NOT_NOW = 503


@dataclass(slots=True)
class Findings:
    """How many requests got each status, and a line for each that is a fault."""

    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def fuzz(url: str, num_requests: int, seed: int = 0) -> Findings:
    """Send about `num_requests` random requests, the same number to each route, both fitting and not fitting ones."""
    import requests
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as with_seed

    findings = Findings()
    session = requests.Session()
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations: list[Any] = [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)

    def send(case: Any) -> None:
        try:
            response = case.call(base_url=url, session=session, timeout=60)
        except (requests.exceptions.InvalidHeader, requests.exceptions.InvalidURL, UnicodeError):
            return  # the client library will not send it
        findings.statuses[response.status_code] += 1
        if response.status_code >= 500 and response.status_code != _NOT_NOW:
            findings.faults.append(f"{response.status_code} {case.as_curl_command()[:1000]}")

    def run(strategy: Any, count: int, number: int) -> None:
        options = settings(
            max_examples=count,
            phases=[Phase.generate],
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        with_seed(number)(options(given(strategy)(send)))()

    share = max(1, num_requests // (len(operations) * len(modes)))
    for number in range(-(-share // _EXAMPLES_AT_ONCE)):
        count = min(_EXAMPLES_AT_ONCE, share - number * _EXAMPLES_AT_ONCE)
        for operation in operations:
            for mode in modes:
                try:
                    run(operation.as_strategy(generation_mode=mode), count, seed + number)
                except Exception as error:
                    # A route without parameters has nothing that would not fit it.
                    if type(error).__name__ not in ("Unsatisfiable", "SkipTest"):
                        raise
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="", help="a running server; started when left out")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with ExitStack() as stack:
        url = arguments.url
        if not url:
            from soak import running_server

            options = ["--max-model-len", "64", "--kv-cache-memory", "16MiB", "--max-request-tokens", "512"]
            port, _, _ = stack.enter_context(running_server("", options))
            url = f"http://127.0.0.1:{port}"
        start = time.monotonic()
        findings = fuzz(url, arguments.requests, arguments.seed)
        elapsed = time.monotonic() - start
    report = Report("fuzz")
    report.config = {"requests": arguments.requests, "seed": arguments.seed}
    report.metrics = {
        "requests": findings.statuses.total(),
        "faults": len(findings.faults),
        "requests_per_second": rounded(findings.statuses.total() / elapsed),
        **{f"status_{status}": count for status, count in sorted(findings.statuses.items())},
    }
    for fault in findings.faults[:20]:
        print(f"fault: {fault}", file=sys.stderr)
    emit(report.as_dict())
    if findings.faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
