"""`fastserve bench`: measure a model on this machine; thin wrappers over `fastserve.bench`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from fastserve.cli.options import ConfigFile, GroupedCommand, Model, guarded, with_options
from fastserve.core.config import EngineConfig

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure a model on this machine.\n\nA table goes to stderr, one JSON line to stdout.",
    epilog="Example: fastserve bench throughput ./my-model --num-requests 64",
)
_options = with_options((EngineConfig, "Engine"), leave_out=("model",))


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

    settings = _given(model, options, config)
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

    settings = _given(model, options, config)
    settings.update(num_requests=num_requests, input_length=input_length, output_length=output_length)
    emit(bench.run(**settings, repeats=repeats))


def _given(model: str | None, options: dict[str, Any], config: Any) -> dict[str, Any]:
    """The options that differ from the defaults, whatever set them, so that the report lists what was chosen."""
    settings = EngineConfig.load({"model": model, **options}, config)
    defaults = EngineConfig()
    chosen = {
        item.name: getattr(settings, item.name)
        for item in dataclasses.fields(EngineConfig)
        if getattr(settings, item.name) != getattr(defaults, item.name)
    }
    return {"model": settings.model, **chosen}


for function, example in ((latency, "latency --output-length 64"), (throughput, "throughput --num-requests 64")):
    app.command(cls=GroupedCommand, epilog=f"Example: fastserve bench {example}")(guarded(function))
