"""The step "distill": train a student to say what a teacher says, on a text, by several losses at once.

Soft labels (Hinton et al. 2015), hidden states through learned projections (TinyBERT, Jiao et al. 2020) and relations
among the last layer's queries, keys and values (MiniLM v2, Wang et al. 2021). Both models are in memory. After pruning
it mends: zeros stay zeros. With `bits` the weights are rounded in every pass, and gradients go straight through. B
windows, L tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, mse_loss, softmax

from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.weights import WeightReader
from fastserve.compress.calibration import max_length, text_ids
from fastserve.compress.evaluate import task
from fastserve.compress.folder_writer import FolderWriter
from fastserve.compress.grid import WeightScheme, fit, nearest
from fastserve.compress.network import Network, find_blocks, load_dense
from fastserve.compress.recipe import Distill
from fastserve.core.errors import ConfigError

Progress = Callable[[str, int, int], None]
_Seen = dict[str, list[Tensor]]
_QUERIES, _KEYS, _VALUES = ("q_proj", "query", "q"), ("k_proj", "key", "k"), ("v_proj", "value", "v")
_CHECKPOINT_EVERY = 50
_WARMUP = 0.1
_MASKED = 0.05  # share of zeros from which on a matrix counts as pruned


def check(teacher: ModelFolder, step: Distill, text: str) -> None:
    """ConfigError for what cannot be done, before work starts."""
    if not Path(text).is_file():
        raise ConfigError(f"distill: text = {text!r} is no file; give a plain text file")
    if unknown := sorted(set(step.shape) - set(teacher.config)):
        raise ConfigError(f"distill: shape has {unknown[0]!r}, which the teacher's config.json does not have")
    num_layers = len(Network(ModelFolder.open(step.student) if step.student else teacher).blocks)
    if wrong := [layer for layer in step.layers if not 0 <= layer < num_layers]:
        raise ConfigError(f"distill: there is no layer {wrong[0]}; the student has {num_layers}, the first is 0")
    if step.student:
        sizes = [folder.config.get("vocab_size") for folder in (teacher, ModelFolder.open(step.student))]
        if sizes[0] != sizes[1]:
            raise ConfigError(
                f"distill: the student has {sizes[1]} tokens, the teacher {sizes[0]}; they must be the same"
            )


def run(
    teacher: ModelFolder, student: ModelFolder, step: Distill, text: Path, writer: FolderWriter, progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train and write the student; returns what changes in its config.json, and the losses for the card."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step.seed)
        model = new_student(student, step) if step.shape else load_dense(student)
        losses = train(load_dense(teacher), model, teacher, step, text, progress, writer.work)
    kept = student.weights.dtype(student.weights.names()[0])
    tied = set(model.all_tied_weights_keys)
    values = {name: item.detach().to(kept) for name, item in model.named_parameters() if name not in tied}
    if not writer.has("0000"):
        writer.write("0000", values)
    (writer.work / "kept-state.safetensors").unlink(missing_ok=True)
    return dict(step.shape), {"losses": losses}


def new_student(folder: ModelFolder, step: Distill) -> Any:
    """A network of the folder's architecture and the step's shape, with random weights."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder.path)
    for key, value in step.shape.items():
        setattr(config, key, value)
    if isinstance(getattr(config, "layer_types", None), list):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    config.use_cache = False
    return getattr(transformers, folder.architecture)(config)


def train(
    teacher: Any, student: Any, folder: ModelFolder, step: Distill, text: Path, progress: Progress, work: Path
) -> list[float]:
    """Train `student` in place; the mean loss of every tenth of the steps. Goes on from a checkpoint in `work`."""
    ids = text_ids(folder, text)
    length = min(step.length, max_length(folder))
    if len(ids) <= length:
        raise ConfigError(f"distill: the text has {len(ids)} tokens, fewer than a window of {length}")
    projections = _projections(teacher, student, step)
    parameters = [*student.parameters(), *projections.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=step.learning_rate, weight_decay=0.0)
    masks = _masks(student)
    state = work / "kept-state.safetensors"
    first, losses = _load(state, parameters, optimizer)
    teacher.requires_grad_(False)
    student.train().requires_grad_(True)
    _fake_quantize(student, step)
    with _watched(teacher, step) as theirs, _watched(student, step) as ours:
        for number in range(first, step.steps):
            progress("distill", number, step.steps)
            draw = torch.Generator().manual_seed(step.seed * 1_000_003 + number)
            starts = torch.randint(len(ids) - length, (step.batch_size,), generator=draw)
            windows = torch.stack([ids[start : start + length] for start in starts.tolist()])
            for group in optimizer.param_groups:
                group["lr"] = step.learning_rate * _schedule(number, step.steps)
            inputs, targets = task(folder, windows, seed=number)
            for values in (*theirs.values(), *ours.values()):
                values.clear()
            with torch.no_grad():
                wanted = teacher(**inputs).logits[targets >= 0]
            loss = step_loss(step, student(**inputs).logits[targets >= 0], wanted, targets[targets >= 0])
            loss = loss + _inner_loss(step, projections, theirs, ours)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            for parameter, mask in masks:
                parameter.data.mul_(mask)
            losses.append(float(loss.detach()))
            if (number + 1) % _CHECKPOINT_EVERY == 0 and number + 1 < step.steps:
                _save(state, parameters, optimizer, losses)
    progress("distill", step.steps, step.steps)
    _end_fake_quantize(student)
    tenth = max(1, step.steps // 10)
    return [sum(losses[at : at + tenth]) / len(losses[at : at + tenth]) for at in range(0, len(losses), tenth)]


def _schedule(number: int, total: int) -> float:
    """Up for a tenth, then down to a tenth, both in a line."""
    warm = max(1, round(_WARMUP * total))
    return (number + 1) / warm if number < warm else 1 - 0.9 * (number - warm) / max(1, total - warm)


def step_loss(step: Distill, found: Tensor, wanted: Tensor, targets: Tensor) -> Tensor:
    """The losses on logits [T, V]: of the student, of the teacher; targets [T]."""
    loss = found.new_zeros(())
    if step.soft:
        loss = loss + step.soft * soft_loss(found, wanted, step.temperature)
    if step.hard:
        loss = loss + step.hard * cross_entropy(found, targets)
    return loss


def _inner_loss(step: Distill, projections: nn.ModuleList, theirs: _Seen, ours: _Seen) -> Tensor:
    """The losses on what was seen inside."""
    loss = torch.zeros(())
    if step.hidden:
        loss = loss + step.hidden * _hidden_loss(theirs["hidden"], ours["hidden"], projections)
    if step.attention:
        for role in ("query", "key", "value"):
            loss = loss + step.attention * relation_loss(theirs[role][-1], ours[role][-1])
    return loss


def soft_loss(found: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """KL of the student's [T, V] from the teacher's probabilities at a temperature, times its square."""
    target = softmax(wanted / temperature, -1)
    return kl_div(log_softmax(found / temperature, -1), target, reduction="batchmean") * temperature**2


def relation_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """KL between how alike the places [B, L, D] of a sequence are to each other, in either model."""
    scores = [item.flatten(2).float() for item in (teacher, student)]
    relations = [item @ item.transpose(1, 2) / item.shape[-1] ** 0.5 for item in scores]
    return kl_div(
        log_softmax(relations[1], -1).flatten(0, 1), softmax(relations[0], -1).flatten(0, 1), reduction="batchmean"
    )


def _hidden_loss(teacher: list[Tensor], student: list[Tensor], projections: nn.ModuleList) -> Tensor:
    """Mean squared difference of every student's layer, projected, and the teacher's at the same height."""
    total = student[0].new_zeros(())
    for number, (values, projection) in enumerate(zip(student, projections, strict=True)):
        wanted = teacher[(number + 1) * len(teacher) // len(student) - 1]
        total = total + mse_loss(projection(values), wanted) / wanted.square().mean()
    return total / len(student)


def _projections(teacher: Any, student: Any, step: Distill) -> nn.ModuleList:
    if not step.hidden:
        return nn.ModuleList()
    sizes = [int(model.config.hidden_size) for model in (student, teacher)]
    layers = nn.ModuleList(nn.Linear(sizes[0], sizes[1], bias=False) for _ in find_blocks(student))
    for layer in layers:
        assert isinstance(layer, nn.Linear)
        nn.init.orthogonal_(layer.weight) if sizes[0] != sizes[1] else nn.init.eye_(layer.weight)
    return layers


@contextmanager
def _watched(model: Any, step: Distill) -> Iterator[_Seen]:
    """What the losses look at, as passes go by: outputs of blocks, and the last block's queries, keys and values."""
    seen: _Seen = {"hidden": [], "query": [], "key": [], "value": []}
    handles = []

    def keep(role: str) -> Callable[..., None]:
        return lambda _module, _args, output: seen[role].append(output[0] if isinstance(output, tuple) else output)

    blocks = find_blocks(model)
    if step.hidden:
        handles += [model.get_submodule(name).register_forward_hook(keep("hidden")) for name in blocks]
    if step.attention:
        for role, names in (("query", _QUERIES), ("key", _KEYS), ("value", _VALUES)):
            last = [
                module
                for name, module in model.get_submodule(blocks[-1]).named_modules()
                if name.split(".")[-1] in names
            ]
            if not last:
                raise ConfigError(f"distill: {blocks[-1]} has no {role} of its own; leave out attention")
            handles.append(last[0].register_forward_hook(keep(role)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class _Rounded(nn.Module):
    """Rounds a weight [N, K]; its gradient is that of the weight itself (Bengio et al. 2013)."""

    def __init__(self, scheme: WeightScheme) -> None:
        super().__init__()
        self._scheme = scheme

    def forward(self, weight: Tensor) -> Tensor:
        rounded = nearest(weight.detach(), fit(weight.detach(), self._scheme)).dequantize()
        return weight + (rounded - weight).detach()


def _fake_quantize(model: Any, step: Distill) -> None:
    if not step.bits:
        return
    for block in find_blocks(model):
        for name, linear in model.get_submodule(block).named_modules():
            if isinstance(linear, nn.Linear):
                if linear.in_features % (step.group_size or linear.in_features):
                    raise ConfigError(
                        f"distill: group_size = {step.group_size} does not divide the inputs of {block}.{name}"
                    )
                nn.utils.parametrize.register_parametrization(
                    linear, "weight", _Rounded(WeightScheme(step.bits, step.group_size))
                )


def _end_fake_quantize(model: Any) -> None:
    for module in list(model.modules()):
        if nn.utils.parametrize.is_parametrized(module, "weight"):
            nn.utils.parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)


def _masks(student: Any) -> list[tuple[Tensor, Tensor]]:
    """Matrices that were pruned, and where they are not zero."""
    found = []
    for module in student.modules():
        if isinstance(module, nn.Linear):
            mask = module.weight.data != 0
            if float(mask.float().mean()) < 1 - _MASKED:
                found.append((module.weight, mask))
    return found


def _save(file: Path, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, losses: list[float]) -> None:
    from safetensors.torch import save_file

    tensors = {f"{number}": item.data.contiguous() for number, item in enumerate(parameters)}
    for number, values in optimizer.state_dict()["state"].items():
        tensors |= {f"{number}.{key}": torch.as_tensor(value).contiguous() for key, value in values.items()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)
    temporary = file.with_suffix(".writing")
    save_file(tensors, temporary)
    os.replace(temporary, file)


def _load(file: Path, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> tuple[int, list[float]]:
    """(steps that are done, their losses); (0, []) without a checkpoint."""
    if not file.is_file():
        return 0, []
    reader = WeightReader([file])

    def read(name: str) -> Tensor:
        values = torch.empty(reader.shape(name), dtype=reader.dtype(name))
        reader.read_into(name, values)
        return values

    for number, item in enumerate(parameters):
        item.data = read(str(number))
    state: dict[int, dict[str, Tensor]] = {}
    for name in reader.names():
        owner, _, key = name.partition(".")
        if key:
            state.setdefault(int(owner), {})[key] = read(name)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    losses = read("losses").tolist()
    return len(losses), losses
