"""Transport and diffusion over ranks: time and bytes of a sweep and of a step, one process against several.

    python bench/distributed/bench_transport_ranks.py --ranks 1 2
    torchrun --nproc-per-node 4 bench/distributed/bench_transport_ranks.py

Every process has one thread. Transport: two samples of `--points` points in the plane, squared distances computed on
the fly, rows shared out; a solve by Newton's method to 1e-9, and sweeps of Sinkhorn's iteration. Diffusion: a ring of
`--nodes` nodes, each tied to its 16 nearest, with 32 columns, cut into arcs. The first row of each table is Kantor in
one process without ranks. Fastest of the repetitions, each that of the slowest rank. "work" is processor time, which
waiting for other ranks, or for other programs, does not enter.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kantor.distributed import Ranks, ShardedGraph, init, shares
from kantor.graph import Graph, diffuse
from kantor.transport import solve_sample
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import processes
from kantor.bench.tables import Table

SWEEPS, STEPS, COLUMNS, REACH = 20, 20, 32, 8
F64 = torch.float64


def seconds_of(ranks: Ranks | None, run: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Wall-clock and processor time."""
    record = []
    for _ in range(repeats + 1):
        if ranks is not None:
            ranks.barrier()
        wall, work = time.perf_counter(), time.process_time()
        run()
        wall, work = time.perf_counter() - wall, time.process_time() - work
        record.append((wall, work) if ranks is None else tuple(ranks.max(wall, work)))
    return min(wall for wall, _ in record[1:]), min(work for _, work in record[1:])


def own(ranks: Ranks | None, whole: Tensor) -> Tensor:
    """This rank's rows."""
    return whole if ranks is None else whole.split(shares(len(whole), ranks.size))[ranks.rank]


def measure_transport(ranks: Ranks | None, points: int, repeats: int) -> dict[str, Any]:
    """A whole solve, and a sweep."""
    generator = torch.Generator().manual_seed(0)
    X, Y = torch.rand(points, 2, dtype=F64, generator=generator), torch.rand(points, 2, dtype=F64, generator=generator)
    X = own(ranks, X.square())
    options: dict[str, Any] = {"reg": 1e-3, "ranks": ranks}
    plain = options | {"method": "sinkhorn", "relaxation": 1.0, "tol": 1e-15}
    with warnings.catch_warnings(action="ignore"):  # sweeps end at their limit
        if ranks is not None:
            ranks.traffic.reset()
        result = solve_sample(X, Y, **options)
        sums = 0 if ranks is None else ranks.traffic.all_reduce.messages
        solve = seconds_of(ranks, lambda: solve_sample(X, Y, **options), max(1, repeats // 2))
        sweeps = [
            seconds_of(ranks, lambda n=n: solve_sample(X, Y, **plain, max_iter=n), repeats)
            for n in (SWEEPS, 3 * SWEEPS)
        ]
        sent = []
        for n in (SWEEPS, 3 * SWEEPS):
            if ranks is not None:
                ranks.traffic.reset()
                solve_sample(X, Y, **plain, max_iter=n)
                sent.append(ranks.traffic.all_reduce.bytes)
    return {
        "solve": solve,
        "sweep": (sweeps[1][1] - sweeps[0][1]) / (2 * SWEEPS),
        "bytes": (sent[1] - sent[0]) // (2 * SWEEPS) if sent else 0,
        "model": 8 * (points + 6),
        "value": float(result.value),
        "steps": result.n_iter,
        "sums": sums,
    }


def ring(nodes: int) -> Graph:
    """Each node tied to the `REACH` nearest on either side."""
    offsets = torch.tensor([k for k in range(-REACH, REACH + 1) if k != 0])
    columns = (torch.arange(nodes)[:, None] + offsets).remainder(nodes).sort(1).values
    weight = torch.rand(columns.numel(), dtype=F64, generator=torch.Generator().manual_seed(0)).add_(0.5)
    return Graph(torch.arange(nodes + 1) * len(offsets), columns.reshape(-1), weight)


def measure_diffusion(ranks: Ranks | None, nodes: int, repeats: int) -> dict[str, Any]:
    """A step, and the first state's norm as a check."""
    whole = ring(nodes)
    graph = whole if ranks is None else ShardedGraph.from_graph(whole, ranks)
    x = own(ranks, torch.randn(nodes, COLUMNS, dtype=F64, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        seconds = [t / STEPS for t in seconds_of(ranks, lambda: diffuse(x, graph, 0.02, STEPS), repeats)]
        if ranks is not None:
            ranks.traffic.reset()
        norm = float(diffuse(x, graph, 0.02, STEPS).square().sum())
    if ranks is None:
        return {"step": seconds, "bytes": 0, "model": 0, "norm": norm}
    return {
        "step": seconds,
        "bytes": ranks.traffic.exchange.bytes // STEPS,
        "model": (2 * REACH if ranks.size > 1 else 0) * COLUMNS * 8,
        "norm": ranks.sum(norm)[0],
    }


def measure(ranks: Ranks, points: int, nodes: int, repeats: int) -> dict[str, Any]:
    """Both; the process alone too, where there is one."""
    alone = (
        (measure_transport(None, points, repeats), measure_diffusion(None, nodes, repeats)) if ranks.size == 1 else None
    )
    record: dict[str, Any] = {"ranks": ranks.size, "alone": alone}
    record["shared"] = (measure_transport(ranks, points, repeats), measure_diffusion(ranks, nodes, repeats))
    return record


def show(records: list[dict[str, Any]], points: int, nodes: int) -> None:
    """Two tables, with the models of the bytes."""
    rows = [("none", record["alone"]) for record in records if record["alone"]]
    rows += [(str(record["ranks"]), record["shared"]) for record in records]
    table = Table(
        f"Transport of {points} to {points} points, reg 1e-3",
        ("ranks", "solve s", "its work s", "steps", "sums", "work of a sweep ms", "bytes a sweep", "model", "value"),
    )
    for name, (transport, _) in rows:
        model = transport["model"] if name not in ("none", "1") else 0
        table.add(
            name, *(f"{t:.2f}" for t in transport["solve"]), transport["steps"], transport["sums"],
            f"{1e3 * transport['sweep']:.2f}", transport["bytes"], model, f"{transport['value']:.12f}",
        )  # fmt: skip
    table.print()
    table = Table(
        f"Diffusion on {nodes} nodes, {2 * REACH * nodes} entries, {COLUMNS} columns",
        ("ranks", "step ms", "its work ms", "bytes a step", "model", "norm"),
    )
    for name, (_, diffusion) in rows:
        step = (f"{1e3 * t:.2f}" for t in diffusion["step"])
        table.add(name, *step, diffusion["bytes"], diffusion["model"], f"{diffusion['norm']:.10e}")
    table.notes.append("bytes: of the first rank.")
    table.print()


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--points", type=int, default=3000)
    parser.add_argument("--nodes", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    arguments = (options.points, options.nodes, options.repeats)
    if processes.under_torchrun():
        ranks = init()
        record = measure(ranks, *arguments)
        if ranks.rank == 0:
            show([record], *arguments[:2])
        return
    show([processes.run(size, measure, *arguments) for size in options.ranks], *arguments[:2])


if __name__ == "__main__":
    main()
