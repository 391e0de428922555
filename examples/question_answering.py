"""Fine-tune a BERT on question answering, then ask it.

    python examples/question_answering.py                                    a small BERT and facts made here, minutes
    python examples/question_answering.py --model ./bert --data squad.json   your own

Without a model, a small BERT with random weights is made: it learns to find who does what where in texts of made-up
facts, and is asked about facts it has not seen. The same works with any BERT folder and any file in SQuAD's form.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from fastserve.train.finetune.run import finetune, open_network
from fastserve.train.finetune.settings import FinetuneSettings
from fastserve.train.finetune.spans import QuestionAnswering
from fastserve.train.network import open_tokenizer
from fastserve.train.tokenizer import TokenizerSettings, make_tokenizer_folder

NAMES = [
    "Anna",
    "Ben",
    "Clara",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Henry",
    "Ida",
    "Jonas",
    "Kate",
    "Leo",
    "Maria",
    "Nina",
    "Oscar",
    "Paula",
]
PLACES = [
    "harbour",
    "library",
    "garden",
    "market",
    "station",
    "castle",
    "bridge",
    "school",
    "museum",
    "forest",
    "bakery",
    "theatre",
]
THINGS = [
    "books",
    "apples",
    "letters",
    "songs",
    "maps",
    "flowers",
    "clocks",
    "boats",
    "stories",
    "candles",
    "bread",
    "stamps",
]
VERBS = ["sells", "paints", "collects", "repairs", "studies", "guards"]


def facts(number: int, seed: int) -> list[dict[str, Any]]:
    """Questions about texts of two facts, with the answers' places, in SQuAD's form."""
    chooser = random.Random(seed)
    rows = []
    for _ in range(number):
        people = chooser.sample(NAMES, 2)
        parts = [(name, chooser.choice(VERBS), chooser.choice(THINGS), chooser.choice(PLACES)) for name in people]
        context = " ".join(f"{name} {verb} {thing} at the {place}." for name, verb, thing, place in parts)
        name, verb, thing, place = chooser.choice(parts)
        question, answer = chooser.choice(
            [(f"Where is {name}?", place), (f"What does {name} like?", thing), (f"What does {name} do?", verb)]
        )
        start = context.index(answer, context.index(name))
        rows.append({"question": question, "context": context, "answers": {"text": [answer], "answer_start": [start]}})
    return rows


def small_bert(folder: Path) -> Path:
    """A BERT of 0.1 million random weights with a tokenizer that knows the facts' words."""
    import torch
    from transformers import BertConfig, BertForMaskedLM

    texts = [f"{row['question']} {row['context']}" for row in facts(500, seed=0)]
    make_tokenizer_folder(texts, folder, TokenizerSettings(kind="wordpiece", lowercase=True, vocab_size=300))
    tokenizer = open_tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        initializer_range=0.2,  # so wide that equal words attend to each other from the beginning
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def main(arguments: list[str] | None = None) -> float:
    """Run the example; returns the exact match of the tuned model on held-out questions, in percent."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--model", type=Path, help="BERT folder (default: a small one made here)")
    parser.add_argument("--data", type=Path, help="questions in SQuAD's JSON or JSON lines (default: made here)")
    parser.add_argument("--out", type=Path, default=Path("runs/question-answering"))
    parser.add_argument("--steps", type=int, default=0, help="steps (default: 2400 here, 2 epochs of your data)")
    options = parser.parse_args(arguments)
    data = options.data
    if data is None:
        data = options.out.with_name(f"{options.out.name}-facts.jsonl")
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_text("".join(json.dumps(row) + "\n" for row in facts(4000, seed=1)), encoding="utf-8")
    model = options.model or small_bert(options.out.with_name(f"{options.out.name}-bert"))
    settings = FinetuneSettings(
        epochs=2,
        steps=options.steps or (0 if options.data else 2400),
        learning_rate=3e-5 if options.model else 1e-3,
        batch_size=32,
        max_length=384 if options.model else 64,
        precision="float32",
        validation_share=0.05,
    )
    scores = finetune("question-answering", str(model), data, options.out, settings)
    ask(options.out / "model", settings)
    print(f"exact match {scores['exact_match']} (before: {scores['before']['exact_match']})")
    return float(scores["exact_match"])


def ask(folder: Path, settings: FinetuneSettings) -> None:
    """Answer questions about a text that was in no training set."""
    kind = QuestionAnswering(open_tokenizer(folder), settings)
    network = open_network(kind, str(folder), None).eval()
    context = "Clara repairs clocks at the harbour. Oscar collects stamps at the library."
    for question in ("Where is Clara?", "Where is Oscar?", "What does Oscar like?", "What does Clara do?"):
        row = {"question": question, "context": context, "answers": []}
        print(f"{question}  ->  {kind.predict(network, [row])[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
