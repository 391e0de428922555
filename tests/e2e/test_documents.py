"""The code that documents show, run as it stands against the built-in model."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from benchmarks.soak import running_server
from fastserve.checkpoint.folder import BUILTIN_FOLDER
from tests.conftest import REPOSITORY

needs_builtin = pytest.mark.skipif(
    not (BUILTIN_FOLDER / "config.json").is_file(), reason="the built-in model has not been made in this checkout"
)


def python_block(document: str, number: int = 0) -> str:
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / document).read_text(encoding="utf-8"), re.DOTALL)[number]


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@needs_builtin
@pytest.mark.parametrize("document", ["README.md", "README.zh.md"])
def test_ten_lines_of_python(document: str) -> None:
    printed = run(python_block(document))
    assert "Once upon a time -> " in printed and "The old king -> " in printed
    assert len(printed.split()) > 30


def test_both_languages_show_the_same_code() -> None:
    english, chinese = (re.sub(r"#.*", "", python_block(name)) for name in ("README.md", "README.zh.md"))
    assert english == chinese


@pytest.mark.slow
@needs_builtin
def test_openai_client() -> None:
    code = python_block("docs/serving.md")
    with running_server("", []) as (port, _, _):
        printed = run(code.replace(":8000/", f":{port}/"))
    assert len(printed.split()) > 10


def test_the_decision_about_rows_can_be_reproduced() -> None:
    lines = run(python_block("docs/decisions/0002-rows-do-not-depend-on-the-batch.md")).splitlines()
    assert [line.split()[0] for line in lines] == ["torch.float32", "torch.bfloat16"]
