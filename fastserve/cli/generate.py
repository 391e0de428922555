"""`fastserve generate`: complete prompts in this process, without a server."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from fastserve.cli.options import ConfigFile, Model, with_options
from fastserve.core.config import EngineConfig
from fastserve.core.sampling_params import SamplingParams

_SAMPLING = tuple(item.name for item in dataclasses.fields(SamplingParams))


@with_options((SamplingParams, "Sampling"), (EngineConfig, "Engine"), leave_out=("model",))
def generate(
    options: dict[str, Any],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="Text to continue; may be given several times.")],
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per prompt.")] = False,
    config: ConfigFile = None,
) -> None:
    """Continue texts offline and print them, or the answers of an encoder-decoder. --seed is the seed of sampling."""
    sampling = {name: options.pop(name) for name in list(options) if name in _SAMPLING}
    settings = EngineConfig.load({"model": model, **options}, config)

    from fastserve.checkpoint.folder import TEXT_TO_TEXT, ModelFolder
    from fastserve.checkpoint.sampling_defaults import sampling_defaults
    from fastserve.checkpoint.source_text import SourceText, over_defaults
    from fastserve.checkpoint.tokenizer import Tokenizer

    folder = ModelFolder.open(settings.model)
    continues = folder.task != TEXT_TO_TEXT
    if continues:
        # A beam search is not sampled, so the model's defaults of sampling have no place in it.
        is_search = sampling.get("num_beams", 1) > 1
        params = SamplingParams(**{**({} if is_search else sampling_defaults(folder)), **sampling})
    else:
        params = over_defaults(sampling, SourceText(folder, Tokenizer.load(folder)).defaults())

    from fastserve.offline.llm import LLM

    outputs = LLM(**dataclasses.asdict(settings)).generate(prompt, params)
    for output in outputs:
        if as_json:
            print(json.dumps(dataclasses.asdict(output), ensure_ascii=False))
            continue
        for completion in output.outputs:
            print(f"{output.prompt if continues else ''}{completion.text}")
