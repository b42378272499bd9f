"""What a case of the bench is, and the worker's side of it: solve a problem, time it, judge the answer.

A case is a module of :mod:`kantor.bench.cases` with

    TITLE                    what is compared, in a line
    PEERS                    {name: Peer}; the peers of one library are its configurations, whose best counts
    problems(size, device)   the Problems of a size, "small" or "full"
    make(problem, device)    in a worker: the task that a problem's name stands for
    judge(task, answer)      in a worker: {"accuracy": ...} and what else an answer tells, formed from the answer alone

A library has one process for all its configurations; those that have their threads from torch and BLAS share it. The
clock stands still while an answer is judged.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kantor.bench.harness import Measure, Spec

OWN = "Kantor"
LEAST_SECONDS = 0.05  # a shorter run is repeated and its median taken
WARM_SECONDS = 1.0  # a first run that takes as long is not noticeably longer for being the first

# Libraries that may share a process. A thread pool, an OpenMP or a BLAS setting of its own wants a process of its own.
_SHARED = {"arrays": ("SciPy", "PyAMG", "scikit-learn", "torch", "PyG", "PETSc", "CuPy"), "JAX": ("lineax", "OTT")}

Run = Callable[[], Any]


@dataclass(frozen=True)
class Problem:
    """A problem of a case. An answer counts where its `accuracy`, in the judge's measure, is at most `tolerance`.

    `quantities` are what is compared, less being better: "seconds", or a number that the judge returns. `needs` are
    packages without which it cannot be made, `suits` the names of the peers that can solve it (empty: all).
    """

    name: str
    measure: str
    tolerance: float
    quantities: tuple[str, ...] = ("seconds",)
    needs: tuple[str, ...] = ()
    suits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Peer:
    """One configuration of a library: ``prepare(task)`` returns what is timed. `needs` are packages."""

    name: str
    library: str
    configuration: str
    prepare: Callable[[Any], Run]
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu",)

    @property
    def process(self) -> str:
        """Which process it runs in."""
        return next((name for name, libraries in _SHARED.items() if self.library in libraries), self.library)

    def obstacle(self, device: str) -> str:
        """Why it cannot run here, "" when it can."""
        missing = missing_packages(self.needs)
        if missing:
            return f"{', '.join(missing)} not installed"
        return "" if device in self.devices else f"runs on {', '.join(self.devices)} only"


def missing_packages(names: tuple[str, ...]) -> list[str]:
    """Those that are not installed; nothing is imported."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def load(name: str) -> Any:
    """The module of a case."""
    return importlib.import_module(f"kantor.bench.cases.{name}")


# --- in a worker ---


def prepare(spec: Spec) -> tuple[Measure, dict[str, Any]]:
    """Make the task; a goal is the name of a peer, which is prepared and warmed up when it is met first."""
    torch.set_num_threads(spec.threads)
    case = load(spec.case)
    task = case.make(spec.problem, spec.device)
    ready: dict[str, Run] = {}

    def measure(goal: str) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what an answer is worth is for the judge to say
            seconds = 0.0
            if goal not in ready:
                ready[goal] = case.PEERS[goal].prepare(task)
                seconds, answer = timed(ready[goal], spec.device, 0.0)
            if seconds < WARM_SECONDS:
                seconds, answer = timed(ready[goal], spec.device, LEAST_SECONDS)
            facts: dict[str, Any] = {"seconds": seconds} | case.judge(task, answer)
        finite = facts["accuracy"] is not None and math.isfinite(facts["accuracy"])
        return facts | ({} if finite else {"accuracy": None})  # JSON has no infinity

    return measure, {}


def timed(run: Run, device: str, least: float) -> tuple[float, Any]:
    """Median seconds of a run, repeated for at least so long, and its last answer."""
    wait: Callable[[], object] = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: list[float] = []
    started = time.perf_counter()
    while not times or time.perf_counter() - started < least:
        wait()
        begin = time.perf_counter()
        answer = run()
        wait()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2], answer
