from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


@pytest.mark.slow
def test_the_question_answering_example_answers_correctly(tmp_path: Path) -> None:
    """In a process of its own, with one thread: what it learns depends on the order of additions."""
    script = REPOSITORY / "examples" / "question_answering.py"
    found = subprocess.run(
        [sys.executable, str(script), "--out", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    lines = found.stdout.splitlines()
    answers = [line.split("->")[1].strip() for line in lines if "->" in line]
    assert answers == ["harbour", "library", "stamps", "repairs"]
    score = next(line.split()[2] for line in lines if line.startswith("exact match"))
    assert float(score) > 95
