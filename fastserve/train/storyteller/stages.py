"""The stages in order, what each leaves behind, and which are done.

    tokenizer -> OUT/tokenizer.json     pretrain -> OUT/pretrain.safetensors
    tune      -> OUT/tune.safetensors   export   -> OUT/model/, OUT/CREDITS.md, OUT/samples.*
    texts     -> OUT/texts/, OUT/chats.jsonl: what the general commands (docs/training.md) make such a model of
Each stage reads only the recipe, the texts and what earlier stages left in OUT, so any of them can be run again alone.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from fastserve.core.errors import ConfigError
from fastserve.train.storyteller.chat import ChatSet
from fastserve.train.storyteller.corpus import Corpus, read_corpus
from fastserve.train.storyteller.credits import credits_page
from fastserve.train.storyteller.evaluate import held_out_loss
from fastserve.train.storyteller.export import Measured, export_model
from fastserve.train.storyteller.finetune import finetune
from fastserve.train.storyteller.pretrain import new_model, pretrain
from fastserve.train.storyteller.recipe import Recipe
from fastserve.train.storyteller.samples import SHOWN_REQUESTS, answer, on_topic, samples_page
from fastserve.train.storyteller.tokenizer import load_tokenizer, train_tokenizer
from fastserve.train.storyteller.training_state import load_state

if TYPE_CHECKING:
    from tokenizers import Tokenizer

STAGES = ("tokenizer", "pretrain", "tune", "export")
TEXTS = "texts"  # only when asked for
CHAT_EPOCHS = 3
EVALUATION_LENGTH = 512


def run_stages(recipe: Recipe, corpora: Path, out: Path, only: str | None = None, use_compiler: bool = True) -> None:
    """Run one stage, or every stage; pretrain and tune go on from their checkpoint if there is one."""
    out.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(recipe.data, corpora, recipe.seed)
    pretrained, tuned = out / "pretrain.safetensors", out / "tune.safetensors"
    for stage in (only,) if only else STAGES:
        if stage == "tokenizer":
            _learn_tokenizer(recipe, corpus, out)
            continue
        tokenizer = load_tokenizer(out / "tokenizer.json")
        if stage == "pretrain":
            pretrain(recipe, corpus, tokenizer, pretrained, use_compiler)
        elif stage == TEXTS:
            _write_texts(recipe, corpus, tokenizer, out)
        elif stage == "tune":
            finetune(recipe, corpus, tokenizer, pretrained, tuned, use_compiler)
        else:
            _export(recipe, corpus, tokenizer, out)


def _learn_tokenizer(recipe: Recipe, corpus: Corpus, out: Path) -> None:
    """From the sources that are kept whole: the simple English the model is for."""
    names = [name for name, source in recipe.data.sources.items() if source.is_whole]
    texts = (document.text for name in names for document in corpus.training[name])
    train_tokenizer(texts, recipe.tokenizer.vocab_size).save(str(out / "tokenizer.json"))


def _write_texts(recipe: Recipe, corpus: Corpus, tokenizer: Tokenizer, out: Path) -> None:
    """The clean training documents of every source, and the chats of a few epochs, as JSON lines."""
    folder = out / "texts"
    folder.mkdir(exist_ok=True)
    for name, documents in corpus.training.items():
        lines = (json.dumps({"text": document.text}, ensure_ascii=False) for document in documents)
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    chats = ChatSet(corpus.training, tokenizer, recipe.tune, frozenset(recipe.data.held_out_subjects))
    with open(out / "chats.jsonl", "w", encoding="utf-8") as file:
        for epoch in range(CHAT_EPOCHS):
            for conversation in chats.conversations(recipe.seed + 1 + epoch):
                messages = [{"role": role, "content": content} for role, content in conversation]
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def _export(recipe: Recipe, corpus: Corpus, tokenizer: Tokenizer, out: Path) -> None:
    """Measure both checkpoints, then write the folder, the stories that were scored and the samples to show."""
    model = new_model(recipe, tokenizer)
    held_out: dict[str, dict[str, float]] = {}
    tokens_seen = {}
    for stage in ("pretrain", "tune"):
        path = out / f"{stage}.safetensors"
        if not path.exists():
            raise ConfigError(f"no checkpoint at {path}; run the stage `{stage}` first")
        _, tokens_seen[stage] = load_state(path, model, [])
        model.eval()
        for name, documents in corpus.held_out.items():
            held_out[f"{name}, after {stage}"] = held_out_loss(model, tokenizer, documents, EVALUATION_LENGTH)
    scores, samples = on_topic(model, tokenizer, recipe.data.held_out_subjects, recipe.generation, recipe.seed)
    (out / "samples.json").write_text(
        json.dumps([dataclasses.asdict(sample) for sample in samples], indent=1), encoding="utf-8"
    )
    shown = answer(model, tokenizer, list(SHOWN_REQUESTS), recipe.generation, recipe.seed, batch_size=1)
    (out / "samples.md").write_text(samples_page(shown), encoding="utf-8")
    measured = Measured(tokens_seen["pretrain"], tokens_seen["tune"], held_out, scores, corpus.sha256)
    export_model(out / "model", recipe, model, tokenizer, measured)
    texts = [document for documents in (*corpus.training.values(), *corpus.held_out.values()) for document in documents]
    (out / "CREDITS.md").write_text(credits_page(texts), encoding="utf-8")
