"""Options and fixtures that all tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from devices import device

__all__ = ["device"]  # a fixture


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--size", choices=("small", "full"), default="small", help="size of the tests marked slow")


@pytest.fixture
def size(request: pytest.FixtureRequest) -> str:
    """``small``, or ``full`` when asked for with ``--size full``."""
    return str(request.config.getoption("--size"))


@pytest.fixture(autouse=True, scope="session")
def two_threads() -> Iterator[None]:
    """The same number of threads on every machine, and more than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
