"""From a model folder to a network ready to serve: precision, device, backend, kernels, weights.

Every choice is made here, once, and said in the report. Our own modules run the families of `families.py`; everything
else goes through transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fastserve.checkpoint.folder import TEXT_TO_TEXT, ModelFolder
from fastserve.checkpoint.quantization import read_quantization
from fastserve.core.errors import CheckpointError, ConfigError
from fastserve.kernels import select
from fastserve.kernels.interface import KernelSpec
from fastserve.kernels.reference import Kernels
from fastserve.models.decoder import Decoder, DecoderConfig
from fastserve.models.families import FAMILIES, Family
from fastserve.models.model import ServingModel
from fastserve.models.parameters import LinearPart, ParameterLoader

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A network, the operations it was built for, one line per decision, and the linears that adapters may change; the
    model that guesses for it, if any."""

    model: ServingModel
    kernels: Kernels
    report: list[str]
    linears: dict[str, LinearPart] = field(default_factory=dict)
    draft: LoadedModel | None = None


def load_model(
    folder: ModelFolder,
    *,
    dtype: str = "auto",
    device: str = "auto",
    kernels: str = "auto",
    backend: str = "auto",
    quantization: str = "auto",
    block_size: int = 16,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a folder; the arguments are those of `EngineConfig`.

    Raises:
        CheckpointError: unknown architecture or quantisation, missing, unexpected or misshapen tensors.
        ConfigError: a backend, device or kernels were named that cannot be used here.
    """
    torch_dtype = resolve_dtype(folder, dtype)
    torch_device = resolve_device(device)
    if folder.task == TEXT_TO_TEXT:
        from fastserve.models.encoder_decoder_loader import load_encoder_decoder

        return LoadedModel(*load_encoder_decoder(folder, torch_dtype, torch_device, kernels, backend, block_size))
    family, config, reason = choose_native(folder, backend)
    report = [f"dtype: {str(torch_dtype).removeprefix('torch.')}, device: {torch_device}"]
    if family is None or config is None:
        if folder.config.get("quantization_config") or quantization != "auto":
            raise CheckpointError(
                f"only native architectures are served quantised, and {folder.path} is none ({reason}); give the "
                "folder of the unquantised model, and quantization=auto"
            )
        from fastserve.models import transformers_backend

        report.append(f"backend: transformers ({reason})")
        options = (torch_dtype, torch_device, kernels, block_size, trust_remote_code)
        other, chosen, lines = transformers_backend.load(folder, *options)
        return LoadedModel(other, chosen, [*report, *lines])
    report.append(f"backend: native ({reason})")
    heads = (config.num_heads, config.num_kv_heads, config.head_size)
    chosen, lines = select.select(kernels, KernelSpec(torch_device.type, torch_dtype, *heads, block_size))
    found = read_quantization(folder.config)
    if found is not None and any(item.is_dense for item in found.formats):
        report.append("quantised weights that no kernel has (8-bit floats, groups of 5 to 8 bits) are held as floats")
    model, linears = _load_native(folder, family, config, chosen, torch_dtype, torch_device, quantization == "int8")
    lines += [] if quantization == "auto" else [f"layers: {quantization}"]
    return LoadedModel(model, chosen, [*report, *lines], linears)


def resolve_dtype(folder: ModelFolder, name: str) -> torch.dtype:
    """The compute precision: as named, or what the folder was saved in, float32 when it does not say."""
    if name == "auto":
        name = str(folder.config.get("dtype") or folder.config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"the folder asks for dtype {name!r}; choose dtype={', dtype='.join(DTYPES)}")
    return DTYPES[name]


def resolve_device(name: str) -> torch.device:
    """The device; auto takes a GPU when there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={name}, but this machine or this build of PyTorch has no CUDA; use device=cpu")
    return torch.device(name)


def choose_native(folder: ModelFolder, backend: str) -> tuple[Family | None, DecoderConfig | None, str]:
    """The family and its config, or None twice when transformers is to run it; and why, for people.

    Raises:
        CheckpointError: the native modules were asked for and cannot run this folder.
    """
    if backend == "transformers":
        return None, None, "as asked"
    name = folder.architecture
    family = FAMILIES.get(name)
    reason = f"{name or 'an unnamed architecture'} has no native modules"
    if family is not None:
        try:
            return family, family.read_config(folder.config), name
        except CheckpointError as error:
            reason = str(error)
    if backend == "native":
        raise CheckpointError(
            f"backend=native cannot run {folder.path}: {reason}. Native architectures: {', '.join(FAMILIES)}. "
            "Use backend=auto or backend=transformers to let transformers run it"
        )
    return None, None, reason


def _load_native(
    folder: ModelFolder,
    family: Family,
    config: DecoderConfig,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
    to_int8: bool,
) -> tuple[Decoder, dict[str, LinearPart]]:
    reader = folder.weights
    family_names = family.names_of(folder.config)
    prefix = next((item for item in family.prefixes if reader.names_of(item + family_names["embedding"])), "")
    names = {role: name if role == "head" else prefix + name for role, name in family_names.items()}
    quantization = read_quantization(folder.config)
    parameters = ParameterLoader(reader, names, family.transposed, kernels, dtype, device, quantization, to_int8)
    ignored = family.ignored
    if config.tied_embeddings:
        ignored = (*ignored, rf"{names['head']}\.weight")
    try:
        model = Decoder(config, parameters)
        parameters.finish(ignored)
    finally:
        reader.close()
    # Under names without a prefix: folders of base models and of adapters may differ in it.
    return model, {name.removeprefix(prefix): part for name, part in parameters.linears.items()}
