"""Measure the cases: the libraries in processes, in turn; what takes too long or is wrong is left out, with its reason.

On a problem every configuration of every library is tried once. Of the tries whose answers have the accuracy, the best
of each library goes on, and those repeat in turn, so that a slow minute hits everyone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kantor.bench import machine
from kantor.bench.case import OWN, Peer, Problem, load, missing_packages
from kantor.bench.harness import Spec, Worker, WorkerError
from kantor.bench.results import Results

QUIET_LOAD = 0.5  # runnable processes a processor
QUIET_SPREAD = 0.15  # between two timings of the same copy
PREPARE_SECONDS = 120.0  # of importing libraries and making a problem

Tell = Callable[[float, str], None]  # share of the work that is done, and what is going on
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What is measured. `limit` is in seconds, of one run."""

    cases: tuple[str, ...]
    size: str = "small"
    device: str = "cpu"
    threads: int = 1
    repeats: int = 5
    limit: float = 5.0


class Pool:
    """The libraries' processes; one that died or was stopped is started anew when it is asked again."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._workers: dict[str, Worker] = {}
        self._holds: dict[str, tuple[str, str]] = {}

    def measure(self, case: str, problem: str, peer: Peer, timeout: float) -> dict[str, Any]:
        """One measurement. Raises WorkerError."""
        worker = self._worker(peer.process, "kantor.bench.case")
        try:
            if self._holds.get(peer.process) != (case, problem):
                self._holds.pop(peer.process, None)
                worker.prepare(self._spec(case, problem, peer.process), PREPARE_SECONDS)
                self._holds[peer.process] = case, problem
            return worker.measure(peer.name, timeout)
        finally:
            if not worker.alive:
                self._discard(peer.process)

    def limits(self, goal: str) -> dict[str, Any]:
        """What the machine can do; see :mod:`roofline`. Raises WorkerError."""
        worker = self._worker("limits", "kantor.bench.roofline")
        if "limits" not in self._holds:
            worker.prepare(self._spec("", "", ""), PREPARE_SECONDS)
            self._holds["limits"] = "", ""
        return worker.measure(goal, PREPARE_SECONDS)

    def close(self) -> None:
        """End all processes."""
        for name in list(self._workers):
            self._discard(name)

    def _worker(self, name: str, module: str) -> Worker:
        if name not in self._workers:
            self._workers[name] = Worker(self._options.threads, module, pinned=self._options.device == "cpu")
        return self._workers[name]

    def _discard(self, name: str) -> None:
        self._holds.pop(name, None)
        self._workers.pop(name).stop()

    def _spec(self, case: str, problem: str, process: str) -> Spec:
        return Spec(case, problem, process, "", self._options.threads, self._options.device, 0, 0.0)


def run(options: Options, results: Results, tell: Tell, say: Say) -> None:
    """Measure everything; Ctrl-C ends it, and what was measured is kept."""
    if machine.load() > QUIET_LOAD:
        say(f"warning: {machine.load():.1f} processes a processor are running: the times will be noisy")
    pool = Pool(options)
    todo = [(case, problem) for case in options.cases for problem in load(case).problems(options.size, options.device)]
    try:
        tell(0.0, "the limits of the machine")
        results.add_roofline(pool.limits("limits")["rates"])
        copy = pool.limits("copy")["rate"]
        for case, problems in itertools.groupby(enumerate(todo), lambda item: item[1][0]):
            for done, (_, problem) in problems:
                said = functools.partial(tell, done / len(todo))
                measure_problem(options, results, pool, case, problem, said, say)
                results.save()
            before, copy = copy, pool.limits("copy")["rate"]
            spread = max(before, copy) / min(before, copy) - 1
            results.add_yardstick(case, (before, copy), quiet=spread <= QUIET_SPREAD)
            if spread > QUIET_SPREAD:
                say(f"warning: {case}: two timings of one copy differ by {100 * spread:.0f} %: not quiet")
    except KeyboardInterrupt:
        results.interrupted = True
    finally:
        pool.close()
        results.save()


def measure_problem(
    options: Options, results: Results, pool: Pool, case: str, problem: Problem, tell: Callable[[str], None], say: Say
) -> None:
    """Try every configuration, then repeat the best of each library."""
    results.add_problem(case, problem)
    missing = missing_packages(problem.needs)
    if missing:
        results.add_absence(case, problem, OWN, f"the problem needs {', '.join(missing)}")
        say(f"{case}, {problem.name}: left out, {', '.join(missing)} not installed")
        return
    tried: dict[str, dict[str, Any]] = {}
    peers: dict[str, Peer] = {
        name: peer for name, peer in load(case).PEERS.items() if not problem.suits or name in problem.suits
    }

    def measure(peer: Peer, trial: bool) -> dict[str, Any] | None:
        tell(f"{case}, {problem.name}: {peer.library}, {peer.name}")
        # The first time it is prepared and warmed up as well.
        timeout = 2 * options.limit + 10 if trial else options.limit + 5
        try:
            found = pool.measure(case, problem.name, peer, timeout)
        except WorkerError as error:
            results.add_failure(case, problem, peer, str(error))
            return None
        return results.add_measurement(case, problem, peer, trial, found)

    for name, peer in peers.items():
        reason = peer.obstacle(options.device)
        if reason:
            results.add_absence(case, problem, peer.library, reason)
        elif (found := measure(peer, trial=True)) is not None and found["met"]:
            tried[name] = found
    for turn in range(options.repeats):
        for name in best_of(tried, peers, problem):
            seconds = tried[name]["seconds"]
            if (
                turn < min(options.repeats, max(1, int(options.limit / seconds)))
                and measure(peers[name], False) is None
            ):
                del tried[name]


def best_of(tried: dict[str, dict[str, Any]], peers: dict[str, Peer], problem: Problem) -> list[str]:
    """Of each library the configuration that is best by each quantity, without repetition."""
    best: dict[str, None] = {}
    for quantity in problem.quantities:
        for library in dict.fromkeys(peers[name].library for name in tried):
            mine = [name for name in tried if peers[name].library == library]
            best[min(mine, key=lambda name: float(tried[name][quantity]))] = None
    return list(best)
