"""How fast one request is, in process: time to first token, and tokens per second while decoding.

Decode speed is the difference of two runs, so that reading the prompt does not count: (outputs - 2) tokens over the
time of the whole request less the time of one that stops after two. Greedy, end tokens ignored, prefix cache and
speculation off unless asked for.
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
    model: str = "", *, input_length: int = 128, output_length: int = 128, repeats: int = 5, **options: Any
) -> dict[str, Any]:
    """Measure one request at a time and return the report (see `report.emit`).

    Metrics: decode_tokens_per_second, decode_tpot_ms (milliseconds per token), ttft_seconds (of `input_length`).

    Raises:
        ConfigError: an option is wrong, output_length is below 3 or repeats below 1, or the lengths are more than the
            model takes.
    """
    if output_length < 3 or repeats < 1:
        raise ConfigError("output_length must be at least 3 and repeats at least 1")
    config = BenchConfig.from_options({"model": model, **options})
    llm = open_engine(config)
    [prompt] = workload.fit([workload.decode_case(input_length, output_length)], llm.engine.vocab_size)
    check_lengths(llm, [prompt])
    report = Report("latency", describe(llm, config), repeats=repeats)
    report.config.update(input_length=input_length, output_length=output_length)
    report.limits["before"] = measure_limits()
    generate_seconds(llm, prompt.token_ids, output_length)
    first, short, whole = [], [], []
    for _ in range(repeats):
        first.append(generate_seconds(llm, prompt.token_ids, 1))
        short.append(generate_seconds(llm, prompt.token_ids, 2))
        whole.append(generate_seconds(llm, prompt.token_ids, output_length))
    report.limits["after"] = measure_limits()
    steps = output_length - 2
    report.add_runs("ttft_seconds", first)
    report.add_runs("decode_tokens_per_second", [steps / (b - a) for a, b in zip(short, whole, strict=True)])
    report.add_runs("decode_tpot_ms", [1000 * (b - a) / steps for a, b in zip(short, whole, strict=True)])
    return report.as_dict()


def generate_seconds(llm: LLM, token_ids: tuple[int, ...], num_outputs: int) -> float:
    """Seconds for exactly `num_outputs` greedy tokens after `token_ids`."""
    params = SamplingParams(temperature=0.0, max_tokens=num_outputs, ignore_eos=True)
    start = time.perf_counter()
    outputs = llm.generate([list(token_ids)], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    assert len(outputs[0].outputs[0].token_ids) == num_outputs
    return seconds
