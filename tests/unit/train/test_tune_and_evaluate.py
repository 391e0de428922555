from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fastserve.core.errors import ConfigError
from fastserve.train.evaluate import perplexity
from fastserve.train.plan import plan
from fastserve.train.pretrain import plan_config, pretrain
from fastserve.train.tune import check_search, tune
from tests.unit.train.conftest import make_recipe

SEARCH = {
    "optimizer.learning_rate": {"low": 1e-7, "high": 2e-2, "log": True},
    "model.config.num_hidden_layers": {"choices": [1, 2]},
}


def test_a_search_finds_the_better_values_and_goes_on(corpora: dict[str, Path], tmp_path: Path) -> None:
    recipe = make_recipe(corpora["bpe"], search=SEARCH, train={"steps": 6, "evaluate_every": 2, "checkpoint_every": 6})
    first = tune(recipe, tmp_path, 2)
    assert first["trials"] == 2
    best = tune(recipe, tmp_path, 7)
    assert best["trials"] == 7 and best["held_out_loss"] <= first["held_out_loss"]
    assert best["values"]["optimizer.learning_rate"] > 1e-5 and Path(best["model"]).exists()
    assert json.loads((tmp_path / "best.json").read_text()) == best
    assert tune(recipe, tmp_path, 7) == best


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({}, r"no \[search\]"),
        ({"optimizer.rate": {"choices": [1]}}, "'optimizer.rate' is no key"),
        ({"optimizer.learning_rate": {"low": 1}}, "low, high"),
        ({"optimizer.schedule": {"choices": ["sine"]}}, "must be one of cosine"),
    ],
)
def test_a_bad_search_stops_before_the_first_trial(
    corpora: dict[str, Path], search: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_search(make_recipe(corpora["bpe"], search=search))


def test_perplexity_is_that_of_training(corpora: dict[str, Path], tmp_path: Path) -> None:
    """Windows of whole documents here, packed rows there: the same but for the documents that rows cut."""
    pretrain(make_recipe(corpora["bpe"], train={"steps": 30}), tmp_path / "run")
    found = perplexity(str(tmp_path / "run" / "model"), corpora["bpe"])
    measured = json.loads((tmp_path / "run" / "model" / "fastserve.json").read_text())["measured"]
    assert found["loss"] == pytest.approx(measured["held_out_loss"], abs=0.25)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-3)

    # Without a token that opens a text, the first of a window is not predicted, but its bytes are in the text.
    folder = tmp_path / "run" / "model"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": None}))
    other = perplexity(str(folder), corpora["bpe"])
    assert other["tokens"] < found["tokens"]
    expected = other["loss"] / found["loss"] * found["bits_per_byte"]
    assert other["bits_per_byte"] == pytest.approx(expected, rel=1e-4)


def test_a_plan_counts_what_is_made(corpora: dict[str, Path]) -> None:
    from fastserve.train.network import make_network

    recipe = make_recipe(corpora["bpe"], train={"ema_decay": 0.9})
    found = plan(recipe, plan_config(recipe), "h100")
    network = make_network(recipe.model, plan_config(recipe), "causal", 0)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert found.parameters == parameters
    assert found.weight_bytes == found.gradient_bytes == found.average_bytes == 4 * parameters
    assert found.optimizer_bytes == 8 * parameters
    assert found.tokens == 8 * 256 and found.seconds == pytest.approx(found.tokens / found.tokens_per_second)
    with pytest.raises(ConfigError, match="accelerator must be one of"):
        plan(recipe, plan_config(recipe), "abacus")


def test_a_server_is_asked_for_its_model() -> None:
    import json
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    from fastserve.train.evaluate import served_name

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": "tales"}]}).encode())

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    assert served_name(f"http://127.0.0.1:{server.server_port}/") == "tales"
    server.server_close()
    with pytest.raises(ConfigError, match="does not list its models"):
        served_name(f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(ConfigError, match="no address"):
        served_name("tales")
