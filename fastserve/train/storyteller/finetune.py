"""The tuning stage: teach the pretrained model to answer requests for stories.

Batches alternate between packed conversations, with loss on answers only, and a share of the books, so that the
language of pretraining is kept. The learning rate starts where pretraining stopped and decays to nothing.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastserve.core.errors import ConfigError
from fastserve.train.storyteller.chat import ChatSet
from fastserve.train.storyteller.corpus import Corpus
from fastserve.train.storyteller.evaluate import encode_documents
from fastserve.train.storyteller.loop import Run, train
from fastserve.train.storyteller.packing import Batch, mixed_batches, pack_conversations
from fastserve.train.storyteller.pretrain import new_model
from fastserve.train.storyteller.recipe import Recipe
from fastserve.train.storyteller.training_state import load_state

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM


def tuning_batches(recipe: Recipe, corpus: Corpus, tokenizer: Tokenizer) -> Iterator[Batch]:
    """Endless batches; the chat set is made anew for each epoch, the books are those of the last pretraining phase."""
    section, seed = recipe.tune, recipe.seed + 1
    chat_set = ChatSet(corpus.training, tokenizer, section, frozenset(recipe.data.held_out_subjects))
    mixture = recipe.pretrain.phases[-1].mixture
    documents = {name: encode_documents(tokenizer, corpus.training[name]) for name in mixture}
    books = mixed_batches(documents, mixture, section.batch_tokens, section.length, seed)
    chooser = random.Random(seed)
    for epoch in itertools.count():
        for batch in pack_conversations(
            chat_set.epoch(seed + epoch), section.batch_tokens, section.length, seed + epoch
        ):
            while chooser.random() < section.book_share:
                yield next(books)
            yield batch


def finetune(
    recipe: Recipe, corpus: Corpus, tokenizer: Tokenizer, pretrained: Path, state_path: Path, use_compiler: bool = True
) -> LlamaForCausalLM:
    """Tune the model of the checkpoint `pretrained`, or go on from `state_path`, to the recipe's number of steps."""
    if not pretrained.exists():
        raise ConfigError(f"no pretrained checkpoint at {pretrained}; run the stage `pretrain` first")
    model = new_model(recipe, tokenizer)
    load_state(pretrained, model, [])
    run = Run(
        stage="tune",
        num_steps=recipe.tune.steps,
        optimizer=recipe.tune.optimizer,
        state_path=state_path,
        checkpoint_every=recipe.tune.checkpoint_every,
        use_compiler=use_compiler,
    )
    train(model, tuning_batches(recipe, corpus, tokenizer), run)
    return model
