"""Exact nearest neighbours: Kantor beside faiss, torch, scikit-learn and SciPy's tree.

    python bench/graph/bench_knn.py [--sizes 8000 30000] [--dims 16 64] [--ks 15] [--threads 1 2] [--dtype float32]
                                    [--peers ...] [--repeats 5] [-o knn.jsonl]
    python bench/graph/bench_knn.py --sizes 100000 --dims 16 --ks 10 --threads 2 --peers Kantor faiss --repeats 2

Points are a mixture of ten Gaussians of unit width. Every peer returns the k nearest other points of each point and
their distances: faiss (IndexFlatL2), torch (cdist and topk in blocks of 2048 rows), scikit-learn (NearestNeighbors,
brute force), SciPy (cKDTree, in few dimensions only). Each is a process of its own (harness.py); they take turns, and
the least of the repetitions counts: processor time on one thread, wall time on more.

GFLOP/s are 2 n^2 d over the time, for all of them, against the multiply-add peak of roofline.py: what a search by all
distances must do, so that a tree may exceed it. `MB` is how far the process grew in its first search, results
included. `differ` counts indices that are not Kantor's, on a sample, and not as near either.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from kantor.bench import harness, machine
from kantor.bench.cases.knn import Search, cdist, faiss, kantor, points, sklearn, tree, wrong
from kantor.bench.tables import Table
from torch import Tensor

import roofline

TIMEOUT = 600.0
LEAST_SECONDS = 0.3  # a measurement that is shorter is repeated
DTYPES = {"float32": torch.float32, "float64": torch.float64}


# name: search, package, largest n d, largest d
PEERS: dict[str, tuple[Callable[[Tensor, int], Search], str, int, int]] = {
    "Kantor": (kantor, "kantor", 1 << 40, 1 << 20),
    "faiss": (faiss, "faiss", 1 << 40, 1 << 20),
    "torch": (cdist, "torch", 1 << 23, 1 << 20),
    "scikit-learn": (sklearn, "sklearn", 1 << 23, 1 << 20),
    "SciPy": (tree, "scipy", 1 << 23, 20),
}


# --- in a worker ---


def prepare(spec: harness.Spec) -> tuple[harness.Measure, dict[str, Any]]:
    """Make the points; a measurement searches."""
    torch.set_num_threads(spec.threads)
    n, d, k = map(int, spec.problem.split())
    x = points(n, d, DTYPES[spec.dtype])
    PEERS[spec.peer][0](x[: 2 * k + 1].clone(), k)()  # imports
    search = PEERS[spec.peer][0](x, k)
    clock = time.process_time if spec.threads == 1 else time.perf_counter
    resident = machine.forget_peak_memory()
    found = [torch.as_tensor(result) for result in search()]
    facts = {"megabytes": machine.peak_memory() - resident, "differ": wrong(x, *found)}
    del found

    def measure(_: str) -> dict[str, Any]:
        begin, least = time.perf_counter(), float("inf")
        while time.perf_counter() - begin < LEAST_SECONDS:
            started = clock()
            search()
            least = min(least, clock() - started)
        return {"seconds": least}

    return measure, facts


# --- the runner ---


def run(options: argparse.Namespace, n: int, d: int, k: int, threads: int, log: list[dict[str, Any]]) -> None:
    """One table."""
    records: dict[str, dict[str, Any]] = {}
    workers: dict[str, harness.Worker] = {}
    try:
        for repetition in range(options.repeats):
            for name in options.peers:
                _, package, most, dims = PEERS[name]
                if find_spec(package) is None or n * d > most or d > dims or (repetition and name not in records):
                    continue
                if name == "faiss" and options.dtype != "float32":
                    continue
                try:
                    if name not in workers:
                        spec = harness.Spec("knn", f"{n} {d} {k}", name, options.dtype, threads, "cpu", 0, 0.0)
                        workers[name] = harness.Worker(threads, "graph.bench_knn")
                        records[name] = asdict(spec) | workers[name].prepare(spec, TIMEOUT)
                    seconds = workers[name].measure("search", TIMEOUT)["seconds"]
                except harness.WorkerError as error:
                    print(f"{name}, n = {n}, d = {d}: {error}", file=sys.stderr)
                    records.pop(name, None)
                    continue
                records[name]["seconds"] = min(seconds, records[name].get("seconds", float("inf")))
    finally:
        for worker in workers.values():
            worker.stop()
    fma = {rate.kernel[-4:]: rate.best for rate in roofline.peak(threads)}["fp" + options.dtype[-2:]]
    table = Table(
        f"n = {n}, d = {d}, k = {k}, {options.dtype}, {threads} thread(s), least of {options.repeats}",
        ("", "ms", "us/point", "of Kantor", "GFLOP/s", "of peak", "MB", "wrong"),
    )
    for name, record in records.items():
        seconds, rate = record["seconds"], 2e-9 * n * n * d / record["seconds"]
        ratio = f"{seconds / records['Kantor']['seconds']:.2f}x" if "Kantor" in records else "-"
        table.add(
            name, f"{1e3 * seconds:.1f}", f"{1e6 * seconds / n:.2f}", ratio, f"{rate:.0f}", f"{100 * rate / fma:.0f}%",
            f"{record['megabytes']:.0f}", record["differ"],
        )  # fmt: skip
        log.append(record | {"gflops": rate, "peak": fma})
    if machine.load() > 0.5:
        table.notes.append(f"{machine.load():.1f} processes a processor: the peak is too low, and times too long")
    table.print()
    print()


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8000, 30000])
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--ks", type=int, nargs="+", default=[15])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--peers", nargs="+", choices=tuple(PEERS), default=list(PEERS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="append one JSON record a line")
    options = parser.parse_args()
    log: list[dict[str, Any]] = []
    for n in options.sizes:
        for d in options.dims:
            for k in options.ks:
                for threads in options.threads:
                    run(options, n, d, k, threads, log)
    if options.output:
        with options.output.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in log)
    return 0


if __name__ == "__main__":
    sys.exit(main())
