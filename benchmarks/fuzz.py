"""Random requests over the server's own OpenAPI description: none may be answered with a 5xx.

    python benchmarks/fuzz.py                              # 100,000 requests to the built-in model
    python benchmarks/fuzz.py --smoke                      # 2,000
    python benchmarks/fuzz.py --requests 5000 --seed 7 --url http://127.0.0.1:8000

schemathesis (dev extra) makes requests that fit the description and requests that do not, for every route in turn;
nine more bodies are mixed of the values that it made for each of those with a JSON body. Bodies are cut to a few tokens
of answer, so that the time goes into requests. Without --url a server of the built-in model with a short context is
started on a free port of the loopback. A 504 is no fault where the request itself asked for a deadline; every other 5xx
is, and so is a server that has ended or that does not answer within a minute.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastserve.bench.report import Report, emit, rounded

_EXAMPLES_AT_ONCE = 200
_AS_IT_IS = 4  # every so many requests go out as they were made
_MIXED_PER_CASE = 9
_POOL_SIZE = 200  # values kept per field
_DEADLINE_STATUS = 504
_MAX_TOKENS = 4
_TOKEN_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_LIMIT_OF_ROUTE = {
    "/v1/completions": "max_tokens",
    "/v1/chat/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
}


@dataclass(slots=True)
class Findings:
    """How many requests got each status, per route, and a line for each that is a fault."""

    statuses: Counter[int] = field(default_factory=Counter)
    routes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class Mixer:
    """New bodies of one route, each field with a value that some generated body had there, or elsewhere.

    Making a request from a schema takes ten times as long as answering it, and random fields all at once seldom get
    past the first check; values that were made once meet in many more ways.
    """

    def __init__(self, schema: dict[str, Any], seed: int) -> None:
        self.fields = set(schema["properties"])
        self._required = set(schema.get("required", ()))
        self._random = random.Random(seed)
        self._pool: dict[str, list[Any]] = {}

    def take(self, body: dict[str, Any]) -> None:
        for name in self.fields & body.keys():
            values = self._pool.setdefault(name, [])
            if len(values) < _POOL_SIZE:
                values.append(body[name])
            else:
                values[self._random.randrange(_POOL_SIZE)] = body[name]

    def make(self) -> dict[str, Any]:
        wanted = self._random.randrange(6)
        names = self._required | set(self._random.sample(sorted(self.fields), min(wanted, len(self.fields))))
        names -= {"model", "previous_response_id"}
        return {name: self._value(name) for name in sorted(names) if name in self._pool}

    def _value(self, name: str) -> Any:
        is_stranger = self._random.random() < 0.02
        return self._random.choice(self._pool[self._random.choice(sorted(self._pool)) if is_stranger else name])


class Fuzzer:
    """Sends requests to one server and keeps what comes of them.

    Args:
        progress: called with the number of requests so far.
    """

    def __init__(self, url: str, seed: int, progress: Callable[[int], None] = lambda _: None) -> None:
        import requests

        self.findings = Findings()
        self._url = url
        self._seed = seed
        self._progress = progress
        self._session = requests.Session()
        self.description = self._session.get(f"{url}/openapi.json", timeout=60).json()
        schemas = {path: body_schema(self.description, path) for path in self.description["paths"]}
        self._mixers = {path: Mixer(schema, seed) for path, schema in schemas.items() if schema}

    def run(self, num_requests: int) -> Findings:
        """Until about `num_requests` were sent, the same number to each route that has enough of them."""
        import schemathesis

        schema = schemathesis.openapi.from_dict(self.description)
        operations: list[Any] = [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]
        modes = (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE)
        sources = [operation.as_strategy(generation_mode=mode) for operation in operations for mode in modes]
        seed, sent = self._seed, self.findings.statuses
        while sources and sent.total() < num_requests:
            seed += 1
            count = max(2, min(_EXAMPLES_AT_ONCE, (num_requests - sent.total()) // (4 * len(sources))))
            fruitful = []
            for strategy in sources:
                before = sent.total()
                self._draw(strategy, count, seed)
                if sent.total() - before > count // 2:
                    fruitful.append(strategy)  # others have few different requests, and those have been sent
            sources = fruitful
        return self.findings

    def _draw(self, strategy: Any, count: int, seed: int) -> None:
        from hypothesis import HealthCheck, Phase, given, settings
        from hypothesis import seed as with_seed

        options = settings(
            max_examples=count,
            phases=[Phase.generate],
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        try:
            with_seed(seed)(options(given(strategy)(self._send)))()
        except Exception as error:
            # A route without parameters has nothing that would not fit it.
            if type(error).__name__ not in ("Unsatisfiable", "SkipTest"):
                raise

    def _send(self, case: Any) -> None:
        """One generated request, and others of its parts."""
        import requests

        mixer = self._mixers.get(case.path)
        if mixer is not None and isinstance(case.body, dict):
            mixer.take(case.body)
            if self.findings.statuses.total() % _AS_IT_IS:
                lead_deeper(case.body, mixer.fields)
            shorten(case.path, case.body)
        call = partial(case.call, base_url=self._url, session=self._session, timeout=60)
        timed = has_deadline(case.body) or any(name.lower() == "x-request-timeout" for name in case.headers or ())
        with suppress(requests.exceptions.InvalidHeader, requests.exceptions.InvalidURL, UnicodeError):
            self._try(f"{case.method} {case.path}", call, timed, case.as_curl_command)
        if mixer is not None and case.method == "POST":
            for _ in range(_MIXED_PER_CASE):
                body = mixer.make()
                shorten(case.path, body)
                text = json.dumps(body)
                headers = {"Content-Type": "application/json"}
                call = partial(
                    self._session.post, f"{self._url}{case.path}", data=text.encode(), headers=headers, timeout=60
                )
                self._try(f"POST {case.path}", call, has_deadline(body), partial(str, text))

    def _try(self, route: str, call: Callable[[], Any], timed: bool, describe: Callable[[], str]) -> None:
        import requests

        findings = self.findings
        try:
            response = call()
        except requests.exceptions.ConnectionError as error:
            findings.faults.append(f"{route}: {type(error).__name__} {describe()[:1000]}")
            return
        except requests.exceptions.Timeout:
            findings.faults.append(f"{route}: no answer {describe()[:1000]}")
            return
        findings.statuses[response.status_code] += 1
        findings.routes[route] += 1
        self._progress(findings.statuses.total())
        if response.status_code >= 500 and not (timed and response.status_code == _DEADLINE_STATUS):
            findings.faults.append(f"{route}: {response.status_code} {response.text[:200]} {describe()[:1000]}")


def body_schema(description: dict[str, Any], path: str) -> dict[str, Any]:
    """The schema of a route's JSON body; {} without one."""
    content = description["paths"][path].get("post", {}).get("requestBody", {}).get("content", {})
    name = content.get("application/json", {}).get("schema", {}).get("$ref", "").rpartition("/")[2]
    found: dict[str, Any] = description["components"]["schemas"][name] if name else {}
    return found


def lead_deeper(body: dict[str, Any], known: set[str]) -> None:
    """Take away what ends most random requests at once: other models' names and fields that do not exist."""
    for name in [name for name in body if name not in known or name in ("model", "previous_response_id")]:
        del body[name]


def shorten(path: str, body: dict[str, Any]) -> None:
    """Ask for a few tokens where the request would have many; what is wrong with a limit stays wrong."""
    named = _LIMIT_OF_ROUTE.get(path)
    if named is not None and not any(body.get(name) for name in _TOKEN_LIMITS):
        body[named] = _MAX_TOKENS
    for name in _TOKEN_LIMITS:
        if isinstance(body.get(name), int) and body[name] > _MAX_TOKENS:
            body[name] = _MAX_TOKENS


def has_deadline(body: Any) -> bool:
    """Whether the request gave the server little time."""
    return isinstance(body, dict) and body.get("timeout") is not None


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
            from soak import running_server

            state = stack.enter_context(tempfile.TemporaryDirectory())
            options = ["--max-model-len", "256", "--kv-cache-memory", "16MiB", "--state-folder", state]
            port, process, _ = stack.enter_context(running_server("", options))
            url = f"http://127.0.0.1:{port}"
        findings = Fuzzer(url, arguments.seed, progress).run(num_requests)
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
