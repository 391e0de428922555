"""Perplexity of a model in each precision of weights, on text that it was not trained on.

    python benchmarks/precision.py                                    # the built-in model, stories_val.txt
    python benchmarks/precision.py held_out.txt --model FOLDER --tokens 4000

Every folder is made from the model by rounding to nearest (better methods give better figures), loaded and run as it
would be served; "float32" by the plain PyTorch reference is what the others are held against. The embedding and the
head stay as they are but where the name says head. Prints a table, and one JSON line: metrics.perplexity.NAME.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import tempfile
from pathlib import Path

from shared_data import shared_folder

from fastserve import LLM, SamplingParams
from fastserve.bench.quantized_model import quantize_folder
from fastserve.bench.report import Report, emit, rounded
from fastserve.checkpoint.folder import ModelFolder

# name -> weights (as quantize_folder names them; "" leaves them), head, dtype, kernels
VARIANTS = {
    "float32": ("", "", "float32", "reference"),
    "float32-cpu": ("", "", "float32", "cpu"),
    "bfloat16": ("", "", "bfloat16", "cpu"),
    "int8": ("int8", "", "bfloat16", "cpu"),
    "int8-head-int8": ("int8", "int8", "bfloat16", "cpu"),
    "int8-asym": ("int8-asym", "", "bfloat16", "cpu"),
    "int8-a8": ("int8-a8", "", "bfloat16", "cpu"),
    "int8-a8-head-int8": ("int8-a8", "int8", "bfloat16", "cpu"),
    "int4-g128": ("int4-g128", "", "bfloat16", "cpu"),
    "int4-g128-asym": ("int4-g128-asym", "", "bfloat16", "cpu"),
    "int4-g128-asym-head-int8": ("int4-g128-asym", "int8", "bfloat16", "cpu"),
    "int4-g32": ("int4-g32", "", "bfloat16", "cpu"),
    "int4-g32-asym": ("int4-g32-asym", "", "bfloat16", "cpu"),
    "int4-g32-asym-a8": ("int4-g32-asym-a8", "", "bfloat16", "cpu"),
    "codebook": ("codebook", "", "bfloat16", "cpu"),
}


def windows(source: ModelFolder, text: Path, num_tokens: int, length: int) -> list[list[int]]:
    """The text's tokens in windows; the first token of each is context and is not scored."""
    from fastserve.checkpoint.tokenizer import Tokenizer

    ids = Tokenizer.load(source).encode(text.read_text(encoding="utf-8")[: 20 * num_tokens], add_special_tokens=False)
    ids = ids[:num_tokens]
    return [ids[start : start + length] for start in range(0, len(ids) - 1, length - 1)]


def perplexity(folder: Path, dtype: str, kernels: str, prompts: list[list[int]]) -> float:
    """exp of the mean negative log likelihood of the tokens of `prompts`, each window's first one left out."""
    length = max(len(prompt) for prompt in prompts)
    llm = LLM(
        str(folder),
        dtype=dtype,
        kernels=kernels,
        max_model_len=length + 1,
        max_batch_sequences=1,
        max_batch_tokens=length,
        prefix_caching=False,
    )
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    total, count = 0.0, 0
    for prompt in prompts:
        scored = llm.generate([prompt], params, use_tqdm=False)[0].prompt_logprobs
        assert scored is not None
        for token_id, found in zip(prompt, scored, strict=True):
            if found is not None:
                total, count = total - found[token_id].logprob, count + 1
    llm.engine.close()
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, nargs="?", default=shared_folder() / "data/corpora/stories_val.txt")
    parser.add_argument("--model", default="", help="a folder; the built-in model when left out")
    parser.add_argument("--tokens", type=int, default=12000)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    arguments = parser.parse_args()
    if not arguments.text.is_file():
        sys.exit(
            f"there is no {arguments.text}; name a text that the model was not trained on, or set FASTSERVE_SHARED"
        )
    source = ModelFolder.open(arguments.model)
    prompts = windows(source, arguments.text, arguments.tokens, arguments.window)
    num_tokens = sum(len(prompt) - 1 for prompt in prompts)
    report = Report("precision", config={"model": source.name, "tokens": num_tokens, "window": arguments.window})
    report.config |= {"text": arguments.text.name, "rounding": "nearest"}
    for name in arguments.variants.split(","):
        weights, head, dtype, kernels = VARIANTS[name]
        with tempfile.TemporaryDirectory() as scratch:
            folder = quantize_folder(source, Path(scratch), weights, head) if weights else source.path
            found = perplexity(folder, dtype, kernels, prompts)
            size = ModelFolder.open(str(folder)).weight_bytes
        gc.collect()
        report.metrics[f"perplexity.{name}"] = rounded(found)
        report.metrics[f"megabytes.{name}"] = rounded(size / 1e6)
        base = report.metrics[f"perplexity.{next(iter(arguments.variants.split(',')))}"]
        change = found / base - 1
        print(f"{name:26s} {size / 1e6:9.2f} MB  perplexity {found:9.4f}  {change:+.3%}", file=sys.stderr, flush=True)
    emit(report.as_dict())


if __name__ == "__main__":
    main()
