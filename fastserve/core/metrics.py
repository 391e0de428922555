"""The catalogue of metrics: every name that `/metrics` exports, once.

Names are `fastserve_` and the suffixes that users of vLLM know, in base units; counters get `_total` on export. The
server exports from this table, and dashboards and alerts are made from it. Every metric has the label `model_name`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "fastserve_"

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
_REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: name without the prefix (and without `_total`), kind, help, buckets of a histogram, more labels."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    buckets: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()


# From the engine's counters (EngineStats).
ENGINE_METRICS = (
    Metric("num_requests_running", "gauge", "Sequences in the running batch."),
    Metric("num_requests_waiting", "gauge", "Requests that have not been given a place in the batch."),
    Metric("kv_cache_usage_perc", "gauge", "Share of KV blocks held by live sequences; 1 is all."),
    Metric("prefix_cache_queries", "counter", "Prompt tokens looked up in the prefix cache."),
    Metric("prefix_cache_hits", "counter", "Prompt tokens found in the prefix cache."),
    Metric("num_preemptions", "counter", "Sequences put back to wait because KV blocks ran out."),
    Metric("recomputed_tokens", "counter", "Tokens computed again after their KV blocks were taken."),
    Metric("kv_blocks_kept", "counter", "KV blocks copied to host memory or the file."),
    Metric("kv_blocks_restored", "counter", "KV blocks brought back from there."),
    Metric("kv_errors", "counter", "KV blocks that could not be written or read there; computed again."),
    Metric("kv_move_seconds", "counter", "Time that engine steps were held up by such copies."),
    Metric("spec_decode_num_draft_tokens", "counter", "Guessed tokens that were verified."),
    Metric("spec_decode_num_accepted_tokens", "counter", "Guessed tokens that were right."),
    Metric("prompt_tokens", "counter", "Prompt tokens taken in."),
    Metric("generation_tokens", "counter", "Tokens made."),
    Metric("engine_steps", "counter", "Engine steps."),
    Metric("engine_step_seconds", "counter", "Time spent in engine steps."),
    Metric("engine_restarts", "counter", "Times that the engine process died and was started again."),
    Metric("engine_ready", "gauge", "1 while the engine takes requests, else 0."),
)

# Observed by the server, once per sequence or token.
REQUEST_METRICS = (
    Metric("request_success", "counter", "Finished sequences by reason.", labels=("finished_reason",)),
    Metric("time_to_first_token_seconds", "histogram", "From arrival to the first token.", _LATENCY),
    Metric("inter_token_latency_seconds", "histogram", "Between consecutive tokens.", _PER_TOKEN),
    Metric(
        "time_per_output_token_seconds", "histogram", "Mean time per token after the first, per sequence.", _PER_TOKEN
    ),
    Metric("e2e_request_latency_seconds", "histogram", "From arrival to the last token.", _LATENCY),
    Metric("request_queue_time_seconds", "histogram", "From arrival to the first step that worked on it.", _LATENCY),
    Metric(
        "request_prefill_time_seconds",
        "histogram",
        "From the first step that worked on it to the first token.",
        _LATENCY,
    ),
    Metric("request_decode_time_seconds", "histogram", "From the first to the last token.", _LATENCY),
    Metric(
        "request_inference_time_seconds", "histogram", "From the first step that worked on it to the end.", _LATENCY
    ),
    Metric("request_params_max_tokens", "histogram", "max_tokens of requests, resolved.", _TOKENS),
    Metric("request_prompt_tokens", "histogram", "Prompt length in tokens.", _TOKENS),
    Metric("request_generation_tokens", "histogram", "Completion length in tokens.", _TOKENS),
)

# With API keys only: who asks for how much. There are as many tenants as the key file names.
TENANT_METRICS = (
    Metric("tenant_requests", "counter", "Sequences that were taken in.", labels=("tenant",)),
    Metric("tenant_requests_refused", "counter", "Sequences that found no room (429).", labels=("tenant",)),
    Metric("tenant_prompt_tokens", "counter", "Prompt tokens of sequences that were taken in.", labels=("tenant",)),
    Metric("tenant_generation_tokens", "counter", "Tokens made.", labels=("tenant",)),
)

# Of each encoder and each network of the user's own; a request is one sequence, window or set of tensors.
ARRAY_METRICS = (
    Metric("array_requests", "counter", "Requests by what became of them.", labels=("outcome",)),
    Metric("array_requests_live", "gauge", "Requests without an answer: waiting or being computed."),
    Metric("array_request_latency_seconds", "histogram", "From arrival to the answer, of whole calls.", _LATENCY),
    Metric("array_tokens", "counter", "Tokens of requests that were computed; encoders only."),
    Metric("array_padding_tokens", "counter", "Positions computed beyond those tokens."),
    Metric("array_batch_requests", "histogram", "Requests that were computed together.", _REQUESTS),
    Metric("array_step_seconds", "counter", "Time spent in this model's steps."),
)

CATALOGUE = ENGINE_METRICS + REQUEST_METRICS + TENANT_METRICS + ARRAY_METRICS

# With --metrics-compat vllm, all but these are exported under vLLM's names as well: its prefix, the same suffixes.
VLLM_PREFIX = "vllm:"
NOT_IN_VLLM = frozenset(
    {"engine_steps", "engine_step_seconds", "engine_restarts", "engine_ready"}
    | {metric.name for metric in TENANT_METRICS + ARRAY_METRICS}
)
