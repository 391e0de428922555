"""The built-in model's folder: the tuned one with its way of sampling, its scores, its card and its page.

Reads OUT/pretrain/model, OUT/chat/model, OUT/held_out and OUT/texts.json; writes OUT/model and OUT/samples.*.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from fastserve.core.errors import ConfigError
from fastserve.train.storyteller.recipe import Generation, Recipe
from fastserve.train.storyteller.samples import SHOWN_REQUESTS, answer, on_topic, samples_page
from fastserve.train.storyteller.texts import SHA256_FILE

_WINDOW = 512  # tokens that held-out texts are read in
_ALL = 1_000_000_000
_STAGES = ("pretrain", "chat")


def finish(recipe: Recipe, out: Path) -> dict[str, Any]:
    """Measure both stages, write OUT/model, and return its card. ConfigError for a stage that is missing."""
    from fastserve import LLM, SamplingParams

    folders = {stage: out / stage / "model" for stage in _STAGES}
    for stage, folder in folders.items():
        if not (folder / "config.json").exists():
            raise ConfigError(
                f"there is no model in {folder}; run the step {stage!r} of examples/builtin_model.sh first"
            )
    fresh = out / "model.partial"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(folders["chat"], fresh, ignore=shutil.ignore_patterns("README.md", "training.svg"))
    _set_sampling(fresh / "generation_config.json", recipe.generation)
    generation = recipe.generation
    settings = SamplingParams(
        temperature=generation.temperature,
        top_p=generation.top_p,
        max_tokens=generation.max_new_tokens,
        seed=recipe.seed,
    )
    model = LLM(str(fresh))
    scores, stories = on_topic(model, recipe.data.held_out_subjects, settings)
    shown = answer(model, list(SHOWN_REQUESTS), settings)
    (out / "samples.json").write_text(json.dumps([dataclasses.asdict(story) for story in stories], indent=1))
    (out / "samples.md").write_text(samples_page(shown), encoding="utf-8")
    card = _card(recipe, out, folders, scores)
    _write_json(fresh / "fastserve.json", card)
    (fresh / "README.md").write_text(_readme(card), encoding="utf-8")
    shutil.rmtree(out / "model", ignore_errors=True)
    os.replace(fresh, out / "model")
    return card


def _card(recipe: Recipe, out: Path, folders: dict[str, Path], scores: dict[str, float]) -> dict[str, Any]:
    from fastserve import __version__
    from fastserve.train.evaluate import perplexity

    cards = {
        stage: json.loads((folder / "fastserve.json").read_text(encoding="utf-8")) for stage, folder in folders.items()
    }
    held_out = {
        f"{corpus.stem}, after {stage}": perplexity(str(folder), corpus, length=_WINDOW, max_tokens=_ALL)
        for stage, folder in folders.items()
        for corpus in sorted((out / "held_out").glob("*.jsonl"))
    }
    return {
        "name": recipe.name,
        "made_by": f"fastserve {__version__}, examples/builtin_model.sh",
        "licence": recipe.licence,
        "credits": "Storybooks: CC-BY, authors in CREDITS.md beside this folder; the rest: public domain in the USA.",
        "parameters": cards["chat"]["parameters"],
        "tokens_pretrained": cards["pretrain"]["tokens"],
        "steps": {stage: card["step"] for stage, card in cards.items()},
        "held_out": held_out,
        "on_topic": scores,
        "data_sha256": json.loads((out / SHA256_FILE).read_text(encoding="utf-8")),
        "texts": recipe.as_dict(),
        "recipe": cards["pretrain"]["recipe"],
        "settings": cards["chat"]["settings"],
    }


def _set_sampling(path: Path, generation: Generation) -> None:
    """Add how to sample to what the folder says of its tokens."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values.update(do_sample=True, top_k=0, **dataclasses.asdict(generation))
    _write_json(path, values)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


_README = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# {name}

A {parameters:.1f} M parameter Llama-shaped model that tells short stories in simple English. FastServe trained it from
scratch on {pretrained:.1f} M tokens of public-domain story books and CC-BY picture books, then tuned it on requests
made from them. It comes with the package, so that serving works without a download; it knows nothing but stories.

    Tell me a story about a fox and a crow.
    Continue the story: Once there was a lion who was afraid of mice.

| held-out text | loss per token (nats) | bits per byte |
|---|---|---|
{losses}

On-topic score (share of stories in which the requested subject occurs, for subjects that no training request named):
{on_topic:.0%}.

Weights: {licence}. Credits of the CC-BY stories: CREDITS.md beside this folder. Old books hold dated attitudes; the
worst words were filtered, the rest may show. Not for advice, facts or anything that matters.
"""


def _readme(card: dict[str, Any]) -> str:
    rows = [f"| {name} | {row['loss']:.3f} | {row['bits_per_byte']:.3f} |" for name, row in card["held_out"].items()]
    return _README.format(
        name=card["name"],
        parameters=card["parameters"] / 1e6,
        pretrained=card["tokens_pretrained"] / 1e6,
        losses="\n".join(rows),
        on_topic=card["on_topic"]["on_topic"],
        licence=card["licence"],
    )
