"""From a model folder to an encoder-decoder ready to serve; `loader.load_model` calls this for the families of
`families/encoder_decoders.py`."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.quantization import read_quantization
from fastserve.checkpoint.weights import WeightReader
from fastserve.core.errors import CheckpointError, ConfigError
from fastserve.kernels import select
from fastserve.kernels.interface import KernelSpec
from fastserve.kernels.reference import Kernels
from fastserve.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from fastserve.models.families.encoder_decoders import ENCODER_DECODERS, EncoderDecoderFamily
from fastserve.models.parameters import ParameterLoader


def load_encoder_decoder(
    folder: ModelFolder,
    dtype: torch.dtype,
    device: torch.device,
    kernels: str,
    backend: str,
    block_size: int,
    to_int8: bool = False,
) -> tuple[EncoderDecoder, Kernels, list[str]]:
    """The network, the operations it was built for, and one line per decision.

    Raises:
        CheckpointError: unknown architecture, missing, unexpected or misshapen tensors.
        ConfigError: a backend or kernels were named that cannot be used here.
    """
    family = ENCODER_DECODERS.get(folder.architecture)
    if family is None:
        raise CheckpointError(
            f"{folder.path} is a {folder.architecture or 'network without a name'}, an encoder-decoder that is not "
            f"known here; known: {', '.join(ENCODER_DECODERS)}"
        )
    if backend == "transformers":
        raise ConfigError("encoder-decoders run on our own modules; leave out backend=transformers")
    config = family.read_config(folder.config)
    stack = config.decoder
    spec = KernelSpec(device.type, dtype, stack.num_heads, stack.num_heads, stack.head_size, block_size)
    chosen, lines = select.select(kernels, spec)
    reader = folder.weights
    report = [
        f"dtype: {str(dtype).removeprefix('torch.')}, device: {device}",
        f"backend: native ({folder.architecture})",
    ]
    try:
        return _load(folder, reader, family, config, chosen, dtype, device, to_int8), chosen, [*report, *lines]
    finally:
        reader.close()


def _load(
    folder: ModelFolder,
    reader: WeightReader,
    family: EncoderDecoderFamily,
    config: EncoderDecoderConfig,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
    to_int8: bool,
) -> EncoderDecoder:
    """Which embedding is whose is told by what the folder has: tied ones are stored once, under any of their names."""
    sides = {
        side: {role: family.prefix + name for role, name in family.names(side, folder.config).items()}
        for side in ("encoder", "decoder")
    }
    for side, names in sides.items():
        candidates = [f"{family.prefix}{side}.embed_tokens", f"{family.prefix}shared"]
        candidates += ["lm_head"] if side == "decoder" else [f"{family.prefix}decoder.embed_tokens", "lm_head"]
        names["embedding"] = next((name for name in candidates if reader.names_of(name)), candidates[1])
    sides["decoder"] |= {"head": "lm_head", "logit_bias": "final_logits_bias"}
    config = replace(
        config,
        is_shared=sides["encoder"]["embedding"] == sides["decoder"]["embedding"],
        is_tied=not reader.names_of("lm_head") or sides["decoder"]["embedding"] == "lm_head",
        has_logit_bias="final_logits_bias" in reader,
    )
    quantization = read_quantization(folder.config)
    encoder = ParameterLoader(reader, sides["encoder"], frozenset(), kernels, dtype, device, quantization, to_int8)
    decoder = encoder.with_names(sides["decoder"])
    model = EncoderDecoder(config, encoder, decoder)
    encoder.finish(family.ignored)
    return model
