"""A real server with a decoder and encoders of every task, asked over HTTP."""

from __future__ import annotations

import base64
import concurrent.futures
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

import fastserve
from tests import encoder_folders
from tests.e2e.conftest import FASTSERVE, SMALL
from tests.server_process import ServerProcess, started

pytestmark = pytest.mark.slow  # servers started

TEXTS = ["The fox said to the bear: where is the river?", "a king", "Tell me a story about the sea."]
MODELS = {
    "vectors": ("MPNet", "Model", {}),
    "qa": ("Bert", "ForQuestionAnswering", {}),
    "ner": ("Electra", "ForTokenClassification", {"id2label": {0: "O", 1: "B-PER", 2: "I-PER"}}),
    "labels": ("Albert", "ForSequenceClassification", {}),
    "pairs": ("Roberta", "ForSequenceClassification", {"num_labels": 1}),
    "masks": ("ModernBert", "ForMaskedLM", {}),
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    for name, (family, head, options) in MODELS.items():
        encoder_folders.encoder(folder / name, family, head, **options)
    encoder_folders.encoder(folder / "late", "Bert", "ForSequenceClassification")
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    listed = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in modules]
    (folder / "vectors" / "modules.json").write_text(json.dumps(listed))
    (folder / "vectors" / "1_Pooling").mkdir()
    (folder / "vectors" / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    settings = {"prompts": {"query": "find: "}}
    (folder / "vectors" / "config_sentence_transformers.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def mixed(tiny_model: Path, repository: Path) -> Iterator[ServerProcess]:
    others = [f"{repository / name}?weight=2" for name in MODELS]
    options = ["--port", "0", "--name", "chat", "--model-repository", str(repository), *SMALL]
    with started([*FASTSERVE, "serve", str(tiny_model), *others, *options]) as running:
        yield running


def post(server: ServerProcess, path: str, **body: Any) -> Any:
    reply = httpx.post(server.url + path, json=body, timeout=30)
    assert reply.status_code == 200, reply.text
    return reply.json()


def refused(server: ServerProcess, path: str, **body: Any) -> tuple[int, str]:
    content = json.dumps(body)  # which writes halves of surrogate pairs, too
    reply = httpx.post(server.url + path, content=content, headers={"Content-Type": "application/json"}, timeout=30)
    return reply.status_code, reply.json()["error"]["message"]


def test_all_models_are_listed_and_generation_goes_on(mixed: ServerProcess) -> None:
    models = httpx.get(mixed.url + "/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["chat", *MODELS]
    assert httpx.get(mixed.url + "/v1/models/qa").json()["max_model_len"] == 160
    assert post(mixed, "/v1/completions", prompt="The fox", max_tokens=4)["usage"]["completion_tokens"] == 4
    assert "serving chat, vectors, qa, ner, labels, pairs, masks at" in mixed.banner


def test_embeddings_through_the_openai_client(mixed: ServerProcess, repository: Path) -> None:
    client = openai.OpenAI(base_url=mixed.url + "/v1", api_key="none")
    expected = np.stack(fastserve.pipeline("sentence-embedding", str(repository / "vectors"))(TEXTS))
    answer = client.embeddings.create(model="vectors", input=TEXTS)  # asks for base64
    vectors = np.array([item.embedding for item in answer.data])
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 10
    plain = client.embeddings.create(model="vectors", input=TEXTS[0], encoding_format="float", dimensions=8)
    short = np.array(plain.data[0].embedding)
    np.testing.assert_allclose(short, expected[0, :8] / np.linalg.norm(expected[0, :8]), atol=1e-5)
    [encoded] = post(mixed, "/v1/embeddings", input=TEXTS[0], encoding_format="base64")["data"]
    decoded = np.frombuffer(base64.b64decode(encoded["embedding"]), dtype=np.float32)
    np.testing.assert_allclose(decoded, expected[0], atol=1e-5)
    prompted = client.embeddings.create(model="vectors", input=TEXTS[0], extra_body={"prompt_name": "query"})
    written = client.embeddings.create(model="vectors", input="find: " + TEXTS[0])
    assert prompted.data[0].embedding == written.data[0].embedding != plain.data[0].embedding


def test_metrics_tell_models_apart(mixed: ServerProcess) -> None:
    def values(name: str, **labels: str) -> float:
        listed = "".join(f',{key}="{value}"' for key, value in labels.items())
        text = httpx.get(mixed.url + "/metrics", timeout=30).text
        lines = [
            line
            for line in text.splitlines()
            if line.startswith(f'fastserve_array_{name}{{model_name="vectors"{listed}}}')
        ]
        return float(lines[0].split()[-1]) if lines else 0.0

    names = ["tokens_total", "batch_requests_sum", "request_latency_seconds_count", "step_seconds_total"]
    before = [values(name) for name in names]
    answered, refused_before = values("requests_total", outcome="answered"), values("requests_total", outcome="refused")
    post(mixed, "/v1/embeddings", model="vectors", input=[[2, 8, 9, 3], [2, 3]])
    post(mixed, "/v1/embeddings", model="vectors", input=[2, 3])
    assert refused(mixed, "/pooling", model="vectors", input=[2, 3], output="scores")[0] == 400
    tokens, requests, calls, seconds = (values(name) - start for name, start in zip(names, before, strict=True))
    assert (tokens, requests, calls) == (8, 3, 2) and seconds > 0
    assert values("requests_total", outcome="answered") == answered + 3
    assert values("requests_total", outcome="refused") == refused_before + 1
    assert values("padding_tokens_total") == 0 and values("requests_live") == 0


def test_token_ids_are_taken_as_they_are(mixed: ServerProcess) -> None:
    one = post(mixed, "/v1/embeddings", model="vectors", input=[2, 8, 9, 3])["data"]
    several = post(mixed, "/v1/embeddings", model="vectors", input=[[2, 8, 9, 3], [2, 3]])["data"]
    np.testing.assert_allclose(several[0]["embedding"], one[0]["embedding"], atol=1e-6)


def test_pooling_gives_what_the_network_says(mixed: ServerProcess) -> None:
    for model, output, shape in [("vectors", "embed", (64,)), ("vectors", "hidden", (4, 64)), ("qa", None, (4, 2))]:
        [item] = post(mixed, "/pooling", model=model, input=[2, 8, 9, 3], output=output)["data"]
        assert np.array(item["data"]).shape == shape
    assert refused(mixed, "/pooling", model="vectors", input="x", output="scores")[0] == 400


def test_classify(mixed: ServerProcess, repository: Path) -> None:
    expected = fastserve.pipeline("text-classification", str(repository / "labels"))(TEXTS, top_k=None)
    answer = post(mixed, "/classify", input=TEXTS)
    for item, labels in zip(answer["data"], expected, strict=True):
        assert [found["label"] for found in item["labels"]] == [found["label"] for found in labels]
        assert item["label"] == labels[0]["label"] and item["num_classes"] == 3
        assert sum(item["probs"]) == pytest.approx(1, abs=1e-5)
    [paired] = post(mixed, "/classify", model="labels", input=TEXTS[0], text_pair=TEXTS[1])["data"]
    assert paired["probs"] != answer["data"][0]["probs"]


@pytest.mark.parametrize("model", ["pairs", "vectors"])
def test_score_and_rerank_agree(mixed: ServerProcess, model: str) -> None:
    for path in ("/score", "/v1/score"):
        scores = [item["score"] for item in post(mixed, path, model=model, text_1=TEXTS[0], text_2=TEXTS)["data"]]
    assert len(set(scores)) == 3
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        ranked = post(mixed, path, model=model, query=TEXTS[0], documents=[*TEXTS[:2], {"text": TEXTS[2]}])["results"]
    assert [item["relevance_score"] for item in ranked] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
    assert all(item["document"]["text"] == TEXTS[item["index"]] for item in ranked)
    [best] = post(mixed, "/rerank", model=model, query=TEXTS[0], documents=TEXTS, top_n=1, return_documents=False)[
        "results"
    ]
    assert best["index"] == ranked[0]["index"] and "document" not in best
    if model == "vectors":
        assert scores[0] == pytest.approx(1, abs=1e-5)


def test_question_answering(mixed: ServerProcess, repository: Path) -> None:
    asked = dict(question="Where is the river?", context=" ".join(encoder_folders._CORPUS * 3))
    expected = fastserve.pipeline("question-answering", str(repository / "qa"))(**asked, top_k=3, max_answer_len=30)
    answers = post(mixed, "/v1/question-answering", **asked, top_k=3)["answers"]
    for answer, other in zip(answers, expected, strict=True):
        assert answer == {**other, "score": pytest.approx(other["score"], abs=1e-4)}


def test_entities_and_masks(mixed: ServerProcess, repository: Path) -> None:
    pipe = fastserve.pipeline("ner", str(repository / "ner"), aggregation_strategy="simple", ignore_labels=[])
    found = post(mixed, "/v1/token-classification", input=TEXTS, ignore_labels=[])["data"]
    for item, entities in zip(found, pipe(TEXTS), strict=True):
        assert [(e["entity_group"], e["start"], e["end"]) for e in item["entities"]] == [
            (e["entity_group"], e["start"], e["end"]) for e in entities
        ]
    text = "The [MASK] said to the [MASK]."
    expected = fastserve.pipeline("fill-mask", str(repository / "masks"))(text, top_k=2)
    [filled] = post(mixed, "/v1/fill-mask", input=text, top_k=2)["data"]
    assert [[w["token"] for w in words] for words in filled["masks"]] == [[w["token"] for w in ws] for ws in expected]


def test_what_cannot_be_done_is_said(mixed: ServerProcess) -> None:
    assert refused(mixed, "/v1/embeddings", model="chat", input="x") == (
        404,
        "there is no encoder 'chat' here; its encoders are 'vectors', 'qa', 'ner', 'labels', 'pairs', 'masks'",
    )
    status, message = refused(mixed, "/classify", model="qa", input="x")
    assert status == 400 and "is for question-answering, not for text-classification" in message
    status, message = refused(mixed, "/v1/embeddings", model="vectors", input="the fox " * 200)
    assert status == 400 and "takes at most 128" in message
    assert post(mixed, "/v1/embeddings", model="vectors", input="the fox " * 200, truncate=True)["usage"] == {
        "prompt_tokens": 128,
        "total_tokens": 128,
    }
    for path, body, word in [
        ("/v1/embeddings", {"input": []}, "input"),
        ("/v1/embeddings", {"input": "x", "dimensions": 10_000}, "have 64 numbers"),
        ("/v1/embeddings", {"input": "x", "prompt_name": "none"}, "it has: query"),
        ("/v1/embeddings", {"input": [400]}, "between 0 and"),
        ("/v1/embeddings", {"input": "\ud800"}, "not valid Unicode"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["c"]}, "give as many"),
        ("/rerank", {"model": "labels", "query": "a", "documents": ["b"]}, "3 labels"),
        ("/v1/question-answering", {"question": "", "context": "x"}, "neither of them empty"),
        ("/v1/fill-mask", {"input": "no mask"}, "no [MASK]"),
        ("/v1/fill-mask", {"input": "[MASK] " * 50, "top_k": 1000}, "top_k for every mask"),
        ("/v1/question-answering", {"question": "x", "context": "x", "max_answer_length": 10**6}, "max_answer_length"),
        ("/v1/embeddings", {"input": "x", "priority": 10**30}, "priority"),
    ]:
        status, message = refused(mixed, path, **body)
        assert status == 400 and word in message, (path, message)


def test_many_at_once_are_answered_as_alone(mixed: ServerProcess) -> None:
    """Requests of several clients go in one ragged batch; nobody gets another one's answer."""
    texts = [" ".join(TEXTS[0].split()[: 1 + index % 9]) + f" {index % 7}" for index in range(64)]
    alone = {text: post(mixed, "/v1/embeddings", input=text)["data"][0]["embedding"] for text in sorted(set(texts))[:9]}
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda text: post(mixed, "/v1/embeddings", input=text), texts))
    for text, answer in zip(texts, together, strict=True):
        if text in alone:
            np.testing.assert_allclose(answer["data"][0]["embedding"], alone[text], atol=1e-5)


def test_models_come_and_go_while_others_work(mixed: ServerProcess) -> None:
    """Nobody else's answer changes or fails, and the newcomer has limits of its own."""
    expected = post(mixed, "/v1/embeddings", model="vectors", input=TEXTS)["data"]
    stop = threading.Event()

    def embed() -> int:
        count = 0
        while not stop.is_set():
            found = post(mixed, "/v1/embeddings", model="vectors", input=TEXTS)["data"]
            for item, other in zip(found, expected, strict=True):
                np.testing.assert_allclose(item["embedding"], other["embedding"], atol=1e-5)
            count += 1
        return count

    def generate() -> int:
        count = 0
        while not stop.is_set():
            usage = post(mixed, "/v1/completions", prompt="The fox", max_tokens=8, ignore_eos=True)["usage"]
            assert usage["completion_tokens"] == 8
            count += 1
        return count

    def answers(length: int) -> int:
        body = {"model": "late", "input": [5] * length, "output": "scores"}
        return httpx.post(mixed.url + "/pooling", json=body, timeout=60).status_code

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        working = [pool.submit(embed), pool.submit(embed), pool.submit(generate)]
        try:
            for _ in range(3):
                config = json.dumps({"max_model_len": 16, "weight": 2})
                loaded = httpx.post(
                    mixed.url + "/v2/repository/models/late/load", json={"parameters": {"config": config}}, timeout=60
                )
                assert loaded.status_code == 200, loaded.text
                assert [answers(16), answers(17)] == [200, 400]
                gone = httpx.post(mixed.url + "/v2/repository/models/late/unload", json={}, timeout=60)
                assert gone.status_code == 200, gone.text
                assert answers(16) == 404
        finally:
            stop.set()
        assert all(task.result(60) > 0 for task in working)


def test_encoders_alone(repository: Path) -> None:
    """A server without a model that generates has no such endpoints, and says what to try."""
    with started([*FASTSERVE, "serve", str(repository / "qa"), "--port", "0", "--num-threads", "1"]) as server:
        assert "question-answering" in server.banner and "serving qa at" in server.banner
        asked = dict(question="Where is the river?", context="The river is in the wood.")
        assert post(server, "/v1/question-answering", **asked)["answers"][0]["answer"]
        assert httpx.post(server.url + "/v1/completions", json={"prompt": "x"}).status_code == 404
        assert [model["id"] for model in httpx.get(server.url + "/v1/models").json()["data"]] == ["qa"]
        assert httpx.get(server.url + "/metrics").status_code == 200
        assert httpx.post(server.url + "/tokenize", json={"prompt": "the fox"}).json()["count"] > 2
        status, output = server.stop()
        assert status == 0, output
