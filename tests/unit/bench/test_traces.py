"""Trace files of every known format; scaling to a context and to a load; equal prefix hashes, equal tokens."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fastserve.bench.traces import prompt_ids, read_trace
from fastserve.core.errors import ConfigError

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:16:46.6805900,4000,1
"""
SERVEGEN = "arrival_s,client_id,input_tokens,output_tokens\n0.5,14,23,3\n1.5,26,55,8\n2.5,14,29,2\n"
VIDUR = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3772,54,3826,69.8\n2015,156,2171,12.9\n"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_azure_times_and_lengths(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, "azure.csv", AZURE))
    assert [(item.num_prompt, item.num_output) for item in trace.requests] == [(374, 44), (396, 109), (4000, 1)]
    assert trace.requests[2].arrival - trace.requests[0].arrival == pytest.approx(60)
    assert trace.has_arrivals


def test_azure_times_are_utc_unless_they_say_otherwise(tmp_path: Path) -> None:
    times = ["2024-05-10 00:00:00.009930+00:00", "2024-05-10 00:00:01", "2024-05-10 01:00:02+01:00"]
    rows = "".join(f"{time},5,5\n" for time in times)
    trace = read_trace(write(tmp_path, "azure.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows))
    since = [item.arrival - datetime(2024, 5, 10, tzinfo=UTC).timestamp() for item in trace.requests]
    assert since == pytest.approx([0.00993, 1, 2], abs=1e-5)


def test_servegen_names_tenants_and_offset_and_count_choose(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, "servegen.csv", SERVEGEN), num_requests=2, offset=1)
    assert [(item.tenant, item.num_prompt) for item in trace.requests] == [("26", 55), ("14", 29)]
    assert trace.offset == 1


def test_lengths_without_arrivals_get_poisson_ones_by_seed(tmp_path: Path) -> None:
    path = write(tmp_path, "vidur.csv", VIDUR)
    arrivals = [[item.arrival for item in read_trace(path, seed=seed).requests] for seed in (0, 0, 1)]
    assert arrivals[0] == arrivals[1] != arrivals[2]
    assert 0 < arrivals[0][0] < arrivals[0][1]
    assert not read_trace(path).has_arrivals


def test_mooncake_prefixes_are_equal_where_hashes_are(tmp_path: Path) -> None:
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 3]},
        {"timestamp": 1500, "input_length": 1300, "output_length": 5, "hash_ids": [1, 2, 4]},
    ]
    trace = read_trace(write(tmp_path, "mooncake.jsonl", "\n".join(map(json.dumps, rows)))).fit(4096, 0.25)
    first, second = (prompt_ids(item, index, 1000) for index, item in enumerate(trace.requests))
    assert (len(first), len(second)) == (275, 325)
    assert first[:256] == second[:256]  # two hashes of 512 tokens, scaled to 128
    assert first[256:] != second[256:275]
    assert trace.requests[1].arrival == 1.5


def test_fit_scales_by_one_factor_and_clips_prompts(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, "azure.csv", AZURE)).fit(1000, 0.5)
    assert [(item.num_prompt, item.num_output) for item in trace.requests] == [(187, 22), (198, 54), (999, 1)]
    assert read_trace(tmp_path / "azure.csv").fit(100_000).length_scale == 1.0


def test_at_rate_scales_arrivals_by_one_factor(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path, "servegen.csv", SERVEGEN)).at_rate(4.0)
    assert [item.arrival for item in trace.requests] == pytest.approx([0, 0.25, 0.5])
    assert trace.requests_per_second == pytest.approx(4.0)


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "nowhere.csv")
    with pytest.raises(ConfigError, match="no known trace format has the columns a, b"):
        read_trace(write(tmp_path, "odd.csv", "a,b\n1,2\n"))
    with pytest.raises(ConfigError, match="3 requests; 4 from 0"):
        read_trace(write(tmp_path, "azure.csv", AZURE), num_requests=4)
    for numbers in ({"num_requests": -5}, {"num_requests": 1}, {"offset": -5}):
        for name in (tmp_path / "azure.csv", "heavy-tailed"):
            with pytest.raises(ConfigError, match="2 requests or more"):
                read_trace(name, **numbers)
    with pytest.raises(ConfigError, match="no room"):
        read_trace(tmp_path / "azure.csv").fit(1)


MOONCAKE = '{"timestamp": 0, "input_length": 9, "output_length": 5, "hash_ids": [1]}\n'


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("cut.csv", AZURE + "2023-11-16 18:16:47,40", 5),
        ("long.csv", SERVEGEN + "9" * 200_000 + ",14,23,3\n", 5),
        ("null.jsonl", MOONCAKE + MOONCAKE.replace("[1]", "null"), 2),
        ("list.jsonl", MOONCAKE * 2 + "[1, 2]\n", 3),
        ("cut.jsonl", MOONCAKE + MOONCAKE[:40], 2),
    ],
)
def test_the_line_that_cannot_be_read_is_named(tmp_path: Path, name: str, text: str, line: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} cannot be read, line {line}: "):
        read_trace(write(tmp_path, name, text))
