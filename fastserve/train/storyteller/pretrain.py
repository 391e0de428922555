"""The pretraining stage: books in, a model that continues text out.

Phases differ in window length and mixture: a long cheap stretch of short windows first, then longer windows and
simpler, more modern texts while the learning rate decays (the part of a run that shapes the style most).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastserve.train.storyteller.corpus import Corpus
from fastserve.train.storyteller.evaluate import encode_documents, held_out_loss
from fastserve.train.storyteller.loop import Run, train
from fastserve.train.storyteller.model import best_device, make_model
from fastserve.train.storyteller.packing import Batch, Tokens, mixed_batches
from fastserve.train.storyteller.recipe import Pretrain, Recipe
from fastserve.train.storyteller.tokenizer import END_OF_TEXT, END_OF_TURN, PADDING, token_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

QUICK_EVALUATION_TOKENS = 30_000


def new_model(recipe: Recipe, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """The recipe's model with random weights on the best device."""
    special_ids = {
        "bos_token_id": token_id(tokenizer, END_OF_TEXT),
        "eos_token_id": token_id(tokenizer, END_OF_TURN),
        "pad_token_id": token_id(tokenizer, PADDING),
    }
    return make_model(recipe.model, tokenizer.get_vocab_size(), special_ids, recipe.seed).to(best_device())


def pretraining_batches(documents: dict[str, list[Tokens]], section: Pretrain, seed: int) -> Iterator[Batch]:
    """The batches of all phases in order."""
    return itertools.chain.from_iterable(
        itertools.islice(
            mixed_batches(documents, phase.mixture, section.batch_tokens, phase.length, seed + 1000 * index),
            phase.steps,
        )
        for index, phase in enumerate(section.phases)
    )


def pretrain(
    recipe: Recipe, corpus: Corpus, tokenizer: Tokenizer, state_path: Path, use_compiler: bool = True
) -> LlamaForCausalLM:
    """Train from scratch, or from the checkpoint at `state_path`, to the end of the last phase."""
    section = recipe.pretrain
    model = new_model(recipe, tokenizer)
    documents = {name: encode_documents(tokenizer, items) for name, items in corpus.training.items()}

    def evaluate() -> dict[str, float]:
        found = held_out_loss(model, tokenizer, corpus.held_out["held_out"], 512, QUICK_EVALUATION_TOKENS)
        return {f"held_out_{key}": value for key, value in found.items()}

    run = Run(
        stage="pretrain",
        num_steps=sum(phase.steps for phase in section.phases),
        optimizer=section.optimizer,
        state_path=state_path,
        checkpoint_every=section.checkpoint_every,
        evaluate=evaluate,
        evaluate_every=section.evaluate_every,
        use_compiler=use_compiler,
    )
    train(model, pretraining_batches(documents, section, recipe.seed), run)
    return model
