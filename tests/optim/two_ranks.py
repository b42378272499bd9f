"""Two processes that talk over gloo: this one, and one that is started for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2
Work = Callable[[int, Path], None]


def two_ranks(work: Work, folder: Path) -> None:
    """Call ``work(rank, folder)``, a function of a module, in both; starting one process costs half of two."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch has no gloo")
    other = mp.get_context("spawn").Process(target=_take_part, args=(work, 1, folder))
    other.start()
    try:
        _take_part(work, 0, folder)
        other.join(60)
    finally:
        other.kill()
        other.join()
    assert other.exitcode == 0


def _take_part(work: Work, rank: int, folder: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    meeting = (folder / "meeting").as_uri()
    dist.init_process_group("gloo", meeting, timedelta(seconds=60), world_size=RANKS, rank=rank)
    try:
        with warnings.catch_warnings(action="ignore"):
            work(rank, folder)
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)
