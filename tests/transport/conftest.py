"""Solves that fail must be expected: `ends_with` says so, any other warning of non-convergence is an error."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_unexpected_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="solve", category=RuntimeWarning)
        yield
