"""Batches: a file of requests that are answered when there is room, and a file of their answers.

A batch is worked off request by request through the same endpoints that clients call, in this process, a few at a time.
Its state is on disk (`files.py:StateFolder`) and every answer is written when it is there, so that a server which is
started again goes on where the last one ended; a request may be answered anew when the server died while writing it.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Iterator
from typing import Any, Literal

import msgspec
from fastapi import APIRouter, Request, Response
from pydantic import Field
from starlette.types import ASGIApp, Message, Scope

from fastserve.serve.errors import ApiError
from fastserve.serve.files import StateFolder, opened, read_struct, write_struct
from fastserve.serve.openai import Body, Name
from fastserve.serve.response_store import page
from fastserve.serve.tenants import tenant_of

_log = logging.getLogger(__name__)
MAX_LINES = 50_000
MAX_BATCHES = 1000
_MAX_ERRORS = 20
_WINDOW_SECONDS = 24 * 3600
_RETRY_SECONDS = 2.0
_BUSY = (429, 503)
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_LIVE = ("validating", "in_progress", "finalizing", "cancelling")


class BatchBody(Body):
    """POST /v1/batches."""

    input_file_id: Name
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: dict[Name, Name] | None = Field(default=None, max_length=16)


class Line(msgspec.Struct):
    """One request of the input file."""

    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


class Counts(msgspec.Struct):
    total: int = 0
    completed: int = 0
    failed: int = 0


class Batch(msgspec.Struct, omit_defaults=True):
    """A batch in OpenAI's form; times are seconds since the epoch. `tenant` is who may see it, and is not shown."""

    id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    status: str
    created_at: int
    expires_at: int
    request_counts: Counts
    tenant: str = ""
    metadata: dict[str, str] | None = None
    errors: dict[str, Any] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    @property
    def is_live(self) -> bool:
        return self.status in _LIVE

    def move(self, status: str) -> None:
        """Enter a state, at this time."""
        self.status = status
        if status != "validating":
            setattr(self, f"{status}_at", int(time.time()))

    def shown(self) -> dict[str, Any]:
        fields: dict[str, Any] = msgspec.to_builtins(self)
        for name in ("tenant", "output_file_id", "error_file_id") if self.is_live else ("tenant",):
            fields.pop(name, None)  # files can be read when the batch has ended
        return {**fields, "object": "batch", "request_counts": msgspec.structs.asdict(self.request_counts)}


class BatchRunner:
    """Works off batches, the oldest first.

    Args:
        app: answers requests.
        state: where batches are; None when the server has no state folder.
        num_workers: requests of a batch that are here at a time.
    """

    def __init__(self, app: ASGIApp, state: StateFolder | None, num_workers: int) -> None:
        self._app = app
        self._state = state
        self._num_workers = num_workers
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        found = [] if state is None else [read_struct(file, Batch) for file in (state.path / "batches").glob("*.json")]
        self.batches = {batch.id: batch for batch in sorted(found, key=lambda batch: (batch.created_at, batch.id))}

    def start(self) -> None:
        """Begin, with what an earlier server left unfinished."""
        if self._state is not None:
            self._task = asyncio.create_task(self._run(), name="batches")

    async def close(self) -> None:
        """Stop; what was not finished goes on when a server is started with this state folder again."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._state is not None:
            self._state.close()

    def add(self, batch: Batch) -> None:
        """Take a new batch."""
        self.save(batch)
        self.batches[batch.id] = batch
        self._wake.set()

    def save(self, batch: Batch) -> None:
        """Write the state of a batch."""
        write_struct(opened(self._state).path / "batches" / f"{batch.id}.json", batch)

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            for batch in list(self.batches.values()):
                if batch.is_live:
                    await self._work_off(batch)
            await self._wake.wait()

    async def _work_off(self, batch: Batch) -> None:
        work = _Work(self._app, opened(self._state), batch, self._num_workers, self.save)
        try:
            await work.run()
            return
        except _InvalidInputError as error:
            problems = [{"code": "invalid_input_file", "message": text} for text in error.problems]
        except ApiError as error:
            problems = [{"code": error.code or "invalid_request", "message": str(error)}]
        except OSError as error:  # the disk is full, say: serving goes on
            _log.error("batch %s failed: %s", batch.id, error)
            problems = [{"code": "storage_error", "message": error.strerror or "cannot write"}]
        except Exception:
            _log.exception("batch %s failed", batch.id)
            problems = [{"code": "server_error", "message": "internal error; the server's log has the details"}]
        batch.errors = {"object": "list", "data": problems}
        batch.move("failed")
        try:
            work.keep_results()
            self.save(batch)
        except OSError as error:
            _log.error("the state of batch %s cannot be written: %s", batch.id, error)


class _InvalidInputError(Exception):
    """The input file has lines that cannot be asked."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__(f"{len(problems)} problems")
        self.problems = problems


class _Work:
    """One batch being worked off."""

    def __init__(self, app: ASGIApp, state: StateFolder, batch: Batch, num_workers: int, save: Any) -> None:
        self._app = app
        self._state = state
        self._batch = batch
        self._num_workers = num_workers
        self._save = save
        self._num_written = 0
        # Known from the beginning, so that a server that takes over finds what was written.
        batch.output_file_id = batch.output_file_id or f"file-{uuid.uuid4().hex}"
        batch.error_file_id = batch.error_file_id or f"file-{uuid.uuid4().hex}"
        self._paths = {True: state.content(batch.output_file_id), False: state.content(batch.error_file_id)}

    async def run(self) -> None:
        batch = self._batch
        self._state.get(batch.input_file_id, batch.tenant, "input_file_id")
        if batch.status == "validating":
            problems = await asyncio.to_thread(self._validate)
            if problems:
                raise _InvalidInputError(problems)
            if batch.status == "validating":  # it may have been cancelled meanwhile
                batch.move("in_progress")
        self._save(batch)
        done = await asyncio.to_thread(self._read_done)
        lines = (line for line in self._lines() if line.custom_id not in done)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._num_workers):
                    group.create_task(self._worker(lines))
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        self._finish()

    def _lines(self) -> Iterator[Line]:
        with self._state.content(self._batch.input_file_id).open("rb") as file:
            for text in file:
                if text.strip():
                    yield msgspec.json.decode(text, type=Line)

    def _validate(self) -> list[str]:
        """What is wrong with the file, by line; nothing when all can be asked."""
        problems: list[str] = []
        seen: set[str] = set()
        with self._state.content(self._batch.input_file_id).open("rb") as file:
            for number, text in enumerate((line for line in file if line.strip()), 1):
                if problem := self._check(text, seen):
                    problems.append(f"line {number} {problem}")
                if len(problems) >= _MAX_ERRORS or number > MAX_LINES:
                    break
        if len(seen) > MAX_LINES:
            problems.append(f"a batch has at most {MAX_LINES} lines")
        if not seen and not problems:
            problems.append("the file has no requests")
        self._batch.request_counts.total = len(seen)
        return problems

    def _check(self, text: bytes, seen: set[str]) -> str:
        try:
            line = msgspec.json.decode(text, type=Line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return f"is no request: {error}"
        if line.method != "POST" or line.url != self._batch.endpoint:
            return f"asks for {line.method[:10]} {line.url[:50]}, not POST {self._batch.endpoint}"
        if not 0 < len(line.custom_id) <= 512 or line.custom_id in seen:
            return f"has a custom_id that is empty, too long or not unique: {line.custom_id[:50]!r}"
        if line.body.get("stream") or line.body.get("background"):
            return "asks for a stream or a background response"
        seen.add(line.custom_id)
        return ""

    def _read_done(self) -> set[str]:
        """Requests that an earlier server answered; a line that it could not finish is cut off."""
        done: set[str] = set()
        counts = self._batch.request_counts
        for is_answer, path in self._paths.items():
            num_whole, count = 0, 0
            if path.exists():
                with path.open("r+b") as file:
                    for text in file:
                        if not text.endswith(b"\n"):
                            break
                        done.add(msgspec.json.decode(text)["custom_id"])
                        num_whole += len(text)
                        count += 1
                    file.truncate(num_whole)
            if is_answer:
                counts.completed = count
            else:
                counts.failed = count
        return done

    async def _worker(self, lines: Iterator[Line]) -> None:
        batch = self._batch
        for line in lines:
            answer = await self._ask(line) if batch.status == "in_progress" else None
            if answer is None:
                return
            status, body = answer
            is_answer = status == 200
            self._num_written += len(body)
            self._state.check_room(self._num_written)
            with self._paths[is_answer].open("ab") as file:
                file.write(_result(line.custom_id, status, body))
            batch.request_counts.completed += is_answer
            batch.request_counts.failed += not is_answer

    async def _ask(self, line: Line) -> tuple[int, bytes] | None:
        """Status and body; None when the batch is given up while there is no room for the request."""
        body = msgspec.json.encode(line.body)
        while self._batch.status == "in_progress" and time.time() < self._batch.expires_at:
            status, reply = await call(self._app, line.url, body, self._batch.tenant)
            if status not in _BUSY:
                return status, reply
            await asyncio.sleep(_RETRY_SECONDS)
        return None

    def _finish(self) -> None:
        batch = self._batch
        counts = batch.request_counts
        is_whole = counts.completed + counts.failed >= counts.total
        if batch.status == "in_progress":
            batch.move("finalizing")
        self.keep_results()
        if batch.status == "cancelling":
            batch.move("cancelled")
        else:
            batch.move("completed" if is_whole else "expired")
        self._save(batch)

    def keep_results(self) -> None:
        """Make files of the answers that are there, also when the batch ends early."""
        batch = self._batch
        assert batch.output_file_id is not None and batch.error_file_id is not None
        if self._paths[True].exists():
            self._state.register(batch.output_file_id, f"{batch.id}_output.jsonl", "batch_output", batch.tenant)
        else:
            batch.output_file_id = None
        if self._paths[False].exists():
            self._state.register(batch.error_file_id, f"{batch.id}_error.jsonl", "batch_output", batch.tenant)
        else:
            batch.error_file_id = None


def _result(custom_id: str, status: int, body: bytes) -> bytes:
    response = {"status_code": status, "request_id": uuid.uuid4().hex, "body": msgspec.Raw(body)}
    line = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": None}
    return msgspec.json.encode(line) + b"\n"


async def call(app: ASGIApp, path: str, body: bytes, tenant: str) -> tuple[int, bytes]:
    """POST `body` to an endpoint of this process: status and reply. What is cancelled frees the engine."""
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "client": None,
        "server": None,
        "state": {"tenant": tenant},
    }
    waiting = [{"type": "http.request", "body": body, "more_body": False}]
    status, pieces = 500, []

    async def receive() -> Message:
        if waiting:
            return waiting.pop()
        await asyncio.Event().wait()
        raise AssertionError("nobody sets it")

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            pieces.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:  # it has been answered with 500, and logged
        return 500, b"".join(pieces)
    return status, b"".join(pieces)


class BatchesApi:
    """The endpoints."""

    def __init__(self, state: StateFolder | None, runner: BatchRunner) -> None:
        self._state = state
        self._runner = runner

    def add_routes(self, router: APIRouter) -> None:
        router.post("/v1/batches", summary="Answer a file of requests")(self.create)
        router.get("/v1/batches", summary="List the batches")(self.list)
        router.get("/v1/batches/{batch_id}", summary="The state of a batch")(self.get)
        router.post("/v1/batches/{batch_id}/cancel", summary="Stop a batch")(self.cancel)

    async def create(self, body: BatchBody, request: Request) -> Response:
        """Take a batch; its file is checked when its turn comes."""
        state, tenant = opened(self._state), tenant_of(request)
        state.get(body.input_file_id, tenant, "input_file_id")
        if len(self._runner.batches) >= MAX_BATCHES:
            self._forget_one()
        now = int(time.time())
        batch = Batch(
            id=f"batch_{uuid.uuid4().hex}",
            endpoint=body.endpoint,
            input_file_id=body.input_file_id,
            completion_window=body.completion_window,
            status="validating",
            created_at=now,
            expires_at=now + _WINDOW_SECONDS,
            request_counts=Counts(),
            tenant=tenant,
            metadata=body.metadata,
        )
        self._runner.add(batch)
        return _json(batch.shown())

    async def list(self, request: Request, after: str | None = None, limit: int = 20) -> Response:
        """The caller's batches, the newest first."""
        opened(self._state)
        tenant = tenant_of(request)
        mine = [batch.shown() for batch in self._runner.batches.values() if batch.tenant == tenant]
        return _json(page(mine[::-1], after, limit))

    async def get(self, batch_id: str, request: Request) -> Response:
        """A batch in its present state."""
        return _json(self._find(batch_id, request).shown())

    async def cancel(self, batch_id: str, request: Request) -> Response:
        """Stop a batch; requests that are being answered are finished, and answers that are there are kept."""
        batch = self._find(batch_id, request)
        if batch.status in ("validating", "in_progress"):
            batch.move("cancelling")
            self._runner.save(batch)
        elif batch.status != "cancelling":
            raise ApiError(f"the batch is {batch.status} already")
        return _json(batch.shown())

    def _find(self, batch_id: str, request: Request) -> Batch:
        opened(self._state)
        batch = self._runner.batches.get(batch_id)
        if batch is None or batch.tenant != tenant_of(request):
            raise ApiError(f"there is no batch {batch_id[:100]!r}", 404, code="batch_not_found")
        return batch

    def _forget_one(self) -> None:
        """The oldest batch that has ended makes room. Raises ApiError (429) when none has."""
        ended = next((batch for batch in self._runner.batches.values() if not batch.is_live), None)
        if ended is None:
            raise ApiError(f"{MAX_BATCHES} batches are waiting already", 429, retry_after=60)
        (opened(self._state).path / "batches" / f"{ended.id}.json").unlink(missing_ok=True)
        del self._runner.batches[ended.id]


def _json(content: Any) -> Response:
    return Response(msgspec.json.encode(content), media_type="application/json")
