"""LoRA adapters and beam search through the whole server, by the `openai` client and plain HTTP."""

from __future__ import annotations

from pathlib import Path

import httpx
import openai
import pytest

from tests import folders
from tests.e2e.conftest import FASTSERVE, SMALL
from tests.server_process import started

pytestmark = pytest.mark.slow  # servers started


def test_adapters_of_a_server(tiny_model: Path, tmp_path: Path) -> None:
    fox = folders.lora(tmp_path / "fox", tiny_model, seed=1)
    bear = folders.lora(tmp_path / "bear", tiny_model, seed=2)
    wrong = folders.lora(tmp_path / "wrong", folders.llama(tmp_path / "wide", hidden_size=96), seed=3)
    command = [*FASTSERVE, "serve", str(tiny_model), "--port", "0", "--lora", f"fox={fox}", "--max-loras", "2", *SMALL]
    with started(command) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["tiny-llama", "fox"]

        def text(model: str) -> str:
            answer = client.completions.create(
                model=model, prompt="Once upon", max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
            )
            return answer.choices[0].text

        assert text("fox") != text("tiny-llama")
        load = {"lora_name": "bear", "lora_path": str(wrong)}
        refused = httpx.post(f"{server.url}/v1/load_lora_adapter", json=load)
        assert refused.status_code == 400 and "do not belong together" in refused.json()["error"]["message"]
        loaded = httpx.post(f"{server.url}/v1/load_lora_adapter", json={**load, "lora_path": str(bear)})
        assert loaded.status_code == 200
        assert len({text("fox"), text("bear"), text("tiny-llama")}) == 3
        full = httpx.post(f"{server.url}/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": str(bear)})
        assert full.status_code == 400 and "max_loras" in full.json()["error"]["message"]
        httpx.post(f"{server.url}/v1/unload_lora_adapter", json={"lora_name": "fox"}).raise_for_status()
        assert [model.id for model in client.models.list()] == ["tiny-llama", "bear"]


def test_beam_search_of_a_server(tiny_model: Path) -> None:
    from fastserve import LLM

    [expected] = LLM(str(tiny_model), num_threads=1, kv_cache_memory="4MiB").beam_search(
        "Once upon", 3, max_tokens=10, ignore_eos=True
    )
    with started([*FASTSERVE, "serve", str(tiny_model), "--port", "0", *SMALL]) as server:
        body = {"model": "tiny-llama", "prompt": "Once upon", "max_tokens": 10, "ignore_eos": True}
        for beams in (
            {"n": 3, "use_beam_search": True},
            {"n": 2, "best_of": 3, "use_beam_search": True},
            {"num_beams": 3},
        ):
            reply = httpx.post(f"{server.url}/v1/completions", json={**body, **beams}, timeout=60).json()
            texts = [choice["text"] for choice in reply["choices"]]
            assert texts == [answer.text for answer in expected.outputs[: beams.get("n", 1)]]
            assert reply["usage"]["completion_tokens"] == 10 * len(texts)
        with httpx.stream(
            "POST", f"{server.url}/v1/completions", json={**body, "num_beams": 3, "stream": True}
        ) as stream:
            assert "[DONE]" in stream.read().decode()
        refused = httpx.post(f"{server.url}/v1/completions", json={**body, "num_beams": 3, "temperature": 0.5})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "temperature"
