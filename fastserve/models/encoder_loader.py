"""From a model folder to an encoder ready to serve: the counterpart of `loader.py`, which is for what generates."""

from __future__ import annotations

from dataclasses import dataclass

from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.quantization import read_quantization
from fastserve.checkpoint.weights import WeightReader
from fastserve.core.errors import CheckpointError
from fastserve.kernels import select
from fastserve.kernels.interface import KernelSpec
from fastserve.kernels.reference import Kernels
from fastserve.models.encoder import Encoder, HeadConfig
from fastserve.models.families.encoders import ENCODERS, EncoderFamily, find_encoder
from fastserve.models.loader import resolve_device, resolve_dtype
from fastserve.models.parameters import ParameterLoader


@dataclass(frozen=True, slots=True)
class LoadedEncoder:
    """An encoder, the operations it was built for, and one line per decision."""

    model: Encoder
    kernels: Kernels
    report: list[str]


def load_encoder(
    folder: ModelFolder, *, dtype: str = "auto", device: str = "auto", kernels: str = "auto", quantization: str = "auto"
) -> LoadedEncoder:
    """Load a folder. Arguments are those of `EngineConfig`.

    Raises:
        CheckpointError: unknown architecture, missing, unexpected or misshapen tensors.
        ConfigError: a device or kernels were named that cannot be used here.
    """
    found = find_encoder(folder.architecture)
    if found is None:
        raise CheckpointError(
            f"{folder.path} is a {folder.architecture or 'network without a name'}, which is no encoder that is known "
            f"here; families: {', '.join(ENCODERS)}"
        )
    family, suffix = found
    config = family.read_config(folder.config)
    head = family.head(suffix, folder.config, config)
    torch_dtype, torch_device = resolve_dtype(folder, dtype), resolve_device(device)
    spec = KernelSpec(torch_device.type, torch_dtype, config.num_heads, config.num_heads, config.head_size, 1)
    chosen, lines = select.select(kernels, spec)
    reader, names, ignored = _tensors(folder, family, suffix, head)
    parameters = ParameterLoader(
        reader,
        names,
        frozenset(),
        chosen,
        torch_dtype,
        torch_device,
        read_quantization(folder.config),
        to_int8=quantization == "int8",
    )
    try:
        model = Encoder(config, parameters, head)
        parameters.finish(ignored)
    finally:
        reader.close()
    report = [f"dtype: {str(torch_dtype).removeprefix('torch.')}, device: {torch_device}", *lines]
    if quantization != "auto":
        report.append(f"layers: {quantization}")
    return LoadedEncoder(model, chosen, report)


def _tensors(
    folder: ModelFolder, family: EncoderFamily, suffix: str, head: HeadConfig | None
) -> tuple[WeightReader, dict[str, str], tuple[str, ...]]:
    """The folder's tensors, role -> module name, and patterns of names that are left over."""
    reader = folder.weights
    prefix = family.prefix if reader.names_of(family.prefix + family.names["embedding"]) else ""
    names = {role: prefix + name for role, name in family.names.items()}
    ignored = family.ignored
    if head is None:  # of a folder with a head, the encoder alone is wanted
        ignored = (*ignored, rf"(?!{prefix}).*") if prefix else (*ignored, r"cls\..*", r"lm_head\..*")
    else:
        given = family.heads[suffix]
        roles = {"head_output": given.output, "head_dense": given.dense, "head_norm": given.norm}
        names |= {role: prefix + name[1:] if name.startswith(".") else name for role, name in roles.items()}
    return reader, names, ignored
