"""FastServe itself, in process; the same questions as its peers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from worker import Engine, Ids, serve

from fastserve import LLM, SamplingParams

KV_TOKENS = 32 * (512 + 128) + 4096  # the mixed case at once, and one whole context


class Ours(Engine):
    packages = ("fastserve", "torch")

    def __init__(self, folder: str, precision: str) -> None:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        numbers = config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
        self._llm = LLM(folder, dtype="bfloat16", prefix_caching=False, kv_cache_memory=4 * numbers * KV_TOKENS)
        scheme = json.dumps(config["quantization_config"]) if "quantization_config" in config else "bfloat16"
        self.precision = {"weights": scheme, "kv_cache": "bfloat16", "lm_head": "see weights", "activations": precision}
        self.settings = {"kernels": "auto"}

    def generate(self, prompts: Sequence[Ids], num_outputs: Sequence[int]) -> list[Ids]:
        params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in num_outputs]
        outputs = self._llm.generate(list(prompts), params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]


if __name__ == "__main__":
    serve(Ours)
