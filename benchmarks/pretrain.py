"""Tokens per second of `fastserve pretrain` beside a plain PyTorch loop of the same network, batch and precision.

    python benchmarks/pretrain.py            about ten minutes on two cores
    python benchmarks/pretrain.py --smoke    half a minute

Both sides train transformers' Llama on random tokens with AdamW, in the same process, in turns: `plain` is the loop
that one would write by hand (one tensor of tokens, autocast, cross-entropy, clip, step). Ours has rows, packing,
checkpoints, log and guard around it. A ratio above 1: ours is faster.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
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


def ours(shards: Path, run: Path, options: argparse.Namespace, packing: bool) -> float:
    """Tokens per second, by the log's clock, from the end of the warm-up to the last step."""
    values: dict[str, Any] = {
        "name": "speed",
        "model": {"type": "llama", "config": SHAPE},
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
    """Tokens per second of the loop written by hand."""
    import contextlib

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **SHAPE)).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    rows = options.batch_tokens // options.length
    data = torch.randint(2, vocab_size, (options.steps + options.warmup, rows, options.length + 1))

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        with (
            torch.autocast(device.type, torch.bfloat16) if options.precision == "bfloat16" else contextlib.nullcontext()
        ):
            logits = network(input_ids=tokens[:, :-1], use_cache=False).logits
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
    speeds: dict[str, list[float]] = {
        "tokens_per_second": [],
        "packed_tokens_per_second": [],
        "plain_tokens_per_second": [],
    }
    with tempfile.TemporaryDirectory() as name:
        shards = Path(name) / "shards"
        make_shards(shards, 2_000_000)
        vocab_size = json.loads((shards / "tokens.json").read_text())["vocab_size"]
        for repeat in range(options.repeats):
            speeds["tokens_per_second"].append(ours(shards, Path(name) / f"rows-{repeat}", options, packing=False))
            speeds["plain_tokens_per_second"].append(plain(options, vocab_size))
            speeds["packed_tokens_per_second"].append(
                ours(shards, Path(name) / f"packed-{repeat}", options, packing=True)
            )
    for metric, values in speeds.items():
        report.add_runs(metric, values)
    pairs = list(zip(*speeds.values(), strict=True))
    report.add_runs("ratio_vs_plain_torch", [own / other for own, _, other in pairs])
    report.add_runs("ratio_packed_vs_plain_torch", [packed / other for _, packed, other in pairs])
    report.limits["after"] = measure_limits()
    emit(report.as_dict())


if __name__ == "__main__":
    main()
