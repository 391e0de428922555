"""The command line: help, flags made from dataclasses, errors and exit codes, chat through a fake answerer."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from fastserve import LLM, __version__
from fastserve.checkpoint.folder import TEXT_GENERATION
from fastserve.cli import chat as chat_module
from fastserve.cli.chat import ServerChat, converse
from fastserve.cli.main import app
from fastserve.cli.options import field_help, guarded
from fastserve.core.config import EngineConfig, ServeConfig
from fastserve.core.errors import CheckpointError, ConfigError, FastServeError, RequestError
from fastserve.core.sampling_params import SamplingParams
from fastserve.serve.tenants import KeyRing
from tests.encoder_decoder_folders import encoder_decoder
from tests.unit.serve.server import run_server

runner = CliRunner()
COMMANDS = (["serve"], ["chat"], ["generate"], ["info"], ["compress"], ["bench", "latency"], ["bench", "throughput"])
HEAVY = {"torch", "transformers", "fastapi", "uvicorn", "pydantic", "rich", "tokenizers", "numpy"}


@pytest.mark.parametrize("command", [[], *COMMANDS, ["bench"]])
def test_every_help_has_an_example(command):
    result = runner.invoke(app, [*command, "--help"])
    assert result.exit_code == 0
    assert "Example: fastserve" in result.output


@pytest.mark.parametrize(
    "code",
    [
        "import fastserve",
        "from fastserve.cli.main import app; app(['--help'])",
        # typer itself takes pydantic to describe the options of one command.
        "from fastserve.cli.main import app; HEAVY.discard('pydantic'); app(['serve', '--help'])",
    ],
)
def test_help_and_import_load_nothing_heavy(repository: Path, code: str):
    program = f"import sys, atexit; HEAVY = {HEAVY!r}; atexit.register(lambda: print(HEAVY & set(sys.modules))); {code}"
    result = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "set()"


def test_version():
    assert runner.invoke(app, ["--version"]).output == f"fastserve {__version__}\n"


def test_every_option_of_the_server_is_a_flag_with_help():
    output = runner.invoke(app, ["serve", "--help"]).output
    for item in dataclasses.fields(ServeConfig):
        assert ("--" + item.name.replace("_", "-") + " " in output) == (item.name not in ("model", "api_key")), (
            item.name
        )
    for owner in (EngineConfig, ServeConfig, SamplingParams):
        described = field_help(owner)
        assert {item.name for item in dataclasses.fields(owner)} <= set(described), owner


def served_with(monkeypatch, arguments: list[str], environment: dict[str, str] | None = None) -> ServeConfig:
    """The options that `fastserve serve ARGUMENTS` would serve with."""
    from fastserve.serve import launch

    seen: list[ServeConfig] = []
    monkeypatch.setattr(launch, "serve", lambda config, announce: seen.append(config) or 0)
    result = runner.invoke(app, ["serve", *arguments], env=environment)
    assert result.exit_code == 0, result.output
    return seen[0]


def test_flags_environment_and_file_in_that_order(monkeypatch, tmp_path):
    file = tmp_path / "options.toml"
    file.write_text('port = 1\nmax_model_len = 100\nkv_cache_memory = "64MiB"\nprefix_caching = false\n')
    config = served_with(
        monkeypatch,
        ["folder", "--config", str(file), "--port", "3"],
        {"FASTSERVE_PORT": "2", "FASTSERVE_MAX_MODEL_LEN": "200", "FASTSERVE_API_KEY": "secret"},
    )
    assert (config.model, config.port, config.max_model_len, config.api_key) == ("folder", 3, 200, "secret")
    assert (config.kv_cache_memory, config.prefix_caching) == (64 * 2**20, False)


def test_kinds_of_flags(monkeypatch):
    config = served_with(monkeypatch, ["--no-prefix-caching", "--kv-cache-memory", "2GB", "--drain-timeout", "1.5"])
    assert (config.model, config.prefix_caching, config.kv_cache_memory) == ("", False, 2_000_000_000)
    assert config.drain_timeout == 1.5
    assert served_with(monkeypatch, ["--seed", "0"]).seed == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--dtype", "int3"], "fastserve: dtype must be one of"),
        (["serve", "--kv-cache-memory", "many"], "no memory size"),
        (["serve", "--config", "/nowhere.toml"], "cannot read config file"),
        (["generate", "-p", "x", "--temperature", "-1"], "temperature must be between"),
        (["chat", "--url", "http://127.0.0.1:1", "--dtype", "float32"], "leave out dtype"),
        (["chat", "--url", "ftp://x"], "is no address"),
        (["chat", "--url", "http://127.0.0.1:99999"], "is no address"),
        (["serve", "--target-tpot-ms", "nan"], "target_tpot_ms must be a number"),
        (["serve", "--stall-timeout", "inf"], "stall_timeout must be a number"),
    ],
)
def test_wrong_options_are_one_line_and_status_2(arguments, message, monkeypatch):
    monkeypatch.setattr("fastserve.checkpoint.sampling_defaults.sampling_defaults", lambda folder: {})
    decoder = SimpleNamespace(task=TEXT_GENERATION)
    monkeypatch.setattr("fastserve.checkpoint.folder.ModelFolder.open", lambda name: decoder)
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_config_file_that_is_not_utf_8_is_a_config_error(tmp_path):
    file = tmp_path / "options.toml"
    file.write_bytes(b'model = "\xff"')
    with pytest.raises(ConfigError, match=r"options\.toml is not valid TOML"):
        EngineConfig.load(file=file, environment={})


@pytest.mark.parametrize(
    ("option", "value"),
    [("lora", 3), ("kv_cache_memory", [1]), ("kv_cache_memory", 1.5), ("max_batch_tokens", 2000.7)],
)
def test_values_of_the_wrong_type_are_config_errors(option, value):
    with pytest.raises(ConfigError, match=str(value).strip("[]")):
        EngineConfig.from_options({option: value})


def test_a_whole_float_is_a_size_and_a_count():
    config = EngineConfig.from_options({"kv_cache_memory": 2e9, "max_batch_tokens": 2000.0})
    assert (config.kv_cache_memory, config.max_batch_tokens) == (2_000_000_000, 2000)


def test_missing_folder_is_one_line_and_status_3():
    for command in (["serve", "./no-such-folder"], ["info", "./no-such-folder"], ["chat", "./no-such-folder"]):
        result = runner.invoke(app, [*command, *(["--port", "0"] if command[0] == "serve" else [])])
        assert result.exit_code == 3, result.output
        assert "there is no model folder" in result.output
        assert len(result.output.strip().splitlines()) == 1


def test_generate_asks_an_encoder_decoder_as_its_folder_says(tmp_path):
    folder = encoder_decoder(tmp_path / "bart", "bart", generation={"num_beams": 2, "max_length": 8})
    small = ["--kv-cache-memory", "8MiB", "--num-threads", "1"]
    expected = LLM(str(folder), kv_cache_memory="8MiB", num_threads=1).generate("The fox")[0].outputs[0].text
    command = ["generate", str(folder), "-p", "The fox", *small]
    assert runner.invoke(app, command).output == f"{expected}\n"
    answer = json.loads(runner.invoke(app, [*command, "--json", "--max-tokens", "3"]).output)
    assert len(answer["outputs"][0]["token_ids"]) == 3 and answer["outputs"][0]["score"] is not None


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (CheckpointError("x"), 3),
        (RequestError("x"), 2),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
    ],
)
def test_errors_become_exit_codes(error, status):
    @guarded
    def fails() -> None:
        raise error

    with pytest.raises(typer.Exit) as end:
        fails()
    assert end.value.exit_code == status


def test_bugs_are_not_hidden():
    @guarded
    def fails() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()


class Answered(list):
    """The lines of a response."""

    status = 200


class Parrot:
    """Repeats the last message; asks to stop, or fails, when told so."""

    def __init__(self):
        self.seen: list[list[dict[str, str]]] = []

    def reply(self, messages):
        self.seen.append([dict(message) for message in messages])
        text = messages[-1]["content"]
        yield text[:2]
        if text == "stop":
            raise KeyboardInterrupt
        if text == "long":
            raise RequestError("the conversation is too long")
        if text == "busy":
            raise FastServeError("the server says: too many requests")
        yield text[2:]


def run_chat(lines: list[str | BaseException], system: str = "") -> tuple[int, Parrot]:
    feed = iter([*lines, EOFError()])

    def read() -> str:
        item = next(feed)
        if isinstance(item, BaseException):
            raise item
        return item

    parrot = Parrot()
    return converse(parrot, system, read), parrot


def test_chat_remembers_and_forgets(capsys):
    status, parrot = run_chat(["hello", "", "again", "/new", "fresh", "/exit", "never"], system="be brief")
    assert status == 0
    assert capsys.readouterr().out == "hello\nagain\nfresh\n"
    system = {"role": "system", "content": "be brief"}
    assert [len(messages) for messages in parrot.seen] == [2, 4, 2]
    assert parrot.seen[2] == [system, {"role": "user", "content": "fresh"}]


def test_ctrl_c_stops_the_answer_then_the_program(capsys):
    status, parrot = run_chat(["stop", "next", KeyboardInterrupt()])
    assert status == 130
    assert parrot.seen[1][1] == {"role": "assistant", "content": "st"}
    assert "[stopped]" in capsys.readouterr().out


def test_a_turn_that_cannot_be_answered_is_taken_back(capsys):
    status, parrot = run_chat(["long", "short"])
    assert status == 0
    assert [message["content"] for message in parrot.seen[1]] == ["short"]
    assert "too long" in capsys.readouterr().err


def test_a_server_that_is_busy_ends_no_conversation(capsys):
    status, parrot = run_chat(["hello", "busy", "again", "busy"])
    assert status == 1  # the last line was not answered
    assert [message["content"] for message in parrot.seen[2]] == ["hello", "hello", "again"]
    assert "too many requests (your line was dropped" in capsys.readouterr().err


@pytest.mark.parametrize("event", [b"data: {", b"data: []", b'data: {"choices": [1]}'])
def test_an_event_that_is_none_is_an_error_of_the_server(event):
    with pytest.raises(FastServeError, match="no part of an answer"):
        list(ServerChat("127.0.0.1:1", None, {}, "")._read(Answered([event])))


def test_chat_through_a_server(tmp_path):
    messages = [{"role": "user", "content": "hello"}]
    with run_server(tmp_path, keys=KeyRing({"key": "one"})) as server:
        pieces = list(ServerChat(server.url, None, {"max_tokens": 15}, "key").reply(messages))
        assert "".join(pieces).startswith("user\nhello")
        bare = server.url.removeprefix("http://")
        assert list(ServerChat(f"{bare}/v1/", "fake", {"max_tokens": 5}, "key").reply(messages))
        with pytest.raises(FastServeError, match="API key"):
            list(ServerChat(server.url, None, {}, "wrong").reply(messages))
        with pytest.raises(RequestError, match="context"):
            list(ServerChat(server.url, None, {"max_tokens": 9999}, "key").reply(messages))
    with pytest.raises(FastServeError, match="does not answer"):
        list(ServerChat(server.url, None, {}, "key").reply(messages))


def test_chat_command_reads_lines_from_a_pipe(tmp_path, monkeypatch):
    with run_server(tmp_path) as server:
        result = runner.invoke(app, ["chat", "--url", server.url, "--max-tokens", "12"], input="hello\n/exit\n")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("user\nhello")


def test_held_interrupt_restores_the_handler():
    before = signal.getsignal(signal.SIGINT)
    with chat_module._held_interrupt() as noted:
        os.kill(os.getpid(), signal.SIGINT)
        assert noted == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is before
