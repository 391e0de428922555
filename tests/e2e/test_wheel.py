"""The wheel: built, unpacked somewhere else, and used from there."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import fastserve
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow  # a wheel built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("scikit_build_core", reason="scikit-build-core is not installed (make setup)")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPOSITORY)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    [file] = folder.glob("*.whl")
    return file


def test_the_wheel_has_everything_and_nothing_else(wheel: Path) -> None:
    """What git tracks in the package is in the wheel, data files too; nothing outside it is."""
    tracked = subprocess.run(
        ["git", "-C", str(REPOSITORY), "ls-files", "fastserve"], capture_output=True, text=True, check=True
    ).stdout.split()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert set(tracked) <= set(names)
    outside = [name for name in names if not name.startswith(("fastserve/", "fastserve-"))]
    assert outside == []
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_it_runs_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys, json; sys.path[:0] = sys.argv[1:]; import fastserve; from fastserve.cli.main import app; "
        "print(json.dumps([fastserve.__file__, fastserve.__version__]))"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-S", "-c", code, str(tmp_path / "site"), sysconfig.get_path("purelib")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    file, version = json.loads(result.stdout)
    assert Path(file).is_relative_to(tmp_path / "site") and version == fastserve.__version__
