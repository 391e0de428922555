"""A real server with a decoder, an encoder and two encoder-decoders, asked for translations over HTTP; and one with an
encoder-decoder alone."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import fastserve
from tests import encoder_folders
from tests.e2e.conftest import FASTSERVE, SMALL
from tests.encoder_decoder_folders import add_tokens, encoder_decoder
from tests.server_process import ServerProcess, started

pytestmark = pytest.mark.slow  # servers started

TEXT = "The fox said to the bear: where is the river?"
LANGUAGES = ["__de__", "__en__", "__fr__"]
SEARCH = {"num_beams": 4, "length_penalty": 0.8, "max_length": 24, "forced_eos_token_id": 2}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("translators")
    add_tokens(encoder_decoder(folder / "m2m", "m2m100", generation=SEARCH), LANGUAGES, src_lang="en")
    encoder_decoder(folder / "summaries", "bart", generation={"max_length": 30})
    encoder_decoder(folder / "later", "t5", generation={"max_length": 10})
    encoder_folders.encoder(folder / "labels", "Bert", "ForSequenceClassification")
    return folder


@pytest.fixture(scope="module")
def server(tiny_model: Path, repository: Path) -> Iterator[ServerProcess]:
    others = [str(repository / name) for name in ("m2m", "summaries", "labels")]
    options = ["--port", "0", "--name", "chat", "--model-repository", str(repository), *SMALL]
    with started([*FASTSERVE, "serve", str(tiny_model), *others, *options]) as running:
        yield running


def post(server: ServerProcess, path: str, **body: Any) -> Any:
    reply = httpx.post(server.url + path, json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


def refused(server: ServerProcess, path: str, **body: Any) -> tuple[int, str]:
    reply = httpx.post(server.url + path, json=body, timeout=60)
    return reply.status_code, reply.json()["error"]["message"]


def offline(folder: Path) -> fastserve.LLM:
    return fastserve.LLM(str(folder), kv_cache_memory="16MiB", num_threads=1)


def test_translations_are_those_of_the_folder(server: ServerProcess, repository: Path) -> None:
    """Beams and lengths as generation_config.json says; the same as offline."""
    llm = offline(repository / "m2m")
    answer = post(server, "/v1/translations", text=[TEXT, "the sea"], target_language="fr")
    expected = llm.translate([TEXT, "the sea"], "fr", "en")
    assert [choice["text"] for choice in answer["choices"]] == [output.outputs[0].text for output in expected]
    assert answer["object"] == "translation" and answer["model"] == "m2m"
    assert answer["usage"]["prompt_tokens"] == sum(len(output.prompt_token_ids) for output in expected)
    german = post(server, "/v1/translations", model="m2m", text=TEXT, target_language="de", source_language="fr")
    assert german["choices"][0]["text"] == llm.translate(TEXT, "de", "fr")[0].outputs[0].text
    several = post(server, "/v1/translations", text=TEXT, target_language="fr", n=3)
    assert len({choice["text"] for choice in several["choices"]}) == 3


def test_streams_have_the_same_text(server: ServerProcess) -> None:
    # Long, for tokens that come quickly are joined into one event.
    asked = {"model": "m2m", "text": [TEXT, "the sea"], "target_language": "de", "num_beams": 1, "max_tokens": 120}
    whole = post(server, "/v1/translations", **asked)
    texts, num_events = ["", ""], 0
    body = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", server.url + "/v1/translations", json=body, timeout=60) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert event["object"] == "translation.chunk"
                for choice in event["choices"]:
                    texts[choice["index"]] += choice["text"]
                    num_events += 1
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert num_events > 4 and event["usage"] == whole["usage"]


def test_completions_and_other_models_beside_each_other(server: ServerProcess, repository: Path) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
    expected = offline(repository / "summaries").generate(TEXT, use_tqdm=False)[0].outputs[0]

    def summarise(_: int) -> str:
        return client.completions.create(model="summaries", prompt=TEXT).choices[0].text

    def ask(index: int) -> str:
        return str(post(server, "/v1/completions", model="chat", prompt=f"The fox {index}", max_tokens=20)["id"])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = [pool.submit(summarise, index) for index in range(6)]
        others = [pool.submit(ask, index) for index in range(6)]
        labels = pool.submit(post, server, "/classify", input=TEXT)
        assert [item.result() for item in found] == [expected.text] * 6
        assert all(item.result() for item in others) and labels.result()["data"]
    streamed = client.completions.create(model="summaries", prompt=TEXT, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == expected.text
    sampled = [
        client.completions.create(model="summaries", prompt=TEXT, temperature=1.0, seed=3, max_tokens=8) for _ in "ab"
    ]
    assert sampled[0].choices[0].text == sampled[1].choices[0].text
    assert sampled[0].usage is not None and sampled[0].usage.completion_tokens <= 8


def test_models_are_listed_loaded_and_unloaded(server: ServerProcess) -> None:
    entries = {entry["id"]: entry for entry in httpx.get(server.url + "/v1/models").json()["data"]}
    assert entries["m2m"]["kind"] == "text" and entries["m2m"]["max_model_len"] == 160
    assert httpx.post(server.url + "/v2/repository/models/later/load", timeout=60).status_code == 200
    assert post(server, "/v1/completions", model="later", prompt=TEXT)["usage"]["completion_tokens"] <= 9
    assert httpx.post(server.url + "/v2/repository/models/later/unload", timeout=60).status_code == 200
    assert refused(server, "/v1/completions", model="later", prompt=TEXT)[0] == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("translations", {"text": TEXT, "target_language": "xx"}, 400, "no language 'xx'.*de, en, fr"),
        ("translations", {"text": TEXT}, 400, "a language is needed here; target_language may be one of de, en, fr"),
        ("translations", {"text": TEXT, "model": "summaries", "target_language": "fr"}, 400, "knows no languages"),
        ("translations", {"text": TEXT, "model": "labels"}, 404, "encoder-decoders are 'm2m', 'summaries'"),
        ("translations", {"text": "the sea " * 300, "target_language": "fr"}, 400, "takes at most 160"),
        (
            "translations",
            {"text": "", "target_language": "fr", "num_beams": 3, "top_p": 0.5},
            400,
            "top_p has no place",
        ),
        ("completions", {"model": "summaries", "prompt": TEXT, "suffix": "x"}, 400, "suffix has no meaning"),
        (
            "completions",
            {"model": "summaries", "prompt": TEXT, "prompt_logprobs": 1},
            400,
            "prompt_logprobs has no meaning",
        ),
        ("completions", {"model": "summaries", "prompt": TEXT, "echo": True}, 400, "echo has no meaning"),
        ("completions", {"model": "summaries", "prompt": TEXT, "max_tokens": 5000}, 400, "answers with at most"),
        ("chat/completions", {"model": "summaries", "messages": [{"role": "user", "content": "x"}]}, 404, "no model"),
    ],
)
def test_errors(server: ServerProcess, path: str, body: dict[str, Any], status: int, message: str) -> None:
    found, text = refused(server, f"/v1/{path}", **body)
    assert found == status, text
    assert __import__("re").search(message, text), text


def test_a_server_with_an_encoder_decoder_alone(repository: Path) -> None:
    with started([*FASTSERVE, "serve", str(repository / "summaries"), "--port", "0", *SMALL]) as running:
        assert "completions" in running.banner
        assert post(running, "/v1/completions", prompt=TEXT)["model"] == "summaries"
        assert post(running, "/v1/completions", prompt=TEXT, model="summaries", num_beams=2)["choices"][0]["text"]
        assert httpx.get(running.url + "/ready").status_code == 200


def test_pipelines_answer_as_in_transformers_4(repository: Path) -> None:
    options = {"kv_cache_memory": "16MiB", "num_threads": 1}
    translate = fastserve.pipeline("translation_en_to_fr", str(repository / "m2m"), **options)
    text = offline(repository / "m2m").translate(TEXT, "fr", "en")[0].outputs[0].text
    assert translate(TEXT) == [{"translation_text": text.strip()}]
    assert translate([TEXT, TEXT], num_beams=2, num_return_sequences=2)[1][0].keys() == {"translation_text"}
    summarise = fastserve.pipeline("summarization", str(repository / "summaries"), **options)
    assert summarise(TEXT, max_length=8)[0].keys() == {"summary_text"}
    assert fastserve.pipeline("", str(repository / "summaries"), **options)(TEXT, do_sample=True, seed=1)[0]
    with pytest.raises(fastserve.core.errors.ConfigError, match="not for summarization"):
        fastserve.pipeline("summarization", str(repository / "labels"))
    with pytest.raises(fastserve.core.errors.RequestError, match="unknown argument num_beem"):
        summarise(TEXT, num_beem=3)
