"""Which models a server has: the one that generates, if any, and the others, from what the user named.

Reads each folder's config.json to see what it is; loads nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from fastserve.checkpoint.folder import TEXT_GENERATION, ModelFolder, is_servable
from fastserve.core.arrays import ModelSpec
from fastserve.core.config import EngineConfig, ServeConfig
from fastserve.core.errors import ConfigError

# What clients may say of a model that they load; where it runs and what code and folders it has is the operator's.
_CLIENTS_OPTIONS = (
    *("dtype", "kernels", "quantization", "max_model_len", "max_batch_tokens", "max_batch_sequences"),
    *("kv_cache_memory", "weight"),
)


@dataclass(frozen=True, slots=True)
class ServedModels:
    """The models of one server.

    Attributes:
        engine: options of the model that generates, or the server's own when there is none.
        folder, name: of the model that generates, or of the first; no folder when all are networks of the user's own.
        generates: whether there is one that does.
        others: those that do not.
    """

    engine: EngineConfig
    folder: ModelFolder | None
    name: str
    generates: bool
    others: tuple[ModelSpec, ...] = ()

    @classmethod
    def of(cls, config: ServeConfig) -> ServedModels:
        """Sort the models that the options name.

        Raises:
            CheckpointError: one is not there, or damaged.
            ConfigError: two that generate, two of one name, or options that do not exist.
        """
        given = [config.model, *filter(None, (item.strip() for item in config.more_models.split(",")))]
        names = [name.strip() for name in config.name.split(",")] if config.name else []
        if len(names) > len(given):
            raise ConfigError(f"name has {len(names)} names for {len(given)} models; give at most one for each")
        base = config.engine()
        generator: tuple[EngineConfig, ModelFolder | None, str] | None = None
        first: tuple[EngineConfig, ModelFolder | None, str] | None = None
        others: list[ModelSpec] = []
        for index, text in enumerate(given):
            options, weight = _read(text)
            folder = None if is_servable(options["model"]) else ModelFolder.open(options["model"])
            own_name = Path(options["model"].partition(":")[0]).stem if folder is None else folder.name
            name = names[index] if index < len(names) and names[index] else own_name
            path = options["model"] if folder is None else str(folder.path)
            settings = EngineConfig.from_options({**asdict(base), **options, "model": path})
            if first is None or first[1] is None:
                first = (settings, folder, name)
            if folder is None or folder.task != TEXT_GENERATION:
                others.append(ModelSpec(name, asdict(settings), weight))
            elif weight != 1.0:
                raise ConfigError(f"{name} generates text, and its weight is 1; give the other models theirs by it")
            elif generator is None:
                generator = (settings, folder, name)
            else:
                raise ConfigError(
                    f"{generator[2]} and {name} both are decoders, and one server has one such model; serve the other "
                    "on a port of its own"
                )
        assert first is not None
        taken = [spec.name for spec in others] + ([generator[2]] if generator else [])
        if len(set(taken)) < len(taken):
            raise ConfigError(f"two models have one name ({', '.join(taken)}); name them apart with --name A,B")
        engine, folder, name = generator or first
        return cls(
            engine if generator else replace(engine, model=""), folder, name, generator is not None, tuple(others)
        )


def repository_spec(repository: str, name: str, base: EngineConfig, options: dict[str, Any]) -> ModelSpec:
    """A model of the folder that clients may load from.

    Raises:
        ConfigError: there is no such folder, no model of that name in it, or options that are not the client's.
    """
    if not repository:
        raise ConfigError("this server loads no models while it runs; start it with --model-repository FOLDER")
    folder = Path(repository) / name
    if name in ("", ".", "..") or Path(name).name != name or not folder.is_dir():
        raise ConfigError(f"the model repository has no folder {name!r}")
    if unknown := sorted(options.keys() - set(_CLIENTS_OPTIONS)):
        known = ", ".join(_CLIENTS_OPTIONS)
        raise ConfigError(f"unknown option {unknown[0][:100]}; a model that clients load takes {known}")
    weight = _weight(options.pop("weight", 1.0))
    opened = ModelFolder.open(str(folder))
    if opened.task == TEXT_GENERATION:
        raise ConfigError(f"{name} generates text; such a model is named when the server starts")
    settings = EngineConfig.from_options({**asdict(base), **options, "model": str(folder.resolve())})
    return ModelSpec(name, asdict(settings), weight)


def _read(text: str) -> tuple[dict[str, str], float]:
    """FOLDER?option=value&... -> options, weight."""
    path, _, query = text.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    weight = _weight(options.pop("weight", "1"))
    return {"model": path, **options}, weight


def _weight(value: Any) -> float:
    try:
        weight = float(value)
    except (TypeError, ValueError, OverflowError):
        weight = 0.0
    if not 0 < weight < float("inf"):
        raise ConfigError(f"weight must be a number above 0, not {value!r}")
    return weight
