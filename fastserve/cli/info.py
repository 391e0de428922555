"""`fastserve info`: what a model folder holds and how it would run here."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastserve.cli.options import ConfigFile, Model, with_options
from fastserve.core.config import EngineConfig

if TYPE_CHECKING:
    from fastserve.checkpoint.folder import ModelFolder
    from fastserve.engine.memory import MemoryPlan
    from fastserve.models.loader import LoadedModel


@with_options((EngineConfig, "Engine"), leave_out=("model",))
def info(
    options: dict[str, Any],
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    config: ConfigFile = None,
) -> None:
    """Show what a model is and how it would run.

    Loads the model; shows its architecture and size, the memory plan, and which kernels would run and why.
    """
    settings = EngineConfig.load({"model": model, **options}, config)

    from fastserve.engine.engine import open_model

    folder, loaded, memory = open_model(settings)
    if as_json:
        print(json.dumps(_as_dict(folder, loaded, memory)))
    else:
        print(_as_text(folder, loaded, memory))


def _as_dict(folder: ModelFolder, loaded: LoadedModel, memory: MemoryPlan) -> dict[str, Any]:
    shape = loaded.model.shape
    return {
        "name": folder.name,
        "path": str(folder.path),
        "architecture": folder.architecture,
        "num_parameters": shape.num_parameters,
        "num_layers": shape.num_layers,
        "num_heads": shape.num_heads,
        "num_kv_heads": shape.num_kv_heads,
        "head_size": shape.head_size,
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "max_positions": shape.max_positions,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "weight_bytes": memory.weight_bytes,
        "kv_cache_bytes": memory.kv_bytes,
        "kv_blocks": memory.num_blocks,
        "max_model_len": memory.max_model_len,
        "sequences_at_max_model_len": memory.num_longest,
        "decisions": loaded.report,
    }


def _as_text(folder: ModelFolder, loaded: LoadedModel, memory: MemoryPlan) -> str:
    shape = loaded.model.shape
    heads = f"{shape.num_heads} heads, {shape.num_kv_heads} for keys and values, {shape.head_size} wide"
    rows = [
        ("model", f"{folder.name} ({folder.path})"),
        ("architecture", folder.architecture or "not named"),
        ("parameters", f"{shape.num_parameters:,}"),
        ("network", f"{shape.num_layers} layers, hidden size {shape.hidden_size}, {heads}"),
        ("vocabulary", f"{shape.vocab_size:,} tokens"),
        *memory.rows(),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join([*(f"{name:<{width}}  {value}" for name, value in rows), *loaded.report])
