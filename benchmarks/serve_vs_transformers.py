"""FastServe against transformers on the same random Qwen3-0.6B, bfloat16, on this machine.

    python benchmarks/serve_vs_transformers.py             # three interleaved repeats
    python benchmarks/serve_vs_transformers.py --small     # a tenth of the work, to see that it runs

Three cases: 32 mixed requests at once (ours: the in-process engine; theirs: continuous batching), one request's
decode speed, and the time to the first token of 1,024 (theirs: `generate`). Both sides run plain PyTorch operations
with the same number of threads, greedy, end tokens ignored, prefix reuse off. Each side has a process of its own; they
take turns, and each repeat swaps who goes first. transformers' continuous batching is first tried with each of the
settings below on every other request, and the best is used. transformers is a dependency of ours, so both run in one
environment, with the same torch. A ratio above 1 means that ours is better.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from fastserve.bench import random_model, workload
from fastserve.bench.report import Report, emit, measure_limits, rounded
from fastserve.checkpoint.folder import ModelFolder

PAGE_SIZE = 256  # transformers' default
# Tokens and requests per step. Its attention on a CPU computes every query against every key of the step and masks,
# so that smaller steps can be the faster ones.
TRANSFORMERS_SETTINGS: list[dict[str, int]] = [
    {"max_batch_tokens": 1024, "max_requests_per_batch": 32},
    {"max_batch_tokens": 512, "max_requests_per_batch": 16},
    {"max_batch_tokens": 256, "max_requests_per_batch": 8},
    {"max_batch_tokens": 256, "max_requests_per_batch": 4},
]
Settings = dict[str, int]
Prompts = Sequence[workload.Prompt]


class Side(Protocol):
    """One engine in its worker process. Each call returns the tokens of every prompt, in order."""

    def generate_one(self, prompt: workload.Prompt) -> list[int]: ...
    def generate_all(self, prompts: Prompts, settings: Settings) -> tuple[float, list[list[int]]]: ...


def kv_bytes(folder: str) -> int:
    """KV memory for the whole workload at once, and no more: the other side needs its own."""
    config = ModelFolder.open(folder).config
    numbers = config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    num_tokens = 32 * (512 + 128) + int(config["max_position_embeddings"])
    return 2 * 2 * int(numbers) * num_tokens  # keys and values, two bytes each


class Ours:
    """`fastserve.LLM` with the plain PyTorch kernels."""

    def __init__(self, folder: str) -> None:
        from fastserve import LLM

        self._llm = LLM(
            folder,
            dtype="bfloat16",
            kernels="reference",
            prefix_caching=False,
            speculation="off",
            kv_cache_memory=kv_bytes(folder),
        )

    def generate_one(self, prompt: workload.Prompt) -> list[int]:
        return self.generate_all([prompt], {})[1][0]

    def generate_all(self, prompts: Prompts, settings: Settings) -> tuple[float, list[list[int]]]:
        from fastserve import SamplingParams

        params = [SamplingParams(temperature=0.0, max_tokens=item.num_outputs, ignore_eos=True) for item in prompts]
        start = time.perf_counter()
        outputs = self._llm.generate([list(item.token_ids) for item in prompts], params, use_tqdm=False)
        return time.perf_counter() - start, [output.outputs[0].token_ids for output in outputs]


class Transformers:
    """`generate` for one request, and continuous batching for many."""

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
        self._model.eval()
        self._model.generation_config.eos_token_id = None

    def generate_one(self, prompt: workload.Prompt) -> list[int]:
        import torch

        input_ids = torch.tensor([prompt.token_ids])
        with torch.inference_mode():
            output = self._model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                do_sample=False,
                max_new_tokens=prompt.num_outputs,
                min_new_tokens=prompt.num_outputs,
                eos_token_id=None,
                pad_token_id=0,
            )
        return list(output[0, len(prompt.token_ids) :].tolist())

    def generate_all(self, prompts: Prompts, settings: Settings) -> tuple[float, list[list[int]]]:
        from transformers import GenerationConfig
        from transformers.generation import ContinuousBatchingConfig

        pages = sum(-(-(len(item.token_ids) + item.num_outputs) // PAGE_SIZE) for item in prompts)
        batching = ContinuousBatchingConfig(
            page_size=PAGE_SIZE,
            num_blocks=pages + 8,  # room for every request, so that none is ever put off
            allow_block_sharing=False,
            auto_switch_to_flash=False,  # needs a GPU; asking would look for kernels on the hub
            **settings,
        )
        generation = GenerationConfig(max_new_tokens=128, do_sample=False, eos_token_id=-1, pad_token_id=0)
        with self._model.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=batching
        ) as manager:
            self._run(
                manager, [workload.Prompt(prompts[0].token_ids[:16], 2)]
            )  # its cache is made on the first request
            start = time.perf_counter()
            tokens = self._run(manager, prompts)
            return time.perf_counter() - start, tokens

    @staticmethod
    def _run(manager: Any, prompts: Prompts) -> list[list[int]]:
        for index, item in enumerate(prompts):
            manager.add_request(list(item.token_ids), request_id=f"r{index}", max_new_tokens=item.num_outputs)
        finished: dict[str, list[int]] = {}
        while len(finished) < len(prompts):
            output = manager.get_result(timeout=5)
            if output is None:
                if not manager.is_running():
                    raise RuntimeError("continuous batching stopped")
                continue
            if output.error:
                raise RuntimeError(output.error)
            if output.is_finished():
                finished[output.request_id] = list(output.generated_tokens)
        return [finished[f"r{index}"] for index in range(len(prompts))]


SIDES: dict[str, type[Ours] | type[Transformers]] = {"ours": Ours, "transformers": Transformers}


def work(name: str, folder: str) -> None:
    """The worker: one JSON request per line on stdin, one JSON answer per line on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    side: Side = SIDES[name](folder)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        prompts = [workload.Prompt(tuple(ids), count) for ids, count in question["prompts"]]
        if question["case"] == "all":
            seconds, tokens = side.generate_all(prompts, question["settings"])
        else:
            start = time.perf_counter()
            tokens = [side.generate_one(prompts[0])]
            seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


class Worker:
    """The parent's end of one worker process."""

    def __init__(self, name: str, folder: Path) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, __file__, "--worker", name, str(folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()

    def ask(self, case: str, prompts: Prompts, settings: Settings | None = None) -> tuple[float, list[list[int]]]:
        """Seconds, and the tokens of each prompt; their number is checked."""
        question = {
            "case": case,
            "prompts": [(item.token_ids, item.num_outputs) for item in prompts],
            "settings": settings or {},
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if [len(ids) for ids in answer["tokens"]] != [item.num_outputs for item in prompts]:
            raise RuntimeError("a request came back with another number of tokens than asked for")
        return float(answer["seconds"]), answer["tokens"]

    def decode_speed(self, prompt: workload.Prompt) -> float:
        """Tokens per second after the prompt has been read."""
        short, _ = self.ask("one", [workload.Prompt(prompt.token_ids, 2)])
        whole, _ = self.ask("one", [prompt])
        return (prompt.num_outputs - 2) / (whole - short)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with status {self._process.wait()}; see its messages above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def choose_settings(worker: Worker, prompts: Prompts) -> tuple[Settings, dict[str, float]]:
    """Run `prompts` once with each setting; the fastest, and the tokens per second of all."""
    tried: dict[str, float] = {}
    best: tuple[float, Settings] = (0.0, {})
    for settings in TRANSFORMERS_SETTINGS:
        seconds, _ = worker.ask("all", prompts, settings)
        speed = sum(item.num_outputs for item in prompts) / seconds
        tried[", ".join(f"{name}={value}" for name, value in settings.items())] = rounded(speed)
        say(f"transformers with {settings}: {speed:.1f} tokens/s")
        best = max(best, (speed, settings), key=lambda item: item[0])
    return best[1], tried


def agreement(first: list[list[int]], second: list[list[int]], length: int = 4) -> float:
    """Share of requests whose first tokens are the same on both sides: the check that they run the same model.
    Rounding differs between them, so that later tokens of a random model may part."""
    same = [a[:length] == b[:length] for a, b in zip(first, second, strict=True)]
    return sum(same) / len(same)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(folder: Path, small: bool, repeats: int) -> Report:
    prompts: list[workload.Prompt] = workload.mixed_case(8 if small else 32)
    decode, prefill = workload.decode_case(output_length=16 if small else 128), workload.prefill_case()
    workers = {name: Worker(name, folder) for name in SIDES}
    report = Report("serve_vs_transformers", repeats=repeats)
    runs: dict[str, list[float]] = {}
    try:
        settings, tried = choose_settings(workers["transformers"], prompts[::2])
        workers["ours"].ask("all", prompts[:4])
        report.limits["before"] = measure_limits()
        num_outputs = sum(item.num_outputs for item in prompts)
        tokens: dict[str, list[list[int]]] = {}
        for repeat in range(repeats):
            order = list(SIDES) if repeat % 2 == 0 else list(reversed(SIDES))
            for name in order:
                seconds, tokens[name] = workers[name].ask("all", prompts, settings if name == "transformers" else {})
                runs.setdefault(f"{name}_output_tokens_per_second", []).append(num_outputs / seconds)
            for name in order:
                runs.setdefault(f"{name}_decode_tokens_per_second", []).append(workers[name].decode_speed(decode))
            for name in order:
                runs.setdefault(f"{name}_ttft_seconds", []).append(workers[name].ask("one", [prefill])[0])
            say(f"repeat {repeat + 1} of {repeats}: " + ", ".join(f"{name} {runs[name][-1]:.4g}" for name in runs))
        report.limits["after"] = measure_limits()
    finally:
        for worker in workers.values():
            worker.close()
    for name, values in runs.items():
        report.add_runs(name, values)
    find = report.metrics
    find["throughput_ratio"] = rounded(
        find["ours_output_tokens_per_second"] / find["transformers_output_tokens_per_second"]
    )
    find["decode_ratio"] = rounded(
        find["ours_decode_tokens_per_second"] / find["transformers_decode_tokens_per_second"]
    )
    find["ttft_ratio"] = rounded(find["transformers_ttft_seconds"] / find["ours_ttft_seconds"])
    find["token_agreement"] = rounded(agreement(tokens["ours"], tokens["transformers"]))
    report.config = {
        "num_requests": len(prompts),
        "precision": {"weights": "bfloat16", "kv_cache": "bfloat16", "lm_head": "bfloat16"},
        "num_threads": len(os.sched_getaffinity(0)),
        "ours": {"kernels": "reference", "prefix_caching": False},
        "transformers": {"attention": "sdpa", "page_size": PAGE_SIZE, **settings},
        "transformers_settings_tried": tried,
    }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shape", default="qwen3-0.6b", help="a decoder shape of make_model.py")
    parser.add_argument("--small", action="store_true", help="a quick check: small shape, 8 requests, one repeat")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(*arguments.worker)
        return
    shape = "llama-0.1b" if arguments.small else arguments.shape
    folder = random_model.make(shape)
    report = measure(folder, arguments.small, 1 if arguments.small else arguments.repeats)
    report.config = {"shape": shape, "small": arguments.small, **report.config}
    emit(report.as_dict())


if __name__ == "__main__":
    main()
