"""The command line, the report, and the search: what they print and write is what was done."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from fastserve.checkpoint.folder import ModelFolder
from fastserve.cli.main import app
from fastserve.compress import search as search_module
from fastserve.compress.evaluate import compare, task
from fastserve.compress.network import load_dense
from fastserve.compress.recipe import Calibration, Distill, Evaluation, Prune, Quantize, Rotate, Window, make_recipe
from fastserve.compress.report import as_text, front, page
from fastserve.compress.run import compress
from fastserve.compress.search import search
from fastserve.core.errors import ConfigError
from tests.folders import IM_START, llama
from tests.unit.compress.test_quantize import logits

runner = CliRunner()


def test_the_command_writes_folder_card_and_report(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [
        "compress",
        str(models["llama"]),
        "--out",
        str(out),
        "--method",
        "gptq",
        "--group-size",
        "32",
        "--json",
    ]
    arguments += ["--calibration", str(text), "--samples", "6", "--length", "48", "--evaluation", str(text)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout.splitlines()[-1])
    assert printed == json.loads((out / "fastserve.json").read_text())["compressed"]
    assert printed["bytes"]["compressed"] == ModelFolder.open(str(out)).weight_bytes
    loss = printed["loss"]
    assert 0 < loss["kl"] < 1 and 0.3 < loss["same_top"] < 1
    assert loss["increase"] == pytest.approx(loss["perplexity"] / loss["original_perplexity"] - 1)
    html = (out / "report.html").read_text()
    assert html.count("<rect") == 14 and "model.layers.1.mlp.down_proj" in html
    assert "http://" not in html and "https://" not in html and "<script" not in html
    assert len(printed["samples"][0]["compressed"]) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--out DIR"),
        (["--out", "x", "--bits", "1"], "bits"),
        (["--out", "x", "--method", "gptq"], "calibration"),
        (["--out", "x", "--max-loss", "0.1"], "go with --auto"),
        (["--out", "x", "--auto", "--max-loss", "0.1"], "evaluation"),
        (["--out", "x", "--recipe", "none.toml"], "cannot read the recipe"),
        (["--out", "x", "--gguf", "q8_0", "--auto"], "--gguf writes a model as it is"),
        (["--out", "x", "--dense", "--bits", "4"], "leave out --bits"),
        (["--out", "x", "--auto", "--max-loss", "0.1", "--group-size", "0"], "leave out --group-size"),
        (["--out", "x", "--auto", "--recipe", "none.toml", "--asymmetric"], "leave out --recipe, --symmetric"),
        (["--out", "x", "--recipe", "none.toml", "--method", "rtn", "--samples", "3"], "leave out --method, --samples"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["compress", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["llama", "bert", "t5"])
def test_a_model_does_not_differ_from_itself(models: dict[str, Path], text: Path, kind: str) -> None:
    folder = ModelFolder.open(str(models[kind]))
    found = compare(folder, folder, Evaluation(str(text), tokens=200, length=40), lambda *_: None)
    assert found.kl == pytest.approx(0, abs=1e-6) and found.same_top == 1 and found.increase == 0
    assert found.tokens == {"llama": 195, "t5": 100}.get(kind, found.tokens)


def test_masked_models_see_the_mask_of_their_tokenizer(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    folder = ModelFolder.open(str(models["bert"]))
    inputs, targets = task(folder, torch.full((2, 50), 7))
    assert set(inputs["input_ids"][targets >= 0].tolist()) == {IM_START} and not bool((targets == IM_START).any())
    shutil.copytree(models["bert"], tmp_path / "bare")
    file = tmp_path / "bare" / "tokenizer_config.json"
    settings = {key: value for key, value in json.loads(file.read_text()).items() if key != "mask_token"}
    file.write_text(json.dumps(settings))
    evaluated = {"steps": [{"do": "quantize", "bits": 8}], "evaluation": {"text": str(text)}}
    for values in (evaluated, {"steps": [{"do": "distill", "text": str(text)}]}):
        with pytest.raises(ConfigError, match="names no mask token"):
            compress(str(tmp_path / "bare"), tmp_path / "out", make_recipe(values))
    assert [item.name for item in tmp_path.iterdir()] == ["bare"]


def test_a_model_is_not_judged_on_what_it_writes(models: dict[str, Path], tmp_path: Path) -> None:
    values = {"steps": [{"do": "quantize", "bits": 8}], "evaluation": {"text": "generated"}}
    with pytest.raises(ConfigError, match=r"evaluation\.text = 'generated' is no file"):
        compress(str(models["llama"]), tmp_path / "out", make_recipe(values))
    assert not list(tmp_path.iterdir())


def test_calibration_by_the_model_itself_and_speed(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {"steps": [{"do": "quantize", "method": "gptq", "group_size": 32}]}
    values["calibration"] = {"text": "generated", "samples": 3, "length": 24}
    values["evaluation"] = {"text": str(text), "tokens": 400, "length": 40, "speed": True}
    folders = [compress(str(models["llama"]), tmp_path / name, make_recipe(values)) for name in ("a", "b")]
    first, second = ([file.read_bytes() for file in folder.shards] for folder in folders)
    assert first == second
    card = json.loads((folders[0].path / "fastserve.json").read_text())["compressed"]
    assert all(min(pair.values()) > 0 for pair in card["speed"].values()) and len(card["speed"]) == 2
    assert "decode, tokens/s" in as_text(folders[0], card)


@pytest.mark.parametrize(
    "step",
    [{"do": "quantize", "method": "kmeans"}, {"do": "prune", "method": "magnitude", "ratio": 0.8, "store": "bitmask"}],
    ids=["codebook", "bitmask"],
)
def test_scores_on_a_task_are_of_what_was_written(
    models: dict[str, Path], text: Path, tmp_path: Path, step: dict[str, Any]
) -> None:
    """The scorer gets folders that transformers loads, with the values of the weights, whatever form they are in."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    seen: list[torch.Tensor] = []

    def score(folder: str) -> dict[str, float]:
        AutoTokenizer.from_pretrained(folder)
        network = AutoModelForCausalLM.from_pretrained(folder).eval()
        seen.append(logits(network, ModelFolder.open(folder)))
        return {"accuracy": float(len(seen))}

    values = {"steps": [step], "evaluation": {"task": "classification", "examples": str(text)}}
    out = compress(str(models["llama"]), tmp_path / "out", make_recipe(values), score=score)
    for folder, found in zip((ModelFolder.open(str(models["llama"])), out), seen, strict=True):
        assert torch.allclose(found, logits(load_dense(folder), folder), atol=1e-4)
    card = json.loads((out.path / "fastserve.json").read_text())["compressed"]
    assert card["task"] == {"name": "classification", "original": {"accuracy": 1.0}, "compressed": {"accuracy": 2.0}}
    assert "classification, accuracy" in as_text(out, card) and "classification, accuracy" in page(card)
    with pytest.raises(ConfigError, match="score="):
        compress(str(models["llama"]), tmp_path / "none", make_recipe(values))


def test_every_key_and_flag_is_documented(repository: Path) -> None:
    page_text = (repository / "docs/compression.md").read_text(encoding="utf-8")
    keys = {
        key
        for section in (Calibration, Evaluation, Quantize, Prune, Rotate, Window, Distill)
        for key in section.__struct_fields__
    }
    assert [key for key in sorted(keys) if not re.search(rf"`{key}`|^{key} = ", page_text, re.MULTILINE)] == []
    flags = re.findall(r"--[a-z-]+", runner.invoke(app, ["compress", "--help"]).output)
    unknown = {"--help", "--symmetric"}
    assert [flag for flag in flags if flag not in page_text and flag not in unknown] == []


def test_names_in_a_report_are_no_markup() -> None:
    card: dict[str, Any] = {"from": "<b>x</b>", "steps": [], "bytes": {"original": 2, "compressed": 1}}
    card["samples"] = [{"prompt": "<script>", "original": "a & b", "compressed": "<i>"}]
    assert "<b>x" not in page(card) and "<script" not in page(card) and "a &amp; b" in page(card)


def test_the_front() -> None:
    variants = [{"bytes": 4, "perplexity": 1.0}, {"bytes": 2, "perplexity": 2.0}, {"bytes": 3, "perplexity": 2.5}]
    assert front(variants) == [0, 1]


def test_a_search(models: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ladder = {name: search_module.LADDER[name] for name in ("int8", "int4 in 32", "codebook3")}
    monkeypatch.setattr(search_module, "LADDER", ladder)
    settings = (Calibration(str(text), 4, 32), Evaluation(str(text), 200, 40))
    model = str(models["llama"])
    smallest = search(model, tmp_path / "loss", *settings, max_loss=1000.0)
    card = json.loads((smallest.path / "fastserve.json").read_text())["compressed"]
    sizes = {item["name"]: item["bytes"] for item in card["variants"]}
    assert list(sizes) == list(ladder) and smallest.weight_bytes == min(sizes.values())
    assert [item.name for item in tmp_path.iterdir()] == ["loss"]
    assert (smallest.path / "report.html").read_text().count("<circle") == 3
    best = search(model, tmp_path / "size", *settings, max_bytes=sizes["int8"])
    assert best.weight_bytes == sizes["int8"]
    with pytest.raises(ConfigError, match=r"no variant is within 1000 B; the smallest, codebook3"):
        search(model, tmp_path / "none", *settings, max_bytes=1000)
    with pytest.raises(ConfigError, match="one limit"):
        search(model, tmp_path / "none", *settings)


def test_a_search_takes_no_variant_of_another(
    models: dict[str, Path], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_module, "LADDER", {name: search_module.LADDER[name] for name in ("int8", "codebook3")})
    settings = (Calibration(str(text), 4, 32), Evaluation(str(text), 200, 40))

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "quantize" and list(tmp_path.glob("*.try-codebook3.partial")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(str(models["llama"]), tmp_path / "out", *settings, max_loss=1000.0, progress=interrupt)
    left = tmp_path / "out.try-int8"
    stamp = (left / "config.json").stat().st_mtime_ns
    other = llama(tmp_path / "other", hidden_size=64, intermediate_size=128, seed=1)
    with pytest.raises(ConfigError, match="begun with another recipe or model"):
        search(str(other), tmp_path / "out", *settings, max_loss=1000.0)
    assert (left / "config.json").stat().st_mtime_ns != stamp  # tried anew
    shutil.rmtree(tmp_path / "out.try-codebook3.partial")
    found, fresh = (search(str(other), tmp_path / name, *settings, max_loss=1000.0) for name in ("out", "fresh"))
    cards = [json.loads((folder.path / "fastserve.json").read_text())["compressed"] for folder in (found, fresh)]
    assert cards[0]["variants"] == cards[1]["variants"]
