from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastserve.core.errors import CheckpointError, ConfigError, FastServeError
from fastserve.train.checkpoints import latest_checkpoint
from fastserve.train.pretrain import PretrainTask, pretrain
from tests.unit.train.conftest import LLAMA, log_of, losses_of, make_recipe

BERT = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64
)
# Longer than the validation split.
LONG_ROWS = {
    "data": {"length": 2048},
    "train": {"batch_tokens": 2048},
    "model": {"config": {**LLAMA, "max_position_embeddings": 2048}},
}
KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("bpe", LLAMA, "causal"),
    "qwen3": ("bpe", {**LLAMA, "head_dim": 8}, "causal"),
    "gpt2": ("bpe", dict(n_embd=32, n_layer=2, n_head=2, n_positions=64), "causal"),
    "bert": ("wordpiece", BERT, "masked"),
    "roberta": ("wordpiece", BERT, "masked"),
    "albert": ("unigram", {**BERT, "embedding_size": 16}, "sentence-order"),
    "t5": ("unigram", dict(d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16), "span-corruption"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_objective_learns_and_exports_a_folder_that_opens(
    kind: str, corpora: dict[str, Path], tmp_path: Path
) -> None:
    import torch
    import transformers

    tokenizer, config, objective = KINDS[kind]
    recipe = make_recipe(
        corpora[tokenizer],
        model={"type": kind, "config": config},
        objective={"kind": objective},
        train={"steps": 40, "checkpoint_every": 40, "evaluate_every": 40},
        optimizer={"learning_rate": 1e-2},
    )
    measured = pretrain(recipe, tmp_path / "run")
    assert pretrain(recipe, tmp_path / "run") == measured, "a finished run has nothing more to do"
    losses = losses_of(tmp_path / "run")
    assert measured["held_out_loss"] < losses[1] - 0.5 and losses[40] < losses[1] - 0.5
    folder = tmp_path / "run" / "model"
    written = json.loads((folder / "config.json").read_text())["architectures"][0]
    network = getattr(transformers, written).from_pretrained(folder)
    opened = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(opened) <= network.config.vocab_size
    assert all(torch.isfinite(parameter).all() for parameter in network.parameters())
    card = json.loads((folder / "fastserve.json").read_text())
    assert card["step"] == 40 and card["measured"] == measured and card["recipe"]["model"]["type"] == kind
    assert "<svg" in (folder / "training.svg").read_text()


def test_stopping_and_resuming_changes_no_bit(
    corpora: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, averages, Muon and accumulation, the losses and the exported weights are the same bits."""
    import signal

    from safetensors.torch import load_file

    recipe = make_recipe(
        corpora["bpe"],
        model={"type": "gpt2", "config": dict(n_embd=32, n_layer=2, n_head=2, n_positions=64)},
        optimizer={"kind": "muon", "schedule": "wsd", "decay_steps": 3},
        train={"ema_decay": 0.9, "micro_batch_tokens": 64, "steps": 10, "evaluate_every": 10},
    )
    pretrain(recipe, tmp_path / "whole")
    batches = PretrainTask.micro_batches

    def interrupted(self: PretrainTask, step: int, rank: int, num_ranks: int) -> Any:
        if step == 5:
            signal.raise_signal(signal.SIGINT)
        return batches(self, step, rank, num_ranks)

    monkeypatch.setattr(PretrainTask, "micro_batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, tmp_path / "stopped")
    monkeypatch.undo()
    assert max(losses_of(tmp_path / "stopped")) == 6
    pretrain(recipe, tmp_path / "stopped")
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "stopped"))
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_an_evaluation_that_fails_does_not_cost_the_checkpoint(
    corpora: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: PretrainTask, trainer: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(PretrainTask, "evaluate", fail)
    with pytest.raises(MemoryError):
        pretrain(make_recipe(corpora["bpe"], train={"evaluate_every": 4}), tmp_path / "run")
    found = latest_checkpoint(tmp_path / "run" / "checkpoints")
    assert found is not None and found.name == "step-00000004"


def test_accumulation_changes_nothing_but_rounding(corpora: dict[str, Path], tmp_path: Path) -> None:
    for name, size in (("whole", 0), ("parts", 64)):
        pretrain(make_recipe(corpora["bpe"], train={"micro_batch_tokens": size}), tmp_path / name)
    whole, parts = losses_of(tmp_path / "whole"), losses_of(tmp_path / "parts")
    assert all(math.isclose(whole[step], parts[step], rel_tol=1e-5) for step in whole)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_documents_of_a_row_do_not_see_each_other(corpora: dict[str, Path], attention: str) -> None:
    """The logits of a packed document equal those of the document alone, for causal and masked networks."""
    import torch

    from fastserve.train.network import make_network
    from fastserve.train.pretrain import RunParts

    for kind in ("llama", "gpt2", "bert", "roberta"):
        tokenizer, config, objective_kind = KINDS[kind]
        recipe = make_recipe(
            corpora[tokenizer],
            model={"type": kind, "config": config, "attention": attention},
            data={"length": 60},
            train={"batch_tokens": 240},
            objective={"kind": objective_kind},
        )
        parts = RunParts(recipe)
        network = make_network(recipe.model, parts.config, objective_kind, 0).eval()
        [batch] = PretrainTask(recipe, parts, Path()).micro_batches(0, 0, 1)
        tensors = {name: torch.from_numpy(values) for name, values in batch.items() if name != "labels"}
        is_start = tensors["position_ids"] == tensors["position_ids"].min()
        row = int(is_start.sum(1).argmax())
        starts = is_start[row].nonzero().flatten().tolist()
        assert len(starts) > 1
        seen: list[torch.Tensor] = []
        network.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output.logits))
        with torch.no_grad():
            parts.objectives[0].loss(network, {**tensors, "labels": torch.from_numpy(batch["labels"])})
            for start, end in zip(starts, [*starts[1:], is_start.shape[1]], strict=True):
                alone = network(
                    input_ids=tensors["input_ids"][row : row + 1, start:end],
                    position_ids=tensors["position_ids"][row : row + 1, start:end],
                ).logits
                assert torch.allclose(seen[0][row, start:end], alone[0], atol=1e-5)


def test_divergence_goes_back_and_leaves_the_rows_out(
    corpora: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = PretrainTask.loss
    asked: list[int] = []
    batches = PretrainTask.micro_batches

    def remembered(self: PretrainTask, step: int, rank: int, num_ranks: int) -> Any:
        asked.append(step)
        return batches(self, step, rank, num_ranks)

    monkeypatch.setattr(PretrainTask, "micro_batches", remembered)
    monkeypatch.setattr(PretrainTask, "loss", lambda *args: loss(*args) * (math.nan if asked[-1] == 6 else 1.0))
    pretrain(make_recipe(corpora["bpe"]), tmp_path / "run")
    assert asked == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    [line] = [line for line in log_of(tmp_path / "run") if "rollback_to" in line]
    assert (line["step"], line["rollback_to"]) == (6, 4)
    assert max(losses_of(tmp_path / "run")) == 8

    monkeypatch.setattr(PretrainTask, "loss", lambda *args: loss(*args) * math.nan)
    with pytest.raises(FastServeError, match=r"diverged 6 times.*learning_rate"):
        pretrain(make_recipe(corpora["bpe"]), tmp_path / "lost")


def test_going_on_from_a_folder(corpora: dict[str, Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    first = pretrain(make_recipe(corpora["bpe"], train={"steps": 30, "checkpoint_every": 30}), tmp_path / "first")
    recipe = make_recipe(corpora["bpe"])
    values = {**recipe.as_dict(), "model": {"folder": str(tmp_path / "first" / "model"), "dtype": "float32"}}
    from fastserve.train.recipe import build_section
    from fastserve.train.settings import Recipe

    values["optimizer"]["learning_rate"] = 1e-5
    values = json.loads(json.dumps(values))
    second = pretrain(build_section(Recipe, values, ""), tmp_path / "second")
    assert abs(second["held_out_loss"] - first["held_out_loss"]) < 0.05

    weights = tmp_path / "first" / "model" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(CheckpointError, match="pickled weights"):
        pretrain(build_section(Recipe, values, ""), tmp_path / "third")


def test_phases_and_mixtures(corpora: dict[str, Path], tmp_path: Path) -> None:
    both = {"sources": {"a": str(corpora["bpe"]), "b": str(corpora["bpe"])}}
    phases = [{"steps": 3, "length": 32, "mixture": {"a": 3, "b": 1}}, {"steps": 2, "length": 64}]
    recipe = make_recipe(corpora["bpe"], data={**both, "phases": phases}, train={"steps": 0})
    measured = pretrain(recipe, tmp_path / "run")
    assert max(losses_of(tmp_path / "run")) == 5 and measured["held_out_loss_a"] == measured["held_out_loss_b"]


def test_many_sources_keep_their_shares_however_rows_are_asked_for() -> None:
    """No source loses a row as the run goes on, and a row is the same whichever process asks for it."""
    from fastserve.train.rows import MixedRows, Row

    class Source:
        per_epoch = 10

        def row(self, number: int) -> Row:
            return Row(*(np.zeros(1, np.int64) for _ in range(3)))

    shares = [0.31, 0.07, 0.22, 0.2, 0.15, 0.05]
    mixed = MixedRows([Source() for _ in shares], [7 * share for share in shares])
    whole = [row.key for row in mixed.rows(0, 1000)]
    assert len(set(whole)) == 1000
    for size in (1, 3, 8):
        parts, counts = [], np.zeros(len(shares))
        for first in range(0, 1000 - size, size):
            parts.append([row.key for row in mixed.rows(first, size)])
            assert len(parts[-1]) == size
            counts += np.bincount([source for source, _ in parts[-1]], minlength=len(shares))
            assert np.abs(counts - (first + size) * np.array(shares)).max() < 2
        assert set().union(*parts) == {row.key for row in mixed.rows(0, size * len(parts))}


def test_checkpoints_are_pruned_and_models_too(corpora: dict[str, Path], tmp_path: Path) -> None:
    pretrain(
        make_recipe(corpora["bpe"], train={"checkpoint_every": 1, "evaluate_every": 2, "keep_checkpoints": 2}),
        tmp_path / "run",
    )
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000007",
        "step-00000008",
    ]
    assert sorted(path.name for path in (tmp_path / "run" / "models").iterdir()) == ["step-00000006", "step-00000008"]
    assert (tmp_path / "run" / "model").resolve().name == "step-00000008"


def test_bfloat16_compile_and_gradient_checkpointing_learn_the_same(corpora: dict[str, Path], tmp_path: Path) -> None:
    pretrain(make_recipe(corpora["bpe"]), tmp_path / "plain")
    options = {"precision": "bfloat16", "gradient_checkpointing": True}
    pretrain(make_recipe(corpora["bpe"], train=options), tmp_path / "other")
    plain, other = losses_of(tmp_path / "plain"), losses_of(tmp_path / "other")
    assert all(math.isclose(plain[step], other[step], rel_tol=0.02) for step in plain)


def test_float16_scales_its_loss_and_does_an_overflowing_step_again(corpora: dict[str, Path], tmp_path: Path) -> None:
    """The first scale overflows; the same losses follow as in float32, and a resumed run keeps the scale."""
    from safetensors import safe_open

    from fastserve.train.checkpoints import whole_checkpoints

    pretrain(make_recipe(corpora["bpe"]), tmp_path / "plain")
    half = make_recipe(corpora["bpe"], train={"precision": "float16"})
    pretrain(half, tmp_path / "half")
    plain, found = losses_of(tmp_path / "plain"), losses_of(tmp_path / "half")
    assert all(math.isclose(plain[step], found[step], rel_tol=0.02) for step in plain)
    assert not any("rollback_to" in line for line in log_of(tmp_path / "half"))
    newest = whole_checkpoints(tmp_path / "half" / "checkpoints")
    with safe_open(next(newest[-1].glob("*.safetensors")), "pt") as file:
        scale, steps = file.get_tensor("loss_scale").tolist()
    assert steps == 8 and 1 <= scale <= 2**16

    shutil.rmtree(newest[-1])
    (tmp_path / "half" / "log.jsonl").unlink()
    pretrain(half, tmp_path / "half")
    assert losses_of(tmp_path / "half") == {step: found[step] for step in range(5, 9)}


def test_the_loss_scale() -> None:
    from fastserve.train.loss_scale import LossScale

    scale = LossScale(True)
    shrunk = [scale.value for _ in iter(scale.shrink, False)]
    assert shrunk == [2.0**power for power in range(15, -1, -1)]
    for _ in range(2000):
        scale.grow()
    assert scale.value == 2 and LossScale(False).tensors() == {} and not LossScale(False).shrink()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_first_step_is_that_of_a_new_optimizer(kind: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastserve.train.optimizers import make_optimizers, make_states
    from fastserve.train.settings import OptimizerSection

    found = []
    for are_made in (True, False):
        torch.manual_seed(0)
        network = LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=50))
        optimizers = make_optimizers(network, OptimizerSection(kind=kind))
        if are_made:
            make_states(optimizers)
        tokens = torch.arange(40).reshape(2, 20)
        network(tokens, labels=tokens).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        found.append(torch.cat([parameter.detach().flatten() for parameter in network.parameters()]))
    assert torch.equal(*found)


def test_samples_and_tensorboard(corpora: dict[str, Path], tmp_path: Path) -> None:
    watch = {"tensorboard": True, "samples": ["The fox"], "sample_tokens": 4}
    measured = pretrain(make_recipe(corpora["bpe"], watch=watch, train={"steps": 2}), tmp_path / "run")
    assert set(measured["samples"]) == {"The fox"}
    assert list((tmp_path / "run" / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"train": {"step": 3}}, r"section \[train\]: unknown key 'step'; known keys are .*steps"),
        ({"model": {"config": {"hiden_size": 3}}}, "unknown key 'hiden_size'.*hidden_size"),
        ({"model": {"type": "lama"}}, "knows no 'lama'"),
        ({"model": {"attention": "foo"}}, "model.attention: must be one of eager.*sdpa"),
        ({"model": {"config": {**LLAMA, "num_attention_heads": 5}}}, "model.config"),
        ({"model": {"config": {**LLAMA, "vocab_size": 100}}}, "has 100 tokens, the tokenizer 320"),
        ({"model": {"folder": "/x"}}, "either type"),
        ({"data": {"length": 256}}, "exceed the 128 positions.*data.length"),
        ({"data": {"length": 0}}, "data.length: must be at least 1"),
        (LONG_ROWS, "held-out text of 'tales'.*too few tokens for one row of 2048.*--validation-share"),
        ({"data": {"sources": {}}}, "at least one folder"),
        ({"data": {"sources": {"a": "/none"}}}, "holds no token shards.*data prepare"),
        ({"data": {"mixture": {"b": 1}}}, "names 'b'"),
        ({"objective": {"kind": "masked"}}, "type 'llama' cannot learn the objective 'masked'"),
        ({"objective": {"kind": "masked"}, "model": {"type": "bert", "config": BERT}}, "no mask_token.*wordpiece"),
        ({"objective": {"kind": "span"}}, "must be one of causal"),
        ({"train": {"batch_tokens": 100}}, "must be a multiple of the row length 32"),
        ({"train": {"precision": "int8"}}, "train.precision"),
        ({"watch": {"report_every": 0}}, "watch.report_every: must be at least 1"),
        ({"parallel": {"data": 3}}, "must be a multiple of the row length 32 times the 3"),
        ({"parallel": {"shard": 2}}, "give --nproc 2"),
        ({"parallel": {"data": 2, "tensor": 2}}, "combine tensor with shard"),
        ({"optimizer": {"schedule": "wsd"}}, "decay_steps"),
    ],
)
def test_a_bad_recipe_stops_before_the_first_step(
    corpora: dict[str, Path], tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pretrain(make_recipe(corpora["bpe"], **sections), tmp_path / "run")
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_inputs_are_as_long_as_the_positions_behind_the_padding() -> None:
    import transformers

    from fastserve.train.network import num_positions

    for config, room in (
        (transformers.RobertaConfig(max_position_embeddings=514, pad_token_id=1), 512),
        (transformers.BertConfig(max_position_embeddings=512), 512),
        (transformers.GPT2Config(n_positions=64), 64),
        (transformers.T5Config(), None),
    ):
        assert num_positions(config) == room


def test_tokenizers_must_agree(corpora: dict[str, Path], tmp_path: Path) -> None:
    sources = {"a": str(corpora["bpe"]), "b": str(corpora["wordpiece"])}
    with pytest.raises(ConfigError, match="different tokenizers"):
        pretrain(make_recipe(corpora["bpe"], data={"sources": sources}), tmp_path / "run")


def test_a_run_folder_is_one_run(corpora: dict[str, Path], tmp_path: Path) -> None:
    pretrain(make_recipe(corpora["bpe"], train={"steps": 1}), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"another \[seed\]"):
        pretrain(make_recipe(corpora["bpe"], seed=5), tmp_path / "run")
    for sections, message in (
        ({"optimizer": {"kind": "muon"}}, "optimizer.kind was another"),
        ({"train": {"ema_decay": 0.9}}, "train.ema_decay was another"),
        ({"train": {"precision": "float16"}}, "train.precision was another"),
    ):
        with pytest.raises(ConfigError, match=message):
            pretrain(make_recipe(corpora["bpe"], **sections), tmp_path / "run")
    with pytest.raises(ConfigError, match="not empty"):
        pretrain(make_recipe(corpora["bpe"]), tmp_path)


def test_the_folder_is_served_as_it_is(corpora: dict[str, Path], tmp_path: Path) -> None:
    """The engine's greedy tokens are those that transformers gives for the exported folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastserve import LLM, SamplingParams

    pretrain(make_recipe(corpora["bpe"], train={"steps": 20}), tmp_path / "run")
    folder = tmp_path / "run" / "model"
    [output] = LLM(str(folder), dtype="float32", kernels="reference").generate(
        ["The fox"], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer("The fox", return_tensors="pt")
    tokens = network.generate(**ids, do_sample=False, max_new_tokens=8, min_new_tokens=8)
    assert list(output.outputs[0].token_ids) == tokens[0, ids["input_ids"].shape[1] :].tolist()
