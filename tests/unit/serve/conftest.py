"""One server over the fake engine for most tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest

from fastserve.core.config import EngineConfig
from tests.unit.serve.server import RunningServer, run_server


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with run_server(
        tmp_path_factory.mktemp("model"), EngineConfig(scheduler="priority"), max_body_bytes=200_000
    ) as running:
        yield running


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
