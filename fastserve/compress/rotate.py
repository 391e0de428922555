"""The step "rotate": turn the residual stream, so that no feature is much larger than others and rounding loses less.

Norms without weights do not see a rotation: their weights go into the matrices behind them, what reads the stream is
turned one way and what writes it the other, and so are each head's values. The network computes what it did (QuaRot,
Ashkboos et al. 2024, without its online rotations). An embedding that was tied to the head gets a head of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastserve.compress.folder_writer import FolderWriter
from fastserve.compress.network import Network
from fastserve.compress.prune import tensors_of
from fastserve.compress.quantize import Progress
from fastserve.compress.recipe import Rotate
from fastserve.core.errors import ConfigError

_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_READERS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
)
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def check(network: Network) -> None:
    """ConfigError for architectures whose stream is not read through norms alone, or in other places."""
    name = network.folder.architecture
    if name not in _ARCHITECTURES:
        raise ConfigError(f"{name} cannot be rotated; {', '.join(_ARCHITECTURES)} can")


def run(network: Network, step: Rotate, writer: FolderWriter, progress: Progress) -> dict[str, Any]:
    """Write the rotated tensors; returns what changes in config.json."""
    total, size = len(network.blocks), int(network.folder.config["hidden_size"])
    stream = orthogonal(size, step.seed)
    if not writer.has("0000"):
        writer.write("0000", _outside(network, stream))
    for number, name in enumerate(network.blocks, 1):
        progress("rotate", number - 1, total)
        if not writer.has(f"{number:04d}"):
            network.fill(name)
            block = network.block(name)
            heads = orthogonal(int(getattr(block.self_attn, "head_dim")), step.seed + 1)  # noqa: B009 - of any module
            rotate_block(block, stream, heads)
            writer.write(f"{number:04d}", tensors_of(network, name))
            network.drop(name)
    progress("rotate", total, total)
    return {"tie_word_embeddings": False}


def rotate_block(block: nn.Module, stream: Tensor, heads: Tensor) -> None:
    """Turn one block; stream [D, D] and heads [H, H] are orthogonal."""
    for norm_name, readers in _READERS:
        norm = block.get_submodule(norm_name)
        scales = norm.get_parameter("weight").data
        for name in readers:
            weight = block.get_submodule(name).get_parameter("weight")
            weight.data = ((weight.data * scales).double() @ stream).float()
        norm.get_parameter("weight").data = torch.ones_like(scales)
    for name in _WRITERS:
        for values in block.get_submodule(name).parameters(recurse=False):
            values.data = (stream.t() @ values.data.double()).float()
    size = len(heads)
    for values in block.get_submodule("self_attn.v_proj").parameters(recurse=False):
        by_head = values.data.double().view(-1, size, *values.shape[1:])
        values.data = torch.einsum("hd...,de->he...", by_head, heads).reshape(values.shape).float()
    output = block.get_submodule("self_attn.o_proj").get_parameter("weight")
    output.data = (output.data.double().view(len(output), -1, size) @ heads).view_as(output).float()


def orthogonal(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix [size, size], float64: Hadamard's with random signs where there is one."""
    draw = torch.Generator().manual_seed(seed)
    if size & (size - 1) == 0:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        signs = torch.randint(0, 2, (size, 1), generator=draw) * 2.0 - 1.0
        return matrix * signs / size**0.5
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=draw)).Q


def _outside(network: Network, stream: Tensor) -> dict[str, Tensor]:
    found = {network.tensor_name(name): network.read(name, None) for name in network.parameters_of("")}
    modules = {id(module): name for name, module in network.model.named_modules()}
    embedding = f"{modules[id(network.model.get_input_embeddings())]}.weight"
    head = f"{modules[id(network.model.get_output_embeddings())]}.weight"
    norm = "model.norm.weight"
    dtype = network.dtype_of(embedding)
    scales = network.read(norm).double()
    for name, values in (
        (network.tensor_name(embedding), network.read(embedding).double() @ stream),
        ("lm_head.weight", (network.read(embedding if head in network.tied else head).double() * scales) @ stream),
        (network.tensor_name(norm), torch.ones_like(scales)),
    ):
        found[name] = values.to(dtype)
    return found
