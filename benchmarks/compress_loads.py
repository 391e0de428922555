"""Whether vLLM loads what `fastserve compress` writes, and says the same of a text.

    python benchmarks/compress_loads.py                    # the built-in model in every format; minutes
    python benchmarks/compress_loads.py --formats int8,int4-g128

Each folder is loaded by vLLM's CPU build (`benchmarks/peers.py install vllm`) in a process of its own, and by FastServe
in this one, both in bfloat16. Prints a table, and one JSON line: per format metrics.perplexity_fastserve.NAME and
metrics.perplexity_vllm.NAME, the mean difference of the tokens' log probabilities, and metrics.same_tokens.NAME, how
many greedy tokens the two have in common from the start. "bfloat16", which is not compressed, says how far the two
differ without it. A format that vLLM refuses is named in `skipped`, with the last line that it said.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import peers
from peer_process import PipedProcess
from shared_data import add_text_options, text_settings

from fastserve import LLM, SamplingParams
from fastserve.bench.report import Report, emit, rounded
from fastserve.checkpoint.folder import ModelFolder
from fastserve.compress.calibration import text_ids
from fastserve.compress.recipe import make_recipe
from fastserve.compress.run import compress

FORMATS: dict[str, list[dict[str, Any]]] = {
    "bfloat16": [],
    "int8": [{"do": "quantize", "bits": 8}],
    "int8-a8-dynamic": [{"do": "quantize", "bits": 8, "activations": "dynamic"}],
    "int8-a8-static": [{"do": "quantize", "method": "smoothquant", "bits": 8, "activations": "static"}],
    "int8-cache-float8": [{"do": "quantize", "bits": 8, "kv_cache": "float8"}],
    "int4-g128": [{"do": "quantize", "method": "gptq"}],
    "int4-g32": [{"do": "quantize", "group_size": 32}],
    "int4-rows": [{"do": "quantize", "group_size": 0}],
    "int4-g128-asymmetric": [{"do": "quantize", "symmetric": False}],
    "int3-g128": [{"do": "quantize", "bits": 3}],
    "float8": [{"do": "quantize", "kind": "float", "bits": 8}],
    "float8-a8-dynamic": [{"do": "quantize", "kind": "float", "bits": 8, "activations": "dynamic"}],
    "sparse-2:4": [{"do": "prune", "method": "magnitude", "pattern": "2:4"}],
    "channels-25": [{"do": "prune", "method": "channels", "ratio": 0.25}],
}


class ScoringProcess(PipedProcess):
    """vLLM with one folder."""

    def __init__(self, folder: Path) -> None:
        command = [str(peers.interpreter("vllm")), str(peers.ENGINES / "score_vllm.py"), str(folder)]
        super().__init__("vllm", command)

    def score(self, ids: list[int], num_outputs: int) -> tuple[list[float], list[int]]:
        answer = self._ask({"ids": ids, "num_outputs": num_outputs})
        return answer["logprobs"], answer["tokens"]


def score_ours(folder: Path, ids: list[int], num_outputs: int) -> tuple[list[float], list[int]]:
    llm = LLM(str(folder), dtype="bfloat16", max_model_len=1024, prefix_caching=False)
    params = SamplingParams(max_tokens=num_outputs, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
    output = llm.generate([ids], params, use_tqdm=False)[0]
    llm.engine.close()
    assert output.prompt_logprobs is not None
    pairs = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    return [scores[token].logprob for token, scores in pairs if scores is not None], output.outputs[0].token_ids


def perplexity(logprobs: list[float]) -> float:
    return math.exp(-sum(logprobs) / len(logprobs))


def common(ours: list[int], theirs: list[int]) -> int:
    """Tokens before the first that differs."""
    pairs = enumerate(zip(ours, theirs, strict=True))
    return next((place for place, (mine, other) in pairs if mine != other), len(ours))


def compare(report: Report, name: str, folder: Path, ids: list[int], num_outputs: int) -> None:
    ours, our_tokens = score_ours(folder, ids, num_outputs)
    try:
        process = ScoringProcess(folder)
    except RuntimeError as error:
        report.skipped[name] = f"vLLM did not load it: {error}"
        print(f"{name:22s} not loaded by vLLM", file=sys.stderr, flush=True)
        return
    try:
        theirs, their_tokens = process.score(ids, num_outputs)
        report.config["versions"] = process.about["versions"]
    except RuntimeError as error:
        report.skipped[name] = f"vLLM loaded it, but did not run it: {error}"
        return
    finally:
        process.close()
    differences = [abs(mine - other) for mine, other in zip(ours, theirs, strict=True)]
    found = {
        "perplexity_fastserve": perplexity(ours),
        "perplexity_vllm": perplexity(theirs),
        "logprob_difference": sum(differences) / len(differences),
        "same_tokens": common(our_tokens, their_tokens),
    }
    report.metrics |= {f"{key}.{name}": rounded(value, 6) for key, value in found.items()}
    print(f"{name:22s} " + "  ".join(f"{key} {value:.4f}" for key, value in found.items()), file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_text_options(parser, 512, "calibration", "storybooks_ccby.jsonl")
    parser.add_argument("--outputs", type=int, default=32, help="greedy tokens after it")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--smoke", action="store_true", help="one format, few tokens")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.formats, arguments.tokens, arguments.outputs = "int4-g32", 48, 4
    if peers.interpreter("vllm") is None:
        sys.exit("vLLM is not installed; python benchmarks/peers.py install vllm")
    plain = text_settings(arguments, "calibration")
    report = Report("compress_loads", config=plain | {"weights": "as named", "kv_cache": "bfloat16"})
    source = ModelFolder.open(arguments.model)
    ids = text_ids(source, arguments.text, arguments.tokens).tolist()
    calibration = {"text": str(arguments.calibration), "samples": 16, "length": 256}
    for name in arguments.formats.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            folder = source.path
            if FORMATS[name]:
                recipe = make_recipe({"steps": FORMATS[name], "calibration": calibration})
                folder = compress(arguments.model, Path(scratch) / "out", recipe).path
            compare(report, name, folder, ids, arguments.outputs)
    emit(report.as_dict())


if __name__ == "__main__":
    main()
