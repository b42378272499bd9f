"""Processes that talk over gloo, started once for the whole test session, and functions run on them.

``run(size, work, *arguments)`` calls ``work(ranks, *arguments)``, a function of a module, on `size` of them (1 to 4)
and returns their results in the order of the ranks; an exception on any rank fails the test with its traceback.
``outcomes(...)`` returns exceptions as values instead. Each process computes with one thread.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kantor import RankError
from kantor._ranks import Ranks

MOST = 4
SECONDS = 60.0  # the longest that one job may take


class Pool:
    """Processes with a gloo group for each number of ranks, whose timeouts in seconds are given."""

    def __init__(self, timeouts: Sequence[float] = (20.0,) * MOST) -> None:
        size = len(timeouts)
        self._folder = tempfile.TemporaryDirectory()
        meeting = (Path(self._folder.name) / "meeting").as_uri()
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, meeting, timeouts), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def outcomes(self, size: int, work: Callable[..., Any], *arguments: Any, seconds: float = SECONDS) -> list[Any]:
        """What each of the first `size` ranks returned, or the exception that it raised; None where it died."""
        job = pickle.dumps((sys.path, pickle.dumps((work, arguments))))
        for pipe in self.pipes[:size]:
            pipe.send_bytes(_message(size, job))
        results: list[Any] = []
        for pipe in self.pipes[:size]:
            try:
                if not pipe.poll(seconds):
                    self.close()
                    raise AssertionError(f"{work.__name__} on {size} ranks: no answer within {seconds} s")
                results.append(pickle.loads(pipe.recv_bytes()))
            except EOFError:
                results.append(None)
        return results

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self._folder.cleanup()


_pool: Pool | None = None


def outcomes(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Results or exceptions of ``work(ranks, *arguments)``, rank by rank, from the session's processes."""
    global _pool
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("torch has no gloo")
    if _pool is None or not all(process.is_alive() for process in _pool.processes):
        _close()
        _pool = Pool()
    results = _pool.outcomes(size, work, *arguments)
    if any(isinstance(result, RankError) for result in results):  # the group is of no use any more
        _close()
    return results


def run(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Results of ``work(ranks, *arguments)``, rank by rank; fails where a rank raised."""
    results = outcomes(size, work, *arguments)
    for rank, result in enumerate(results):
        if isinstance(result, BaseException):
            notes = "\n".join(getattr(result, "__notes__", []))
            raise AssertionError(f"rank {rank} of {size}: {type(result).__name__}: {result}\n{notes}") from result
    return results


def _close() -> None:
    global _pool
    if _pool is not None:
        _pool.close()
        _pool = None


atexit.register(_close)


def _message(size: int, job: bytes) -> bytes:
    return pickle.dumps((size, job))


def _serve(pipe: Connection, rank: int, meeting: str, timeouts: Sequence[float]) -> None:
    """Take jobs until the other end closes."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", meeting, timedelta(seconds=60), world_size=len(timeouts), rank=rank)
    groups = [dist.new_group(list(range(n + 1)), timedelta(seconds=wait)) for n, wait in enumerate(timeouts)]
    while True:
        try:
            count, job = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            path, body = pickle.loads(job)
            sys.path[:] = path
            work, arguments = pickle.loads(body)
            with warnings.catch_warnings(action="ignore"):
                answer = pickle.dumps(work(Ranks(groups[count - 1]), *arguments))
        except BaseException as error:  # KeyboardInterrupt too
            error.add_note(traceback.format_exc())
            try:
                answer = pickle.dumps(error)
                pickle.loads(answer)
            except Exception:
                answer = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
        pipe.send_bytes(answer)
