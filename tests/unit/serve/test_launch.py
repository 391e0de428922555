"""The server as a process of its own, over the fake engine: ports, signals, the way out, what it imports."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from fastserve.serve.launch import AddressError, bind
from tests import server_process
from tests.folders import write_tokenizer
from tests.server_process import ServerProcess, children, num_listening
from tests.unit.engine.fake_engine import COMMAND

pytestmark = pytest.mark.slow  # many servers started

_PROGRAM = """
import sys
sys.path.insert(0, {repository!r})
from fastserve.cli.options import guarded
from fastserve.core.config import ServeConfig
from fastserve.core.logs import configure_logging
from fastserve.serve.launch import serve
import typer
configure_logging("server")
def run():
    config = ServeConfig.load({options!r}, environment={{}})
    raise typer.Exit(serve(config, lambda text: print(text, flush=True), engine_command={command!r}))
try:
    guarded(run)()
except typer.Exit as end:
    heavy = {{"torch", "transformers"}} & set(sys.modules)
    print("heavy imports:", sorted(heavy), flush=True)
    sys.exit(end.exit_code)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


@contextmanager
def started(folder: Path, environment: dict[str, str] | None = None, **options) -> Iterator[ServerProcess]:
    options = {"model": str(folder), "port": 0, **options}
    repository = str(Path(__file__).resolve().parents[3])
    program = _PROGRAM.format(repository=repository, options=options, command=COMMAND)
    with server_process.started([sys.executable, "-c", program], environment) as server:
        yield server


def test_banner_curl_line_works_and_one_socket_listens(folder):
    with started(folder) as server:
        assert "fake memory plan" in server.banner
        command = next(line for line in server.banner.splitlines() if "curl -N" in line)
        answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=20)
        assert answer.stdout.rstrip().endswith("data: [DONE]")
        engine = children(server.process.pid)
        assert len(engine) == 1
        assert num_listening([server.process.pid, *engine]) == 1
        server.process.send_signal(signal.SIGTERM)
        status, output = server.end()
        assert status == 0
        assert "heavy imports: []" in output
        with pytest.raises(ProcessLookupError):
            os.kill(engine[0], 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_streams_finish_and_refuses_new_ones(folder, number):
    with started(folder, {"FAKE_ENGINE_STEP": "0.02"}) as server:
        body = {"prompt": "abc", "max_tokens": 60, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=20) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(number)
            deadline = time.monotonic() + 60
            while httpx.get(f"{server.url}/ready").status_code != 503:
                assert time.monotonic() < deadline
            refused = httpx.post(f"{server.url}/v1/completions", json=body)
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            rest = list(lines)
        assert rest[-2] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-4]
        assert server.end()[0] == 0


def test_streams_that_outlast_the_drain_end_with_an_error_event(folder):
    with started(folder, {"FAKE_ENGINE_STEP": "0.05"}, drain_timeout=0.5) as server:
        body = {"prompt": "abc", "max_tokens": 200, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=20) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert rest[-2] == "data: [DONE]"
        assert "shutting down" in rest[-4]
        assert server.end()[0] == 0


def test_a_second_signal_exits_at_once(folder):
    with started(folder, {"FAKE_ENGINE_STEP": "0.05"}) as server:
        engine = children(server.process.pid)
        body = {"prompt": "abc", "max_tokens": 200, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=20) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            while httpx.get(f"{server.url}/ready").status_code != 503:
                time.sleep(0.01)
            server.process.send_signal(signal.SIGTERM)
            assert server.end(seconds=3)[0] == 128 + signal.SIGTERM
        deadline = time.monotonic() + 60
        while Path(f"/proc/{engine[0]}").exists():
            assert time.monotonic() < deadline, "the engine process was left behind"
            time.sleep(0.05)


def test_ctrl_c_while_the_model_is_loaded_ends_at_once(folder):
    config = {"model": str(folder), "port": 0}
    repository = str(Path(__file__).resolve().parents[3])
    program = _PROGRAM.format(repository=repository, options=config, command=COMMAND)
    environment = {**os.environ, "FAKE_ENGINE_LOAD": "60"}
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        deadline = time.monotonic() + 60
        while not children(process.pid) or not num_listening([process.pid]):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(1.0)  # well into loading
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "curl" not in output
    finally:
        process.kill()


def test_the_engine_dies_with_a_server_that_is_killed(folder):
    with started(folder) as server:
        engine = children(server.process.pid)
        server.process.kill()
        deadline = time.monotonic() + 60
        while Path(f"/proc/{engine[0]}").exists():
            assert time.monotonic() < deadline, "the engine process was left behind"
            time.sleep(0.05)


def test_an_engine_that_cannot_start_again_ends_the_server_with_an_error(folder, tmp_path):
    flag = tmp_path / "fails"
    with started(folder, {"FAKE_ENGINE_FAILS": str(flag)}) as server:
        flag.touch()
        os.kill(children(server.process.pid)[0], signal.SIGKILL)
        status, output = server.end(seconds=60)
        assert status == 1
        assert "giving up" in output
        assert output.strip().splitlines()[-2].startswith("fastserve: the engine died too often")


def test_a_model_that_cannot_be_loaded_is_one_line(folder, tmp_path):
    flag = tmp_path / "fails"
    flag.touch()
    failing = started(folder, {"FAKE_ENGINE_FAILS": str(flag)})
    with pytest.raises(AssertionError, match=r"fastserve: model.safetensors is damaged: download it again"), failing:
        pass


def test_port_in_use_names_the_port_and_the_flag():
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(AddressError, match=rf"port {port}: Address already in use.*--port") as error:
            bind("127.0.0.1", port)
        assert error.value.exit_code == 3


def test_hosts_that_are_not_ours():
    with pytest.raises(AddressError, match="--"):
        bind("192.0.2.1", 0)
    with pytest.raises(AddressError, match="--host"):
        bind("no such host", 0)


def test_ipv6_loopback():
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        bind("::1", 0).close()
    except AddressError as error:
        assert "::1" in str(error)
