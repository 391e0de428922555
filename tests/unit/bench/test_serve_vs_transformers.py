"""The comparison's own machinery: both sides do the same work on the same model, and settings are chosen by speed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import serve_vs_transformers as compare
from fastserve.bench import workload
from tests import folders

PROMPTS = [workload.Prompt(workload.random_ids(20 + 7 * i, seed=i, first=3, last=300), 6 + i) for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.qwen3(tmp_path_factory.mktemp("model") / "qwen3", dtype="bfloat16")


@pytest.mark.slow
def test_both_sides_do_the_same_work(folder: Path) -> None:
    """Same tokens asked for, same tokens at the beginning; and one request alone gives what it gives among others."""
    tokens = {}
    for name, kind in compare.SIDES.items():
        side = kind(str(folder))
        settings = {"max_batch_tokens": 64, "max_requests_per_batch": 2} if name == "transformers" else {}
        seconds, tokens[name] = side.generate_all(PROMPTS, settings)
        assert seconds > 0
        assert [len(ids) for ids in tokens[name]] == [item.num_outputs for item in PROMPTS]
        assert side.generate_one(PROMPTS[1])[:4] == tokens[name][1][:4]
    assert compare.agreement(tokens["ours"], tokens["transformers"]) >= 0.75


@pytest.mark.slow
def test_a_worker_answers_and_ends(folder: Path) -> None:
    worker = compare.Worker("ours", folder)
    seconds, tokens = worker.ask("all", PROMPTS[:2])
    assert seconds > 0 and [len(ids) for ids in tokens] == [6, 7]
    assert worker.decode_speed(workload.Prompt(PROMPTS[0].token_ids, 40)) > 0
    worker.close()


def test_a_worker_that_dies_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the worker ended with status 1"):
        compare.Worker("ours", tmp_path / "missing")


def test_agreement() -> None:
    assert compare.agreement([[1, 2, 3, 4, 5], [9]], [[1, 2, 3, 4, 6], [8]]) == 0.5


def test_the_fastest_settings_are_chosen() -> None:
    class FakeWorker:
        def ask(self, case: str, prompts: object, settings: dict[str, int]) -> tuple[float, list[list[int]]]:
            return (1.0 if settings["max_batch_tokens"] == 512 else 2.0), []

    settings, tried = compare.choose_settings(FakeWorker(), PROMPTS)
    assert settings["max_batch_tokens"] == 512
    assert len(tried) == len(compare.TRANSFORMERS_SETTINGS)
    assert max(tried.values()) == sum(item.num_outputs for item in PROMPTS)
