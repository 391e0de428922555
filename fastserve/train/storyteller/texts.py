"""Raw books in, what the general commands read out: clean texts by source, chats, held-out texts, credits.

OUT/texts/SOURCE.jsonl, OUT/held_out/NAME.jsonl, OUT/chats.jsonl, OUT/CREDITS.md, OUT/texts.json (sha256 of every file)
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastserve.train.storyteller.chat import ChatSet
from fastserve.train.storyteller.corpus import Document, read_corpus
from fastserve.train.storyteller.credits import credits_page
from fastserve.train.storyteller.recipe import Recipe

SHA256_FILE = "texts.json"


def write_texts(recipe: Recipe, corpora: Path, out: Path) -> None:
    """Read the recipe's files in `corpora` and write all of the above; ConfigError if one is missing."""
    corpus = read_corpus(recipe.data, corpora, recipe.seed)
    for folder, texts in (("texts", corpus.training), ("held_out", corpus.held_out)):
        (out / folder).mkdir(parents=True, exist_ok=True)
        for name, documents in texts.items():
            _write_lines(out / folder / f"{name}.jsonl", ({"text": document.text} for document in documents))
    chats = ChatSet(corpus.training, recipe.chats, frozenset(recipe.data.held_out_subjects))
    epochs = range(recipe.seed + 1, recipe.seed + 1 + recipe.chats.epochs)
    _write_lines(out / "chats.jsonl", (row for seed in epochs for row in chats.rows(seed)))
    everything: list[Document] = [
        document
        for texts in (corpus.training, corpus.held_out)
        for documents in texts.values()
        for document in documents
    ]
    (out / "CREDITS.md").write_text(credits_page(everything), encoding="utf-8")
    (out / SHA256_FILE).write_text(json.dumps(corpus.sha256, indent=1), encoding="utf-8")


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
