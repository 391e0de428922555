"""The workload's fixed numbers, and the report's form."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastserve.bench import latency, report, throughput, workload
from fastserve.bench.engine import BenchConfig, describe, open_engine
from fastserve.cli.main import app
from fastserve.core.errors import ConfigError
from tests import folders


def test_mixed_case_is_the_published_one() -> None:
    """32 requests with these totals: a change would make figures incomparable with earlier ones."""
    prompts = workload.mixed_case()
    assert len(prompts) == 32
    assert sum(item.num_outputs for item in prompts) == 2622
    assert sum(len(item.token_ids) for item in prompts) == 9501
    assert workload.decode_case().token_ids[:3] == workload.random_ids(3, seed=1)
    assert workload.prefill_case().num_outputs == 1


def test_fit_wraps_only_what_does_not_fit() -> None:
    prompts = workload.uniform_case(3, 50, 8)
    assert workload.fit(prompts, 8000) == prompts
    small = workload.fit(prompts, 500)
    assert max(token_id for item in small for token_id in item.token_ids) < 500
    assert [item.num_outputs for item in small] == [8, 8, 8]


def test_percentile() -> None:
    assert report.percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert report.percentile([1.0, 2.0], 0.25) == 1.25
    assert report.percentile([5.0], 0.99) == 5.0
    assert math.isnan(report.percentile([], 0.5))


def test_report_is_a_table_on_stderr_and_one_line_on_stdout(capsys) -> None:
    made = report.Report("example", config={"dtype": "bfloat16"}, repeats=3, skipped={"vllm": "not installed"})
    made.add_runs("decode_ratio", [1.0, 3.0, 1.5])
    made.limits["before"] = report.measure_limits(megabytes=4, size=64)
    report.emit(made.as_dict())
    captured = capsys.readouterr()
    [line] = captured.out.splitlines()
    value = json.loads(line)
    assert list(value)[:8] == ["name", "commit", "machine", "versions", "config", "metrics", "repeats", "skipped"]
    assert value["metrics"] == {"decode_ratio": 1.5} and value["runs"] == {"decode_ratio": [1.0, 3.0, 1.5]}
    assert value["machine"]["limits"]["before"]["read_gb_s"] > 0
    assert value["machine"]["num_cores"] >= 1 and "torch" in value["versions"]
    assert "decode_ratio  1.5" in captured.err and "skipped vllm: not installed" in captured.err


def test_a_report_does_not_need_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert report.Report("example").as_dict()["commit"] == "unknown"


def test_lengths_beyond_the_model_are_refused_and_all_options_reported(tmp_path: Path) -> None:
    model = str(folders.llama(tmp_path / "llama"))
    options = {"kv_cache_memory": 2**23, "max_model_len": 128}
    with pytest.raises(ConfigError, match="150 tokens together, but this engine takes 128"):
        latency.run(model, input_length=50, output_length=100, **options)
    with pytest.raises(ConfigError, match="150 tokens together"):
        throughput.run(model, input_length=50, output_length=100, **options)
    config = BenchConfig.from_options({"model": model, **options, "speculation": "auto"})
    described = describe(open_engine(config), config)
    assert (described["speculation"], described["prefix_caching"], described["max_model_len"]) == ("auto", False, 128)


@pytest.mark.parametrize(
    ("flags", "speculation", "prefix_caching"),
    [
        ([], "off", False),
        (["--prefix-caching", "--speculation", "auto"], "auto", True),
        (["--draft-model", "small"], "auto", False),
        (["--draft-model", "small", "--speculation", "draft"], "draft", False),
    ],
)
def test_flags_reach_the_engine_under_test(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], speculation: str, prefix_caching: bool
) -> None:
    seen: list[BenchConfig] = []

    def opened(config: BenchConfig) -> None:
        seen.append(config)
        raise ConfigError("seen enough")

    for name, module in (("latency", latency), ("throughput", throughput)):
        monkeypatch.setattr(module, "open_engine", opened)
        assert "seen enough" in CliRunner().invoke(app, ["bench", name, *flags]).output
    assert {(config.speculation, config.prefix_caching) for config in seen} == {(speculation, prefix_caching)}
