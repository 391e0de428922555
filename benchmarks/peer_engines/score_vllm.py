"""vLLM's CPU build asked what it says of a text: FOLDER.

Answers {"ids": [...], "num_outputs": N} with the log probability of every id after the first ("logprobs") and the ids
that it goes on with ("tokens"). Starts without compiling, which is for speed.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from typing import Any

import run_vllm  # sets what vLLM reads from the environment

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"


def score(llm: Any, ids: list[int], num_outputs: int) -> dict[str, Any]:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=num_outputs, min_tokens=num_outputs, ignore_eos=True, prompt_logprobs=0
    )
    output = llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)[0]
    found = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
    logprobs = [scores[token].logprob for token, scores in found]
    return {"logprobs": logprobs, "tokens": list(output.outputs[0].token_ids)}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    from vllm import LLM

    llm = LLM(
        model=sys.argv[1], dtype="bfloat16", max_model_len=1024, max_num_seqs=4, enable_prefix_caching=False,
        enforce_eager=True,
    )  # fmt: skip
    packages = run_vllm.VLLM.packages
    ready = {"versions": {name: importlib.metadata.version(name) for name in packages}}
    print(json.dumps(ready), file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        print(json.dumps(score(llm, question["ids"], question["num_outputs"])), file=answers, flush=True)


if __name__ == "__main__":
    main()
