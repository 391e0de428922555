"""All options, once: dataclass field = TOML key = `--flag` = `FASTSERVE_<FIELD>` = keyword of `LLM`.

Values are checked on construction; a bad one raises ConfigError naming the option and what would work. Memory sizes
are bytes, given as an int or as text such as "512MiB", "2GB". Components below take the values they need, never the
whole object.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from fastserve.core.errors import ConfigError

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*$", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
ENVIRONMENT_PREFIX = "FASTSERVE_"
# Fields that hold bytes and may be written as text with a unit.
SIZE_FIELDS = frozenset(
    {
        "kv_cache_memory",
        "kv_cache_max_memory",
        "kv_host_cache",
        "kv_disk_cache",
        "max_body_bytes",
        "response_store_bytes",
        "max_state_bytes",
    }
)


def parse_bytes(value: float | str) -> int:
    """ "512MiB", "2GB", "1.5g" or a plain whole number -> bytes. Decimal units unless an i says binary."""
    if isinstance(value, int | float) and value % 1 == 0:
        return int(value)
    match = _SIZE.match(value) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(f"{value!r} is no memory size; write for example 512MiB or 2GB")
    number, power, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[power.lower()])


def format_bytes(num_bytes: float) -> str:
    """12.3 MiB and the like, for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Options of one engine.

    Attributes:
        model: model folder, hub id, or "" for the built-in model.
        dtype: auto (what the folder says), float32, bfloat16 or float16.
        device: auto, cpu or cuda (cuda:N picks a card).
        kernels: auto, reference, cpu or triton.
        backend: auto (our own modules when the architecture has them), native, or transformers.
        scheduler: fcfs, priority, skip-join-mlfq, hrrn, srpt-predicted, aged-srpt, fair, srpt-oracle (for benchmarks),
            or module:Class.
        max_batch_sequences: most sequences in one step.
        max_batch_tokens: most tokens in one step (prefill chunks and decodes together).
        target_tpot_ms: milliseconds per token that answers should keep to; prefills get what that leaves. 0: none.
        burst_ms: milliseconds of decoding at a time while nobody waits; what comes meanwhile waits as long, and tokens
            are told together. 0: a token at a time.
        max_model_len: longest prompt + output; 0 takes the model's own limit, cut to what memory allows.
        max_waiting: most requests that may wait; further ones get 429.
        kv_cache_memory: bytes for the KV cache; 0 plans it from free memory.
        kv_cache_max_memory: bytes to which the KV cache may grow while memory is free, and from which it shrinks when
            the machine runs short; 0 keeps its size. CPU only.
        quantization: auto (as the folder has it) or int8: matrices of the layers in 8 bits as they are loaded, a scale
            per output, and 8-bit activations, a scale per token.
        kv_cache_dtype: auto (the compute dtype) or int8 (a scale per token and head: half of bfloat16's memory).
        kv_host_cache, kv_disk_cache: bytes of host memory and of a file for blocks that leave the KV cache; 0: none.
        kv_disk_folder: where that file is made; the system's temporary folder when empty.
        kv_replacement: lru or lfu: which blocks those give up first.
        block_size: tokens in one KV block.
        prefix_caching: reuse the KV blocks of equal prompt beginnings.
        speculation: guess tokens from what was written before, and verify several in one step: off, auto (where it is
            expected to pay), ngram (wherever there is a guess) or draft (always, by `draft_model`). The tokens are the
            same.
        draft_model: folder or hub id of a smaller model with the same vocabulary that guesses instead; "" for none.
        lora: LoRA adapters as name=folder; requests choose one by the name in place of the model's.
        max_loras: most adapters at a time, those loaded while serving included; 0: those of `lora`.
        max_lora_rank: largest rank of an adapter.
        num_threads: compute threads; 0 uses every core the process may use.
        seed: from it come the seeds of requests without one, in the order in which they arrive; None: fresh each time.
        trust_remote_code: let transformers run code from the folder. Off unless you ask for it.
    """

    model: str = ""
    dtype: str = "auto"
    device: str = "auto"
    kernels: str = "auto"
    backend: str = "auto"
    scheduler: str = "aged-srpt"
    max_batch_sequences: int = 64
    max_batch_tokens: int = 1024
    target_tpot_ms: float = 0.0
    burst_ms: float = 20.0
    max_model_len: int = 0
    max_waiting: int = 1024
    kv_cache_memory: int = 0
    kv_cache_max_memory: int = 0
    quantization: str = "auto"
    kv_cache_dtype: str = "auto"
    kv_host_cache: int = 0
    kv_disk_cache: int = 0
    kv_disk_folder: str = ""
    kv_replacement: str = "lru"
    block_size: int = 16
    prefix_caching: bool = True
    speculation: str = "auto"
    draft_model: str = ""
    lora: tuple[str, ...] = ()
    max_loras: int = 0
    max_lora_rank: int = 64
    num_threads: int = 0
    seed: int | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("kv_cache_memory", "kv_cache_max_memory", "kv_host_cache", "kv_disk_cache"):
            object.__setattr__(self, name, parse_bytes(getattr(self, name)))
            self._at_least(name, 0)
        self._choice("dtype", ("auto", "float32", "bfloat16", "float16"))
        if self.device.split(":")[0] not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"device must be auto, cpu or cuda, not {self.device!r}")
        self._choice("kernels", ("auto", "reference", "cpu", "triton"))
        self._choice("backend", ("auto", "native", "transformers"))
        self._choice("quantization", ("auto", "int8"))
        self._choice("kv_cache_dtype", ("auto", "int8"))
        if self.kv_cache_dtype == "int8" and self.block_size % 4:
            raise ConfigError(f"block_size must be a multiple of 4 with kv_cache_dtype=int8, not {self.block_size}")
        if self.speculation == "draft" and not self.draft_model:
            raise ConfigError("speculation=draft needs draft_model, the folder of a smaller model that guesses")
        self._choice("speculation", ("auto", "draft") if self.draft_model else ("auto", "ngram", "off"))
        if self.draft_model and self.kv_cache_max_memory:
            raise ConfigError("with draft_model the KV cache keeps its size; leave out kv_cache_max_memory")
        if 0 < self.kv_cache_max_memory < self.kv_cache_memory:
            raise ConfigError(
                f"kv_cache_max_memory ({self.kv_cache_max_memory}) must be at least kv_cache_memory "
                f"({self.kv_cache_memory}), since the KV cache grows from one to the other"
            )
        self._at_least("max_batch_sequences", 1)
        self._at_least("max_batch_tokens", 1)
        self._at_least("target_tpot_ms", 0)
        self._at_least("burst_ms", 0)
        self._at_least("max_model_len", 0)
        self._at_least("max_waiting", 0)
        self._choice("kv_replacement", ("lru", "lfu"))
        self._at_least("num_threads", 0)
        self._at_least("block_size", 1)
        self._at_least("max_lora_rank", 1)
        if not self.max_loras:
            object.__setattr__(self, "max_loras", len(self.lora))
        self._at_least("max_loras", len(self.adapters))
        if self.max_batch_tokens < self.max_batch_sequences:
            raise ConfigError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_batch_sequences "
                f"({self.max_batch_sequences}), so that every running sequence can take a token in a step"
            )

    @property
    def adapters(self) -> dict[str, str]:
        """LoRA adapters: name -> folder."""
        pairs = [item.partition("=") for item in self.lora]
        found = {name: path for name, _, path in pairs if name and path}
        if len(found) != len(pairs):
            raise ConfigError(f"lora takes name=folder, each name once, not {', '.join(self.lora)}")
        return found

    def _choice(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise ConfigError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")

    def _at_least(self, name: str, low: int) -> None:
        if not low <= getattr(self, name) < math.inf:
            raise ConfigError(f"{name} must be a number of at least {low}, not {getattr(self, name)}")

    @classmethod
    def load(
        cls,
        options: Mapping[str, Any] | None = None,
        file: str | Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Self:
        """Merge a TOML file, `FASTSERVE_<FIELD>` variables and `options`, the later winning; None means not given."""
        values: dict[str, Any] = {}
        if file is not None:
            values.update(cls._read_toml(Path(file)))
        environment = os.environ if environment is None else environment
        for item in fields(cls):
            text = environment.get(ENVIRONMENT_PREFIX + item.name.upper())
            if text is not None:
                values[item.name] = text
        values.update({name: value for name, value in (options or {}).items() if value is not None})
        return cls.from_options(values)

    @classmethod
    def from_options(cls, values: Mapping[str, Any]) -> Self:
        """Build from a mapping, converting text to each field's type; unknown names are refused."""
        hints = typing.get_type_hints(cls)
        unknown = sorted(set(values) - set(hints))
        if unknown:
            raise ConfigError(f"unknown option {', '.join(unknown)}; known: {', '.join(sorted(hints))}")
        return cls(**{name: _convert(name, value, hints[name]) for name, value in values.items()})

    @classmethod
    def _read_toml(cls, file: Path) -> dict[str, Any]:
        try:
            return tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read config file {file}: {error.strerror or error}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not valid TOML: {error}") from error


@dataclass(frozen=True, slots=True)
class ServeConfig(EngineConfig):
    """Options of the HTTP server, on top of the engine's.

    Attributes:
        host, port: where to listen; loopback unless you choose otherwise. Port 0 takes a free one.
        name: model name that clients use; the folder's name when empty. Of several models, names with commas between.
        more_models: further models, with commas between: encoders and other networks that do not generate, as FOLDER or
            FOLDER?option=value&... with options of the engine and weight (its share of step time, 1 by default).
        model_repository: folder whose subfolders clients may load and unload as models while the server runs.
        api_key: key that clients must send; from FASTSERVE_API_KEY or api_key_file only, never from a flag.
        api_key_file: file with a key per line, as KEY or TENANT KEY.
        chat_template: file with a jinja2 chat template, in place of the model's own.
        tool_call_format: how the model writes tool calls: auto (found from the chat template), hermes, llama3, mistral
            or json.
        reasoning: whether <think> parts of chat answers become reasoning_content: auto (found from the template), on
            or off.
        drain_timeout: seconds that running requests get after SIGTERM.
        stall_timeout: seconds without a sign of life after which the engine is killed and started again.
        max_body_bytes: largest request body.
        max_request_tokens: most tokens (prompt and max_tokens, for each choice) that one request may ask for; 0 takes a
            full batch of full contexts.
        max_queued_tokens: most tokens that all requests which are here may ask for; 0 is no limit but max_waiting.
        request_timeout: seconds after which any request is ended; 0 is no limit. Requests may ask for less.
        response_store_bytes: memory for stored responses (/v1/responses); 0 stores none.
        state_folder: folder for files and batches; without it there are none.
        max_state_bytes: most bytes that files take in it.
        metrics_compat: vllm exports vLLM's metric names beside ours; none.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    more_models: str = ""
    model_repository: str = ""
    api_key: str = ""
    api_key_file: str = ""
    chat_template: str = ""
    tool_call_format: str = "auto"
    reasoning: str = "auto"
    drain_timeout: float = 30.0
    stall_timeout: float = 60.0
    max_body_bytes: int = 8 * 1024 * 1024
    max_request_tokens: int = 0
    max_queued_tokens: int = 0
    request_timeout: float = 0.0
    response_store_bytes: int = 64 * 1024 * 1024
    state_folder: str = ""
    max_state_bytes: int = 1024 * 1024 * 1024
    metrics_compat: str = "none"

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        for name in ("max_body_bytes", "response_store_bytes", "max_state_bytes"):
            object.__setattr__(self, name, parse_bytes(getattr(self, name)))
        for name in ("max_request_tokens", "max_queued_tokens", "request_timeout", "response_store_bytes"):
            self._at_least(name, 0)
        self._choice("metrics_compat", ("none", "vllm"))
        self._choice("tool_call_format", ("auto", "hermes", "llama3", "mistral", "json"))
        self._choice("reasoning", ("auto", "on", "off"))
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be between 0 and 65535, not {self.port}")
        self._at_least("drain_timeout", 0)
        self._at_least("stall_timeout", 1)

    def engine(self) -> EngineConfig:
        """The engine's part of these options."""
        return EngineConfig(**{item.name: getattr(self, item.name) for item in fields(EngineConfig)})


def _convert(name: str, value: Any, hint: Any) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    if name in SIZE_FIELDS:
        return parse_bytes(value)
    try:
        if typing.get_origin(kind) is tuple:
            return tuple(value.split(",") if isinstance(value, str) else map(str, value))
        if kind is int and isinstance(value, float) and not value.is_integer():
            raise ValueError
        if kind is bool and isinstance(value, str):
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[value.lower()]
        return kind(value)
    except (TypeError, ValueError, KeyError) as error:
        wanted = "a list of texts" if typing.get_origin(kind) is tuple else kind.__name__
        raise ConfigError(f"{name} must be {wanted}, not {value!r}") from error
