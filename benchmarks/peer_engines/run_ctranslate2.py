"""CTranslate2's generator. It has no continuous batching, so that many requests go in batches of like lengths.

In int8 beside float32: its wheel computes nothing in bfloat16 on processors without MKL's support.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import ctranslate2
from tokenizers import Tokenizer
from worker import Engine, Ids, serve

BATCH_SIZE = 8


class CTranslate2(Engine):
    packages = ("ctranslate2",)

    def __init__(self, folder: str, precision: str) -> None:
        threads = len(os.sched_getaffinity(0))
        self._tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self._generator = ctranslate2.Generator(
            folder, device="cpu", compute_type=precision, inter_threads=1, intra_threads=threads
        )
        compute = self._generator.compute_type
        self.precision = {"weights": compute, "kv_cache": "as computed", "lm_head": compute, "activations": compute}
        self.settings = {"batch_size": BATCH_SIZE, "intra_threads": threads}

    def generate(self, prompts: Sequence[Ids], num_outputs: Sequence[int]) -> list[Ids]:
        texts = [[self._tokenizer.id_to_token(token_id) for token_id in ids] for ids in prompts]
        count = max(num_outputs)
        results = self._generator.generate_batch(
            texts, max_length=count, min_length=count, sampling_topk=1, include_prompt_in_result=False, end_token=[]
        )
        return [list(result.sequences_ids[0])[:wanted] for result, wanted in zip(results, num_outputs, strict=True)]

    def generate_many(self, prompts: Sequence[Ids], num_outputs: Sequence[int]) -> list[Ids]:
        order = sorted(range(len(prompts)), key=lambda index: num_outputs[index])
        tokens: list[Ids] = [[] for _ in prompts]
        for start in range(0, len(order), BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            outputs = self.generate([prompts[index] for index in chosen], [num_outputs[index] for index in chosen])
            for index, output in zip(chosen, outputs, strict=True):
                tokens[index] = output
        return tokens


if __name__ == "__main__":
    serve(CTranslate2)
