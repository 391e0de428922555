"""The whole app over a fake engine, on a real loopback port, in this process: for tests of the API."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.tokenizer import Tokenizer
from fastserve.core.config import EngineConfig
from fastserve.engine.client import EngineClient, RestartPolicy
from fastserve.serve.app import Api, AppOptions, create_app
from fastserve.serve.connection import BoundedConnection
from fastserve.serve.launch import bind
from tests.folders import write_tokenizer
from tests.unit.engine.fake_engine import COMMAND


class RunningServer:
    """A server that answers at `url`; `api` and `client` belong to the event loop `loop`."""

    def __init__(self, url: str, api: Api, client: EngineClient, loop: asyncio.AbstractEventLoop) -> None:
        self.url = url
        self.api = api
        self.client = client
        self.loop = loop


@contextmanager
def run_server(
    folder: Path, config: EngineConfig | None = None, *, stall_timeout: float = 60.0, **options
) -> Iterator[RunningServer]:
    """Serve the fake engine with the tokenizer of `folder` (made when it is empty)."""
    folder.mkdir(exist_ok=True)
    if not (folder / "tokenizer.json").exists():
        write_tokenizer(folder)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    started: list[RunningServer] = []
    ready, stop = threading.Event(), threading.Event()

    async def main() -> None:
        restarts = RestartPolicy(delays=(0.1,))
        client = EngineClient(config or EngineConfig(), command=COMMAND, stall_timeout=stall_timeout, restarts=restarts)
        await client.start()
        listener = bind("127.0.0.1", 0)
        tokenizer = Tokenizer.load(ModelFolder.open(str(folder)))
        app = create_app(client, tokenizer, model_name="fake", options=AppOptions(**options))
        settings = uvicorn.Config(app, http=BoundedConnection, lifespan="off", log_level="critical", ws="none")
        web = uvicorn.Server(settings)
        app.batches.start()
        serving = asyncio.create_task(web.serve(sockets=[listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        started.append(RunningServer(url, app.api, client, asyncio.get_running_loop()))
        ready.set()
        while not stop.is_set():
            await asyncio.sleep(0.02)
        await app.batches.close()
        web.should_exit = True
        await serving
        await client.close()

    failure: list[BaseException] = []

    def target() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            failure.append(error)
            ready.set()

    thread = threading.Thread(target=target)
    thread.start()
    ready.wait(30)
    if failure:
        raise failure[0]
    try:
        yield started[0]
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()
