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
        groups = config.get("quantization_config", {}).get("config_groups", {})  # the second is the head's
        has_int8_inputs = bool(groups and groups["group_0"]["input_activations"])
        self.precision = {
            "weights": WEIGHTS[precision] if groups else "bfloat16",
            "kv_cache": "bfloat16" if kv_cache == "auto" else f"{kv_cache} per token and head",
            "lm_head": "int8 per channel" if "group_1" in groups else "bfloat16",
            "activations": "int8 per token in the products" if has_int8_inputs else "bfloat16",
        }
        self.settings = settings

    def generate(self, prompts: Sequence[Ids], num_outputs: Sequence[int]) -> list[Ids]:
        params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in num_outputs]
        outputs = self._llm.generate(list(prompts), params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]


if __name__ == "__main__":
    serve(Ours)
