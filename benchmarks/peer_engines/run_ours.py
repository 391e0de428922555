"""FastServe itself, in process; the same questions as its peers."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from worker import KV_GIB, Engine, Ids, serve

from fastserve import LLM, SamplingParams

WEIGHTS = {"int8": "int8 symmetric per channel", "int4": "int4 symmetric, groups of 128"}


class Ours(Engine):
    packages = ("fastserve", "torch")

    def __init__(self, folder: str, precision: str) -> None:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        settings: dict[str, Any] = {"max_model_len": 2048, "prefix_caching": False}
        settings["kv_cache_memory"] = (int(os.environ.get("OUR_KV_MIB", "0")) or KV_GIB << 10) << 20
        settings["speculation"] = "off"  # a random network repeats itself
        settings["kv_cache_dtype"] = kv_cache = os.environ.get("OUR_KV_CACHE", "auto")
        self._llm = LLM(folder, dtype="bfloat16", **settings)
        is_whole = "quantization_config" not in config
        self.precision = {
            "weights": "bfloat16" if is_whole else WEIGHTS[precision],
            "kv_cache": "bfloat16" if kv_cache == "auto" else f"{kv_cache} per token and head",
            "lm_head": "bfloat16" if is_whole else "int8 per channel",
            "activations": "bfloat16" if is_whole else "int8 per token in the products",
        }
        self.settings = settings

    def generate(self, prompts: Sequence[Ids], num_outputs: Sequence[int]) -> list[Ids]:
        params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in num_outputs]
        outputs = self._llm.generate(list(prompts), params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]


if __name__ == "__main__":
    serve(Ours)
