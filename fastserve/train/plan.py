"""What a recipe will take: parameters, memory per process, time; computed, nothing is trained.

Weights, gradients and optimizer state are counted exactly; activations are estimated after Korthikanti et al. 2022,
"Reducing activation recomputation", section 4, time from 6 operations per weight and token (Kaplan et al. 2020) plus
attention's, at a stated share of the accelerator's peak.
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fastserve.core.errors import ConfigError
from fastserve.train.settings import Recipe

if TYPE_CHECKING:
    import torch

# Dense bfloat16 operations per second and memory, from the makers' data sheets.
ACCELERATORS = {
    "h100": (989e12, 80e9),
    "h200": (989e12, 141e9),
    "a100": (312e12, 80e9),
    "l40s": (362e12, 48e9),
    "rtx4090": (165e12, 24e9),
    "cpu": (0.0, 0.0),  # measured here
}
DEFAULT_UTILIZATION = 0.4


@dataclass(frozen=True, slots=True)
class Plan:
    """Bytes are per process."""

    parameters: int
    processes: int
    steps: int
    tokens: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int
    activation_bytes: int
    total_bytes: int
    memory_bytes: int
    flops_per_token: float
    tokens_per_second: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(recipe: Recipe, config: Any, accelerator: str, utilization: float = DEFAULT_UTILIZATION) -> Plan:
    """The plan of a recipe whose network has the transformers configuration `config`."""
    import torch
    import transformers

    from fastserve.train.network import NETWORK_CLASSES, num_parameters

    if accelerator not in ACCELERATORS:
        raise ConfigError(f"accelerator must be one of {', '.join(ACCELERATORS)}, not {accelerator!r}")
    with torch.device("meta"):
        network = getattr(transformers, NETWORK_CLASSES[recipe.objective.kind]).from_config(config)
    parameters, mesh, train = num_parameters(network), recipe.parallel, recipe.train
    part = _heaviest_stage(network, mesh.pipeline)
    embeddings = getattr(part.get_input_embeddings(), "weight", None)
    matrices = sum(item.numel() for item in part.parameters() if item.ndim == 2 and item is not embeddings)
    own = num_parameters(part) / (mesh.shard * mesh.tensor)
    states = 8 * own if recipe.optimizer.kind == "adamw" else (8 - 4 * matrices / num_parameters(part)) * own
    length = max(phase.length for phase in recipe.phases)
    num_passes = math.ceil(recipe.share_rows(length) / recipe.pass_rows(length))
    activations = _activation_bytes(recipe, config, length, num_passes)
    average = 4 * own if train.ema_decay else 0
    tokens = recipe.num_steps * train.batch_tokens
    flops = _flops_per_token(config, parameters, length)
    peak, memory = ACCELERATORS[accelerator]
    if accelerator == "cpu":
        import psutil

        peak, memory = measured_peak(torch.device("cpu"), torch.bfloat16), float(psutil.virtual_memory().total)
    busy = num_passes / (num_passes + mesh.pipeline - 1)  # the rest of the time a stage waits for others
    speed = mesh.num_processes * peak * utilization * busy / flops
    if train.gradient_checkpointing:
        speed *= 3 / 4  # the forward pass is done twice
    return Plan(
        parameters=parameters,
        processes=mesh.num_processes,
        steps=recipe.num_steps,
        tokens=tokens,
        weight_bytes=int(4 * own),
        gradient_bytes=int(4 * own),
        optimizer_bytes=int(states),
        average_bytes=int(average),
        activation_bytes=int(activations),
        total_bytes=int(8 * own + states + average + activations),
        memory_bytes=int(memory),
        flops_per_token=flops,
        tokens_per_second=speed,
        seconds=tokens / speed,
    )


def _heaviest_stage(network: Any, num_stages: int) -> Any:
    from fastserve.train.network import num_parameters

    if num_stages == 1:
        return network
    from fastserve.train.pipeline import check_cut, cut

    check_cut(network.config, num_stages)
    stages = [copy.deepcopy(network) for _ in range(num_stages)]
    for index, stage in enumerate(stages):
        cut(stage, index, num_stages)
    return max(stages, key=num_parameters)


def _activation_bytes(recipe: Recipe, config: Any, length: int, num_passes: int) -> float:
    """Of one process: about 34 bytes per token, layer and hidden unit at 16 bits, the logits in float32.

    Of a pipeline's stages the first holds as many passes as there are stages, the last one and its logits; and each has
    room for the hidden states of all passes, and for their gradients.
    """
    train, num_stages = recipe.train, recipe.parallel.pipeline
    width, layers = config.hidden_size, math.ceil(config.num_hidden_layers / num_stages)
    per_layer = 34 * width / recipe.parallel.tensor * (2 if train.precision == "float32" else 1)
    held, again = (layers * 2 * width, per_layer) if train.gradient_checkpointing else (layers * per_layer, 0.0)
    first = min(num_stages, num_passes) * held
    last = held + 2 * 4 * config.get_text_config().vocab_size
    room = 2 * 4 * width * num_passes if num_stages > 1 else 0
    return recipe.pass_rows(length) * length * (max(first, last) + again + room)


def _flops_per_token(config: Any, parameters: int, length: int) -> float:
    return 6.0 * parameters + 12.0 * config.num_hidden_layers * config.hidden_size * length


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a matrix product on a device, as it is now."""
    import time

    import torch

    size = 512 if device.type == "cpu" else 8192
    matrix = torch.randn(size, size, device=device).to(dtype)
    float((matrix @ matrix)[0, 0])
    start = time.perf_counter()
    for _ in range(3):
        product = matrix @ matrix
    float(product[0, 0])  # waits for the device
    return 3 * 2 * size**3 / (time.perf_counter() - start)
