"""The whole server, as people use it: `fastserve serve` with a real (tiny, random) model and the `openai` client."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from tests.e2e.conftest import FASTSERVE, SMALL
from tests.server_process import ServerProcess, num_listening

STORY = [{"role": "user", "content": "Tell me a story about a fox"}]
LONG = {"max_tokens": 400, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture
def client(server: ServerProcess):
    wait_ready(server)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def wait_ready(server: ServerProcess, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while httpx.get(f"{server.url}/ready").status_code != 200:
        assert time.monotonic() < deadline, "the server is not ready"
        time.sleep(0.05)


def gauge(server: ServerProcess, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics").text
    return float(re.search(rf"^fastserve_{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE).group(1))


def until_idle(server: ServerProcess, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while gauge(server, "num_requests_running") or gauge(server, "num_requests_waiting"):
        assert time.monotonic() < deadline, "requests are still there"
        time.sleep(0.05)
    assert gauge(server, "kv_cache_usage_perc") == 0


def test_streamed_chat_by_the_openai_client(client):
    fields = dict(model="tiny-llama", messages=STORY, max_tokens=40, temperature=0)
    whole = client.chat.completions.create(**fields)
    *chunks, last = client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert whole.usage.completion_tokens > 5
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    # The second request found the first one's prompt in the prefix cache, in whole blocks.
    assert last.usage.prompt_tokens_details.cached_tokens >= 16


def test_http_and_offline_make_the_same_tokens(client, tiny_model):
    from fastserve import LLM, SamplingParams

    prompts = ["Once upon a time", "The fox said to the bear", "x"]
    answer = client.completions.create(model="tiny-llama", prompt=prompts, max_tokens=32, temperature=0)
    llm = LLM(str(tiny_model), kv_cache_memory="16MiB", num_threads=1)
    outputs = llm.generate(prompts, SamplingParams(max_tokens=32, temperature=0), use_tqdm=False)
    assert [choice.text for choice in answer.choices] == [output.outputs[0].text for output in outputs]


def test_seeds_and_choices(client):
    def texts(seed: int) -> list[str]:
        answer = client.chat.completions.create(model="tiny-llama", messages=STORY, max_tokens=24, n=3, seed=seed)
        return [choice.message.content for choice in answer.choices]

    first = texts(7)
    assert first == texts(7)
    assert first != texts(8)
    assert len(set(first)) == 3


def test_logprobs_of_greedy_tokens_are_the_best(client):
    answer = client.chat.completions.create(
        model="tiny-llama", messages=STORY, max_tokens=12, temperature=0, logprobs=True, top_logprobs=4
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for item in content:
        assert len(item.top_logprobs) == 4
        assert item.top_logprobs[0].logprob == item.logprob
        assert item.top_logprobs[0].bytes == item.bytes
        assert item.logprob < 0


def test_prompt_logprobs_cover_the_prompt(client):
    answer = client.completions.create(
        model="tiny-llama", prompt="Once upon a time", max_tokens=1, extra_body={"prompt_logprobs": 2}
    )
    first, *rest = answer.choices[0].prompt_logprobs
    assert first is None
    assert len(rest) == answer.usage.prompt_tokens - 1
    assert all(2 <= len(item) <= 3 for item in rest)


def test_many_streams_at_once_lose_and_repeat_nothing(client, server):
    fields = dict(model="tiny-llama", max_tokens=48, temperature=0, extra_body={"ignore_eos": True})
    prompts = [f"Tell me story number {number}" for number in range(24)]
    alone = {prompt: client.completions.create(prompt=prompt, **fields).choices[0].text for prompt in prompts[:4]}
    texts: dict[str, str] = {}

    def run(prompt: str) -> None:
        stream = client.completions.create(prompt=prompt, stream=True, **fields)
        texts[prompt] = "".join(chunk.choices[0].text for chunk in stream)

    threads = [threading.Thread(target=run, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(texts) == 24
    assert {prompt: texts[prompt] for prompt in alone} == alone
    until_idle(server)


def test_prompt_longer_than_the_limit(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model="tiny-llama", prompt="fox " * 2000)
    assert error.value.code == "context_length_exceeded"
    assert "511" in error.value.message


def test_kill_9_in_mid_stream(client, server):
    """Running streams end with an error within 2 s, /ready tells the truth, the engine returns, queued ones go on."""
    queued: list[str] = []

    def wait_in_queue() -> None:
        answer = client.completions.create(model="tiny-llama", prompt="The fox", max_tokens=4, temperature=0)
        queued.append(answer.choices[0].text)

    expected = client.completions.create(model="tiny-llama", prompt="The fox", max_tokens=4, temperature=0)
    # Eight sequences fill the batch, so that the next request has to wait.
    running = client.completions.create(model="tiny-llama", prompt="Once", n=8, stream=True, **LONG)
    next(running)
    thread = threading.Thread(target=wait_in_queue)
    thread.start()
    deadline = time.monotonic() + 60
    while gauge(server, "num_requests_waiting") < 1:
        assert time.monotonic() < deadline, "the second request did not queue"
    old = server.engine_id
    os.kill(old, signal.SIGKILL)
    with pytest.raises(openai.APIError, match="died"):
        list(running)
    reply = httpx.get(f"{server.url}/ready")
    assert (reply.status_code, reply.json()["reason"]) == (503, "engine restarting")
    assert httpx.get(f"{server.url}/health").status_code == 200
    thread.join(60)
    assert queued == [expected.choices[0].text]
    assert httpx.get(f"{server.url}/ready").status_code == 200
    assert server.engine_id != old
    until_idle(server)


def test_vanishing_clients_free_the_engine(client, server):
    for _ in range(10):
        stream = client.completions.create(model="tiny-llama", prompt="Once", n=2, stream=True, **LONG)
        next(stream)
        stream.close()
    with httpx.Client() as http, pytest.raises(httpx.ReadTimeout):
        body = {"prompt": "Once", "max_tokens": 400, "n": 8, "ignore_eos": True}
        http.post(f"{server.url}/v1/completions", json=body, timeout=httpx.Timeout(5, read=0.03))
    until_idle(server)


def test_one_listening_socket_and_no_torch_in_the_api_process(server):
    wait_ready(server)
    process_id = server.process.pid
    assert num_listening([process_id, server.engine_id]) == 1
    assert "libtorch" not in Path(f"/proc/{process_id}/maps").read_text()
    assert "libtorch" in Path(f"/proc/{server.engine_id}/maps").read_text()


def test_port_in_use_is_told_at_once(server, tiny_model):
    port = server.url.rpartition(":")[2]
    result = subprocess.run(
        [*FASTSERVE, "serve", str(tiny_model), "--port", port], capture_output=True, text=True, timeout=30
    )
    assert result.returncode == 3
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("fastserve: cannot listen on 127.0.0.1 port " + port)
    assert "--port" in line


def test_banner_curl_line(server):
    wait_ready(server)
    command = next(line for line in server.banner.splitlines() if "curl -N" in line)
    answer = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert answer.stdout.count("data: ") > 3
    assert answer.stdout.rstrip().endswith("data: [DONE]")


def test_sigterm_lets_a_stream_finish(tiny_model):
    from tests.server_process import started

    with started([*FASTSERVE, "serve", str(tiny_model), "--port", "0", *SMALL]) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.completions.create(model="tiny-llama", prompt="Once", stream=True, **LONG)
            next(stream)
            server.process.send_signal(signal.SIGTERM)
            assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        status, _ = server.end()
        assert status == 0


def test_clients_that_vanish_leave_nothing(server):
    """benchmarks/clients.py with fewer of them: descriptors, threads, sequences and blocks are as before."""
    from benchmarks import clients

    wait_ready(server)
    port = int(server.url.rpartition(":")[2])
    asyncio.run(clients.vanish(port, 45))
    before = clients.holdings(server.process.pid, port)
    asyncio.run(clients.vanish(port, 90))
    assert clients.faults(before, clients.holdings(server.process.pid, port)) == []
