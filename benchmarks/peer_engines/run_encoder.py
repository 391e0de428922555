"""One engine that embeds texts, in one process: asked by lines of JSON on stdin, answering on stdout.

    run_encoder.py ENGINE MODEL PRECISION THREADS

MODEL is a folder, or an ONNX file for onnxruntime and openvino. A question is
{"sequences": [[ids], ...], "batch_size": n}; the answer has the seconds, the tokens that were computed (padding
included) and the first vectors, the means over each text's tokens. Engines that pad take batches of like lengths, which
is what is best for them. Runs in the peer's own environment, so only that engine is imported.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

Ids = list[int]


class FastServe:
    """Our runtime, without a server around it."""

    def __init__(self, model: str, precision: str, threads: int) -> None:
        from fastserve.core.arrays import ModelSpec
        from fastserve.engine.pooling_runtime import PoolingRuntime

        _set_torch_threads(threads)
        dtype = "float32" if precision == "fp32" else "bfloat16"
        options = {"model": model, "dtype": dtype, "max_batch_tokens": 2048}
        options["quantization"] = "int8" if precision == "int8" else "auto"
        self._runtime = PoolingRuntime(ModelSpec("encoder", options))

    def embed(self, sequences: Sequence[Ids], batch_size: int) -> tuple[list[Any], int]:
        from fastserve.core.arrays import PoolingRequest
        from fastserve.engine.array_codec import to_numpy

        before = self._runtime.num_computed
        vectors: dict[str, Any] = {}
        for index, ids in enumerate(sequences):
            self._runtime.add(PoolingRequest(str(index), "encoder", ids, head="embed"))
        while self._runtime.has_work():
            for output in self._runtime.step():
                vectors[output.request_id] = to_numpy(output.arrays[""]).tolist()
        return [vectors[str(index)] for index in range(len(sequences))], self._runtime.num_computed - before


class Transformers:
    """AutoModel with padded batches."""

    sorts = True

    def __init__(self, model: str, precision: str, threads: int) -> None:
        import torch
        from transformers import AutoModel

        _set_torch_threads(threads)
        dtype = {"bf16": torch.bfloat16}.get(precision, torch.float32)
        self._model = AutoModel.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").eval()

    def embed(self, sequences: Sequence[Ids], batch_size: int) -> tuple[list[Any], int]:
        import torch

        vectors: dict[int, Any] = {}
        num_computed = 0
        with torch.inference_mode():
            for places, ids, mask in _batches(sequences, batch_size, self.sorts):
                tensor = torch.tensor(mask)
                hidden = self._model(input_ids=torch.tensor(ids), attention_mask=tensor).last_hidden_state.float()
                weights = tensor.unsqueeze(-1).float()
                means = (hidden * weights).sum(1) / weights.sum(1)
                vectors.update(zip(places, means.tolist(), strict=True))
                num_computed += tensor.numel()
        return [vectors[index] for index in range(len(sequences))], num_computed


class TransformersInOrder(Transformers):
    """The same with batches of what comes one after the other."""

    sorts = False


class OnnxRuntime:
    """An ONNX file, optimised and, in int8, quantised by its own tools beforehand."""

    def __init__(self, model: str, precision: str, threads: int) -> None:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])

    def embed(self, sequences: Sequence[Ids], batch_size: int) -> tuple[list[Any], int]:
        import numpy as np

        def run(inputs: dict[str, Any]) -> Any:
            return self._session.run(None, inputs)[0]

        return _embed_with(run, np, sequences, batch_size)


class OpenVino:
    """The same ONNX file through OpenVINO, at the precision that is asked for.

    int8 is what its own NNCF makes for transformers: weights and activations in 8 bits, calibrated on random ids here,
    since the network is random; the rest in bfloat16, as ours.
    """

    def __init__(self, model: str, precision: str, threads: int) -> None:
        import openvino

        core = openvino.Core()
        hint = "f32" if precision == "fp32" else "bf16"
        options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
        network = core.read_model(model)
        self._model = core.compile_model(_quantize(network) if precision == "int8" else network, "CPU", options)

    def embed(self, sequences: Sequence[Ids], batch_size: int) -> tuple[list[Any], int]:
        import numpy as np

        return _embed_with(lambda inputs: self._model(inputs)[0], np, sequences, batch_size)


def _quantize(network: Any) -> Any:
    import nncf
    import numpy as np

    generator = np.random.default_rng(0)
    samples = []
    for length in generator.integers(32, 512, 16):
        ids = generator.integers(1000, 30000, (1, int(length)))
        samples.append({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    return nncf.quantize(
        network, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(samples)
    )


def _embed_with(run: Any, np: Any, sequences: Sequence[Ids], batch_size: int) -> tuple[list[Any], int]:
    vectors: dict[int, Any] = {}
    num_computed = 0
    for places, ids, mask in _batches(sequences, batch_size):
        weights = np.array(mask, dtype=np.int64)
        hidden = run({"input_ids": np.array(ids, dtype=np.int64), "attention_mask": weights})
        means = (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdims=True)
        vectors.update(zip(places, means.astype(float).tolist(), strict=True))
        num_computed += weights.size
    return [vectors[index] for index in range(len(sequences))], num_computed


def _batches(
    sequences: Sequence[Ids], size: int, sorts: bool = True
) -> Iterator[tuple[list[int], list[Ids], list[Ids]]]:
    """Places, ids and masks of batches, of like lengths if they are sorted, padded to their longest."""
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]) if sorts else 0)
    for start in range(0, len(order), size):
        places = order[start : start + size]
        longest = max(len(sequences[place]) for place in places)
        ids = [sequences[place] + [0] * (longest - len(sequences[place])) for place in places]
        mask = [[1] * len(sequences[place]) + [0] * (longest - len(sequences[place])) for place in places]
        yield places, ids, mask


def _set_torch_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


ENGINES: dict[str, Any] = {
    "fastserve": FastServe,
    "transformers": Transformers,
    "transformers_in_order": TransformersInOrder,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVino,
}


def main() -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    name, model, precision, threads = sys.argv[1:5]
    engine = ENGINES[name](model, precision, int(threads))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        started = time.perf_counter()
        vectors, num_computed = engine.embed(question["sequences"], question["batch_size"])
        seconds = time.perf_counter() - started
        answer = {"seconds": seconds, "computed": num_computed, "vectors": vectors[:8]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
