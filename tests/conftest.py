"""Fixtures that every room's tests share: where real data lies, and which machine we are on.

No test downloads anything. Tiny model folders come from `tests/folders.py`; real data is optional and lies in
`$FASTSERVE_SHARED` or in a folder `shared` beside the repository; a test that needs it is skipped without it.
"""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

# A slow machine is no failure: no example has a time limit.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")

REPOSITORY = Path(__file__).resolve().parent.parent


def find_shared() -> Path | None:
    """The folder of shared data, or None when this machine has none."""
    given = os.environ.get("FASTSERVE_SHARED")
    folder = Path(given) if given else REPOSITORY.parent / "shared"
    return folder if (folder / "data").is_dir() else None


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder `data` of the shared data; skips the test where there is none."""
    shared = find_shared()
    if shared is None:
        pytest.skip("no shared data: set FASTSERVE_SHARED, or put it into ../shared beside the repository")
    return shared / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run."""
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in needs_gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    for item in items:
        if item.get_closest_marker("network") and not os.environ.get("FASTSERVE_TEST_NETWORK"):
            item.add_marker(pytest.mark.skip(reason="set FASTSERVE_TEST_NETWORK=1 to run tests that need the internet"))
