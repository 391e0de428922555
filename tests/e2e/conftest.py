"""Real servers with the real engine on a tiny random model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import folders
from tests.server_process import ServerProcess, started

FASTSERVE = [sys.executable, "-m", "fastserve.cli.main"]
SMALL = ["--kv-cache-memory", "16MiB", "--max-batch-tokens", "256", "--num-threads", "1"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with 512 tokens of context."""
    return folders.llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[ServerProcess]:
    """One server for the tests of a module; it must survive each of them."""
    command = [*FASTSERVE, "serve", str(tiny_model), "--port", "0", "--max-batch-sequences", "8", *SMALL]
    with started(command) as running:
        yield running
