"""Where operators run in the tests: ``cpu``, ``emulated`` (the CUDA code on CPU tensors) and ``cuda``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec

import pytest
import torch

from kantor._ops import emulated

DEVICES = ("cpu", "emulated", pytest.param("cuda", marks=pytest.mark.gpu))


def on(device: str) -> AbstractContextManager[None]:
    """Where operators run inside the context: ``cpu``, ``emulated`` (CUDA code on CPU tensors) or ``cuda``."""
    return emulated() if device == "emulated" else nullcontext()


def require(device: str) -> None:
    """Skip the test, with the reason, where this build or machine lacks the device."""
    if device == "emulated" and find_spec("kantor._emu") is None:
        pytest.skip("kantor._emu is not built: configure with KANTOR_TESTS=ON")
    if device == "cuda" and not (torch.cuda.is_available() and torch.version.cuda):
        pytest.skip("no CUDA device")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test on every device; tensors go to ``home(device)``."""
    require(request.param)
    with on(request.param):
        yield request.param


def home(device: str) -> str:
    """The torch device that holds the tensors."""
    return "cuda" if device == "cuda" else "cpu"
