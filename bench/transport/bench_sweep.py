"""One iteration of Sinkhorn's method in the log domain, beside its peers and the limits of the machine.

    python bench/transport/bench_sweep.py --threads 1 2 -o results/sweep.jsonl

An iteration is ``f = reg (log a - LSE_j((g - C) / reg))`` and the same for g. C is a matrix (fp64, fp32), or |x - y|^2
of points (d = 3) and never formed. Every peer starts from the same g and its potentials are compared with float64.

The floor is the larger of two times: of reading the matrix once at the speed of a dot product on arrays of its size,
and of one exponential for each entry above the cut-off, at the speed of the fastest exp of torch and NumPy on an array
in cache. An entry is read once and needs one exponential in an iteration, for rows and columns together, if the two
halves are fused; peers that take two passes need twice that. Peers take turns, medians count; each has a process.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from kantor.bench import machine, tables
from kantor.bench.harness import Measure, Spec, Worker, WorkerError
from torch import Tensor

import roofline

PREPARE_SECONDS, MEASURE_SECONDS = 300.0, 120.0  # KeOps compiles in the first
LEAST_SECONDS = 0.25  # of one measurement, which is the median of as many sweeps
CUTOFF = 60.0  # entries below e^-60 of their row's largest change no digit, and Kantor skips them
DIMENSION = 3
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class Task:
    """A cost, as a matrix C (n, m) or points X (n, d), Y (m, d); log a, log b; g to start from."""

    C: Tensor | None
    X: Tensor | None
    Y: Tensor | None
    log_a: Tensor
    log_b: Tensor
    g: Tensor
    reg: float


Sweep = Callable[[], tuple[Any, Any]]  # returns (f, new g)


# --- Kantor ---


def kantor_sweep(task: Task) -> Sweep:
    """The native sweep: f, and the column sums of the plan of f and g, from which g follows."""
    from kantor.transport import _native
    from kantor.transport._cost import Cost

    if task.C is not None:
        cost = Cost.dense(task.C)
    else:
        assert task.X is not None
        assert task.Y is not None
        cost = Cost.points(task.X, task.Y, "sqeuclidean")
    encoded, g, log_a, log_b = cost.encode(), task.g.double(), task.log_a.double(), task.log_b.double()

    def sweep() -> tuple[Tensor, Tensor]:
        f, sums = _native.sweep(encoded, task.reg, g, log_a, cutoff=CUTOFF)
        return f, g + task.reg * (log_b - sums.log())

    return sweep


# --- matrices ---


def torch_sweep(task: Task) -> Sweep:
    """Two logsumexp along rows, on -C / reg in both orders and with one temporary each: the fastest way found."""
    assert task.C is not None
    K, KT = task.C / -task.reg, (task.C.T / -task.reg).contiguous()
    work, workT, g = torch.empty_like(K), torch.empty_like(KT), task.g / task.reg

    def sweep() -> tuple[Tensor, Tensor]:
        f = task.log_a - torch.logsumexp(torch.add(K, g, out=work), 1)
        new = task.log_b - torch.logsumexp(torch.add(KT, f, out=workT), 1)
        return f * task.reg, new * task.reg

    return sweep


def pot_sweep(task: Task, backend: str) -> Callable[[], float]:
    """Seconds for a sweep of ``ot.bregman.sinkhorn_log``: the difference of 31 iterations and one, over 30."""
    import ot

    assert task.C is not None
    tensors = (task.log_a.exp(), task.log_b.exp(), task.C)
    a, b, C = tensors if backend == "torch" else (t.numpy() for t in tensors)

    def run(iterations: int) -> float:
        begin = time.perf_counter()
        ot.bregman.sinkhorn_log(a, b, C, task.reg, numItermax=iterations, stopThr=0.0, warn=False)
        return time.perf_counter() - begin

    return lambda: (run(31) - run(1)) / 30


def ott_sweep(task: Task) -> Sweep:
    """The two updates of OTT-JAX's geometry, compiled together; points in the batches its online mode takes."""
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_platforms", "cpu")
    from ott.geometry import geometry, pointcloud

    operands = (task.C,) if task.C is not None else (task.X, task.Y)
    arrays = [jax.numpy.asarray(t.numpy()) for t in operands if t is not None]
    log_a, log_b, g = (jax.numpy.asarray(t.numpy()) for t in (task.log_a, task.log_b, task.g))

    def both(arrays: Any, log_a: Any, log_b: Any, g: Any) -> tuple[Any, Any]:
        if len(arrays) == 1:
            geom: Any = geometry.Geometry(arrays[0], epsilon=task.reg)
        else:
            geom = pointcloud.PointCloud(*arrays, epsilon=task.reg, batch_size=512)
        f = jax.numpy.zeros_like(log_a)
        f = geom.update_potential(f, g, log_a, 0, axis=1)
        return f, geom.update_potential(f, g, log_b, 0, axis=0)

    compiled = jax.jit(both).lower(arrays, log_a, log_b, g).compile()

    def sweep() -> tuple[Any, Any]:
        return jax.block_until_ready(compiled(arrays, log_a, log_b, g))

    return sweep


# --- points ---


def keops_sweep(task: Task) -> Sweep:
    """Two logsumexp reductions of a KeOps LazyTensor."""
    from pykeops.torch import LazyTensor

    assert task.X is not None
    assert task.Y is not None
    scale = 1 / math.sqrt(task.reg)
    X, Y = task.X * scale, task.Y * scale

    def softmin(x: Tensor, y: Tensor, h: Tensor) -> Tensor:
        x_i, y_j, h_j = LazyTensor(x[:, None]), LazyTensor(y[None]), LazyTensor(h[None, :, None])
        result: Tensor = (h_j - ((x_i - y_j) ** 2).sum(-1)).logsumexp(1)[:, 0]
        return result

    def sweep() -> tuple[Tensor, Tensor]:
        f = task.log_a - softmin(X, Y, task.g / task.reg)
        return f * task.reg, (task.log_b - softmin(Y, X, f)) * task.reg

    return sweep


def geomloss_sweep(task: Task) -> Sweep:
    """The two soft minima of an iteration of GeomLoss's online backend, whose cost is |x - y|^2 / 2."""
    from geomloss._legacy.sinkhorn_samples import lse_genred, softmin_online

    assert task.X is not None
    assert task.Y is not None
    X, Y = math.sqrt(2) * task.X, math.sqrt(2) * task.Y
    reduction = lse_genred("(SqDist(X,Y) / IntCst(2))", DIMENSION, dtype=str(X.dtype)[6:])

    def sweep() -> tuple[Tensor, Tensor]:
        f = softmin_online(task.reg, (X, Y), task.g / task.reg, log_conv=reduction).view(-1) + task.reg * task.log_a
        new = softmin_online(task.reg, (Y, X), f / task.reg, log_conv=reduction).view(-1)
        return f, new + task.reg * task.log_b

    return sweep


def torch_points_sweep(task: Task) -> Sweep:
    """logsumexp over tiles of rows that fit a cache; a tile is one matrix product of points extended by their norms."""
    assert task.X is not None
    assert task.Y is not None
    scale = math.sqrt(2 / task.reg)
    X, Y = task.X * scale, task.Y * scale
    X_half, Y_half = X.square().sum(1) / 2, Y.square().sum(1) / 2

    def softmin(x: Tensor, half: Tensor, y: Tensor, h: Tensor) -> Tensor:
        rows = max(1, (1 << 17) // len(y))
        parts = [torch.logsumexp(torch.addmm(h, tile, y.T), 1) for tile in x.split(rows)]
        return torch.cat(parts) - half

    def sweep() -> tuple[Tensor, Tensor]:
        f = task.log_a - softmin(X, X_half, Y, task.g / task.reg - Y_half)
        return f * task.reg, (task.log_b - softmin(Y, Y_half, X, f - X_half)) * task.reg

    return sweep


DENSE: dict[str, Callable[[Task], Any]] = {
    "kantor": kantor_sweep,
    "torch": torch_sweep,
    "pot": lambda task: pot_sweep(task, "numpy"),
    "pot-torch": lambda task: pot_sweep(task, "torch"),
    "ott": ott_sweep,
}
POINTS: dict[str, Callable[[Task], Any]] = {
    "kantor": kantor_sweep,
    "keops": keops_sweep,
    "geomloss": geomloss_sweep,
    "torch": torch_points_sweep,
    "ott": ott_sweep,
}
PACKAGES = {"keops": "pykeops", "geomloss": "geomloss", "pot": "ot", "pot-torch": "ot", "ott": "ott"}


# --- in a worker ---


def make_task(case: str, n: int, reg: float, dtype: torch.dtype) -> tuple[Task, Tensor]:
    """A problem near its solution, and its cost in float64."""
    from kantor.datasets import transport

    X, Y, a, b = transport.point_cloud_points(n, DIMENSION)
    X, Y = X.to(dtype), Y.to(dtype)
    C = torch.cdist(X.double(), Y.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    if case == "dense":
        C = C.to(dtype).double()
    g = torch.zeros(n, dtype=torch.float64)
    for _ in range(2):
        f = reg * (a.log() - torch.logsumexp((g - C) / reg, 1))
        g = reg * (b.log() - torch.logsumexp((f[:, None] - C) / reg, 0))
    g = g.to(dtype)
    log_a, log_b = a.log().to(dtype), b.log().to(dtype)
    if case == "dense":
        return Task(C.to(dtype), None, None, log_a, log_b, g, reg), C
    return Task(None, X, Y, log_a, log_b, g, reg), C


def prepare(spec: Spec) -> tuple[Measure, dict[str, Any]]:
    """Build the sweep, compare it with float64, and return what times it."""
    torch.set_num_threads(spec.threads)
    case, n, reg = spec.problem.split("/")
    if spec.peer == "floor":
        return _exp_rate(DTYPES[spec.dtype]), {}
    task, C = make_task(case, int(n), float(reg), DTYPES[spec.dtype])
    sweep = (DENSE if case == "dense" else POINTS)[spec.peer](task)
    exponents = (task.g.double() - C) / task.reg
    log_sums = torch.logsumexp(exponents, 1)
    above = float((exponents >= exponents.amax(1, keepdim=True) - CUTOFF).double().mean())
    facts: dict[str, Any] = {"above_cutoff": above}
    if not spec.peer.startswith("pot"):
        f = task.reg * (task.log_a.double() - log_sums)
        g = task.reg * (task.log_b.double() - torch.logsumexp((f[:, None] - C) / task.reg, 0))
        mine = [torch.from_numpy(np.array(t)).double().view(-1) for t in sweep()]
        facts["difference"] = max(float((x - y).abs().max()) for x, y in zip(mine, (f, g), strict=True)) / task.reg
    del C, exponents

    def measure(_: str) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            times = []
            while len(times) < 3 or sum(times) < LEAST_SECONDS:
                if spec.peer.startswith("pot"):
                    times.append(sweep())
                else:
                    begin = time.perf_counter()
                    sweep()
                    times.append(time.perf_counter() - begin)
        return {"seconds": statistics.median(times)}

    return measure, facts


def _exp_rate(dtype: torch.dtype) -> Measure:
    """Exponentials a second, of one thread, on 16 KiB: the faster of torch and NumPy."""
    x = torch.linspace(-20, 0, (16 << 10) // dtype.itemsize, dtype=dtype)
    out = torch.empty_like(x)
    x_array, out_array = x.numpy(), out.numpy()

    def measure(_: str) -> dict[str, Any]:
        torch.set_num_threads(1)
        rates = []
        for call in (lambda: torch.exp(x, out=out), lambda: np.exp(x_array, out=out_array)):
            times = []
            for _ in range(200):
                begin = time.perf_counter()
                for _ in range(20):
                    call()
                times.append(time.perf_counter() - begin)
            rates.append(20 * x.numel() / statistics.median(times))
        return {"seconds": 1 / max(rates), "torch": rates[0], "numpy": rates[1]}

    return measure


# --- in the runner ---


def _installed(peer: str) -> bool:
    from importlib.util import find_spec

    return peer not in PACKAGES or find_spec(PACKAGES[peer]) is not None


def run_case(
    case: str, n: int, reg: float, dtype: str, threads: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """All peers of a case in turns; a record each, the floor among them."""
    problem = f"{case}/{n}/{reg!r}"
    available = DENSE if case == "dense" else POINTS
    names = ["floor", *(name for name in available if _installed(name) and name in options.methods)]
    workers: dict[str, Worker] = {}
    facts: dict[str, dict[str, Any]] = {}
    times: dict[str, list[float]] = {name: [] for name in names}
    errors: dict[str, str] = {}
    try:
        for name in names:
            workers[name] = Worker(threads, "transport.bench_sweep")
            spec = Spec("sweep", problem, name, dtype, threads, "cpu", 0, 0.0)
            try:
                facts[name] = workers[name].prepare(spec, PREPARE_SECONDS)
            except WorkerError as error:
                errors[name] = str(error)
        for _ in range(options.repeats):
            for name in names:
                if name not in errors:
                    try:
                        times[name].append(workers[name].measure("sweep", MEASURE_SECONDS)["seconds"])
                    except WorkerError as error:
                        errors[name] = str(error)
    finally:
        for worker in workers.values():
            worker.stop()
    size = DTYPES[dtype].itemsize * n * n
    bandwidth = _read_bandwidth(threads, size)
    base = {"kind": "sweep", "case": case, "n": n, "reg": reg, "dtype": dtype, "threads": threads}
    records = []
    exp_seconds = statistics.median(times["floor"]) / threads
    for name in names[1:]:
        seconds = statistics.median(times[name]) if times[name] else None
        records.append(
            base
            | {"peer": name, "seconds": seconds, "error": errors.get(name)}
            | {
                "floor_bytes": size / bandwidth if case == "dense" else 0.0,
                "floor_exp": exp_seconds * n * n * facts.get(name, {}).get("above_cutoff", 1.0),
                "difference": facts.get(name, {}).get("difference"),
            }
        )
    return records


def _read_bandwidth(threads: int, size: int) -> float:
    """Bytes a second of a dot product whose two arrays together are as large as the matrix."""
    return max(rate.median for rate in roofline.measure(threads, size, ("dot",), "cpu", "auto")) * roofline.GB


def make_table(records: list[dict[str, Any]]) -> tables.Table:
    """Times, ratios and fractions of the floor."""
    table = tables.Table(
        "one Sinkhorn iteration (rows and columns)",
        ("case", "dtype", "n", "reg", "threads", "peer", "ms", "ns/entry", "x Kantor", "of floor", "bound", "differs"),
    )
    mine: dict[tuple, float] = {}
    last = None
    for record in records:
        key = tuple(record[name] for name in ("case", "dtype", "n", "reg", "threads"))
        if key != last:
            table.rule()
            last = key
        seconds = record["seconds"]
        if seconds is None:
            table.notes.append(f"{record['peer']}: {record['error']}")
            continue
        if record["peer"] == "kantor":
            mine[key] = seconds
        floor = max(record["floor_bytes"], record["floor_exp"])
        table.add(
            record["case"], record["dtype"], record["n"], f"{record['reg']:.0e}", record["threads"], record["peer"],
            f"{1e3 * seconds:.3f}", f"{1e9 * seconds / record['n'] ** 2:.3f}",
            f"{seconds / mine[key]:.2f}" if key in mine else "-", f"{100 * floor / seconds:.0f}%",
            "bytes" if record["floor_bytes"] > record["floor_exp"] else "exp",
            f"{record['difference']:.0e}" if record["difference"] is not None else "-",
        )  # fmt: skip
    table.notes.append("differs: largest difference of a potential from float64, in units of reg")
    return table


def main() -> int:
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=("dense", "points"), choices=("dense", "points"))
    parser.add_argument("--sizes", nargs="+", type=int, default=(1000, 4000))
    parser.add_argument("--regs", nargs="+", type=float, default=(1e-1, 1e-3))
    parser.add_argument("--dtypes", nargs="+", default=tuple(DTYPES), choices=tuple(DTYPES))
    parser.add_argument("--methods", nargs="+", default=tuple(DENSE | POINTS), choices=tuple(DENSE | POINTS))
    parser.add_argument("--threads", nargs="+", type=int, default=(1,))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="append one JSON record a line as they come")
    options = parser.parse_args()
    records: list[dict[str, Any]] = []
    if options.output is not None:
        with options.output.open("a") as file:
            file.write(json.dumps(machine.environment()) + "\n")
    for threads in options.threads:
        for case in options.cases:
            for dtype in options.dtypes:
                for n in options.sizes:
                    for reg in options.regs:
                        found = run_case(case, n, reg, dtype, threads, options)
                        records += found
                        if options.output is not None:
                            with options.output.open("a") as file:
                                file.writelines(json.dumps(record) + "\n" for record in found)
    make_table(records).print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
