"""transformers: `generate` for one request, continuous batching for many."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from worker import Engine, Ids, serve

PAGE_SIZE = 256
# The best of those that serve_vs_transformers.py tries, on a processor: its attention masks a whole step's keys.
BATCHING = {"max_batch_tokens": 256, "max_requests_per_batch": 8}


class Transformers(Engine):
    packages = ("transformers", "torch")

    def __init__(self, folder: str, precision: str) -> None:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
        self._model.generation_config.eos_token_id = None
        self.precision = dict.fromkeys(("weights", "kv_cache", "lm_head", "activations"), "bfloat16")
        self.settings = {"attention": "sdpa", "page_size": PAGE_SIZE, **BATCHING}

    def generate(self, prompts: Sequence[Ids], num_outputs: Sequence[int]) -> list[Ids]:
        input_ids = torch.tensor([prompts[0]])
        with torch.inference_mode():
            output = self._model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                do_sample=False,
                max_new_tokens=num_outputs[0],
                min_new_tokens=num_outputs[0],
                eos_token_id=None,
                pad_token_id=0,
            )
        return [output[0, len(prompts[0]) :].tolist()]

    def generate_many(self, prompts: Sequence[Ids], num_outputs: Sequence[int]) -> list[Ids]:
        lengths = [len(ids) + count for ids, count in zip(prompts, num_outputs, strict=True)]
        batching = ContinuousBatchingConfig(
            page_size=PAGE_SIZE,
            num_blocks=sum(-(-length // PAGE_SIZE) for length in lengths) + 8,
            allow_block_sharing=False,
            auto_switch_to_flash=False,
            **BATCHING,
        )
        generation = GenerationConfig(max_new_tokens=128, do_sample=False, eos_token_id=-1, pad_token_id=0)
        finished: dict[str, Ids] = {}
        with self._model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=batching
        ) as manager:
            for index, (ids, count) in enumerate(zip(prompts, num_outputs, strict=True)):
                manager.add_request(list(ids), request_id=f"r{index}", max_new_tokens=count)
            while len(finished) < len(prompts):
                output = manager.get_result(timeout=5)
                if output is None and not manager.is_running():
                    raise RuntimeError("continuous batching stopped")
                if output is not None and output.error:
                    raise RuntimeError(output.error)
                if output is not None and output.is_finished():
                    finished[output.request_id] = list(output.generated_tokens)
        return [finished[f"r{index}"] for index in range(len(prompts))]


if __name__ == "__main__":
    serve(Transformers)
