"""From raw books to the built-in model's folder, at toy size: the functions behind the script's commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastserve import LLM
from fastserve.checkpoint.folder import ModelFolder
from fastserve.train.data.prepare import prepare
from fastserve.train.data.settings import PrepareSettings
from fastserve.train.finetune.run import finetune
from fastserve.train.finetune.settings import FinetuneSettings
from fastserve.train.pretrain import pretrain
from fastserve.train.storyteller.__main__ import main
from fastserve.train.tokenizer import TokenizerSettings, make_tokenizer_folder, texts_of
from tests.unit.train.conftest import make_recipe


def test_the_steps_make_a_folder_that_is_served(data_folder: Path, recipe_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["texts", str(recipe_path), "--out", str(out), "--data", str(data_folder)]) == 0
    assert (out / "CREDITS.md").read_text().count("A. Writer") == 1
    settings = TokenizerSettings(vocab_size=400, chat=True)
    make_tokenizer_folder(texts_of([str(out / "texts" / "stories.jsonl")]), out / "tokenizer", settings)
    rules = PrepareSettings(quality=False, near_duplicates=False, workers=1, validation_share=0.0)
    for source, name in (("texts/stories", "stories"), ("held_out/held_out", "books")):
        prepare([str(out / f"{source}.jsonl")], out / "data" / name, rules, out / "tokenizer")
    held_out = {"length": 64, "held_out": {"books": str(out / "data" / "books")}}
    train = {"steps": 4, "batch_tokens": 256, "evaluate_every": 2}
    measured = pretrain(make_recipe(out / "data" / "stories", data=held_out, train=train), out / "pretrain")
    assert measured["held_out_loss"] == measured["held_out_loss_books"] > 0

    tuning = FinetuneSettings(steps=2, batch_size=4, max_length=96, precision="float32", evaluate_examples=4)
    finetune("instruction", str(out / "pretrain" / "model"), out / "chats.jsonl", out / "chat", tuning)
    assert main(["finish", str(recipe_path), "--out", str(out)]) == 0
    card = json.loads((out / "model" / "fastserve.json").read_text())
    assert card["held_out"].keys() == {
        f"{text}, after {stage}" for text in ("held_out", "storybooks") for stage in ("pretrain", "chat")
    }
    assert card["steps"] == {"pretrain": 4, "chat": 2} and 0 <= card["on_topic"]["on_topic"] <= 1
    assert set(card["data_sha256"]) == {"stories.txt", "storybooks.jsonl", "held_out.txt"}
    assert "On-topic score" in (out / "model" / "README.md").read_text()
    folder = ModelFolder.open(str(out / "model"))
    assert json.loads((folder.path / "generation_config.json").read_text())["max_new_tokens"] == 8
    assert LLM(str(out / "model")).chat([{"role": "user", "content": "hello"}])[0].outputs[0].token_ids


def test_errors_are_one_line(recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["texts", str(recipe_path), "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("fastserve: training text")
    assert main(["finish", str(recipe_path), "--out", str(tmp_path / "out")]) == 2
    assert "run the step 'pretrain'" in capsys.readouterr().err


def test_importing_the_room_is_light() -> None:
    import subprocess
    import sys

    code = "import sys, fastserve.train.storyteller.__main__; print({'torch', 'transformers'} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"
