"""The Open Inference Protocol by its own client: a module with pre- and postprocessing, an ONNX file, a program."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from fastserve.core.errors import CheckpointError, ConfigError
from fastserve.models.servable import Servable, load_servable
from tests import encoder_folders
from tests.conftest import REPOSITORY
from tests.e2e.conftest import FASTSERVE
from tests.server_process import ServerProcess, started

triton = pytest.importorskip("tritonclient.http")
from tritonclient.utils import InferenceServerException  # noqa: E402

pytestmark = pytest.mark.slow  # servers started

WEIGHT = np.arange(8, dtype=np.float32).reshape(4, 2) / 8


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """affine.onnx (x @ WEIGHT), double.pt2 (2 x of any batch), and a repository with an encoder."""
    import onnx
    import torch
    from onnx import TensorProto, helper, numpy_helper

    folder = tmp_path_factory.mktemp("networks")
    given, made = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", size]) for name, size in (("x", 4), ("y", 2))
    )
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "affine", [given], [made], [numpy_helper.from_array(WEIGHT, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 10
    onnx.save(model, folder / "affine.onnx")

    class Double(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    batch = torch.export.Dim("batch", min=1, max=1024)
    program = torch.export.export(Double(), (torch.zeros(3, 5),), dynamic_shapes=({0: batch},))
    torch.export.save(program, folder / "double.pt2")
    encoder_folders.encoder(folder / "repository" / "late", "Bert", "ForSequenceClassification")
    return folder


@pytest.fixture(scope="module")
def server(files: Path) -> Iterator[ServerProcess]:
    models = [
        str(REPOSITORY / "examples" / "ranking.py:servable"),
        str(files / "affine.onnx"),
        str(files / "double.pt2"),
    ]
    options = ["--port", "0", "--num-threads", "1", "--model-repository", str(files / "repository")]
    with started([*FASTSERVE, "serve", *models, *options]) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[object]:
    with triton.InferenceServerClient(server.url.removeprefix("http://"), concurrency=8) as connected:
        yield connected


def tensor(name: str, values: np.ndarray, datatype: str, is_binary: bool = True) -> object:
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values, binary_data=is_binary)
    return made


def test_metadata(client, server: ServerProcess) -> None:
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("affine")
    assert client.is_model_ready("affine", "1") and not client.is_model_ready("nothing")
    assert client.get_server_metadata()["name"] == "fastserve"
    assert client.get_model_metadata("affine") == {
        "name": "affine",
        "versions": ["1"],
        "platform": "fastserve_tensors",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
    }
    assert {item["name"] for item in client.get_model_repository_index()} >= {"ranking", "affine", "double"}
    assert "serving ranking, affine, double at" in server.banner


@pytest.mark.parametrize("is_binary", [True, False])
def test_onnx(client, is_binary: bool) -> None:
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    wish = triton.InferRequestedOutput("y", binary_data=is_binary)
    answer = client.infer("affine", [tensor("x", x, "FP32", is_binary)], outputs=[wish], request_id="seven")
    np.testing.assert_allclose(answer.as_numpy("y"), x @ WEIGHT, atol=1e-5)
    assert answer.get_response()["id"] == "seven"
    np.testing.assert_allclose(client.infer("affine", [tensor("x", x, "FP32")]).as_numpy("y"), x @ WEIGHT, atol=1e-5)


def test_program(client) -> None:
    [described] = client.get_model_metadata("double")["inputs"]
    x = np.ones((2, 5), dtype=np.float32)
    answer = client.infer("double", [tensor(described["name"], x, "FP32")])
    [output] = answer.get_response()["outputs"]
    np.testing.assert_array_equal(answer.as_numpy(output["name"]), x * 2)


@pytest.mark.parametrize("is_binary", [True, False])
def test_module_with_text(client, is_binary: bool) -> None:
    names = np.array([["shoes"], ["garden"]], dtype=object)
    visitor = np.array([[0.2, 1, 0], [0.2, 1, 0]], dtype=np.float32)
    inputs = [tensor("advertisement", names, "BYTES", is_binary), tensor("visitor", visitor, "FP32", is_binary)]
    both = client.infer("ranking", inputs).as_numpy("probability")
    assert both.shape == (2, 1) and ((both > 0) & (both < 1)).all() and both[0] != both[1]
    one = [tensor("advertisement", names[1:], "BYTES"), tensor("visitor", visitor[1:], "FP32")]
    np.testing.assert_allclose(client.infer("ranking", one).as_numpy("probability"), both[1:], atol=1e-6)


def test_requests_of_a_moment_are_joined_and_answered_apart(server: ServerProcess) -> None:
    def ask(number: int) -> float:
        body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [number, 0, 0, 1]}]}
        reply = httpx.post(server.url + "/v2/models/affine/infer", json=body)
        assert reply.status_code == 200, reply.text
        return reply.json()["outputs"][0]["data"][1]

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(100)))
    np.testing.assert_allclose(answers, [number * WEIGHT[0, 1] + WEIGHT[3, 1] for number in range(100)], atol=1e-4)


def test_what_does_not_fit_is_refused_with_the_signature(client) -> None:
    good = np.zeros((1, 4), dtype=np.float32)
    expected = "affine takes x: float32"
    for inputs in (
        [tensor("z", good, "FP32")],
        [tensor("x", good, "FP32"), tensor("z", good, "FP32")],
        [tensor("x", good.astype(np.float64), "FP64")],
        [tensor("x", np.zeros((1, 5), dtype=np.float32), "FP32")],
        [tensor("x", np.zeros(4, dtype=np.float32), "FP32", is_binary=False)],
    ):
        with pytest.raises(InferenceServerException, match="affine takes x: float32") as failure:
            client.infer("affine", inputs)
        assert failure.value.status() == "400" and expected in failure.value.message()
    with pytest.raises(InferenceServerException, match="no model 'none'"):
        client.infer("none", [tensor("x", good, "FP32")])
    with pytest.raises(InferenceServerException, match="has no output w; it has y"):
        client.infer("affine", [tensor("x", good, "FP32")], outputs=[triton.InferRequestedOutput("w")])
    sizes = [
        tensor("advertisement", np.array([["a"]], dtype=object), "BYTES"),
        tensor("visitor", np.zeros((2, 3), dtype=np.float32), "FP32"),
    ]
    with pytest.raises(InferenceServerException, match="different sizes along axis 0"):
        client.infer("ranking", sizes)


@pytest.mark.parametrize(
    ("content", "headers", "word"),
    [
        (b"{", {}, "cannot be read"),
        (b"[]", {}, "cannot be read"),
        (b'{"inputs": []}', {"Inference-Header-Content-Length": "99"}, "at most the body's length"),
        (b'{"inputs": []}x', {"Inference-Header-Content-Length": "14"}, "1 bytes follow"),
        ({"datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3]}, {}, "asks for 16 bytes"),
        ({"datatype": "FP32", "shape": [1, 4], "data": ["a", 1, 1, 1]}, {}, "not of FP32"),
        ({"datatype": "FP32", "shape": [1, -4], "data": []}, {}, "cannot be"),
        ({"datatype": "FP32", "shape": [1, 2**64], "data": []}, {}, "cannot be"),
        ({"datatype": "FP99", "shape": [1, 4], "data": []}, {}, "known: BOOL"),
        ({"datatype": "FP32", "shape": [1, 4]}, {}, "has no data"),
        ({"datatype": "INT8", "shape": [1, 4], "data": [1000, 1, 1, 1]}, {}, "not of INT8"),
        ({"datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 16}}, {}, "does not have"),
    ],
)
def test_damaged_bodies(server: ServerProcess, content: object, headers: dict[str, str], word: str) -> None:
    if isinstance(content, dict):
        content = json.dumps({"inputs": [{"name": "x", **content}]}).encode()
    reply = httpx.post(server.url + "/v2/models/affine/infer", content=content, headers=headers)
    assert reply.status_code == 400 and word in reply.json()["error"], reply.text


def test_models_come_and_go(client, server: ServerProcess) -> None:
    client.load_model("late", config=json.dumps({"max_batch_tokens": 512}))
    assert client.is_model_ready("late")
    reply = httpx.post(server.url + "/classify", json={"model": "late", "input": "the fox"})
    assert reply.status_code == 200 and len(reply.json()["data"][0]["probs"]) == 3
    with pytest.raises(InferenceServerException, match="already"):
        client.load_model("late")
    with pytest.raises(InferenceServerException, match="takes text, not tensors"):
        client.infer("late", [tensor("x", np.zeros((1, 4), dtype=np.float32), "FP32")])
    client.unload_model("late")
    assert not client.is_model_ready("late")
    assert httpx.post(server.url + "/classify", json={"model": "late", "input": "x"}).status_code == 404
    for name, word in (("other", "no folder 'other'"), ("..", "no folder")):
        with pytest.raises(InferenceServerException, match=word):
            client.load_model(name)
    with pytest.raises(InferenceServerException, match="unknown option"):
        client.load_model("late", config=json.dumps({"nothing": 1}))


def test_servables_say_what_is_wrong_with_them(tmp_path: Path) -> None:
    import torch

    with pytest.raises(ConfigError, match="axis 0 must be -1"):
        Servable(torch.nn.Identity(), {"x": ("float32", [3])}, {"y": ("float32", [-1])})
    with pytest.raises(ConfigError, match="numpy's name"):
        Servable(torch.nn.Identity(), {"x": ("real", [-1])}, {"y": ("float32", [-1])})
    with pytest.raises(ConfigError, match="at least one input"):
        Servable(torch.nn.Identity(), {}, {})
    wrong = Servable(lambda arrays: {"z": arrays["x"]}, {"x": ("float32", [-1])}, {"y": ("float32", [-1])})
    with pytest.raises(CheckpointError, match="gave no output 'y'; it gave z"):
        wrong({"x": np.zeros(2, dtype=np.float32)})
    (tmp_path / "code.py").write_text("number = 3\n")
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    for name, word in (
        (f"{tmp_path}/code.py:number", "no fastserve.Servable called number"),
        (f"{tmp_path}/none.py:x", "no such file"),
        ("no_such_module:x", "cannot be imported"),
        (f"{tmp_path}/none.onnx", "there is no file"),
        (f"{tmp_path}/bad.onnx", "cannot be read"),
    ):
        with pytest.raises(CheckpointError, match=word):
            load_servable(name)
