"""`fastserve bench`: measure a model on this machine; thin wrappers over `fastserve.bench`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from fastserve.bench.engine import BenchConfig
from fastserve.cli.options import ConfigFile, GroupedCommand, Model, guarded, with_options
from fastserve.core.errors import ConfigError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure a model on this machine.\n\nA table goes to stderr, one JSON line to stdout.",
    epilog="Example: fastserve bench throughput ./my-model --num-requests 64",
)
_options = with_options((BenchConfig, "Engine"), leave_out=("model",))


@_options
def latency(
    options: dict[str, Any],
    model: Model = None,
    input_length: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    output_length: Annotated[int, typer.Option(help="Tokens to make.")] = 128,
    repeats: Annotated[int, typer.Option(help="Runs to take the median of.")] = 5,
    config: ConfigFile = None,
) -> None:
    """Time one request at a time.

    Measures the time to the first token, and tokens per second while decoding.
    """
    from fastserve.bench import latency as bench
    from fastserve.bench.report import emit

    settings = _merged(model, options, config)
    emit(bench.run(**settings, input_length=input_length, output_length=output_length, repeats=repeats))


@_options
def throughput(
    options: dict[str, Any],
    model: Model = None,
    num_requests: Annotated[int, typer.Option(help="Requests, all there at the start.")] = 32,
    input_length: Annotated[int, typer.Option(help="Tokens of each prompt; 0: 64 to 512.")] = 0,
    output_length: Annotated[int, typer.Option(help="Tokens to make for each; 0: 32 to 128.")] = 0,
    repeats: Annotated[int, typer.Option(help="Runs to take the median of.")] = 3,
    config: ConfigFile = None,
) -> None:
    """Measure many requests at once: tokens per second."""
    from fastserve.bench import throughput as bench
    from fastserve.bench.report import emit

    settings = _merged(model, options, config)
    settings.update(num_requests=num_requests, input_length=input_length, output_length=output_length)
    emit(bench.run(**settings, repeats=repeats))


def policies(
    trace: Annotated[str, typer.Option(help="Trace file: Azure, ServeGen, ShareGPT, Vidur (CSV) or Mooncake (JSONL).")],
    load: Annotated[float, typer.Option(help="Share of the capacity measured with FCFS.")] = 0.9,
    scheduler: Annotated[list[str] | None, typer.Option(help="Policy to run; again for more. All by default.")] = None,
    requests: Annotated[int, typer.Option(help="Consecutive requests of the trace.")] = 300,
    offset: Annotated[int, typer.Option(help="Requests of the trace to leave out before them.")] = 0,
    max_batch_sequences: Annotated[int, typer.Option(help="Most sequences in one step.")] = 16,
    max_batch_tokens: Annotated[int, typer.Option(help="Most tokens in one step.")] = 512,
    context: Annotated[int, typer.Option(help="Longest prompt + output; lengths are scaled to it.")] = 4096,
    kv_blocks: Annotated[int, typer.Option(help="KV blocks of 16 tokens; 0: enough for all.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Folder for pictures (PNG, and one HTML file with all).")] = None,
) -> None:
    """Compare scheduling policies on a request trace, simulated.

    The engine's own scheduler runs with a cost model in place of the network. FCFS and an oracle that knows the
    answers' lengths are always among them.
    """
    from fastserve.bench import policies as bench
    from fastserve.bench.report import emit
    from fastserve.bench.simulate import Machine
    from fastserve.scheduler.policy import POLICY_NAMES

    machine = Machine(
        max_batch_sequences=max_batch_sequences,
        max_batch_tokens=max_batch_tokens,
        context=context,
        num_blocks=kv_blocks,
    )
    names = scheduler or POLICY_NAMES
    if plot is not None:
        bench.plot(plot, trace, load=load, num_requests=requests, offset=offset, policies=names, machine=machine)
    emit(bench.compare(trace, load=load, num_requests=requests, offset=offset, policies=names, machine=machine))


def simulate(
    trace: Annotated[str, typer.Option(help="Trace file: Azure, ServeGen, ShareGPT, Vidur (CSV) or Mooncake (JSONL).")],
    scheduler: Annotated[str, typer.Option(help="The policy of each replica.")] = "aged-srpt",
    load: Annotated[float, typer.Option(help="Share of all replicas' capacity, measured with FCFS.")] = 0.9,
    requests: Annotated[int, typer.Option(help="Requests; a shorter trace is repeated.")] = 300,
    offset: Annotated[int, typer.Option(help="Requests of the trace to leave out before them.")] = 0,
    replicas: Annotated[int, typer.Option(help="Engines behind a router.")] = 1,
    router: Annotated[str, typer.Option(help="round-robin, least-loaded or prefix-aware.")] = "least-loaded",
    max_batch_sequences: Annotated[int, typer.Option(help="Most sequences in one step of a replica.")] = 16,
    max_batch_tokens: Annotated[int, typer.Option(help="Most tokens in one step of a replica.")] = 512,
    context: Annotated[int, typer.Option(help="Longest prompt + output; lengths are scaled to it.")] = 4096,
    kv_blocks: Annotated[int, typer.Option(help="KV blocks of 16 tokens per replica; 0: two full batches.")] = 0,
    target_tpot_ms: Annotated[float, typer.Option(help="As the server's option of this name; 0: none.")] = 0.0,
) -> None:
    """Simulate replicas behind a router on a request trace.

    The engine's own scheduler runs with a cost model in place of the network: a million requests in minutes.
    """
    from fastserve.bench import cluster as bench
    from fastserve.bench.report import emit
    from fastserve.bench.simulate import Machine

    machine = Machine(
        max_batch_sequences=max_batch_sequences,
        max_batch_tokens=max_batch_tokens,
        context=context,
        num_blocks=kv_blocks,
        target_tpot=target_tpot_ms / 1e3,
    )
    emit(
        bench.run(
            trace,
            num_requests=requests,
            num_replicas=replicas,
            router=router,
            scheduler=scheduler,
            load=load,
            offset=offset,
            machine=machine,
        )
    )


def serve(
    trace: Annotated[str, typer.Option(help="Trace file: Azure, ServeGen, ShareGPT, Vidur (CSV) or Mooncake (JSONL).")],
    model: Model = None,
    url: Annotated[str, typer.Option(help="http://host:port of a running server; left out: start our own.")] = "",
    scheduler: Annotated[str, typer.Option(help="The policy of our own server; its default when left out.")] = "",
    load: Annotated[float, typer.Option(help="Share of the capacity measured on the server.")] = 0.9,
    rate: Annotated[float, typer.Option(help="Requests per second instead; no capacity run.")] = 0.0,
    requests: Annotated[int, typer.Option(help="Consecutive requests of the trace.")] = 300,
    offset: Annotated[int, typer.Option(help="Requests of the trace to leave out before them.")] = 0,
    context: Annotated[int, typer.Option(help="Longest prompt + output; lengths are scaled to it.")] = 1024,
    max_batch_sequences: Annotated[int, typer.Option(help="Most sequences in one step of the server.")] = 16,
) -> None:
    """Replay a request trace over HTTP against an OpenAI-compatible server.

    Without a url, our own server is started with the model, and ended afterwards.
    """
    from fastserve.bench import serve_trace as bench
    from fastserve.bench.report import emit

    settings: dict[str, Any] = {"load": load, "rate": rate, "num_requests": requests, "offset": offset}
    settings.update(context=context, max_batch_sequences=max_batch_sequences)
    if url:
        if scheduler:
            raise ConfigError("a running server has its scheduler already; leave out --scheduler or --url")
        emit(bench.run(trace, url=url, model=model or "", **settings))
        return
    options = ["--max-batch-sequences", str(max_batch_sequences)]
    options += ["--max-waiting", str(requests)] if requests else []
    options += ["--scheduler", scheduler] if scheduler else []
    with bench.own_server(model or "", options) as address:
        emit(bench.run(trace, url=address, server_options=options, **settings))


def _merged(model: str | None, options: dict[str, Any], config: Any) -> dict[str, Any]:
    """All options of the engine: the benchmark's defaults under what a file, variables and flags say."""
    return dataclasses.asdict(BenchConfig.load({"model": model, **options}, config))


_COMMANDS = (
    (latency, "latency --output-length 64"),
    (throughput, "throughput --num-requests 64"),
    (policies, "policies --trace azure_llm_2023_conv.csv --load 0.9"),
    (simulate, "simulate --trace azure_llm_2023_conv.csv --requests 100000 --replicas 8 --router least-loaded"),
    (serve, "serve ./my-model --trace azure_llm_2023_conv.csv --load 0.9 --scheduler fcfs"),
)
for function, example in _COMMANDS:
    app.command(cls=GroupedCommand, epilog=f"Example: fastserve bench {example}")(guarded(function))
