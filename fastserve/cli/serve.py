"""`fastserve serve`: an OpenAI-compatible server."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fastserve.cli.options import ConfigFile, with_options
from fastserve.core.config import EngineConfig, ServeConfig

Models = Annotated[
    list[str] | None,
    typer.Argument(help="Model folders or hub ids; the built-in model without any.", metavar="MODEL"),
]


@with_options((EngineConfig, "Engine"), (ServeConfig, "Server"), leave_out=("model",))
def serve(options: dict[str, Any], models: Models = None, config: ConfigFile = None) -> None:
    """Serve models over HTTP in OpenAI's form, until Ctrl-C.

    One of them may generate text; the others are encoders (embeddings, question answering, classification, ...):
    fastserve serve ./chat-model ./bert-qa --name chat,qa

    Every option can also be set in the file of --config or as FASTSERVE_<NAME>; the API key only as FASTSERVE_API_KEY
    or with --api-key-file.
    """
    if models and len(models) > 1:
        options["more_models"] = ",".join([*models[1:], *filter(None, [options.get("more_models")])])
    settings = ServeConfig.load({"model": models[0] if models else None, **options}, config)

    from fastserve.core.logs import configure_logging
    from fastserve.serve import launch

    configure_logging("server")
    raise typer.Exit(launch.serve(settings, lambda text: print(text, flush=True)))
