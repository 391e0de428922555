"""vLLM's CPU build, in process."""

from __future__ import annotations

import os
from collections.abc import Sequence

from worker import KV_GIB, Engine, Ids, serve

CPUS = sorted(os.sched_getaffinity(0))
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, CPUS)),
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: nothing is counted twice, and no third thread on the cores
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
WEIGHTS = {"bf16": "bfloat16", "int8": "int8 symmetric per channel", "int4": "int4 symmetric, groups of 128"}


class VLLM(Engine):
    packages = ("vllm-cpu", "torch")

    def __init__(self, folder: str, precision: str) -> None:
        from vllm import LLM

        self._llm = LLM(
            model=folder, dtype="bfloat16", max_model_len=2048, max_num_seqs=64, enable_prefix_caching=False
        )
        self.precision = {
            "weights": WEIGHTS[precision],
            "kv_cache": "bfloat16",
            "lm_head": "bfloat16",
            "activations": "int8 per token" if precision == "int8" else "bfloat16",
        }
        self.settings = {"max_model_len": 2048, "max_num_seqs": 64, "kv_cache_gib": KV_GIB}

    def generate(self, prompts: Sequence[Ids], num_outputs: Sequence[int]) -> list[Ids]:
        from vllm import SamplingParams

        params = [
            SamplingParams(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True, detokenize=False)
            for count in num_outputs
        ]
        requests = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs = self._llm.generate(requests, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]


if __name__ == "__main__":
    serve(VLLM)
