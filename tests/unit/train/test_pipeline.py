"""Stages of a network: cut and put together again, on two processes as on one, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastserve.core.errors import ConfigError
from fastserve.train.checkpoints import whole_checkpoints
from fastserve.train.plan import plan
from fastserve.train.pretrain import check, plan_config, pretrain
from tests.conftest import REPOSITORY
from tests.unit.train.conftest import LLAMA, log_of, losses_of, make_recipe, recipe_values
from tests.unit.train.test_parallel import write_toml
from tests.unit.train.test_pretrain import BERT

SMALL = dict(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=40,
)
NEOX = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
STILL = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
LAYERS = {**LLAMA, "num_hidden_layers": 3}
TRAIN = {"steps": 10, "evaluate_every": 10, "checkpoint_every": 5}
# Of the 8 rows of a step: three passes, the last of which is short.
SECTIONS: dict[str, dict[str, Any]] = {
    "tied": {
        "model": {"config": {**LAYERS, "tie_word_embeddings": True}},
        "optimizer": {"clip_norm": 0.3},
        "train": {**TRAIN, "micro_batch_tokens": 96, "ema_decay": 0.9},
    },
    "masked": {
        "model": {"type": "bert", "config": {**BERT, **STILL, "num_hidden_layers": 3}},
        "objective": {"kind": "masked"},
        "train": {**TRAIN, "micro_batch_tokens": 96},
    },
    "muon": {
        "model": {
            "type": "gpt2",
            "config": dict(n_embd=32, n_layer=2, n_head=2, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0),
        },
        "optimizer": {"kind": "muon"},
        "train": {**TRAIN, "micro_batch_tokens": 256},
    },
    "bfloat16": {
        "model": {"config": LAYERS},
        "train": {**TRAIN, "precision": "bfloat16", "gradient_checkpointing": True},
    },
}
TOLERANCE = {"bfloat16": 0.02}

# One process of several, which makes one run after another; the loss of a step of "lost" is no number.
_RUNS = """
import math, os, sys
from pathlib import Path
from fastserve.train import pipeline
from fastserve.train.pretrain import pretrain
from fastserve.train.settings import read_recipe
root, *runs = sys.argv[1:]
loss, calls = pipeline.label_loss, []
def lost(*arguments):
    calls.append(1)
    return loss(*arguments) * (math.nan if len(calls) == 15 else 1)
for run in runs:
    name, os.environ["MASTER_PORT"] = run.split(":")
    pipeline.label_loss = lost if name == "lost" else loss
    pretrain(read_recipe(Path(root) / f"{name}.toml"), Path(root) / name)
"""


def run_all(root: Path, names: list[str], num_processes: int) -> None:
    """Make the runs of the recipes ROOT/NAME.toml in ROOT/NAME, all by the same processes."""
    ports = []
    with contextlib.ExitStack() as stack:
        for _ in names:
            server = stack.enter_context(socket.socket())
            server.bind(("127.0.0.1", 0))
            ports.append(server.getsockname()[1])
    runs = [f"{name}:{port}" for name, port in zip(names, ports, strict=True)]
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "MASTER_ADDR": "127.0.0.1"}
    logs = [root / f"process-{rank}.txt" for rank in range(num_processes)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _RUNS, str(root), *runs],
            cwd=REPOSITORY,
            env={**os.environ, **fixed, "WORLD_SIZE": str(num_processes), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=log.open("w"),
        )
        for rank, log in enumerate(logs)
    ]
    codes = [process.wait(timeout=600) for process in processes]
    assert not any(codes), "\n".join(log.read_text() for log in logs)


@pytest.fixture(scope="module")
def runs(corpora: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two stages, and of one process in `alone-NAME`; `taken-up` goes on from the middle of `alone-tied`."""
    root = tmp_path_factory.mktemp("pipelines")
    for name, sections in SECTIONS.items():
        corpus = corpora["wordpiece" if name == "masked" else "bpe"]
        write_toml(root / f"{name}.toml", recipe_values(corpus, **sections, parallel={"pipeline": 2}))
        pretrain(make_recipe(corpus, **sections), root / f"alone-{name}")
    shutil.copyfile(root / "tied.toml", root / "taken-up.toml")
    shutil.copytree(root / "alone-tied", root / "taken-up", symlinks=True)
    shutil.rmtree(root / "taken-up" / "checkpoints" / "step-00000010")
    shutil.copyfile(root / "tied.toml", root / "lost.toml")
    run_all(root, [*SECTIONS, "taken-up", "lost"], 2)
    return root


def held_out_loss(run: Path) -> float:
    return float(json.loads((run / "model" / "fastserve.json").read_text())["measured"]["held_out_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("name", SECTIONS)
def test_two_stages_agree_with_one_process(runs: Path, name: str) -> None:
    """Losses, gradient norms, held-out loss and weights (averages where there are any)."""
    import torch
    from safetensors.torch import load_file

    alone, tolerance = runs / f"alone-{name}", TOLERANCE.get(name, 1e-4)
    for one, two in zip(log_of(alone), log_of(runs / name), strict=True):
        for key in set(one) & {"loss", "gradient_norm", "tokens", "held_out_loss"}:
            allowed = tolerance * (10 if key == "gradient_norm" else 1)
            assert math.isclose(one[key], two[key], rel_tol=allowed), (key, one, two)
    one, two = (load_file(run / "model" / "model.safetensors") for run in (alone, runs / name))
    assert one.keys() == two.keys()
    if name == "muon":  # Its update is made in bfloat16: single elements may differ by more.
        assert all(torch.dist(one[key], two[key]) < 0.03 * one[key].norm() + 1e-3 for key in one)
    elif tolerance < 1e-3:
        assert all(torch.allclose(one[key], two[key], atol=2e-3) for key in one)


@pytest.mark.slow
def test_runs_go_on_with_other_processes(runs: Path, corpora: dict[str, Path], tmp_path: Path) -> None:
    """Two stages from the checkpoint of one process, and one process from that of two stages."""
    expected = losses_of(runs / "alone-tied")
    shutil.copytree(runs / "tied", tmp_path / "back", symlinks=True)
    shutil.rmtree(whole_checkpoints(tmp_path / "back" / "checkpoints")[-1])
    pretrain(make_recipe(corpora["bpe"], **SECTIONS["tied"]), tmp_path / "back")
    for run in (runs / "taken-up", tmp_path / "back"):
        again = [line for line in log_of(run) if "loss" in line]
        assert [line["step"] for line in again] == [*range(1, 11), *range(6, 11)]
        assert all(math.isclose(line["loss"], expected[line["step"]], rel_tol=1e-4) for line in again)
        assert math.isclose(held_out_loss(run), held_out_loss(runs / "alone-tied"), rel_tol=1e-4)


@pytest.mark.slow
def test_stages_go_back_together(runs: Path) -> None:
    """The loss of step 5, of which only the last stage knows, is no number."""
    [line] = [line for line in log_of(runs / "lost") if "rollback_to" in line]
    assert line["rollback_to"] == 0 and max(losses_of(runs / "lost")) == 10


@pytest.mark.slow
def test_the_exported_folder_opens(runs: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = runs / "tied" / "model"
    network, reports = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(reports[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert network.lm_head.weight is network.model.embed_tokens.weight
    card = json.loads((folder / "fastserve.json").read_text())
    assert card["parameters"] == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.slow
def test_copies_of_a_pipeline(runs: Path, corpora: dict[str, Path]) -> None:
    values = recipe_values(corpora["bpe"], **SECTIONS["tied"], parallel={"pipeline": 2, "data": 2})
    write_toml(runs / "copies.toml", values)
    run_all(runs, ["copies"], 4)
    expected, found = losses_of(runs / "alone-tied"), losses_of(runs / "copies")
    assert expected.keys() == found.keys()
    assert all(math.isclose(expected[step], found[step], rel_tol=1e-4) for step in expected)
    assert math.isclose(held_out_loss(runs / "copies"), held_out_loss(runs / "alone-tied"), rel_tol=1e-4)


def made(kind: str, **config: Any) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM

    factory = AutoModelForMaskedLM if "bert" in kind else AutoModelForCausalLM
    heads = {} if "bert" in kind or kind == "gpt2" else dict(num_key_value_heads=1, head_dim=8)
    return factory.from_config(CONFIG_MAPPING[kind](**SMALL, **heads, **config)).eval()


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
def test_stages_one_after_another_are_the_network(is_tied: bool) -> None:
    """For every type: the same logits of packed rows; each weight and each dropout is in one stage, or at both ends."""
    import torch

    from fastserve.train.pipeline import TYPES, Stage, cut

    batch = {
        "input_ids": torch.arange(24).reshape(2, 12) % 40 + 5,
        "position_ids": torch.tensor([[*range(7), *range(5)], [*range(4), *range(8)]]) + 2,
    }
    for kind in TYPES:
        network = made(kind, tie_word_embeddings=is_tied)
        stages = [copy.deepcopy(network) for _ in range(3)]
        hidden: tuple[torch.Tensor, ...] = ()
        for place, stage in enumerate(stages):
            cut(stage, place, 3)
            with torch.no_grad():
                hidden = (Stage(stage, dict, contextlib.nullcontext)(*hidden, **batch),)
        with torch.no_grad():
            assert torch.allclose(hidden[0], network(**batch).logits, atol=1e-5), kind
        names = [name for stage in stages for name, _ in stage.named_parameters()]
        assert set(names) == {name for name, _ in network.named_parameters()}, kind
        twice = sorted(name for name in set(names) if names.count(name) > 1)
        embedding = [name for name, item in network.named_parameters() if item is network.get_input_embeddings().weight]
        assert twice == (embedding if is_tied else []), kind
        dropouts = [sum(isinstance(item, torch.nn.Dropout) for item in each.modules()) for each in (network, *stages)]
        assert dropouts[0] == sum(dropouts[1:]), kind


def test_stages_are_optimized_as_the_network_is() -> None:
    """Every weight goes to the same optimizer with the same decay."""
    from fastserve.train.optimizers import make_optimizers
    from fastserve.train.pipeline import TYPES, cut
    from fastserve.train.settings import OptimizerSection

    def rules(network: Any) -> dict[str, tuple[str, float]]:
        names = {id(item): name for name, item in network.named_parameters()}
        return {
            names[id(item)]: (type(optimizer).__name__, group["weight_decay"])
            for optimizer in make_optimizers(network, OptimizerSection(kind="muon"))
            for group in optimizer.param_groups
            for item in group["params"]
        }

    for kind in TYPES:
        network = made(kind)
        whole = rules(network)
        for place in range(3):
            stage = copy.deepcopy(network)
            cut(stage, place, 3)
            found = rules(stage)
            assert found == {name: whole[name] for name in found}, kind


def test_layers_go_round() -> None:
    from fastserve.train.pipeline import layers_of

    assert [layers_of(stage, 3, 8) for stage in range(3)] == [range(3), range(3, 6), range(6, 8)]
    assert [layers_of(stage, 4, 4) for stage in range(4)] == [range(stage, stage + 1) for stage in range(4)]


@pytest.mark.parametrize(
    ("sections", "nproc", "message"),
    [
        ({}, 1, "pipeline 2, data 1, shard 1, tensor 1 make 2 processes, not 1: give --nproc 2"),
        ({"parallel": {"pipeline": 4}}, 4, "4 stages need as many layers, and the network has 2"),
        ({"parallel": {"pipeline": 0}}, 1, "parallel.pipeline: must be at least 1"),
        ({"parallel": {"pipeline": 2, "shard": 2}}, 4, "combine pipeline with data"),
        ({"parallel": {"pipeline": 2, "tensor": 2}}, 4, "combine pipeline with data"),
        ({"model": {"type": "gpt_neox", "config": NEOX}}, 2, "'gpt_neox' cannot be cut into stages, those of llama,"),
        ({"objective": {"kind": "sentence-order"}}, 2, "the objective 'sentence-order' is not learnt in stages"),
        ({"objective": {"kind": "span-corruption"}}, 2, "the objective 'span-corruption' is not learnt in stages"),
        ({"watch": {"samples": ["The"]}}, 2, "watch.samples: no process of a pipeline can continue a prompt"),
    ],
)
def test_what_cannot_be_done_in_stages_is_said_before(
    corpora: dict[str, Path], sections: dict[str, Any], nproc: int, message: str
) -> None:
    sections = {"parallel": {"pipeline": 2}, **sections}
    with pytest.raises(ConfigError, match=message):
        check(make_recipe(corpora["bpe"], **sections), nproc)


def test_a_plan_counts_the_heaviest_stage(corpora: dict[str, Path]) -> None:
    """The last one, with the head and the norm before it."""
    recipe = make_recipe(corpora["bpe"], parallel={"pipeline": 2}, train={"batch_tokens": 256, "ema_decay": 0.9})
    found = plan(recipe, plan_config(recipe), "h100")
    width, head = LLAMA["hidden_size"], 320 * LLAMA["hidden_size"]
    layer = (found.parameters - 2 * head - width) // 2
    assert found.weight_bytes == found.gradient_bytes == found.average_bytes == 4 * (layer + width + head)
    assert found.optimizer_bytes == 2 * found.weight_bytes and found.processes == 2
    alone = plan(make_recipe(corpora["bpe"], train={"ema_decay": 0.9}), plan_config(recipe), "h100")
    assert alone.parameters == found.parameters and alone.total_bytes > found.total_bytes


def test_passes_of_a_share() -> None:
    """Without micro_batch_tokens a pipeline takes four passes for each stage, where there are the rows."""

    def rows(tokens: int, **parallel: int) -> int:
        return make_recipe(Path(), train={"micro_batch_tokens": tokens}, parallel=parallel).pass_rows(32)

    assert [rows(0), rows(64), rows(999), rows(0, pipeline=2), rows(96, pipeline=2)] == [8, 2, 8, 1, 3]
    assert make_recipe(Path(), train={"batch_tokens": 32 * 20}, parallel={"pipeline": 2}).pass_rows(32) == 3
