"""What the CPU benchmarks compute around their timings: work of a token, batches, merged results, ratios."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastserve.bench.report import Report

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peer_engines"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(BENCHMARKS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def make_folder(folder: Path, tied: bool) -> Path:
    import torch
    from safetensors.torch import save_file

    tensors = {"model.embed_tokens.weight": torch.zeros(10, 4), "model.norm.weight": torch.zeros(4)}
    if not tied:
        tensors["lm_head.weight"] = torch.zeros(10, 4)
    save_file(tensors, folder / "model.safetensors")
    sizes = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {**sizes, "num_key_value_heads": 1, "head_dim": 2, "vocab_size": 10}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("tied", [True, False])
def test_every_token_reads_the_head_but_not_a_separate_embedding(load, tmp_path, tied):
    shape = load("cpu_roofline").Shape(make_folder(tmp_path, tied))
    assert shape.weight_bytes == 4 * (10 * 4 + 4)
    assert shape.kv_bytes == 2 * 2 * 2 * 1 * 2


def test_prefill_operations_count_what_must_be_done_for_one_row_of_logits(load, tmp_path):
    shape = load("cpu_roofline").Shape(make_folder(tmp_path, tied=True))
    projections, rest = 4 * (4 + 2 + 2), 4 * 4 + 3 * 4 * 6  # of a layer: until attention, and after it
    pairs = 1 + 2 + 3
    attention = 2 * (2 * 2) * pairs  # scores and values, both of num_heads * head_dim
    first, last = (projections + rest) * 3 + attention, projections * 3 + attention + rest
    assert shape.prefill_operations(3) == 2 * (first + last + 10 * 4)


def test_batches_pad_on_the_left_and_cut_what_was_not_asked_for(load):
    worker = load("worker")
    seen = []

    class Counting(worker.Engine):
        def generate(self, prompts, num_outputs):
            seen.append((prompts, num_outputs))
            return [[prompt[-1]] * count for prompt, count in zip(prompts, num_outputs, strict=True)]

    tokens = worker.in_batches(Counting(), [[1], [2, 2], [3]], [5, 1, 2], size=2)
    assert tokens == [[1] * 5, [2], [3] * 2]
    assert seen == [([[2, 2], [0, 3]], [2, 2]), ([[1]], [5])]


def test_throughput_refuses_missing_tokens(load):
    worker = load("worker")

    class Short(worker.Engine):
        def generate(self, prompts, num_outputs):
            return [[0] * (count - 1) for count in num_outputs]

    with pytest.raises(RuntimeError, match="asked for"):
        worker.answer(Short(), {"case": "throughput", "prompts": [[[1, 2], 3]]})


def test_cases_of_a_pair_merge_and_ratios_say_how_many_times_better_ours_is(load, tmp_path):
    module = load("cpu_peers")
    file = tmp_path / "vllm.bf16.json"
    module.keep(file, "decode", {"vllm": {"decode": [10.0, 30.0, 20.0]}, "fastserve": {"decode": [40.0]}}, {}, {})
    module.keep(file, "prefill", {"vllm": {"prefill": [3.0]}, "fastserve": {"prefill": [2.0]}}, {}, {})
    module.keep(file, "throughput", {"vllm": {"throughput": [9.0], "memory": [8]}}, {}, {})
    report = module.collect(tmp_path, {})
    assert report.as_dict()["repeats"] == 1  # of decode there are three, of the others one
    assert report.metrics["ratio.vllm.bf16.decode"] == 2.0
    assert report.metrics["ratio.vllm.bf16.prefill"] == 1.5
    assert "ratio.vllm.bf16.throughput" not in report.metrics
    assert "ours beside vllm.bf16" in report.skipped


@pytest.mark.parametrize(("peer", "weights", "head"), [("vllm", "int4", ""), ("openvino", "int4-a8", "int8")])
def test_our_weights_and_head_have_the_peer_s_bits(load, monkeypatch, peer, weights, head):
    module, beside = load("cpu_peers"), load("peers").PEERS[peer]
    commands = []
    made = SimpleNamespace(stdout="folder\n")
    monkeypatch.setattr(module.subprocess, "run", lambda command, **_: commands.append(command) or made)
    module.our_model("llama-0.1b", "int4", beside.our_int4, beside.our_head)
    assert commands[0][2:] == ["llama-0.1b", "--weights", weights, "--head", head]


def test_roofline_plot_draws_every_operation(load, tmp_path):
    pytest.importorskip("matplotlib")
    figures = {"share": 0.5, "gop_s": 10.0, "operations_per_byte": 2.0, "peak_gop_s": 100.0, "read_limit_gb_s": 10.0}
    report = Report("x", metrics={f"ops.bf16.qkv.rows1.{name}": value for name, value in figures.items()})
    report.metrics |= {f"ops.bf16.argmax.{name}": value for name, value in {**figures, "gop_s": 0.0}.items()}
    load("roofline_plot").draw(report.metrics, tmp_path / "plot.svg")
    text = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert "qkv.rows1" in text and "argmax (bf16)" in text
