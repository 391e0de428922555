"""ONNX Runtime GenAI. It has no continuous batching, so that many requests go in batches of like lengths."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

import numpy as np
import onnxruntime_genai as genai
from worker import Engine, Ids, in_batches, serve

BATCH_SIZE = 8


class ONNXRuntime(Engine):
    packages = ("onnxruntime-genai", "onnxruntime")

    def __init__(self, folder: str, precision: str) -> None:
        config = genai.Config(folder)
        threads = {"intra_op_num_threads": len(os.sched_getaffinity(0))}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self._model = genai.Model(config)
        self.precision = {
            "weights": f"{precision}, symmetric blocks of 32",
            "kv_cache": "float32",
            "lm_head": precision,
            "activations": "int8 in the products (accuracy level 4), else float32",
        }
        self.settings = {"batch_size": BATCH_SIZE, **threads}

    def generate(self, prompts: Sequence[Ids], num_outputs: Sequence[int]) -> list[Ids]:
        length, count = len(prompts[0]), num_outputs[0]
        params = genai.GeneratorParams(self._model)
        total = length + count
        params.set_search_options(max_length=total, min_length=total, do_sample=False, batch_size=len(prompts))
        generator = genai.Generator(self._model, params)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        for _ in range(count):
            generator.generate_next_token()
        return [generator.get_sequence(row)[length:].tolist() for row in range(len(prompts))]

    def generate_many(self, prompts: Sequence[Ids], num_outputs: Sequence[int]) -> list[Ids]:
        return in_batches(self, prompts, num_outputs, BATCH_SIZE)


if __name__ == "__main__":
    serve(ONNXRuntime)
