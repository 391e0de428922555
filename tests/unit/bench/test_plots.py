"""The pictures are made, and the page needs no other file."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastserve.bench.policies import plot
from fastserve.bench.simulate import Machine
from fastserve.core.errors import ConfigError
from fastserve.scheduler.cost import Coefficients

pytest.importorskip("matplotlib")


def test_plots_and_page(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    rows = "".join(f"{index * 0.1},c,16,{60 if index % 5 == 0 else 4}\n" for index in range(40))
    trace.write_text("arrival_s,client_id,input_tokens,output_tokens\n" + rows)
    with pytest.raises(ConfigError, match="load is a share"):
        plot(tmp_path, str(trace), load=0.0, num_requests=40, offset=0, policies=["hrrn"], machine=Machine())
    machine = Machine(Coefficients(0.01, 0.001, 0.002), 2, 64, 256)
    folder = tmp_path / "plots"
    plot(folder, str(trace), load=0.9, num_requests=40, offset=0, policies=["hrrn"], machine=machine, loads=(0.5, 1.1))
    pictures = sorted(file.name for file in folder.glob("*.png"))
    assert {"mean_ttft_against_load.png", "queue_over_time.png", "steps_over_time_hrrn.png"} <= set(pictures)
    page = (folder / "policies.html").read_text()
    assert page.count("data:image/png;base64,") == len(pictures) == 7
    assert "http" not in page
