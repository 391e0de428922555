"""`fastserve serve`: an OpenAI-compatible server."""

from __future__ import annotations

from typing import Any

import typer

from fastserve.cli.options import ConfigFile, Model, with_options
from fastserve.core.config import EngineConfig, ServeConfig


@with_options((EngineConfig, "Engine"), (ServeConfig, "Server"), leave_out=("model",))
def serve(options: dict[str, Any], model: Model = None, config: ConfigFile = None) -> None:
    """Serve a model over HTTP in OpenAI's form, until Ctrl-C.

    Every option can also be set in the file of --config or as FASTSERVE_<NAME>; the API key only as FASTSERVE_API_KEY
    or with --api-key-file.
    """
    settings = ServeConfig.load({"model": model, **options}, config)

    from fastserve.core.logs import configure_logging
    from fastserve.serve import launch

    configure_logging("server")
    raise typer.Exit(launch.serve(settings, lambda text: print(text, flush=True)))
