"""`fastserve chat`: talk to a model in the terminal, in this process or through a server.

Ctrl-C stops the answer that is being written; at the prompt it ends the program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from fastserve.cli.options import INTERRUPTED, ConfigFile, Model, with_options
from fastserve.core.config import EngineConfig
from fastserve.core.errors import ConfigError, FastServeError, RequestError
from fastserve.core.sampling_params import SamplingParams

if TYPE_CHECKING:
    import http.client
    from types import FrameType

_SAMPLING = tuple(item.name for item in dataclasses.fields(SamplingParams))
_CONNECT_SECONDS = 300
Messages = list[dict[str, str]]


class Chat(Protocol):
    """Whoever answers."""

    def reply(self, messages: Messages) -> Iterator[str]:
        """The answer, piece by piece. Ctrl-C stops it and raises KeyboardInterrupt."""


@with_options(
    (SamplingParams, "Sampling"),
    (EngineConfig, "Engine"),
    leave_out=("model", "n", "logprobs", "prompt_logprobs", "num_beams", "length_penalty", "early_stopping"),
)
def chat(
    options: dict[str, Any],
    model: Model = None,
    url: Annotated[str, typer.Option(help="Talk to a running server instead of loading a model.")] = "",
    system: Annotated[str, typer.Option(help="System message at the beginning.")] = "",
    config: ConfigFile = None,
) -> None:
    """Talk to a model. /new forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer.

    With --url the key of the server is taken from FASTSERVE_API_KEY.
    """
    sampling = {name: options.pop(name) for name in list(options) if name in _SAMPLING}
    answerer: Chat
    if url:
        if options or config:
            raise ConfigError(f"with --url the server's own options apply; leave out {', '.join(options) or 'config'}")
        answerer = ServerChat(url, model, sampling, os.environ.get("FASTSERVE_API_KEY", ""))
    else:
        answerer = LocalChat(EngineConfig.load({"model": model, **options}, config), sampling)
    status = converse(answerer, system)
    if status:
        raise typer.Exit(status)


def converse(answerer: Chat, system: str, read: Callable[[], str] | None = None) -> int:
    """Read lines and print answers until the end of the input; the exit status says whether the last was answered."""
    if read is None:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() line editing)
        prompt = "> " if sys.stdin.isatty() else ""

        def read() -> str:
            return input(prompt)

    start: Messages = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    status = 0
    while True:
        try:
            line = read().strip()
        except EOFError:
            print()
            return status
        except KeyboardInterrupt:
            print()
            return INTERRUPTED
        if line == "/exit":
            return 0
        if line == "/new":
            messages = list(start)
        elif line:
            status = _take_turn(answerer, messages, line)


def _take_turn(answerer: Chat, messages: Messages, line: str) -> int:
    """Ask and print; an answer that was stopped stays in the conversation as far as it went. Returns an exit status."""
    messages.append({"role": "user", "content": line})
    pieces: list[str] = []
    try:
        for piece in answerer.reply(messages):
            pieces.append(piece)
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" [stopped]")
    except FastServeError as error:
        messages.pop()
        print("\n" * bool(pieces) + f"{error} (your line was dropped; /new begins afresh)", file=sys.stderr)
        return error.exit_code
    messages.append({"role": "assistant", "content": "".join(pieces)})
    return 0


class LocalChat:
    """Answers with a model loaded in this process."""

    def __init__(self, config: EngineConfig, sampling: dict[str, Any]) -> None:
        from fastserve.checkpoint.folder import ModelFolder
        from fastserve.checkpoint.sampling_defaults import sampling_defaults
        from fastserve.checkpoint.tokenizer import Tokenizer
        from fastserve.engine.engine import Engine

        folder = ModelFolder.open(config.model)
        self._tokenizer = Tokenizer.load(folder)
        if not self._tokenizer.has_chat_template:
            raise RequestError(f"{folder.name} has no chat template, so it cannot chat; use fastserve generate")
        self._sampling = {"max_tokens": None, **sampling_defaults(folder), **sampling}
        SamplingParams(**self._sampling)
        self._engine = Engine(config)
        self._num_turns = 0
        self._seeds = Random(config.seed)

    def reply(self, messages: Messages) -> Iterator[str]:
        from fastserve.checkpoint.text_stream import TextStream
        from fastserve.core.request import Request, fork

        text = self._tokenizer.render_chat([dict(message) for message in messages])
        prompt_ids = self._tokenizer.encode(text, add_special_tokens=False)
        room = self._engine.max_model_len - len(prompt_ids)
        if room < 1:
            raise RequestError(f"the conversation has {len(prompt_ids)} tokens, which is more than the model can read")
        limit = min(room, self._sampling["max_tokens"] or room)
        [sampling] = fork(SamplingParams(**{**self._sampling, "max_tokens": limit}), self._seeds)
        self._num_turns += 1
        request = Request(f"chat-{self._num_turns}", prompt_ids, sampling, time.monotonic())
        stream = TextStream(self._tokenizer, prompt_ids, sampling)
        with _held_interrupt() as interrupts:
            self._engine.add(request)
            try:
                is_finished = False
                while not is_finished:
                    for output in self._engine.step():
                        is_finished = output.finish_reason is not None
                        yield stream.push(output.token_ids, is_finished, output.stop_token_id)
                        is_finished = is_finished or stream.stop_reason is not None
                    if interrupts:
                        raise KeyboardInterrupt
            finally:
                self._engine.abort([request.request_id])


class ServerChat:
    """Answers through a server's /v1/chat/completions."""

    def __init__(self, url: str, model: str | None, sampling: dict[str, Any], api_key: str) -> None:
        try:
            parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # brackets, or a port above 65535
            is_address = False
        if not is_address:
            raise ConfigError(f"{url!r} is no address of a server; write for example http://127.0.0.1:8000")
        self._address = parts
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._fields = {**sampling, **({"model": model} if model else {}), "stream": True}

    def reply(self, messages: Messages) -> Iterator[str]:
        import http.client

        assert self._address.hostname is not None
        secure = self._address.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(self._address.hostname, self._address.port, timeout=_CONNECT_SECONDS)
        with contextlib.closing(connection):
            try:
                body = json.dumps({**self._fields, "messages": messages})
                connection.request("POST", self._path, body, self._headers)
                yield from self._read(connection.getresponse())
            except (OSError, UnicodeError, http.client.HTTPException) as error:  # a name like a..b is a UnicodeError
                raise FastServeError(f"the server at {self._address.geturl()} does not answer: {error}") from error

    def _read(self, response: http.client.HTTPResponse) -> Iterator[str]:
        if response.status != 200:
            message = _error_message(response.read())
            raise (RequestError if response.status == 400 else FastServeError)(f"the server says: {message}")
        for line in response:
            data = line.removeprefix(b"data: ").strip()
            if not line.startswith(b"data: ") or data == b"[DONE]":
                continue
            try:
                event = json.loads(data)
                if "error" in event:
                    raise FastServeError(f"the server says: {_error_message(data)}")
                pieces = [choice["delta"].get("content") or "" for choice in event["choices"]]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise FastServeError(f"the server sent what is no part of an answer: {data[:200]!r}") from error
            yield from pieces


def _error_message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", errors="replace")


@contextlib.contextmanager
def _held_interrupt() -> Iterator[list[int]]:
    """Ctrl-C is noted in the list instead of breaking into an engine step."""
    noted: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        noted.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)
