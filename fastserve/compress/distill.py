"""The step "distill": train a student to say what a teacher says, on a text or on what the student writes itself.

The losses are those of `losses.py`, the teacher (a folder, a server, what either said before) is `teacher.py`'s, and
what holds for the student's matrices meanwhile (zeros, low rank, rounding) is `constraints.py`'s. Without a soft loss
it is plain training. B windows, L tokens, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softmax

from fastserve.checkpoint.folder import ModelFolder
from fastserve.checkpoint.weights import WeightReader
from fastserve.compress.calibration import max_length, text_ids
from fastserve.compress.constraints import Masks, constrain, release
from fastserve.compress.evaluate import check_task, task
from fastserve.compress.folder_writer import FolderWriter, fingerprint
from fastserve.compress.losses import hidden_loss, relation_loss, soft_loss
from fastserve.compress.network import Network, find_blocks, layer_lists, load_dense
from fastserve.compress.recipe import Distill
from fastserve.compress.teacher import CachedTeacher, ServerTeacher, Teacher, Wanted, in_process, is_server
from fastserve.core.errors import ConfigError

Progress = Callable[[str, int, int], None]
_Seen = dict[str, list[Tensor]]
_QUERIES, _KEYS, _VALUES = ("q_proj", "query", "q"), ("k_proj", "key", "k"), ("v_proj", "value", "v")
_CHECKPOINT_EVERY = 50
_WARMUP = 0.1


def check(original: ModelFolder, step: Distill, text: str) -> None:
    """ConfigError for what cannot be done, before work starts; original: what the recipe began with."""
    if not Path(text).is_file():
        raise ConfigError(f"distill: text = {text!r} is no file; give a plain text file")
    check_task(original)
    teacher = ModelFolder.open(step.teacher) if step.teacher and not is_server(step.teacher) else original
    if is_server(step.teacher):
        ServerTeacher(step.teacher, step.top)
    is_decoder = not teacher.config.get("is_encoder_decoder") and not teacher.architecture.endswith("ForMaskedLM")
    if not is_decoder and (step.on_policy or is_server(step.teacher)):
        what = "on_policy" if step.on_policy else "a server as teacher"
        raise ConfigError(f"distill: {what} is for decoders; {teacher.architecture} is none")
    if unknown := sorted(set(step.shape) - set(teacher.config)):
        raise ConfigError(f"distill: shape has {unknown[0]!r}, which the teacher's config.json does not have")
    if step.layers and teacher.config.get("is_encoder_decoder"):
        raise ConfigError(
            "distill: layers are of decoders and encoders alone, not of networks that are both; give student or shape"
        )
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
    original: ModelFolder, student: ModelFolder, step: Distill, text: Path, writer: FolderWriter, progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train and write the student; returns what changes in its config.json, and the losses for the card."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(step.seed)
        model = new_student(student, step) if step.shape else load_dense(student)
        losses = train(original, model, step, text, progress, writer.work)
    kept = student.weights.dtype(student.weights.names()[0])
    left_out = {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
    saved = model.state_dict().keys() - left_out  # buffers, too, such as Marian's bias of the logits
    tensors = (*model.named_parameters(), *model.named_buffers())
    values = {name: item.detach().to(kept) for name, item in tensors if name in saved}
    if not writer.has("0000"):
        writer.write("0000", values)
    (writer.work / "kept-state.safetensors").unlink(missing_ok=True)
    lists = layer_lists(model.config, range(model.config.num_hidden_layers)) if step.shape else {}
    return {**step.shape, **lists}, {"losses": losses}


def new_student(folder: ModelFolder, step: Distill) -> Any:
    """A network of the folder's architecture and the step's shape, with random weights."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder.path)
    for key, value in step.shape.items():
        setattr(config, key, value)
    for key, items in layer_lists(config, range(config.num_hidden_layers)).items():
        setattr(config, key, items)
    config.use_cache = False
    return getattr(transformers, folder.architecture)(config)


def train(
    original: ModelFolder, student: Any, step: Distill, text: Path, progress: Progress, work: Path
) -> list[float]:
    """Train `student` in place; the mean loss of every tenth of the steps. Goes on from a checkpoint in `work`."""
    ids = text_ids(original, text)
    length = min(step.length, max_length(original))
    if len(ids) <= length:
        raise ConfigError(f"distill: the text has {len(ids)} tokens, fewer than a window of {length}")
    inside = _teacher_model(original, step) if step.hidden or step.attention else None
    teacher = _teacher(original, step, text, inside)
    projections = _projections(inside, student, step)
    masks = Masks(student, step)
    student.requires_grad_(True)
    trained = [*constrain(student, step), *projections.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=step.learning_rate, weight_decay=0.0)
    state = work / "kept-state.safetensors"
    first, losses = _load(state, trained, optimizer)
    student.train()
    with _watched(inside, step) as theirs, _watched(student, step) as ours:
        for number in range(first, step.steps):
            progress("distill", number, step.steps)
            for group in optimizer.param_groups:
                group["lr"] = step.learning_rate * _schedule(number, step.steps)
            inputs, targets, is_own = _step_inputs(original, student, step, ids, length, number)
            for values in (*theirs.values(), *ours.values()):
                values.clear()
            counts = targets >= 0
            wanted = teacher(number, inputs, counts)
            found = student(**inputs).logits[counts]
            loss = step_loss(step, found, wanted, targets[counts], is_own)
            loss = loss + _inner_loss(step, projections, theirs, ours)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            masks.apply(number)
            losses.append(float(loss.detach()))
            if (number + 1) % _CHECKPOINT_EVERY == 0 and number + 1 < step.steps:
                _save(state, trained, optimizer, losses)
    progress("distill", step.steps, step.steps)
    release(student)
    tenth = max(1, step.steps // 10)
    return [sum(losses[at : at + tenth]) / len(losses[at : at + tenth]) for at in range(0, len(losses), tenth)]


def _teacher_model(original: ModelFolder, step: Distill) -> Any:
    folder = ModelFolder.open(step.teacher) if step.teacher else original
    return load_dense(folder).requires_grad_(False)


def _teacher(original: ModelFolder, step: Distill, text: Path, inside: Any) -> Teacher:
    """What the recipe names; a plain training has none, but where its inside is looked at."""

    def make() -> Teacher:
        if is_server(step.teacher):
            return ServerTeacher(step.teacher, step.top)
        return in_process(inside or _teacher_model(original, step))

    if not step.soft and inside is None:
        return lambda _number, _inputs, _counts: Wanted(torch.empty(0))
    if not step.cache:
        return make()
    about = {name: getattr(step, name) for name in ("teacher", "batch_size", "length", "seed", "top")}
    about |= {"text": [str(text), text.stat().st_size], "original": fingerprint(original, {})}
    return CachedTeacher(Path(step.cache), about, step.top, make)


def _step_inputs(
    folder: ModelFolder, student: Any, step: Distill, ids: Tensor, length: int, number: int
) -> tuple[Mapping[str, Tensor], Tensor, bool]:
    """The forward's arguments, the token that belongs at each place (-1: none), and whether the student wrote them."""
    draw = torch.Generator().manual_seed(step.seed * 1_000_003 + number)
    starts = torch.randint(len(ids) - length, (step.batch_size,), generator=draw)
    windows = torch.stack([ids[start : start + length] for start in starts.tolist()])
    if not step.on_policy or float(torch.rand((), generator=draw)) >= step.on_policy:
        return *task(folder, windows, seed=number), False
    half = length // 2
    written = roll_out(student, windows[:, :half], length - half, draw)
    targets = torch.full_like(written, -1)
    targets[:, half - 1 : -1] = written[:, half:]
    return {"input_ids": written}, targets, True


def roll_out(student: Any, prompts: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Prompts [B, P] and `count` tokens that the student says after them, drawn at temperature 1: [B, P + count]."""
    ids, cache = prompts, None
    student.eval()
    with torch.no_grad():
        for _ in range(count):
            given = ids if cache is None else ids[:, -1:]
            output = student(input_ids=given, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            shares = softmax(output.logits[:, -1].float(), -1)
            ids = torch.cat([ids, torch.multinomial(shares, 1, generator=draw)], dim=1)
    student.train()
    return ids


def _schedule(number: int, total: int) -> float:
    """Up for a tenth, then down to a tenth, both in a line."""
    warm = max(1, round(_WARMUP * total))
    return (number + 1) / warm if number < warm else 1 - 0.9 * (number - warm) / max(1, total - warm)


def step_loss(step: Distill, found: Tensor, wanted: Wanted, targets: Tensor, is_own: bool = False) -> Tensor:
    """The losses on the student's logits [T, V]; targets [T]. What the student wrote itself is no example to follow."""
    loss = found.new_zeros(())
    if step.soft:
        loss = loss + step.soft * soft_loss(found, wanted, step.temperature, step.divergence)
    if step.hard and not is_own:
        loss = loss + step.hard * cross_entropy(found, targets)
    return loss


def _inner_loss(step: Distill, projections: nn.ModuleList, theirs: _Seen, ours: _Seen) -> Tensor:
    """The losses on what was seen inside."""
    loss = torch.zeros(())
    if step.hidden:
        loss = loss + step.hidden * hidden_loss(theirs["hidden"], ours["hidden"], projections)
    if step.attention:
        for role in ("query", "key", "value"):
            loss = loss + step.attention * relation_loss(theirs[role][-1], ours[role][-1])
    return loss


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

    blocks = find_blocks(model) if model is not None else []
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
