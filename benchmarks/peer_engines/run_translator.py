"""One engine that translates, in one process: asked by lines of JSON on stdin, answering on stdout.

    run_translator.py ENGINE MODEL PRECISION THREADS

A question is {"sources": [[ids], ...], "lengths": [n, ...], "num_beams": n, "batch_size": n}: each answer has exactly
as many tokens as its length says. The answer has the seconds and the tokens. Engines without continuous batching take
batches of one length, of like sources, which is what is best for them. Runs in the peer's own environment.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

Ids = list[int]


class FastServe:
    """Our offline interface. Neither guesses nor the prefix cache help: random networks repeat themselves, and so do
    the repeats of a benchmark."""

    def __init__(self, model: str, precision: str, threads: int) -> None:
        from fastserve import LLM

        self._llm = LLM(
            model,
            dtype={"fp32": "float32"}.get(precision, "bfloat16"),
            num_threads=threads,
            prefix_caching=False,
            speculation="off",
            max_batch_sequences=128,
            max_batch_tokens=2048,
            kv_cache_memory="1GiB",
        )

    def translate(self, sources: list[Ids], lengths: list[int], num_beams: int, batch_size: int) -> list[Ids]:
        from fastserve import SamplingParams

        params = [
            SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True, num_beams=num_beams)
            for length in lengths
        ]
        outputs = self._llm.generate(sources, params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]


class Batched:
    """Engines that take batches of one length."""

    def translate(self, sources: list[Ids], lengths: list[int], num_beams: int, batch_size: int) -> list[Ids]:
        found: list[Ids] = [[] for _ in sources]
        for chosen in _batches(sources, lengths, batch_size):
            made = self.batch([sources[index] for index in chosen], lengths[chosen[0]], num_beams)
            for index, tokens in zip(chosen, made, strict=True):
                found[index] = tokens
        return found

    def batch(self, sources: list[Ids], length: int, num_beams: int) -> list[Ids]:
        """Answers of `length` tokens."""
        raise NotImplementedError


class Transformers(Batched):
    """generate() over padded batches."""

    def __init__(self, model: str, precision: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForSeq2SeqLM

        torch.set_num_threads(threads)
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        self._model = AutoModelForSeq2SeqLM.from_pretrained(model, dtype=dtype).eval()
        self._model.generation_config.forced_eos_token_id = None

    def batch(self, sources: list[Ids], length: int, num_beams: int) -> list[Ids]:
        import torch

        longest = max(map(len, sources))
        ids = torch.tensor([source + [0] * (longest - len(source)) for source in sources])
        mask = torch.tensor([[1] * len(source) + [0] * (longest - len(source)) for source in sources])
        with torch.inference_mode():
            made = self._model.generate(
                ids,
                attention_mask=mask,
                num_beams=num_beams,
                do_sample=False,
                max_new_tokens=length,
                min_new_tokens=length,
                eos_token_id=None,
            )
        return [row[-length:] for row in made.tolist()]


class CTranslate2(Batched):
    """Its translator, over tokens that are called by their numbers (convert_ctranslate2.py)."""

    def __init__(self, model: str, precision: str, threads: int) -> None:
        import ctranslate2

        compute = {"fp32": "float32", "bf16": "bfloat16"}.get(precision, precision)
        self._translator = ctranslate2.Translator(
            model, device="cpu", compute_type=compute, inter_threads=1, intra_threads=threads
        )

    def batch(self, sources: list[Ids], length: int, num_beams: int) -> list[Ids]:
        texts = [[f"t{number}" for number in source] for source in sources]
        results = self._translator.translate_batch(
            texts, beam_size=num_beams, max_decoding_length=length, min_decoding_length=length
        )
        return [[int(name[1:]) for name in result.hypotheses[0]] for result in results]


def _batches(sources: list[Ids], lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Places of at most batch_size sources whose answers have one length; the longest sources first."""
    for length in sorted(set(lengths)):
        places = sorted(
            (index for index, item in enumerate(lengths) if item == length), key=lambda index: -len(sources[index])
        )
        for start in range(0, len(places), batch_size):
            yield places[start : start + batch_size]


ENGINES: dict[str, Any] = {"fastserve": FastServe, "transformers": Transformers, "ctranslate2": CTranslate2}


def main() -> None:
    name, model, precision, threads = sys.argv[1:]
    engine = ENGINES[name](model, precision, int(threads))
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        started = time.perf_counter()
        tokens = engine.translate(**question)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
