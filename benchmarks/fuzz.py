"""Random requests over the server's own OpenAPI description: none may be answered with a 5xx.

    python benchmarks/fuzz.py                              # 100,000 requests to the built-in model
    python benchmarks/fuzz.py --smoke                      # 2,000
    python benchmarks/fuzz.py --requests 5000 --seed 7 --url http://127.0.0.1:8000

schemathesis (dev extra) makes requests that fit the description and requests that do not, for every route in turn;
bodies are cut to a few tokens of answer, so that the time goes into requests. Without --url a server of the built-in
model with a short context is started on a free port of the loopback. A 504 is no fault where the request itself asked
for a deadline; every other 5xx is, and so is a server that has ended or that does not answer within a minute.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from fastserve.bench.report import Report, emit, rounded

_EXAMPLES_AT_ONCE = 200
_DEADLINE_STATUS = 504
_MAX_TOKENS = 4
_TOKEN_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_LIMIT_OF_ROUTE = {"/v1/completions": "max_tokens", "/v1/chat/completions": "max_tokens"}


@dataclass(slots=True)
class Findings:
    """How many requests got each status, per route, and a line for each that is a fault."""

    statuses: Counter[int] = field(default_factory=Counter)
    routes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def fuzz(url: str, num_requests: int, seed: int = 0, progress: Callable[[int], None] = lambda _: None) -> Findings:
    """Send about `num_requests` random requests, the same number to each route, both fitting and not fitting ones."""
    import requests
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as with_seed

    findings = Findings()
    session = requests.Session()
    description = session.get(f"{url}/openapi.json", timeout=60).json()
    operations: list[Any] = [
        result.ok()  # type: ignore[union-attr]
        for result in schemathesis.openapi.from_dict(description).get_all_operations()
    ]
    modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)

    def send(case: Any) -> None:
        shorten(case)
        try:
            response = case.call(base_url=url, session=session, timeout=60)
        except (requests.exceptions.InvalidHeader, requests.exceptions.InvalidURL, UnicodeError):
            return  # the client library will not send it
        except requests.exceptions.RequestException as error:
            findings.faults.append(f"{type(error).__name__} {case.as_curl_command()[:1000]}")
            return
        findings.statuses[response.status_code] += 1
        findings.routes[f"{case.method} {case.path}"] += 1
        progress(findings.statuses.total())
        if response.status_code >= 500 and not (response.status_code == _DEADLINE_STATUS and has_deadline(case)):
            findings.faults.append(f"{response.status_code} {response.text[:200]} {case.as_curl_command()[:1000]}")

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


def shorten(case: Any) -> None:
    """Ask for a few tokens where the request would have many; what is wrong with a limit stays wrong."""
    body = case.body
    if not isinstance(body, dict):
        return
    named = _LIMIT_OF_ROUTE.get(case.path)
    if named is not None and not any(body.get(name) for name in _TOKEN_LIMITS):
        body[named] = _MAX_TOKENS
    elif case.path == "/v1/responses" and body.get("max_output_tokens") is None:
        body["max_output_tokens"] = _MAX_TOKENS
    for name in _TOKEN_LIMITS:
        if isinstance(body.get(name), int) and body[name] > _MAX_TOKENS:
            body[name] = _MAX_TOKENS


def has_deadline(case: Any) -> bool:
    """Whether the request gave the server little time."""
    in_body = isinstance(case.body, dict) and case.body.get("timeout") is not None
    return in_body or any(name.lower() == "x-request-timeout" for name in case.headers or ())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="", help="a running server; started when left out")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--smoke", action="store_true", help="2,000 requests")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    num_requests = 2000 if arguments.smoke else arguments.requests
    start = time.monotonic()

    def progress(count: int) -> None:
        if count % 1000 == 0:
            print(f"{count} requests in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)

    with ExitStack() as stack:
        url = arguments.url
        if not url:
            import tempfile

            from soak import running_server

            state = stack.enter_context(tempfile.TemporaryDirectory())
            options = ["--max-model-len", "256", "--kv-cache-memory", "16MiB", "--state-folder", state]
            port, process, _ = stack.enter_context(running_server("", options))
            url = f"http://127.0.0.1:{port}"
        findings = fuzz(url, num_requests, arguments.seed, progress)
        elapsed = time.monotonic() - start
        if not arguments.url and process.poll() is not None:
            findings.faults.append(f"the server ended with status {process.returncode}")
    report = Report("fuzz")
    report.config = {"requests": num_requests, "seed": arguments.seed}
    report.metrics = {
        "requests": findings.statuses.total(),
        "routes": len(findings.routes),
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
