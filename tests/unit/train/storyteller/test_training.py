"""A whole run on toy texts: it learns, it resumes exactly, and transformers loads what it exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastserve.train.storyteller.__main__ import main
from fastserve.train.storyteller.optimizer import learning_rate_share
from fastserve.train.storyteller.recipe import Optimizer, read_recipe


@pytest.fixture
def run(recipe_path: Path, data_folder: Path, tmp_path: Path):
    def call(*extra: str, out: str = "out") -> Path:
        folder = tmp_path / out
        assert main([str(recipe_path), "--data", str(data_folder), "--out", str(folder), "--no-compile", *extra]) == 0
        return folder

    return call


def test_all_stages_make_a_model_that_transformers_loads(run, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run() / "model"
    reports = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    losses = [report["loss"] for report in reports if report["stage"] == "pretrain" and "loss" in report]
    assert losses[-1] < losses[0] < 6.0
    assert any("held_out_bits_per_byte" in report for report in reports)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Tell me a story."}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    answer = model.generate(prompt)[0, prompt.shape[1] :]
    assert 1 <= len(answer) <= 8

    card = json.loads((folder / "fastserve.json").read_text())
    assert card["recipe"]["seed"] == 7
    assert card["tokens"] == {"pretrained": 12 * 512, "tuned": 4 * 512}
    assert set(card["data_sha256"]) == {"stories.txt", "storybooks.jsonl", "held_out.txt"}
    assert card["held_out"]["held_out, after pretrain"]["loss"] < 6.0
    assert card["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert card["name"] in (folder / "README.md").read_text()


def test_an_interrupted_run_resumes_exactly(run, recipe_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("--stage", "tokenizer", out="whole")
    run("--stage", "pretrain", out="whole")
    run("--stage", "tokenizer", out="cut")
    with monkeypatch.context() as patch:
        patch.setattr("fastserve.train.storyteller.pretrain.held_out_loss", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("--stage", "pretrain", out="cut")
    cut = run("--stage", "pretrain", out="cut")
    expected, resumed = (load_file(folder / "pretrain.safetensors") for folder in (whole, cut))
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


def _interrupt(*_: object) -> dict[str, float]:
    raise KeyboardInterrupt


def test_errors_are_one_line(recipe_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(recipe_path), "--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: training text")


def test_stage_out_of_order_says_what_to_run(recipe_path: Path, data_folder: Path, tmp_path: Path, capsys) -> None:
    arguments = [str(recipe_path), "--data", str(data_folder), "--out", str(tmp_path / "out"), "--stage"]
    assert main([*arguments, "tune"]) == 2
    assert "run the stage `tokenizer` first" in capsys.readouterr().err
    main([*arguments, "tokenizer"])
    assert main([*arguments, "tune"]) == 2
    assert "run the stage `pretrain` first" in capsys.readouterr().err


def test_learning_rate_warms_up_holds_and_decays() -> None:
    section = Optimizer(1.0, 1.0, warmup_steps=4, decay_steps=10, final_share=0.2)
    shares = [learning_rate_share(step, 30, section) for step in range(31)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(shares[4:21]) == {1.0}
    assert shares[25] == pytest.approx(0.6)
    assert shares[30] == pytest.approx(0.2)


def test_importing_the_room_is_light() -> None:
    import subprocess
    import sys

    code = "import sys, fastserve.train.storyteller.loop; print({'torch', 'transformers'} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_recipe_of_the_card_is_complete(recipe_path: Path) -> None:
    assert json.loads(json.dumps(read_recipe(recipe_path).as_dict()))["tune"]["retold_share"] == 0.7


def test_its_texts_go_through_the_general_commands(data_folder: Path, recipe_path: Path, tmp_path: Path) -> None:
    """What the stage writes can be prepared, and its chats can be tuned on."""
    from fastserve.train.data.prepare import prepare
    from fastserve.train.data.settings import PrepareSettings
    from fastserve.train.finetune.chat import messages_of
    from fastserve.train.finetune.examples import read_examples

    out = tmp_path / "out"
    for stage in ("tokenizer", "texts"):
        assert main([str(recipe_path), "--data", str(data_folder), "--out", str(out), "--stage", stage]) == 0
    settings = PrepareSettings(quality=False, near_duplicates=False, workers=1, validation_share=0.0)
    report = prepare([str(out / "texts" / "stories.jsonl")], tmp_path / "prepared", settings)
    assert report["documents_out"] > 10
    chats = [messages_of(row) for row in read_examples(out / "chats.jsonl")]
    assert chats and all(chat[-1]["role"] == "assistant" and chat[-1]["content"] for chat in chats)
