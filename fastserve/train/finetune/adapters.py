"""Low-rank additions (LoRA, DoRA, QLoRA) on a network, by peft, and the network with them merged."""

from __future__ import annotations

import copy
from typing import Any

from fastserve.core.errors import ConfigError
from fastserve.train.finetune.settings import FinetuneSettings

_HEADS = ("classifier", "qa_outputs", "score")


def add_adapters(network: Any, settings: FinetuneSettings) -> Any:
    """Additions to the chosen linear modules, with `qlora` on a base in 4 bits; new heads are tuned as a whole."""
    import peft

    heads = tuple(name for name in _HEADS if hasattr(network, name))
    if settings.qlora:
        from fastserve.train.finetune.four_bit import quantize_linears

        quantize_linears(network, heads)
        network.float()  # what stays dense: norms, embeddings, heads
    config = peft.LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,
        lora_dropout=settings.lora_dropout,
        target_modules=list(settings.lora_targets) or "all-linear",
        exclude_modules=list(heads) or None,
        modules_to_save=list(heads) or None,
        use_dora=settings.dora,
    )
    try:
        return peft.get_peft_model(network, config)
    except ValueError as error:
        raise ConfigError(f"lora_targets: {error}") from error


def merged(network: Any) -> Any:
    """A dense copy of the network with its additions merged."""
    from fastserve.train.finetune.four_bit import dense_again

    network = copy.deepcopy(network)
    dense_again(network)
    return network.merge_and_unload()
