"""OpenVINO GenAI with its paged attention: continuous batching, chunked prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import openvino as ov
import openvino_genai as genai
from worker import KV_GIB, Engine, Ids, serve

LM_HEAD = {"bf16": "bfloat16", "int8": "int8 per channel", "int4": "int8 per channel"}
WEIGHTS = {
    "bf16": "float16 in memory, computed in bfloat16",
    "int8": "int8 asymmetric per channel",
    "int4": "int4 asymmetric, groups of 128",
}


class OpenVINO(Engine):
    packages = ("openvino", "openvino-genai")

    def __init__(self, folder: str, precision: str) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_seqs = 64
        scheduler.max_num_batched_tokens = 1024
        scheduler.cache_size = KV_GIB
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_NUM_THREADS": len(os.sched_getaffinity(0))}
        self._pipe = genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
        core = ov.Core()
        kv_cache = core.get_property("CPU", "KV_CACHE_PRECISION").get_type_name()
        self.precision = {
            "weights": WEIGHTS[precision],
            "kv_cache": f"default ({kv_cache})",
            "lm_head": LM_HEAD[precision],
            "activations": core.get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name(),
        }
        self.settings = {"max_num_batched_tokens": 1024, "cache_gib": KV_GIB, **properties}

    def generate(self, prompts: Sequence[Ids], num_outputs: Sequence[int]) -> list[Ids]:
        inputs = [ov.Tensor(np.array([ids], dtype=np.int64)) for ids in prompts]
        outputs = self._pipe.generate(inputs, [_greedy(count) for count in num_outputs])
        return [list(output.m_generation_ids[0]) for output in outputs]


def _greedy(num_outputs: int) -> genai.GenerationConfig:
    config = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = num_outputs
    config.ignore_eos = True
    config.do_sample = False
    return config


if __name__ == "__main__":
    serve(OpenVINO)
