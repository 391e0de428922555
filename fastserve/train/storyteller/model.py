"""The network that is trained: transformers' own LlamaForCausalLM, and the loss of a batch.

Master weights are float32; the forward pass runs in bfloat16 by autocast. The loss is compiled (about 1.3 times faster
on a CPU), attention with it: at windows this short that beats the fused CPU attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastserve.train.storyteller.packing import IGNORED, Batch
from fastserve.train.storyteller.recipe import Model

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM


def make_model(shape: Model, vocab_size: int, special_ids: dict[str, int], seed: int) -> LlamaForCausalLM:
    """A new model with random weights; `special_ids` holds bos_token_id, eos_token_id and pad_token_id."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.hidden_size // shape.num_attention_heads,
        max_position_embeddings=shape.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        attn_implementation="eager",
        **special_ids,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def num_parameters(model: LlamaForCausalLM) -> int:
    """Tied weights count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def best_device() -> torch.device:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def batch_loss(model: LlamaForCausalLM, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats over the targets [B, L] that are not IGNORED."""
    import torch

    with torch.autocast(inputs.device.type, torch.bfloat16):
        logits = model(input_ids=inputs, use_cache=False).logits  # [B, L, V]
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def compiled_loss(model: LlamaForCausalLM, use_compiler: bool) -> Callable[[Batch], torch.Tensor]:
    """The loss of a batch of numpy windows on the model's device, compiled if asked."""
    import torch

    device = next(model.parameters()).device
    loss: Any = torch.compile(batch_loss, dynamic=False) if use_compiler else batch_loss

    def of_batch(batch: Batch) -> torch.Tensor:
        result: torch.Tensor = loss(
            model, torch.from_numpy(batch.inputs).to(device), torch.from_numpy(batch.targets).to(device)
        )
        return result

    return of_batch
