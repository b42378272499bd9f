"""All tests of several ranks share the processes that the first of them starts (tests/ranks.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for the mark
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep them on one worker of pytest-xdist, with ``--dist loadgroup``."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.xdist_group("ranks"))
