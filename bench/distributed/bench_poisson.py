"""Pressure solves over ranks: multigrid on a grid in slabs beside the same solve in one process, and what follows.

    python bench/distributed/bench_poisson.py --ranks 1 2 --side 128
    torchrun --nproc-per-node 4 bench/distributed/bench_poisson.py --side 256

A box of voxels with six balls, cut into slabs along its first axis; every process has one thread. Strong scaling keeps
the cube, weak scaling gives each rank a cube's worth of planes. The first row of each table is ``cg(PoissonGrid, b,
M="multigrid")`` in one process without ranks. Medians over interleaved repetitions of whole solves to 1e-6, without
set-up; bytes are those of one more iteration, from the busiest rank, beside the model of docs/guide/distributed.md.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kantor.datasets import poisson_scenes
from kantor.distributed import Ranks, ShardedMultigrid, ShardedPoissonGrid, init
from kantor.linalg import Multigrid, PoissonGrid, cg
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import processes
from kantor.bench.tables import Table

F64 = torch.float64


def right_hand_side(grid: tuple[int, ...], begin: int, end: int) -> Tensor:
    """Planes of a field that is the same for any number of ranks."""
    generator = torch.Generator().manual_seed(0)
    field = torch.randn(grid[0] % 61 + 61, *grid[1:], dtype=F64, generator=generator)
    return field[torch.arange(begin, end) % len(field)]


def median_seconds(ranks: Ranks, runs: list[Callable[[], Any]], repeats: int) -> list[tuple[float, float]]:
    """Of each run, taking turns, the slowest rank's seconds and the seconds that the busiest rank computed."""
    records: list[list[tuple[float, float]]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, record in zip(runs, records, strict=True):
            ranks.barrier()
            started, worked = time.perf_counter(), time.thread_time()
            run()
            wall, work = ranks.max(time.perf_counter() - started, time.thread_time() - worked)
            record.append((wall, work))
    return [
        (statistics.median(t[0] for t in record[1:]), statistics.median(t[1] for t in record[1:])) for record in records
    ]


def bytes_of_an_iteration(ranks: Ranks, A: Any, b: Tensor, M: Any) -> tuple[int, int, int]:
    """Sent by the busiest rank: to neighbours, in gatherings, in sums."""
    counted = []
    for maxiter in (1, 3):
        ranks.traffic.reset()
        with warnings.catch_warnings(action="ignore"):  # the limit is meant to be reached
            cg(A, b, M=M, rtol=0.0, maxiter=maxiter)
        kinds = ranks.traffic.exchange, ranks.traffic.all_gather, ranks.traffic.all_reduce
        counted.append([kind.bytes for kind in kinds])
    exchange, gathered, summed = ((many - few) // 2 for few, many in zip(*counted, strict=True))
    most = ranks.max(exchange, gathered, summed)
    return int(most[0]), int(most[1]), int(most[2])


def model(levels: list[dict[str, Any]], neighbours: int) -> int:
    """Bytes to the neighbours: a plane of doubles; on each cut level 3 planes of b, and 2 of e but on the finest."""
    planes = [math.prod(level["shape"][1:]) for level in levels if level["cut"]]
    cycle = sum(4 * 3 * plane for plane in planes) + sum(4 * 2 * plane for plane in planes[1:])
    return neighbours * (8 * math.prod(levels[0]["shape"][1:]) + cycle)


def measure(ranks: Ranks, side: int, planes: int, repeats: int) -> dict[str, Any]:
    """Figures of a solve on `ranks`."""
    shape = (planes, side, side)
    flags = poisson_scenes.smoke_balls(shape) if ranks.rank == 0 else None
    A = ShardedPoissonGrid.from_global(flags, ranks, source=0)
    started = time.perf_counter()
    M = ShardedMultigrid(A)
    set_up = ranks.max(time.perf_counter() - started)[0]
    b = right_hand_side(shape, A.planes.start, A.planes.stop)
    v = torch.empty_like(b.flatten())
    r = A.confined(b.flatten())
    results = []
    runs: list[Callable[[], Any]] = [
        lambda: results.append(cg(A, b, M=M, rtol=1e-6)),
        lambda: [A.write_product(r, v) for _ in range(5)],
        lambda: [M.matvec(r) for _ in range(5)],
    ]
    if flags is not None and ranks.size == 1:
        whole = PoissonGrid(flags)
        one = Multigrid(whole)
        runs += [lambda: results.append(cg(whole, b, M=one, rtol=1e-6)), lambda: [one.matvec(r) for _ in range(5)]]
    with torch.no_grad():
        seconds = median_seconds(ranks, runs, repeats)
        sent = bytes_of_an_iteration(ranks, A, b, M)
    iterations = results[0].iterations
    record: dict[str, Any] = {
        "ranks": ranks.size,
        "unknowns": A.n,
        "iterations": iterations,
        "set-up": 1e3 * set_up,
        "cg": 1e3 * seconds[0][0] / iterations,
        "work": 1e3 * seconds[0][1] / iterations,
        "product": 1e3 * seconds[1][0] / 5,
        "cycle": 1e3 * seconds[2][0] / 5,
        "exchange bytes": sent[0],
        "model": model(M.levels, min(2, ranks.size - 1)),
        "gathered bytes": sent[1],
        "sum bytes": sent[2],
    }
    if ranks.size == 1 and flags is not None:
        record["cg without ranks"] = 1e3 * seconds[3][0] / results[-1].iterations
        record["work without ranks"] = 1e3 * seconds[3][1] / results[-1].iterations
        record["cycle without ranks"] = 1e3 * seconds[4][0] / 5
        record["iterations without ranks"] = results[-1].iterations
    return record


def show(title: str, records: list[dict[str, Any]]) -> None:
    """A table, with the model of the bytes."""
    columns = (
        "ranks", "unknowns", "iterations", "cg ms/it", "work ms/it", "ns/unknown", "cycle ms", "product ms",
        "set-up ms", "halo bytes", "model", "gathered", "sums",
    )  # fmt: skip
    table = Table(title, columns)
    for record in records:
        unknowns, ranks = record["unknowns"], record["ranks"]
        each = 1e6 * record["work"] * ranks / unknowns
        if "cg without ranks" in record:
            alone = record["work without ranks"]
            table.add(
                "none", unknowns, record["iterations without ranks"], f"{record['cg without ranks']:.2f}",
                f"{alone:.2f}", f"{1e6 * alone / unknowns:.1f}", f"{record['cycle without ranks']:.2f}", *("-",) * 6,
            )  # fmt: skip
        table.add(
            ranks, unknowns, record["iterations"], f"{record['cg']:.2f}", f"{record['work']:.2f}", f"{each:.1f}",
            f"{record['cycle']:.2f}", f"{record['product']:.2f}", f"{record['set-up']:.1f}", record["exchange bytes"],
            record["model"], record["gathered bytes"], record["sum bytes"],
        )  # fmt: skip
    table.notes.append(
        "work: time that the busiest rank's thread computed, without waiting for others. ns/unknown: of it, times "
        "ranks, so that equal numbers mean that nothing is done twice."
    )
    table.print()


def cluster(work: float, iterations: int) -> None:
    """Time to a thousand million unknowns from the measured work, in ns for an unknown and iteration."""
    side, latency, bandwidth, whole_below = (
        1000,
        2e-6,
        10e9,
        2**15,
    )  # of a message between nodes, seconds, bytes a second
    sides = [side]
    while sides[-1] ** 3 > whole_below:
        sides.append((sides[-1] + 1) // 2)
    cut, rest = sides[:-1], sides[-1]
    table = Table(
        f"Model: {side}^3 unknowns, {work:.0f} ns an unknown, iteration and process, {latency * 1e6:.0f} us, "
        f"{bandwidth / 1e9:.0f} GB/s, {iterations} iterations",
        ("ranks", "work ms", "ghost planes ms", "halo ms", "gather + rest ms", "sums ms", "efficiency", "seconds"),
    )
    for ranks in (1, 8, 16, 32, 64):
        compute = work * 1e-9 * side**3 / ranks
        apart = ranks > 1
        # Planes that both neighbours make, on either side, both ways: 3, 2, 1 and 0 in the four stages of a pass.
        ghosts = apart * sum(work * 1e-9 * 2 * 1.5 * s * s for s in cut)
        halo = apart * 2 * (
            latency + 8 * side**2 / bandwidth + sum(2 * latency + 4 * 3 * s * s / bandwidth for s in cut)
            + sum(4 * 2 * s * s / bandwidth for s in cut[1:])
        )  # fmt: skip
        gather = apart * (math.ceil(math.log2(ranks)) * latency + 4 * rest**3 / bandwidth) + work * 1e-9 * rest**3
        sums = apart * 3 * 2 * math.ceil(math.log2(ranks)) * latency
        total = compute + ghosts + halo + gather + sums
        table.add(
            ranks, f"{1e3 * compute:.0f}", f"{1e3 * ghosts:.1f}", f"{1e3 * halo:.2f}", f"{1e3 * gather:.2f}",
            f"{1e3 * sums:.3f}", f"{compute / total:.1%}", f"{iterations * total:.1f}",
        )  # fmt: skip
    table.print()


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--side", type=int, default=128, help="of the cube")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="write the records as JSON lines")
    options = parser.parse_args()
    side, repeats = options.side, options.repeats
    if processes.under_torchrun():
        ranks = init()
        records = [measure(ranks, side, side, repeats), measure(ranks, side, side * ranks.size, repeats)]
        if ranks.rank == 0:
            show(f"{side}^3, strong and weak", records)
        return
    strong = [processes.run(p, measure, side, side, repeats) for p in options.ranks]
    weak = [processes.run(p, measure, side, side * p, repeats) for p in options.ranks]
    show(f"Strong scaling: {side}^3 cells", strong)
    show(f"Weak scaling: {side}^3 cells a rank", weak)
    cluster(1e6 * weak[-1]["work"] * weak[-1]["ranks"] / weak[-1]["unknowns"], weak[-1]["iterations"])
    if options.output is not None:
        options.output.write_text("".join(json.dumps(record) + "\n" for record in [*strong, *weak]))


if __name__ == "__main__":
    main()
