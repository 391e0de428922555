"""The chart shows the last report of each step and is well-formed."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from fastserve.core.errors import ConfigError
from fastserve.train.chart import loss_chart, read_curves

REPORTS = [
    {"stage": "pretrain", "step": 10, "loss": 8.1, "tokens": 1_000_000},
    {"stage": "pretrain", "step": 20, "loss": 5.0, "tokens": 2_000_000},
    {"stage": "pretrain", "step": 20, "held_out_loss": 4.4},
    {"stage": "pretrain", "step": 20, "loss": 4.2, "tokens": 2_000_000},
    {"stage": "pretrain", "step": 25, "held_out_loss": 4.1},
    {"stage": "tune", "step": 20, "loss": 1.0, "tokens": 2_000_000},
]
LINES = ["not a report", *map(json.dumps, REPORTS), '{"stage": "pretrain", "st']


def test_curves_are_those_of_the_stage() -> None:
    curves = read_curves(LINES, "pretrain")
    assert curves == {
        "loss": [(1_000_000, 8.1), (2_000_000, 4.2)],
        "held_out_loss": [(2_000_000, 4.4), (2_000_000, 4.1)],
    }


def test_chart_is_an_svg_with_both_curves() -> None:
    root = ElementTree.fromstring(loss_chart(read_curves(LINES, "pretrain")))
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [2, 2]


def test_a_log_without_the_stage_is_refused() -> None:
    with pytest.raises(ConfigError, match="no report of the stage 'export'"):
        read_curves(LINES, "export")
