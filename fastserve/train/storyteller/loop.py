"""The training loop that pretraining and tuning share: batches in, weights changed in place, checkpoints on the way.

It knows nothing of texts. The order of batches is the caller's; on resume the loop skips the batches already used.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastserve.train.storyteller.model import compiled_loss
from fastserve.train.storyteller.optimizer import learning_rate_share, make_optimizers, set_learning_rates
from fastserve.train.storyteller.packing import Batch
from fastserve.train.storyteller.progress import StageProgress
from fastserve.train.storyteller.recipe import Optimizer
from fastserve.train.storyteller.training_state import load_state, save_state

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

REPORT_EVERY = 10


@dataclass(frozen=True, slots=True)
class Run:
    """What one call of `train` does; `evaluate` returns named numbers to report (may be empty)."""

    stage: str
    num_steps: int
    optimizer: Optimizer
    state_path: Path
    checkpoint_every: int
    evaluate: Callable[[], dict[str, float]] = dict
    evaluate_every: int = 0
    use_compiler: bool = True


def train(model: LlamaForCausalLM, batches: Iterator[Batch], run: Run) -> int:
    """Train to `run.num_steps`, resuming from `run.state_path` if it is there; returns the tokens seen."""
    import torch

    optimizers = make_optimizers(model, run.optimizer)
    step, tokens_seen = load_state(run.state_path, model, optimizers) if run.state_path.exists() else (0, 0)
    batches = itertools.islice(batches, step, None)
    loss_of = compiled_loss(model, run.use_compiler)
    model.train()
    mark, mark_tokens, recent = time.monotonic(), tokens_seen, 0.0
    with StageProgress(run.stage, run.num_steps) as progress:
        while step < run.num_steps:
            batch = next(batches)
            share = learning_rate_share(step, run.num_steps, run.optimizer)
            set_learning_rates(optimizers, run.optimizer, share)
            loss = loss_of(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), run.optimizer.clip_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            tokens_seen += batch.inputs.size
            recent = loss.item() if recent == 0.0 else 0.95 * recent + 0.05 * loss.item()
            if step % REPORT_EVERY == 0 or step == run.num_steps:
                speed = (tokens_seen - mark_tokens) / (time.monotonic() - mark)
                progress.report(step, loss=recent, tokens=tokens_seen, rate=share, tokens_per_second=speed)
                mark, mark_tokens = time.monotonic(), tokens_seen
            if step % run.checkpoint_every == 0 or step == run.num_steps:
                save_state(run.state_path, model, optimizers, step, tokens_seen)
            if run.evaluate_every and step % run.evaluate_every == 0:
                model.eval()
                progress.report(step, **run.evaluate())
                model.train()
    return tokens_seen
