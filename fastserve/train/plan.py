"""What a recipe will take: parameters, memory per process, time; computed, nothing is trained.

Weights, gradients and optimizer state are counted exactly; activations are estimated after Korthikanti et al. 2022,
"Reducing activation recomputation", section 4, time from 6 operations per weight and token (Kaplan et al. 2020) plus
attention's, at a stated share of the accelerator's peak.
"""

from __future__ import annotations

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

    from fastserve.train.network import NETWORK_CLASSES

    if accelerator not in ACCELERATORS:
        raise ConfigError(f"accelerator must be one of {', '.join(ACCELERATORS)}, not {accelerator!r}")
    with torch.device("meta"):
        network = getattr(transformers, NETWORK_CLASSES[recipe.objective.kind]).from_config(config)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    embeddings = network.get_input_embeddings().weight.numel()
    matrices = sum(parameter.numel() for parameter in network.parameters() if parameter.ndim == 2) - embeddings
    mesh, train = recipe.parallel, recipe.train
    own = parameters / (mesh.shard * mesh.tensor)
    states = (
        8 * own if recipe.optimizer.kind == "adamw" else (4 * matrices + 8 * (parameters - matrices)) / parameters * own
    )
    length = max(phase.length for phase in recipe.phases)
    activations = _activation_bytes(recipe, config, length)
    average = 4 * own if train.ema_decay else 0
    tokens = recipe.num_steps * train.batch_tokens
    flops = _flops_per_token(config, parameters, length)
    peak, memory = ACCELERATORS[accelerator]
    if accelerator == "cpu":
        import psutil

        peak, memory = measured_peak(torch.device("cpu"), torch.bfloat16), float(psutil.virtual_memory().total)
    speed = mesh.num_processes * peak * utilization / flops
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


def _activation_bytes(recipe: Recipe, config: Any, length: int) -> float:
    """Of one pass of one process: about 34 bytes per token, layer and hidden unit at 16 bits, the logits in float32."""
    train, ranks = recipe.train, recipe.parallel.data * recipe.parallel.shard
    tokens = min(train.micro_batch_tokens or train.batch_tokens, train.batch_tokens // ranks)
    width, layers = config.hidden_size, config.num_hidden_layers
    per_layer = 34 * width / recipe.parallel.tensor * (2 if train.precision == "float32" else 1)
    if train.gradient_checkpointing:
        layers_bytes = layers * 2 * width + per_layer
    else:
        layers_bytes = layers * per_layer
    return tokens * (layers_bytes + 2 * 4 * config.get_text_config().vocab_size)


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
