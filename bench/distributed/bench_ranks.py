"""Conjugate gradients over ranks: time and bytes of an iteration, one process against several, and what follows.

    python bench/distributed/bench_ranks.py --ranks 1 2 --side 96
    torchrun --nproc-per-node 4 bench/distributed/bench_ranks.py --side 128

The matrix is the seven-point Laplacian of a cube, cut into slabs; every process has one thread. Strong scaling keeps
the cube, weak scaling gives each rank a cube's worth of planes. The first row of each table is Kantor's own ``cg`` on
the same matrix in one process without ranks. cg: what one more iteration costs, from solves of 10 and of 50 without a
preconditioner. The fastest of interleaved repetitions, each timed by its slowest rank: ranks wait for each other, so
that whatever else runs on the machine counts twice.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kantor.distributed import Ranks, ShardedCSR, init
from kantor.linalg import CSR, cg
from kantor.linalg._native import write_matvec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import processes
from kantor.bench.tables import Table

SHORT, ITERATIONS = 10, 40
F64 = torch.float64


def laplacian(side: int, planes: int, begin: int, end: int) -> CSR:
    """Rows of the planes begin..end-1 of a grid of planes x side x side, with the columns of all."""
    z, y, x = torch.meshgrid(torch.arange(begin, end), torch.arange(side), torch.arange(side), indexing="ij")
    row = ((z * side + y) * side + x).reshape(-1)
    parts = [(row, row, torch.full(row.shape, 6.0, dtype=F64))]
    for grid, extent, stride in ((z, planes, side * side), (y, side, side), (x, side, 1)):
        for step in (-1, 1):
            inside = ((grid + step >= 0) & (grid + step < extent)).reshape(-1)
            parts.append((row[inside], row[inside] + step * stride, torch.full((int(inside.sum()),), -1.0, dtype=F64)))
    rows, cols, values = (torch.cat(t) for t in zip(*parts, strict=True))
    return CSR.from_coo(rows - begin * side * side, cols, values, (row.numel(), planes * side * side))


def slab(ranks: Ranks, side: int, planes: int) -> ShardedCSR:
    """This rank's planes."""
    begin, end = (planes * r // ranks.size for r in (ranks.rank, ranks.rank + 1))
    return ShardedCSR.from_rows(laplacian(side, planes, begin, end), ranks)


def best_seconds(ranks: Ranks, runs: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Of each the fastest repetition, by its slowest rank, taking turns."""
    records: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, record in zip(runs, records, strict=True):
            ranks.barrier()
            started = time.perf_counter()
            run()
            record.append(ranks.max(time.perf_counter() - started)[0])
    return [min(record[1:]) for record in records]


def measure(ranks: Ranks, side: int, planes: int, repeats: int) -> dict[str, Any]:
    """Figures of an iteration on `ranks`."""
    S = slab(ranks, side, planes)
    b = torch.randn(S.shape[0], dtype=F64, generator=torch.Generator().manual_seed(ranks.rank))
    x, y = torch.randn_like(b), torch.empty_like(b)

    def solve(A: Any, iterations: int) -> None:
        with warnings.catch_warnings(action="ignore"):  # the limit is meant to be reached
            cg(A, b, rtol=0.0, maxiter=iterations)

    def in_turn() -> None:
        ghosts = S._halo.start(x)()
        write_matvec(S.own.encode(), x, y)
        y.index_add_(-1, S._touched, S._coupling.matvec(ghosts))

    def overlapped() -> None:
        S.write_product(x, y)

    sums = torch.zeros(3, dtype=F64)
    runs: list[Callable[[], Any]] = [
        lambda: solve(S, SHORT),
        lambda: solve(S, SHORT + ITERATIONS),
        lambda: [in_turn() for _ in range(ITERATIONS)],
        lambda: [overlapped() for _ in range(ITERATIONS)],
        lambda: [S._halo.start(x)() for _ in range(ITERATIONS)],
        lambda: [ranks.all_reduce_(sums) for _ in range(2 * ITERATIONS)],
    ]
    if ranks.size == 1:
        alone = laplacian(side, planes, 0, planes)
        runs += [lambda: solve(alone, SHORT), lambda: solve(alone, SHORT + ITERATIONS)]
    with torch.no_grad():
        short_solve, long_solve, *seconds = best_seconds(ranks, runs, repeats)
        ranks.traffic.reset()
        solve(S, 10)
        short = ranks.traffic.exchange.bytes, ranks.traffic.all_reduce.bytes
        ranks.traffic.reset()
        solve(S, 30)
        long = ranks.traffic.exchange.bytes, ranks.traffic.all_reduce.bytes
    if ranks.size == 1:
        *seconds, first, second = seconds
        seconds.append(second - first)
    milliseconds = [1e3 * t / ITERATIONS for t in [long_solve - short_solve, *seconds]]
    names = ("cg", "product, in turn", "product, overlapped", "exchange", "two sums", "cg without ranks")
    counted = [(b - a) // 20 for a, b in zip(short, long, strict=True)]
    return {
        "ranks": ranks.size,
        "unknowns": S.n,
        "ghosts": int(ranks.max(S.ghosts)[0]),
        "exchange bytes": int(ranks.max(counted[0])[0]),
        "sum bytes": counted[1],
        **dict(zip(names, milliseconds, strict=False)),
    }


def show(title: str, records: list[dict[str, Any]]) -> None:
    """A table, with the model of the bytes."""
    columns = (
        "ranks", "unknowns", "cg ms/it", "ns/unknown", "product ms", "in turn ms", "exchange ms", "two sums ms",
        "halo bytes", "model", "sum bytes", "model ",
    )  # fmt: skip
    table = Table(title, columns)
    for record in records:
        if "cg without ranks" in record:
            alone = record["cg without ranks"]
            per_unknown = 1e6 * alone / record["unknowns"]
            table.add("none", record["unknowns"], f"{alone:.3f}", f"{per_unknown:.2f}", *("-",) * 8)
        ranks = record["ranks"]
        table.add(
            ranks, record["unknowns"], f"{record['cg']:.3f}", f"{1e6 * record['cg'] * ranks / record['unknowns']:.2f}",
            f"{record['product, overlapped']:.3f}", f"{record['product, in turn']:.3f}", f"{record['exchange']:.3f}",
            f"{record['two sums']:.3f}", record["exchange bytes"], 8 * record["ghosts"] if ranks > 1 else 0,
            record["sum bytes"], 8 * (2 + 2 * 2) if ranks > 1 else 0,
        )  # fmt: skip
    table.notes.append(
        "ns/unknown: times ranks, so equal numbers mean perfect scaling. halo bytes: of the busiest rank."
    )
    table.print()


def cluster(work: float) -> None:
    """Time to a thousand million unknowns from the measured work, in ns for an unknown and iteration."""
    side, latency, bandwidth = 1000, 2e-6, 10e9  # of a message between nodes, seconds and bytes a second
    iterations = 3.0 * side  # a residual of 1e-6; see --iterations
    table = Table(
        f"Model: {side}^3 unknowns, {work:.1f} ns an unknown and process, {latency * 1e6:.0f} us, "
        f"{bandwidth / 1e9:.0f} GB/s, {iterations:.0f} iterations",
        ("ranks", "work ms", "halo ms", "sums ms", "efficiency", "ms/it", "minutes"),
    )
    for ranks in (1, 16, 64, 256, 1000):
        compute = work * 1e-9 * side**3 / ranks
        halo = 0.0 if ranks == 1 else 2 * (latency + 8 * side**2 / bandwidth)
        sums = 2 * 2 * math.ceil(math.log2(ranks)) * latency
        total = max(compute, halo) + sums  # the exchange hides behind the interior rows
        table.add(
            ranks, f"{1e3 * compute:.1f}", f"{1e3 * halo:.2f}", f"{1e3 * sums:.3f}",
            f"{compute / total:.1%}", f"{1e3 * total:.1f}", f"{iterations * total / 60:.1f}",
        )  # fmt: skip
    table.print()


def count_iterations(sides: list[int]) -> None:
    """How the iterations grow with the side of the cube, without a preconditioner, to 1e-6."""
    table = Table("Iterations to 1e-6", ("side", "iterations", "per side"))
    for side in sides:
        A = laplacian(side, side, 0, side)
        b = torch.randn(side**3, dtype=F64, generator=torch.Generator().manual_seed(0))
        count = cg(A, b, rtol=1e-6).iterations
        table.add(side, count, f"{count / side:.2f}")
    table.print()


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--side", type=int, default=96, help="of the cube")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--iterations", type=int, nargs="*", help="count iterations for cubes of these sides instead")
    parser.add_argument("-o", "--output", type=Path, help="write the records as JSON lines")
    options = parser.parse_args()
    side, repeats = options.side, options.repeats
    if options.iterations:
        count_iterations(options.iterations)
        return
    if processes.under_torchrun():
        ranks = init()
        records = [measure(ranks, side, side, repeats), measure(ranks, side, side * ranks.size, repeats)]
        if ranks.rank == 0:
            show(f"{side}^3, strong and weak", records)
        return
    strong = [processes.run(p, measure, side, side, repeats) for p in options.ranks]
    weak = [processes.run(p, measure, side, side * p, repeats) for p in options.ranks]
    show(f"Strong scaling: {side}^3 unknowns", strong)
    show(f"Weak scaling: {side}^3 unknowns a rank", weak)
    cluster(1e6 * weak[-1]["cg"] * weak[-1]["ranks"] / weak[-1]["unknowns"])
    if options.output is not None:
        options.output.write_text("".join(json.dumps(record) + "\n" for record in [*strong, *weak]))


if __name__ == "__main__":
    main()
