"""Write the tuned model as a Hugging Face folder with its card, atomically file by file.

The folder is complete without this package: transformers, vLLM or FastServe load it as it is. `fastserve.json` records
what made the weights: recipe, seed, sha256 of every text, tokens seen, losses, scores.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastserve.train.storyteller.model import num_parameters
from fastserve.train.storyteller.recipe import Recipe
from fastserve.train.storyteller.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, END_OF_TURN, PADDING, token_id

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM


@dataclass(frozen=True, slots=True)
class Measured:
    """What is known of a finished model; it goes into the card."""

    tokens_pretrained: int
    tokens_tuned: int
    held_out: dict[str, dict[str, float]]  # text -> loss (nats per token), bits_per_byte
    on_topic: dict[str, float]
    data_sha256: dict[str, str]


def export_model(
    folder: Path, recipe: Recipe, model: LlamaForCausalLM, tokenizer: Tokenizer, measured: Measured
) -> None:
    """Write every file into a temporary folder beside `folder`, then move them in one by one."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        fresh = Path(name)
        weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
        weights.pop("lm_head.weight")  # tied to the embeddings
        save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
        config = LlamaConfig.from_dict(model.config.to_dict())
        config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
        config.save_pretrained(fresh)
        _generation_config(recipe, tokenizer).save_pretrained(fresh)
        tokenizer.save(str(fresh / "tokenizer.json"))
        _write_json(fresh / "tokenizer_config.json", _tokenizer_config(recipe))
        (fresh / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        card = make_card(recipe, num_parameters(model), measured)
        _write_json(fresh / "fastserve.json", card)
        (fresh / "README.md").write_text(_readme(card), encoding="utf-8")
        for file in sorted(fresh.iterdir()):
            file.chmod(0o644)
            os.replace(file, folder / file.name)


def make_card(recipe: Recipe, parameters: int, measured: Measured) -> dict[str, Any]:
    """The contents of fastserve.json."""
    from fastserve import __version__

    return {
        "name": recipe.name,
        "made_by": f"fastserve {__version__}, python -m fastserve.train.storyteller",
        "licence": recipe.licence,
        "credits": "Storybooks: CC-BY, authors in CREDITS.md beside this folder; the rest: public domain in the USA.",
        "parameters": parameters,
        "tokens": {"pretrained": measured.tokens_pretrained, "tuned": measured.tokens_tuned},
        "held_out": measured.held_out,
        "on_topic": measured.on_topic,
        "data_sha256": measured.data_sha256,
        "recipe": recipe.as_dict(),
    }


def _generation_config(recipe: Recipe, tokenizer: Tokenizer) -> Any:
    from transformers import GenerationConfig

    settings = recipe.generation
    return GenerationConfig(
        do_sample=True,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=0,
        repetition_penalty=settings.repetition_penalty,
        bos_token_id=token_id(tokenizer, END_OF_TEXT),
        eos_token_id=[token_id(tokenizer, END_OF_TURN), token_id(tokenizer, END_OF_TEXT)],
        pad_token_id=token_id(tokenizer, PADDING),
        max_new_tokens=settings.max_new_tokens,
    )


def _tokenizer_config(recipe: Recipe) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TURN,
        "pad_token": PADDING,
        "model_max_length": recipe.model.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


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
made from them ({tuned:.1f} M tokens). It comes with the package, so that serving works without a download; it knows
nothing but stories.

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
        pretrained=card["tokens"]["pretrained"] / 1e6,
        tuned=card["tokens"]["tuned"] / 1e6,
        losses="\n".join(rows),
        on_topic=card["on_topic"].get("on_topic", 0.0),
        licence=card["licence"],
    )
