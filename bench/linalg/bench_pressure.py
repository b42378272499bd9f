"""Pressure solves: a new geometry set up and solved, Kantor's multigrid beside PyAMG, SciPy and its own plain solvers.

    python bench/linalg/bench_pressure.py [--scenes open_box smoke_balls] [--sizes 32 64 128] [--dim 3] [--threads 1 2]
                                          [--repeats 5] [--large] [-o pressure.jsonl]
    python bench/linalg/bench_pressure.py --dim 2 --sizes 64 256 1024 --scenes smoke_balls tank dam labyrinth
    python bench/linalg/bench_pressure.py --apply --sizes 64 128 256      the product alone, beside a copy

Scenes are those of kantor.datasets.poisson_scenes, right-hand sides standard normal, everything in float64. Each solver
is a process of its own (harness.py); they take turns. One measurement is the set-up for a geometry that was not seen
before, then solves from zero to each tolerance; true residuals are formed afterwards. Set-up: for Kantor from the
flags; for those that need a matrix, from the finished CSR matrix of the fluid cells, whose assembly nobody pays for.
PyAMG gets its better options, found by trying: smoothed aggregation without improved candidates, Ruge-Stueben with the
standard and with direct interpolation, each accelerated by conjugate gradients; `pyamg's best` is the least of all.

The least of the repetitions is reported: processor time on one thread, wall time on more. Solvers that know one thread
only are measured once and compared with both. `MB` is how far the process grew beyond the problem itself.
`--large` adds a box of 256^3 for Kantor alone. `--apply` counts 18 bytes a cell in float64 and 10 in float32 (one word
read, one written, two bytes of flags) against the copy of roofline.py on vectors of the same size.
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
from kantor.bench.cases.multigrid import FIRST, Scene
from kantor.bench.cases.multigrid import SOLVERS as PEERS
from kantor.bench.tables import Table

import roofline

RTOLS = (1e-6, 1e-8)
TIMEOUT = 1200.0
LEAST_SECONDS = 0.3  # a measurement that is shorter is repeated


# --- in a worker ---


def prepare(spec: harness.Spec) -> tuple[harness.Measure, dict[str, Any]]:
    """Build the problem; a measurement sets up and solves."""
    from kantor.datasets.poisson_scenes import SCENES
    from kantor.linalg import PoissonGrid

    torch.set_num_threads(spec.threads)
    peer, (scene, *sizes) = PEERS[spec.peer], spec.problem.split()
    flags = SCENES[scene]([int(n) for n in sizes])
    A = PoissonGrid(flags)
    b = torch.randn(A.grid, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * A.mask
    matrix = A.to_csr().to_scipy() if peer.matrix else None
    problem = Scene(flags, b, A.compress(b), matrix)
    facts = {"unknowns": A.num_unknowns}
    clock = time.process_time if spec.threads == 1 else time.perf_counter
    if A.num_unknowns <= 64**3 and A.closed_components[1] == 0:
        peer.set_up(problem)(1e-3)  # imports, and the first touch of everything

    def once() -> dict[str, Any]:
        started = clock()
        solve = peer.set_up(problem)
        result: dict[str, Any] = {"setup": clock() - started}
        for rtol in RTOLS:
            started = clock()
            x, iterations = solve(rtol)
            seconds = clock() - started
            residual = problem.compressed_b - A.compress(A.matvec(A.expand(x)))
            relative = float(residual.norm() / problem.compressed_b.norm())
            result |= {f"solve {rtol:.0e}": seconds, f"iterations {rtol:.0e}": iterations, f"true {rtol:.0e}": relative}
        return result

    def measure(_: str) -> dict[str, Any]:
        resident, started = machine.forget_peak_memory(), time.perf_counter()
        result = once()
        result["megabytes"] = machine.peak_memory() - resident
        while time.perf_counter() - started < LEAST_SECONDS:
            result = least_of(result, once())
        return result

    return measure, facts


def least_of(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` beside what is known already, with the smaller of two times."""
    timed = [name for name in new if name in old and (name == "setup" or name.startswith("solve"))]
    return old | new | {name: min(old[name], new[name]) for name in timed}


# --- the runner ---


def specs_of(options: argparse.Namespace, scene: str, side: int) -> list[harness.Spec]:
    """All solvers on one scene; the largest box has Kantor's only."""
    cells = side**options.dim
    specs = []
    for name, peer in PEERS.items():
        if find_spec(peer.needs) is None or cells > peer.limit or (options.peers and name.strip() not in options.peers):
            continue
        for threads in options.threads if peer.threaded else [1]:
            problem = " ".join([scene, *[str(side)] * options.dim])
            specs.append(harness.Spec("pressure", problem, name, "float64", threads, "cpu", 0, RTOLS[0]))
    return specs


def run(options: argparse.Namespace, scene: str, side: int, log: list[dict[str, Any]]) -> None:
    """One table."""
    records: dict[tuple[str, int], dict[str, Any]] = {}
    workers: dict[harness.Spec, harness.Worker] = {}
    specs = specs_of(options, scene, side)
    try:
        for repetition in range(options.repeats):
            for spec in specs:
                key = (spec.peer, spec.threads)
                slow = records.get(key, {}).get("wall", 0.0) > options.slow
                if repetition and (slow or (spec.peer, spec.threads) not in records):
                    continue
                try:
                    if spec not in workers:
                        workers[spec] = harness.Worker(spec.threads, "linalg.bench_pressure")
                        facts = workers[spec].prepare(spec, TIMEOUT)
                        records[key] = facts
                    started = time.perf_counter()
                    result = workers[spec].measure("solve", TIMEOUT)
                    wall = time.perf_counter() - started
                except harness.WorkerError as error:
                    print(f"{spec.peer.strip()}, {spec.problem}: {error}", file=sys.stderr)
                    records.pop(key, None)
                    workers.pop(spec).stop()
                    continue
                log.append(asdict(spec) | records[key] | result | {"repetition": repetition})
                records[key] = least_of(records[key], result) | {"wall": wall}
                if wall > options.slow or not keeps(specs, side**options.dim):
                    workers.pop(spec).stop()
    finally:
        for worker in workers.values():
            worker.stop()
    if records:
        table_of(options, scene, side, records).print()
        print()


def keeps(specs: list[harness.Spec], cells: int) -> bool:
    """Whether all processes can stay alive: 250 MB for the libraries, and some hundred bytes a cell."""
    return machine.fits([(250 << 20) + 600 * cells] * len(specs))


def table_of(
    options: argparse.Namespace, scene: str, side: int, records: dict[tuple[str, int], dict[str, Any]]
) -> Table:
    """Seconds and ratios, and what was promised of them."""
    threads = [t for t in options.threads if (FIRST, t) in records]
    ours = [records[FIRST, t]["setup"] + records[FIRST, t]["solve 1e-06"] for t in threads]
    unknowns = next(iter(records.values()))["unknowns"]
    columns = ("", "threads", "set-up s", "to 1e-6 s", "iterations", "both s")
    ratios = tuple(f"of Kantor, {t}t" for t in threads)
    table = Table(
        f"{scene}, {' x '.join([str(side)] * options.dim)}, {unknowns} unknowns",
        (*columns, *ratios, "to 1e-8 s", "iterations", "MB"),
    )
    for (name, used), record in records.items():
        total = record["setup"] + record["solve 1e-06"]
        seconds = (f"{s:.4g}" for s in (record["setup"], record["solve 1e-06"]))
        table.add(
            name,
            used,
            *seconds,
            record["iterations 1e-06"],
            f"{total:.4g}",
            *(f"{total / own:.3g}x" for own in ours),
            f"{record['solve 1e-08']:.4g}",
            record["iterations 1e-08"],
            f"{record['megabytes']:.0f}",
        )
        residuals = {rtol: record[f"true {rtol:.0e}"] for rtol in RTOLS}
        missed = [f"{residual:.1e}" for rtol, residual in residuals.items() if not residual <= 1.5 * rtol]
        if missed:
            table.notes.append(f"{name.strip()}, {used} thread(s): true residuals {', '.join(missed)}")
    amg = [r["setup"] + r["solve 1e-06"] for (name, _), r in records.items() if name.startswith("pyamg")]
    plain = {used: r["setup"] + r["solve 1e-06"] for (name, used), r in records.items() if name == "Kantor, cg"}
    for t, own in zip(threads, ours, strict=True):
        said = [f"pyamg's best takes {min(amg) / own:.1f}x"] if amg else []
        said += [f"Kantor's own cg {plain[t] / own:.1f}x"] if t in plain else []
        if said:
            table.notes.append(f"{t} thread(s), set-up and solve to 1e-6: {', '.join(said)} Kantor's multigrid")
    return table


# --- the product alone ---


def apply(options: argparse.Namespace) -> None:
    """A x beside a copy of vectors of the same size."""
    from kantor import _C
    from kantor.datasets.poisson_scenes import SCENES
    from kantor.linalg import PoissonGrid

    for threads in options.threads:
        torch.set_num_threads(threads)
        table = Table(
            f"masked product, {threads} thread(s), least of {20 * options.repeats}",
            ("", "", "us", "GB/s", "copy GB/s", "of the copy"),
        )
        for side in options.sizes:
            flags = SCENES[options.scenes[0]]([side] * options.dim)
            for dtype in (torch.float64, torch.float32):
                A = PoissonGrid(flags, dtype=dtype)
                operands, layout, scales = A.encode()
                x = torch.randn(1, A.shape[0], dtype=torch.float64).to(dtype)
                y, z = torch.zeros_like(x), torch.zeros_like(x)

                def product(operands=operands, layout=layout, scales=scales, x=x, y=y, threads=threads) -> None:
                    _C.matvec(operands, layout, scales, x, y, None, threads)

                mine, theirs = least([product, lambda x=x, z=z: z.copy_(x)], 20 * options.repeats)
                moved = (2 * dtype.itemsize + 2) * A.shape[0]
                rate = 2 * dtype.itemsize * A.shape[0] / theirs
                native = roofline.copy_bandwidth(threads, 2 * dtype.itemsize * A.shape[0])
                copy = max(rate, native.plain * 1e9)
                table.add(
                    f"{side}^{options.dim}",
                    str(dtype)[6:],
                    f"{1e6 * mine:.0f}",
                    f"{moved / mine / 1e9:.1f}",
                    f"{copy / 1e9:.1f}",
                    f"{100 * moved / mine / copy:.0f}%",
                )
        table.notes.append(f"copy: the faster of torch's copy_ and of roofline.py ({native.source})")
        table.print()
        print()


def least(runs: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Least wall seconds of each, taking turns."""
    times = [float("inf")] * len(runs)
    for _ in range(repeats):
        for k, call in enumerate(runs):
            started = time.perf_counter()
            call()
            times[k] = min(times[k], time.perf_counter() - started)
    return times


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", nargs="+", default=["open_box", "smoke_balls"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--dim", type=int, choices=(2, 3), default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, min(2, machine.cpus())}))
    parser.add_argument("--peers", nargs="+", help="some of: " + ", ".join(name.strip() for name in PEERS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--slow", type=float, default=8.0, help="seconds from which one measurement is enough")
    parser.add_argument("--large", action="store_true", help="a box of 256^3 as well, Kantor alone")
    parser.add_argument("--apply", action="store_true", help="the product alone")
    parser.add_argument("-o", "--output", type=Path, help="measurements as JSON lines")
    options = parser.parse_args()
    if options.apply:
        return apply(options)
    log: list[dict[str, Any]] = []
    for side in options.sizes:
        for scene in options.scenes:
            run(options, scene, side, log)
    if options.large:
        options.dim = 3
        run(options, "open_box", 256, log)
    if options.output:
        options.output.write_text("".join(json.dumps(record) + "\n" for record in log))
    return None


if __name__ == "__main__":
    main()
