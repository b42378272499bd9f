"""Worker processes that hold one prepared solver each, so that a runner can interleave their repetitions.

A worker runs this file as a program; it reads one JSON command a line and answers each with one JSON line:
    {"do": "prepare", "spec": {...}}         ->  {"ok": true, ...}
    {"do": "measure", "goal": "iterations"}  ->  {"ok": true, "seconds": ..., ...}
The environment names a module that has `prepare(spec) -> (measure, facts)`, where measure(goal) returns a
dict of numbers, and fixes the threads before any library is loaded; idle threads sleep (OMP_WAIT_POLICY).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import selectors
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Measure = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class Spec:
    """What a worker prepares: a peer on a problem, and what its goals mean."""

    case: str
    problem: str
    peer: str
    dtype: str
    threads: int
    device: str
    iterations: int
    rtol: float


class WorkerError(RuntimeError):
    """A worker reported an error, died, or ran out of time."""


class Worker:
    """The runner's end of one worker process; a pinned one may use as many processors as it has threads."""

    def __init__(self, threads: int, module: str, pinned: bool = True) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment = os.environ | {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment |= {
            "KANTOR_BENCH_MODULE": module,
            "KANTOR_BENCH_PROCESSORS": str(threads if pinned else 0),
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),  # modules are found there as here
            "OMP_WAIT_POLICY": "PASSIVE",
            # Behind numpy: its threads spin between calls, which costs scipy's loop far more than two dots can gain.
            "OPENBLAS_NUM_THREADS": "1",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
        )
        self._unread = b""

    def prepare(self, spec: Spec, timeout: float) -> dict[str, Any]:
        """Build the problem and the solver, warm it up; returns facts such as setup_seconds."""
        return self._ask({"do": "prepare", "spec": asdict(spec)}, timeout)

    def measure(self, goal: str, timeout: float) -> dict[str, Any]:
        """One timed repetition."""
        return self._ask({"do": "measure", "goal": goal}, timeout)

    @property
    def alive(self) -> bool:
        """Whether the process can answer."""
        return self._process.poll() is None

    def stop(self) -> None:
        """End the process and free its memory."""
        process = self._process
        if process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
        self._log.close()

    def _ask(self, command: dict[str, Any], timeout: float) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise WorkerError(f"the process died: {self._last_words()}") from error
        reply: dict[str, Any] = json.loads(self._line(timeout))
        if not reply.pop("ok"):
            raise WorkerError(reply["error"])
        return reply

    def _line(self, timeout: float) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    self._process.kill()
                    self._process.wait()
                    raise WorkerError(f"no answer in {timeout:.0f} s")
                received = os.read(self._process.stdout.fileno(), 1 << 16)
                if not received:
                    raise WorkerError(f"the process died: {self._last_words()}")
                self._unread += received
        line, self._unread = self._unread.split(b"\n", 1)
        return line

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return f"exit status {code}" + (f", {lines[-1][:300]}" if lines else "")


def _serve() -> None:
    """The worker's loop."""
    # Libraries print what they like on standard output; the answers need a channel of their own.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        threads = int(os.environ["KANTOR_BENCH_PROCESSORS"])
        # XLA sizes its thread pool by the processors it may use: affinity is the one setting that all libraries heed.
        allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        if 0 < threads < len(allowed):
            os.sched_setaffinity(0, allowed[-threads:])
        module = importlib.import_module(os.environ["KANTOR_BENCH_MODULE"])
        measure: Measure | None = None
        for line in sys.stdin:
            command = json.loads(line)
            try:
                if command["do"] == "prepare":
                    measure = None
                    gc.collect()  # a worker that is used again must not hold two problems
                    measure, facts = module.prepare(Spec(**command["spec"]))
                    reply = {"ok": True} | facts
                else:
                    if measure is None:
                        raise RuntimeError("measure: nothing is prepared")
                    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                    reply = {"ok": True, "rss_mb": round(peak)} | measure(command["goal"])
            except Exception as error:
                traceback.print_exc()
                reply = {"ok": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
            answers.write(json.dumps(reply) + "\n")
            answers.flush()


if __name__ == "__main__":
    _serve()
