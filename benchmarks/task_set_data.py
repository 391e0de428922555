"""The real task sets of the shared folder as examples for `fastserve finetune`, and how each is tuned in minutes."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastserve.train.finetune.examples import read_examples
from fastserve.train.finetune.spans import answer_span
from fastserve.train.tokenizer import texts_of

Row = dict[str, Any]
Split = tuple[list[Row], list[Row]]  # learnt from, measured on
CORPORA = {
    "english": ("stories_train.txt.gz", "storybooks_ccby.jsonl"),
    "chinese": ("zh_tang_poems_train.txt", "zh_song_ci_train.txt"),
}
_EVERY = {"english": 5, "chinese": 2}  # one document in so many
_WORDS_OF_ABSTRACT = 160  # so that no tokenizer of ours has to cut it, on either side


def banking77(tasks: Path) -> Split:
    with open(tasks / "banking77_train.csv", encoding="utf-8", newline="") as file:
        rows = [{"text": row["text"], "label": row["category"]} for row in csv.DictReader(file)]
    random.Random(1).shuffle(rows)
    return rows[1000:], rows[:1000]


def clinc150(tasks: Path) -> Split:
    rows = read_examples(tasks / "clinc150_train_val.jsonl")
    learnt, measured = (
        [{"text": row["text"], "label": row["intent"]} for row in rows if row["split"] == side]
        for side in ("train", "val")
    )
    return learnt, measured


def fairytaleqa(tasks: Path) -> Split:
    """Questions whose answer stands in its sections as it is written."""

    def side(name: str) -> list[Row]:
        stories = {row["story"]: row["sections"] for row in read_examples(tasks / f"fairytaleqa_{name}_stories.jsonl")}
        rows = []
        for row in read_examples(tasks / f"fairytaleqa_{name}_questions.jsonl"):
            context = "\n".join(stories[row["story"]][number - 1] for number in row["sections"])
            asked = {"question": row["question"], "context": context, "answers": row["answers"]}
            if answer_span(asked) is not None:
                rows.append(asked)
        return rows

    return side("train"), side("val")


def cmrc2018(tasks: Path) -> Split:
    """Half of the texts to learn from, the other half to measure with."""
    rows = read_examples(tasks / "cmrc2018_dev.json")
    contexts = sorted({row["context"] for row in rows})
    learnt = set(random.Random(1).sample(contexts, len(contexts) // 2))
    return [row for row in rows if row["context"] in learnt], [row for row in rows if row["context"] not in learnt]


def tatoeba(tasks: Path) -> Split:
    def side(name: str) -> list[Row]:
        with open(tasks / f"tatoeba_cmn_eng_{name}.tsv", encoding="utf-8") as file:
            pairs = [line.rstrip("\n").split("\t") for line in file]
        return [{"source": pair[0], "target": pair[1]} for pair in pairs if len(pair) > 1]

    return side("train"), side("val")


def scitldr(tasks: Path) -> Split:
    def side(name: str) -> list[Row]:
        rows = read_examples(tasks / f"scitldr_{name}.jsonl")
        return [{"source": _first_words(row["source"]), "target": row["targets"]} for row in rows]

    return side("train"), side("dev")


def _first_words(source: str | list[str]) -> str:
    text = source if isinstance(source, str) else " ".join(source)
    return " ".join(text.split()[:_WORDS_OF_ABSTRACT])


@dataclass(frozen=True, slots=True)
class TaskSet:
    """A set, the kind of tuning, how, and the networks to tune, each with its passes over the examples.

    Attributes:
        networks: name -> (examples to learn from at most, 0: all; epochs).
        measured: examples to measure with at most.
    """

    read: Callable[[Path], Split]
    kind: str
    networks: dict[str, tuple[int, float]]
    measured: int
    settings: dict[str, Any] = field(default_factory=dict)

    def split(self, tasks: Path, network: str, is_smoke: bool) -> Split:
        """The examples of a run, drawn by a seed."""
        learnt, measured = self.read(tasks)
        at_most = self.networks[network][0] or len(learnt)
        learnt = random.Random(2).sample(learnt, min(at_most, len(learnt)))
        measured = random.Random(2).sample(measured, min(self.measured, len(measured)))
        if is_smoke:
            # A class that is not learnt could not be measured.
            labels = {row["label"] for row in learnt[:64]} if "label" in learnt[0] else set()
            learnt, measured = learnt[:64], [row for row in measured if not labels or row["label"] in labels][:8]
        return learnt, measured


# The lengths leave no text of a classification or a translation cut: a server reads texts whole.
_WINDOW = {"max_length": 256, "stride": 64, "max_answer_tokens": 30}
SETS = {
    "banking77": TaskSet(banking77, "classification", {"bert": (0, 5.0), "minilm": (0, 1.5)}, 1000),
    "clinc150": TaskSet(clinc150, "classification", {"bert": (0, 3.0), "minilm": (0, 1.0)}, 1000),
    "fairytaleqa": TaskSet(fairytaleqa, "question-answering", {"bert": (0, 3.0), "minilm": (0, 1.0)}, 300, {**_WINDOW}),
    "cmrc2018": TaskSet(cmrc2018, "question-answering", {"bert": (0, 8.0)}, 300, {**_WINDOW}),
    "tatoeba": TaskSet(tatoeba, "seq2seq", {"t5": (0, 5.0)}, 300, {"max_answer_tokens": 32}),
    "scitldr": TaskSet(scitldr, "seq2seq", {"t5": (0, 4.0)}, 100, {"max_answer_tokens": 40}),
}
_TEXTS_OF = {
    "english": ((banking77, clinc150, scitldr), ("text", "source")),
    "chinese": ((cmrc2018, tatoeba), ("context", "target")),
}


def collect(language: str, shared: Path, path: Path, is_smoke: bool) -> Path:
    """Documents of a language as JSON lines: a part of the corpora, and what the sets' training sides say in it."""
    if path.exists():
        return path
    sets, keys = _TEXTS_OF[language]
    tasks, corpora = shared / "data" / "tasks", shared / "data" / "corpora"
    found = {row[key]: None for read in sets for row in read(tasks)[0] for key in keys if key in row}
    short = [text for text in found if isinstance(text, str)]
    joined = [" \n".join(short[start : start + 20]) for start in range(0, len(short), 20)]
    documents: Iterable[str] = texts_of([str(corpora / name) for name in CORPORA[language]])
    texts = [text for index, text in enumerate(documents) if index % _EVERY[language] == 0] + joined
    return write(path, [{"text": text} for text in texts[:: 50 if is_smoke else 1]])


def write(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return partial.replace(path)
