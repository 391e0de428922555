"""Tokens per second of `fastserve pretrain` beside plain PyTorch loops of the same network, batch and precision.

    python benchmarks/pretrain.py            about ten minutes on two cores
    python benchmarks/pretrain.py --smoke    a minute

All sides train on random tokens with AdamW, in the same process, in turns: `plain` is the loop that one would write by
hand around transformers' Llama (one tensor of tokens, autocast, cross-entropy, clip, step), `nanogpt` the same loop
around a GPT-2 in a page of PyTorch (one matrix for q, k and v, fused attention and optimizer), beside ours on a GPT-2
of that shape. Ours has rows, packing, checkpoints, log and guard around it. A ratio above 1: ours is faster.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastserve.bench.report import Report, emit, measure_limits
from fastserve.train.data.shards import ShardSize, write_index
from fastserve.train.pretrain import pretrain
from fastserve.train.recipe import build_section
from fastserve.train.settings import Recipe
from fastserve.train.tokenizer import TokenizerSettings, make_tokenizer_folder

SHAPE = dict(
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)
GPT2_SHAPE: dict[str, Any] = dict(
    n_embd=256, n_layer=6, n_head=4, n_positions=1024, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
)
VOCAB = 4096


def make_shards(folder: Path, num_tokens: int) -> None:
    """Random tokens in documents of 2,000, with a tokenizer whose vocabulary is filled up to VOCAB."""
    folder.mkdir()
    extra = tuple(f"<{number}>" for number in range(VOCAB - 400))
    settings = TokenizerSettings(vocab_size=VOCAB, special_tokens=extra)
    make_tokenizer_folder(["a tale of two foxes"], folder / "tokenizer", settings)
    from fastserve.train.data.shards import tokenizer_hash
    from fastserve.train.network import open_tokenizer

    vocab_size = len(open_tokenizer(folder / "tokenizer"))
    tokens = np.random.default_rng(1).integers(2, vocab_size, size=num_tokens, dtype=np.uint16)
    tokens.tofile(folder / "train-00000.tokens")
    np.arange(2000, num_tokens + 1, 2000, dtype=np.uint64).tofile(folder / "train-00000.ends")
    shard = ShardSize("train-00000", num_tokens // 2000, num_tokens, 4 * num_tokens)
    write_index(folder, tokenizer_hash(folder / "tokenizer"), vocab_size, {"train": [shard]})


def ours(shards: Path, run: Path, options: argparse.Namespace, packing: bool = False, kind: str = "llama") -> float:
    """Tokens per second, by the log's clock, from the end of the warm-up to the last step."""
    values: dict[str, Any] = {
        "name": "speed",
        "model": {"type": kind, "config": SHAPE if kind == "llama" else GPT2_SHAPE},
        "data": {"sources": {"random": str(shards)}, "length": options.length},
        "objective": {"packing": packing},
        "optimizer": {"schedule": "constant", "learning_rate": 1e-4},
        "train": {
            "batch_tokens": options.batch_tokens,
            "steps": options.steps + options.warmup,
            "precision": options.precision,
            "compile": options.compile,
            "evaluate_every": 10**6,
            "checkpoint_every": 10**6,
            "keep_checkpoints": 1,
        },
        "watch": {"tensorboard": False, "report_every": 1},
    }
    pretrain(build_section(Recipe, values, ""), run)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = {line["step"]: line["seconds"] for line in lines if "loss" in line}
    elapsed = seconds[options.steps + options.warmup] - seconds[options.warmup]
    return float(options.steps * options.batch_tokens / elapsed)


def plain(options: argparse.Namespace, vocab_size: int) -> float:
    """Tokens per second of the loop written by hand around transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    network = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **SHAPE))
    return train_by_hand(network, lambda ids: network(input_ids=ids, use_cache=False).logits, options, vocab_size)


def nanogpt(options: argparse.Namespace, vocab_size: int) -> float:
    """Tokens per second of the same loop around a GPT-2 that is nothing but PyTorch."""
    import torch
    from torch import Tensor, nn

    size, num_heads = GPT2_SHAPE["n_embd"], GPT2_SHAPE["n_head"]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(size) for _ in range(2))
            self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
            self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU("tanh"), nn.Linear(4 * size, size))

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = self.qkv(self.norms[0](x)).view(*x.shape[:2], 3, num_heads, -1).permute(2, 0, 3, 1, 4)
            seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + self.out(seen.transpose(1, 2).flatten(2))
            return x + self.mlp(self.norms[1](x))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(vocab_size, size), nn.Embedding(GPT2_SHAPE["n_positions"], size)
            self.blocks = nn.Sequential(*(Block() for _ in range(GPT2_SHAPE["n_layer"])))
            self.norm = nn.LayerNorm(size)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
            return nn.functional.linear(self.norm(self.blocks(x)), self.tokens.weight)

    network = Network()
    return train_by_hand(network, network, options, vocab_size)


def train_by_hand(network: Any, logits_of: Callable[[Any], Any], options: argparse.Namespace, vocab_size: int) -> float:
    """Tokens per second after the warm-up."""
    import contextlib

    import torch

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network.to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows = options.batch_tokens // options.length
    data = torch.randint(2, vocab_size, (options.steps + options.warmup, rows, options.length + 1))

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        with (
            torch.autocast(device.type, torch.bfloat16) if options.precision == "bfloat16" else contextlib.nullcontext()
        ):
            logits = logits_of(tokens[:, :-1])
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    compiled = torch.compile(loss_of, dynamic=False) if options.compile else loss_of
    start = 0.0
    for step, tokens in enumerate(data):
        if step == options.warmup:
            start = time.perf_counter()
        loss = compiled(tokens.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
    return float(options.steps * options.batch_tokens / (time.perf_counter() - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="compile both sides")
    parser.add_argument("--smoke", action="store_true", help="sizes that take half a minute")
    options = parser.parse_args()
    if options.smoke:
        options.batch_tokens, options.length, options.steps, options.warmup, options.repeats = 512, 128, 3, 1, 1
    config = {key: getattr(options, key) for key in ("batch_tokens", "length", "steps", "precision", "compile")}
    report = Report("pretrain", config={**config, **SHAPE}, repeats=options.repeats)
    report.limits["before"] = measure_limits()
    speeds: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        shards = Path(name) / "shards"
        make_shards(shards, 2_000_000)
        vocab_size = json.loads((shards / "tokens.json").read_text())["vocab_size"]
        for repeat in range(options.repeats):
            runs = (Path(name) / f"{kind}-{repeat}" for kind in ("rows", "packed", "gpt2"))
            speeds["tokens_per_second"].append(ours(shards, next(runs), options))
            speeds["plain_tokens_per_second"].append(plain(options, vocab_size))
            speeds["packed_tokens_per_second"].append(ours(shards, next(runs), options, packing=True))
            speeds["gpt2_tokens_per_second"].append(ours(shards, next(runs), options, kind="gpt2"))
            speeds["nanogpt_tokens_per_second"].append(nanogpt(options, vocab_size))
    for metric, values in speeds.items():
        report.add_runs(metric, values)
    for metric, own, other in (
        ("ratio_vs_plain_torch", "tokens_per_second", "plain_tokens_per_second"),
        ("ratio_packed_vs_plain_torch", "packed_tokens_per_second", "plain_tokens_per_second"),
        ("ratio_vs_nanogpt", "gpt2_tokens_per_second", "nanogpt_tokens_per_second"),
    ):
        report.add_runs(metric, [a / b for a, b in zip(speeds[own], speeds[other], strict=True)])
    report.limits["after"] = measure_limits()
    emit(report.as_dict())


if __name__ == "__main__":
    main()
