from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastserve.core.errors import ConfigError
from fastserve.train.finetune.run import KINDS, finetune, open_network
from fastserve.train.finetune.settings import FinetuneSettings
from fastserve.train.network import open_tokenizer
from fastserve.train.tokenizer import TokenizerSettings, make_tokenizer_folder
from tests.unit.train.conftest import log_of

pytestmark = pytest.mark.slow  # networks trained

ANIMALS = ("fox", "bear", "wolf", "owl", "mouse", "crow")
PLACES = ("river", "forest", "mountain", "village", "garden", "sea")
TEXTS = [f"The {animal} lives by the {place}." for animal in ANIMALS for place in PLACES]
SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
FAST = dict(learning_rate=1e-2, precision="float32", batch_size=16, max_length=64, warmup_share=0.1)


def make_folder(folder: Path, architecture: str, config: dict[str, Any], network: str, **tokenizer: Any) -> Path:
    """A small random model folder with a tokenizer learnt from the texts."""
    import torch
    import transformers

    questions = ["Where does the live?", "user assistant system", *(f"Say {place}." for place in PLACES)] * 5
    make_tokenizer_folder(TEXTS + questions, folder, TokenizerSettings(**tokenizer))
    opened = open_tokenizer(folder)
    settings = transformers.CONFIG_MAPPING[architecture](
        vocab_size=len(opened),
        pad_token_id=opened.pad_token_id,
        bos_token_id=opened.bos_token_id,
        eos_token_id=opened.eos_token_id,
        **config,
    )
    torch.manual_seed(1)
    getattr(transformers, network).from_config(settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {**SMALL, "max_position_embeddings": 128, "hidden_dropout_prob": 0.0}
    folder = tmp_path_factory.mktemp("models") / "bert"
    return make_folder(folder, "bert", config, "AutoModelForMaskedLM", kind="wordpiece", vocab_size=120)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 128}
    folder = tmp_path_factory.mktemp("models") / "llama"
    return make_folder(folder, "llama", config, "AutoModelForCausalLM", vocab_size=330, chat=True)


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = dict(d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, decoder_start_token_id=0, dropout_rate=0.0)
    folder = tmp_path_factory.mktemp("models") / "t5"
    return make_folder(folder, "t5", config, "AutoModelForSeq2SeqLM", kind="unigram", vocab_size=190)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def facts(number: int, seed: int = 1) -> list[dict[str, Any]]:
    """Animal, place, and the text that says so."""
    chooser = random.Random(seed)
    pairs = [(chooser.choice(ANIMALS), chooser.choice(PLACES)) for _ in range(number)]
    return [
        {"animal": animal, "place": place, "text": f"The {animal} lives by the {place}."} for animal, place in pairs
    ]


def score_of_folder(
    task: str, folder: Path, rows: list[dict[str, Any]], settings: FinetuneSettings
) -> dict[str, float]:
    """What the exported folder scores when it is opened anew."""
    import torch

    kind = KINDS[task](open_tokenizer(folder), settings)
    network = open_network(kind, str(folder), None).eval()
    with torch.no_grad():
        return kind.score(network, rows)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_classification_is_learnt_and_kept_in_the_folder(bert: Path, tmp_path: Path, optimizer: str) -> None:
    rows = [{"text": fact["text"], "intent": fact["place"]} for fact in facts(120)]
    settings = FinetuneSettings(
        **{**FAST, "learning_rate": 3e-3},
        optimizer=optimizer,
        muon_learning_rate=6e-2,
        steps=120,
        label_key="intent",
        validation=str(write(tmp_path / "val.jsonl", rows[:30])),
    )
    found = finetune("classification", str(bert), write(tmp_path / "data.jsonl", rows), tmp_path / "run", settings)
    assert found["accuracy"] > 95 and found["before"]["accuracy"] < 60
    kept = score_of_folder("classification", tmp_path / "run" / "model", rows[:30], settings)
    assert kept == {name: found[name] for name in ("accuracy", "macro_f1")}
    card = json.loads((tmp_path / "run" / "model" / "fastserve.json").read_text())
    assert card["measured"] == found and card["examples"] == 120


def test_a_stopped_run_goes_on_to_the_same_weights(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    from safetensors.torch import load_file

    from fastserve.train.finetune.run import Tuning

    rows = [
        {"text": " ".join([fact["text"]] * (1 + index % 3)), "label": fact["place"]}
        for index, fact in enumerate(facts(60))
    ]
    data = write(tmp_path / "data.jsonl", rows)
    settings = FinetuneSettings(**FAST, steps=8, group_by_length=True)
    finetune("classification", str(bert), data, tmp_path / "whole", settings)
    batches = Tuning.micro_batches
    sizes: dict[int, int] = {}

    def interrupted(self: Tuning, step: int, rank: int, num_ranks: int) -> Any:
        if step == 4:
            signal.raise_signal(signal.SIGINT)
        found = batches(self, step, rank, num_ranks)
        sizes[step] = sum(batch["input_ids"].size for batch in found)
        return found

    monkeypatch.setattr(Tuning, "micro_batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune("classification", str(bert), data, tmp_path / "stopped", settings)
    monkeypatch.undo()
    finetune("classification", str(bert), data, tmp_path / "stopped", settings)
    tokens = {line["step"]: line["tokens"] for line in log_of(tmp_path / "stopped")}
    assert tokens[5] == sum(sizes.values()) and len(set(sizes.values())) > 1
    assert tokens == {line["step"]: line["tokens"] for line in log_of(tmp_path / "whole")}
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "stopped"))
    assert all(one[name].equal(other[name]) for name in one)


def test_grouped_by_length_an_epoch_has_every_item_once_and_little_padding(bert: Path, tmp_path: Path) -> None:
    from fastserve.train.finetune.run import Tuning

    chooser = random.Random(3)
    texts = [
        " ".join([f"{chooser.choice(ANIMALS)} {chooser.choice(PLACES)}."] * chooser.randint(1, 40)) for _ in range(256)
    ]
    settings = FinetuneSettings(**{**FAST, "batch_size": 16, "max_length": 512}, group_by_length=True)
    kind = KINDS["seq2seq"](open_tokenizer(bert), settings)
    items = kind.encode([{"source": text, "target": "yes"} for text in texts])
    tuning = Tuning(kind, items, [], settings, bert, tmp_path, "seq2seq")
    epochs = [[tuning.micro_batches(16 * epoch + step, 0, 1)[0] for step in range(16)] for epoch in range(2)]
    seen = [sorted(row[row > 0].tobytes() for batch in epoch for row in batch["input_ids"]) for epoch in epochs]
    assert seen[0] == seen[1] == sorted(np.array(item["input_ids"]).tobytes() for item in items)
    assert any((one["input_ids"].shape != other["input_ids"].shape) for one, other in zip(*epochs, strict=True))
    size = sum(batch["input_ids"].size for batch in epochs[0])
    assert size < 1.2 * sum(len(item["input_ids"]) for item in items)


def test_words_are_labelled(bert: Path, tmp_path: Path) -> None:
    rows = [
        {"tokens": fact["text"].rstrip(".").split(), "labels": ["O", "B-ANIMAL", "O", "O", "O", "B-PLACE"]}
        for fact in facts(100)
    ]
    settings = FinetuneSettings(**FAST, steps=40)
    found = finetune("token-classification", str(bert), write(tmp_path / "d.jsonl", rows), tmp_path / "run", settings)
    assert found["entity_f1"] > 95 > found["before"]["entity_f1"]


@pytest.mark.parametrize("max_length", [64, 24])
def test_answers_are_found_in_texts_and_in_windows(bert: Path, tmp_path: Path, max_length: int) -> None:
    """The place is asked for; where a window is shorter than the text, the answer may stand in any of them."""
    chooser = random.Random(2)
    rows = []
    for fact in facts(160):
        filler = " ".join(["He is old."] * chooser.randint(0, 6))
        context = f"{filler} {fact['text']} {filler}".strip()
        start = context.index(fact["place"])
        answers = {"text": [fact["place"]], "answer_start": [start]}
        rows.append({"question": "Where does the animal live?", "context": context, "answers": answers})
    settings = FinetuneSettings(**{**FAST, "max_length": max_length, "batch_size": 32}, steps=60, stride=8)
    found = finetune("question-answering", str(bert), write(tmp_path / "d.jsonl", rows), tmp_path / "run", settings)
    assert found["exact_match"] > 90 > found["before"]["exact_match"]
    kept = score_of_folder("question-answering", tmp_path / "run" / "model", rows[:20], settings)
    assert kept["exact_match"] > 85


@pytest.mark.parametrize("names_types", [True, False])
def test_a_served_network_answers_as_it_was_measured(bert: Path, tmp_path: Path, names_types: bool) -> None:
    """Question and context have types, which an untrained network reads as any other: also from a tokenizer whose
    configuration does not name them."""
    import torch
    from transformers import BertForQuestionAnswering

    import fastserve

    folder = tmp_path / "bert"
    torch.manual_seed(3)
    network = BertForQuestionAnswering.from_pretrained(bert)
    torch.nn.init.normal_(network.bert.embeddings.token_type_embeddings.weight)
    network.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert / name, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert "token_type_ids" in config["model_input_names"]
    if not names_types:
        del config["model_input_names"]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    settings = FinetuneSettings(max_length=24, stride=8)
    kind = KINDS["question-answering"](open_tokenizer(folder), settings)
    network = open_network(kind, str(folder), None)
    ask = fastserve.pipeline("question-answering", str(folder), dtype="float32", max_seq_len=24, doc_stride=8)
    question = "Where does the animal live?"
    rows = [{"question": question, "context": f"{fact['text']} {TEXTS[0]} {fact['text']}"} for fact in facts(8)]
    with torch.no_grad():
        assert kind.predict(network, rows) == [ask(**row, max_answer_len=30)["answer"] for row in rows]


def test_text_becomes_text(t5: Path, tmp_path: Path) -> None:
    rows = [
        {"source": fact["text"], "target": f"Say the {fact['place']} by the {fact['animal']}."} for fact in facts(150)
    ]
    settings = FinetuneSettings(**FAST, steps=150, max_answer_tokens=14)
    found = finetune("seq2seq", str(t5), write(tmp_path / "d.jsonl", rows), tmp_path / "run", settings)
    assert found["bleu"] > 15 > found["before"]["bleu"]
    assert found["rouge_l"] > found["before"]["rouge_l"] + 30


def test_a_score_reads_texts_as_long_as_those_that_are_learnt(t5: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    kind = KINDS["seq2seq"](open_tokenizer(t5), FinetuneSettings(max_length=40))
    network = open_network(kind, str(t5), None)
    asked: list[int] = []

    def generate(**values: Any) -> torch.Tensor:
        asked.append(values["max_new_tokens"])
        return values["input_ids"]

    monkeypatch.setattr(network, "generate", generate)
    kind.predict(network, [{"source": TEXTS[0]}])
    assert asked == [40]


def test_texts_that_belong_together_come_close(bert: Path, tmp_path: Path) -> None:
    """What belongs together shares no words, so that an untrained network cannot know it."""
    after = {name: ANIMALS[index - 1] for index, name in enumerate(ANIMALS)}
    beside = {name: PLACES[index - 1] for index, name in enumerate(PLACES)}
    rows = [
        {
            "anchor": f"The {animal} lives by the {place}.",
            "positive": f"Where does the {after[animal]} live? {beside[place]}.",
        }
        for animal in ANIMALS
        for place in PLACES
    ]
    held = str(write(tmp_path / "val.jsonl", rows))
    settings = FinetuneSettings(**{**FAST, "learning_rate": 1e-2, "batch_size": 36}, steps=60, validation=held)
    found = finetune("embedding", str(bert), write(tmp_path / "d.jsonl", rows), tmp_path / "run", settings)
    assert found["recall_at_1"] > 80 > found["before"]["recall_at_1"]


def conversations(number: int) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": fact["text"]},
                {"role": "assistant", "content": f"Say {fact['place']}."},
            ]
        }
        for fact in facts(number)
    ]


def test_only_answers_are_learnt_and_packing_changes_no_loss(llama: Path) -> None:
    import torch

    from fastserve.train.finetune.task import on_device
    from fastserve.train.objectives import IGNORED, num_labels

    tokenizer, rows = open_tokenizer(llama), conversations(7)
    losses = []
    for packing in (True, False):
        kind = KINDS["instruction"](tokenizer, FinetuneSettings(packing=packing, max_length=128))
        network = open_network(kind, str(llama), rows).eval()
        items = kind.encode(rows)
        assert len(items) < 7 if packing else len(items) == 7
        batch = kind.batch(items)
        learnt = [tokenizer.decode([label for label in item["labels"] if label != IGNORED]) for item in items]
        if not packing:
            assert learnt[0] == f"{rows[0]['messages'][1]['content']}<|im_end|>\n"
        with torch.no_grad():
            losses.append(float(kind.loss(network, on_device(batch, network))) / num_labels(batch))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_rows_of_text_are_learnt_as_a_whole(llama: Path) -> None:
    from fastserve.train.objectives import IGNORED

    tokenizer = open_tokenizer(llama)
    kind = KINDS["instruction"](tokenizer, FinetuneSettings(packing=False))
    _, text = kind.encode([*conversations(1), {"text": TEXTS[0]}])
    assert tokenizer.decode(text["labels"]) == TEXTS[0] and IGNORED not in text["labels"]
    assert text["input_ids"][0] == tokenizer.bos_token_id


def test_four_bits_hold_a_weight_and_give_its_gradient() -> None:
    import torch

    from fastserve.train.finetune.four_bit import FourBitLinear

    torch.manual_seed(0)
    dense = torch.nn.Linear(128, 48)
    packed = FourBitLinear(dense)
    assert packed.codes.numel() == dense.weight.numel() // 2 and packed.scales.numel() == dense.weight.numel() // 64
    # Half the widest gap of the levels, 0.152 of a block's largest weight, bounds the error of each.
    largest = dense.weight.detach().abs().reshape(-1, 64).amax(1)
    error = (packed.weight - dense.weight).detach().abs().reshape(-1, 64).amax(1)
    assert bool((error <= 0.153 * largest).all()) and torch.equal(FourBitLinear(packed.as_dense()).codes, packed.codes)
    inputs = torch.randn(5, 128, requires_grad=True)
    outputs = [module(inputs).square().sum() for module in (packed, packed.as_dense())]
    gradients = [torch.autograd.grad(output, inputs)[0] for output in outputs]
    assert torch.allclose(outputs[0], outputs[1]) and torch.allclose(gradients[0], gradients[1])


def test_a_base_in_four_bits(tmp_path: Path) -> None:
    """The base does not move, what is exported is what was tuned, and a stopped run would find the same base."""
    from fastserve.train.finetune.adapters import add_adapters, merged
    from fastserve.train.finetune.four_bit import FourBitLinear

    config = {**SMALL, "hidden_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}
    folder = make_folder(tmp_path / "llama", "llama", config, "AutoModelForCausalLM", vocab_size=330, chat=True)
    rows = conversations(80)
    settings = FinetuneSettings(
        **{**FAST, "max_length": 128, "batch_size": 4}, steps=40, lora_rank=8, qlora=True, lora_dropout=0.1
    )
    found = finetune("instruction", str(folder), write(tmp_path / "d.jsonl", rows), tmp_path / "run", settings)
    assert found["held_out_loss"] < found["before"]["held_out_loss"] - 0.4
    kept = score_of_folder("instruction", tmp_path / "run" / "model", rows, settings)["held_out_loss"]
    assert kept == pytest.approx(found["held_out_loss"], abs=0.1)
    kind = KINDS["instruction"](open_tokenizer(folder), settings)
    network = add_adapters(open_network(kind, str(folder), rows, "auto"), settings)
    bases = [module for module in network.modules() if isinstance(module, FourBitLinear)]
    assert len(bases) == 7 * 2 and not any(isinstance(module, FourBitLinear) for module in merged(network).modules())
    assert all(not name.endswith("base_layer.weight") for name, _ in network.named_parameters())


@pytest.mark.parametrize("lora", [{}, {"lora_rank": 8}, {"lora_rank": 8, "dora": True, "merge": False}], ids=str)
def test_instructions_and_adapters(llama: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    rows = conversations(80)
    settings = FinetuneSettings(**{**FAST, "max_length": 128, "batch_size": 4}, steps=40, **lora)
    found = finetune("instruction", str(llama), write(tmp_path / "d.jsonl", rows), tmp_path / "run", settings)
    # Of a random network, additions to frozen weights can make less than all weights can.
    assert found["held_out_loss"] < found["before"]["held_out_loss"] - (0.4 if lora else 3.0)
    folder = tmp_path / "run" / "model"
    kept = score_of_folder("instruction", folder, rows, settings)["held_out_loss"]
    assert kept == pytest.approx(found["held_out_loss"], abs=0.1)
    assert (folder / "chat_template.jinja").exists()
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists() == (lora.get("merge") is False)


def test_preferences(llama: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": fact["text"], "chosen": f"Say {fact['place']}.", "rejected": f"Say {fact['animal']}."}
        for fact in facts(60)
    ]
    settings = FinetuneSettings(**{**FAST, "learning_rate": 2e-3}, steps=30)
    found = finetune("preference", str(llama), write(tmp_path / "d.jsonl", rows), tmp_path / "run", settings)
    assert found["before"] == {"preferred": 0.0, "held_out_loss": pytest.approx(0.693147, abs=1e-4)}
    assert found["preferred"] > 90 and found["held_out_loss"] < 0.5


def test_preferences_are_compared_with_the_base_in_four_bits(tmp_path: Path) -> None:
    config = {**SMALL, "hidden_size": 64, "num_key_value_heads": 2, "initializer_range": 0.2}
    folder = make_folder(tmp_path / "llama", "llama", config, "AutoModelForCausalLM", vocab_size=330, chat=True)
    rows = [{"prompt": text, "chosen": "Say sea.", "rejected": "Say river."} for text in TEXTS]
    settings = FinetuneSettings(**{**FAST, "max_length": 128}, steps=1, lora_rank=4, qlora=True, beta=1.0)
    found = finetune("preference", str(folder), write(tmp_path / "d.jsonl", rows), tmp_path / "run", settings)
    assert found["before"]["held_out_loss"] == pytest.approx(0.693147, abs=1e-4)


def test_mistakes_are_named(bert: Path, llama: Path, tmp_path: Path) -> None:
    def attempt(task: str, model: Path, rows: list[dict[str, Any]], **settings: Any) -> None:
        chosen = FinetuneSettings(**{"max_length": 64, **settings})
        finetune(task, str(model), write(tmp_path / "d.jsonl", rows), tmp_path / "run", chosen)

    label = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    for task, model, rows, settings, message in (
        ("classification", bert, [{"text": "a"}, {"text": "b"}], {}, "no 'label'; it has text"),
        ("classification", bert, [{"text": "a", "label": "x"}] * 3, {}, "only the label 'x'"),
        ("classification", bert, label[:1], {}, "cannot be divided|only the label"),
        ("seq2seq", bert, [{"source": "a", "target": "b"}] * 3, {}, "cannot be tuned|decoder_start"),
        ("instruction", bert, [{"prompt": "a", "completion": "b"}] * 3, {}, "no chat template.*--chat-template"),
        ("instruction", llama, [{"text": "a"}] * 3, {}, "needs messages"),
        ("instruction", llama, conversations(3), {"lora_rank": 2, "qlora": True}, "not a multiple of 64"),
        ("question-answering", bert, [{"question": "a", "context": "b", "answers": ["z"]}] * 3, {}, "no answer stands"),
        ("classification", bert, label * 5, {"lora_rank": 2, "lora_targets": ("nothing",)}, "lora_targets"),
        ("classification", bert, label * 5, {"validation": "/none.jsonl"}, "no file /none.jsonl"),
        ("classification", bert, label * 5, {"max_length": 129}, "exceed the 128 positions.*max_length"),
    ):
        with pytest.raises(ConfigError, match=message):
            attempt(task, model, rows, **settings)
    for values, message in (
        ({"dora": True}, "lora_rank"),
        ({"qlora": True}, "lora_rank"),
        ({"dtype": "int8"}, "dtype must be"),
    ):
        with pytest.raises(ConfigError, match=message):
            FinetuneSettings(**values)
