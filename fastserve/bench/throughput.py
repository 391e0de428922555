"""How many tokens per second many requests get, in process, all of them there at the start.

Without lengths it is the mixed case that engines are compared on (prompts of 64 to 512 tokens, outputs of 32 to 128);
with both lengths all requests are alike. Greedy, end tokens ignored, prefix cache and speculation off unless asked for.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from fastserve.bench import workload
from fastserve.bench.engine import BenchConfig, check_lengths, describe, open_engine
from fastserve.bench.report import Report, measure_limits
from fastserve.core.errors import ConfigError
from fastserve.core.sampling_params import SamplingParams

if TYPE_CHECKING:
    from fastserve.offline.llm import LLM


def run(
    model: str = "",
    *,
    num_requests: int = 32,
    input_length: int = 0,
    output_length: int = 0,
    repeats: int = 3,
    **options: Any,
) -> dict[str, Any]:
    """Measure a batch of requests and return the report (see `report.emit`).

    Metrics: output_tokens_per_second, total_tokens_per_second (prompts counted too), seconds.

    Raises:
        ConfigError: an option is wrong, only one of the two lengths is given, or they are more than the model takes.
    """
    if bool(input_length) != bool(output_length):
        raise ConfigError("give both input_length and output_length, or neither for the mixed case")
    if num_requests < 1 or repeats < 1:
        raise ConfigError("num_requests and repeats must be at least 1")
    config = BenchConfig.from_options({"model": model, **options})
    llm = open_engine(config)
    if input_length:
        prompts = workload.uniform_case(num_requests, input_length, output_length)
    else:
        prompts = workload.mixed_case(num_requests)
    prompts = workload.fit(prompts, llm.engine.vocab_size)
    check_lengths(llm, prompts)
    report = Report("throughput", describe(llm, config), repeats=repeats)
    report.config.update(
        num_requests=num_requests, input_length=input_length or "64-512", output_length=output_length or "32-128"
    )
    report.limits["before"] = measure_limits()
    generate_all_seconds(llm, prompts[: max(1, num_requests // 8)])
    seconds = [generate_all_seconds(llm, prompts) for _ in range(repeats)]
    report.limits["after"] = measure_limits()
    num_outputs = sum(prompt.num_outputs for prompt in prompts)
    num_total = num_outputs + sum(len(prompt.token_ids) for prompt in prompts)
    report.add_runs("output_tokens_per_second", [num_outputs / value for value in seconds])
    report.add_runs("total_tokens_per_second", [num_total / value for value in seconds])
    report.add_runs("seconds", seconds)
    return report.as_dict()


def generate_all_seconds(llm: LLM, prompts: list[workload.Prompt]) -> float:
    """Seconds until every prompt has its number of greedy tokens."""
    params = [SamplingParams(temperature=0.0, max_tokens=item.num_outputs, ignore_eos=True) for item in prompts]
    start = time.perf_counter()
    outputs = llm.generate([list(item.token_ids) for item in prompts], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    assert [len(output.outputs[0].token_ids) for output in outputs] == [item.num_outputs for item in prompts]
    return seconds
