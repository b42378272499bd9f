"""The limits of this machine as torch reaches them: copy, triad and dot bandwidth, and the rate of matrix products.

Bandwidth counts the words a kernel names per element: copy y = x 2 (one read, one write), triad y = a + s b 3, dot 2.
The read that an ordinary store adds (write-allocate) is not counted.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from kantor.bench import machine, tables
from kantor.bench.harness import Measure, Spec

WORDS = {"copy": 2, "copy_nt": 2, "triad": 3, "triad_nt": 3, "dot": 2}
DEVICE_BYTES = 2 << 30  # far beyond any L2
GB = 1e9


@dataclass(frozen=True)
class Measurement:
    """One kernel's rate: `median` and `best` over repetitions in `unit`, `bytes` the working set of all its arrays."""

    kernel: str
    device: str
    threads: int
    bytes: int
    median: float
    best: float
    unit: str
    source: str
    level: str = ""


@dataclass(frozen=True)
class CopyBandwidth:
    """Bytes read plus bytes written per second of y = x, medians. `non_temporal` is None where it was not measured."""

    plain: float
    non_temporal: float | None
    source: str

    @property
    def best(self) -> float:
        """The faster of the two: the strictest denominator."""
        return max(self.plain, self.non_temporal or 0.0)


def _repeat(call: Callable[[], object], finish: Callable[[], object], amount: float, seconds: float) -> list[float]:
    """Rates in `amount` units per second of five repetitions of about `seconds` each."""
    call()
    finish()
    begin = time.perf_counter()
    call()
    finish()
    inner = max(1, round(seconds / max(time.perf_counter() - begin, 1e-7)))
    rates = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(inner):
            call()
        finish()
        rates.append(amount * inner / (time.perf_counter() - begin))
    return rates


def _finisher(device: torch.device) -> Callable[[], object]:
    return functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def torch_bandwidth(
    threads: int, working_set: int, kernels: tuple[str, ...], device_name: str
) -> Iterator[Measurement]:
    """Rates of copy, triad and dot, those that are named, on arrays of `working_set` bytes together."""
    device = torch.device(device_name)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for kernel in kernels:
            if kernel not in ("copy", "triad", "dot"):
                continue  # torch has no non-temporal stores
            n = working_set // (8 * WORDS[kernel])
            arrays = [torch.full((n,), 1.0, dtype=torch.float64, device=device) for _ in range(WORDS[kernel])]
            calls: dict[str, Callable[..., object]] = {
                "copy": lambda x, z: z.copy_(x),
                "triad": lambda x, y, z: torch.add(x, y, alpha=1.5, out=z),
                "dot": torch.dot,
            }
            rates = _repeat(
                functools.partial(calls[kernel], *arrays), _finisher(device), 8.0 * WORDS[kernel] * n / GB, 0.05
            )
            yield Measurement(
                kernel, device.type, threads, working_set, statistics.median(rates), max(rates), "GB/s", "torch"
            )
    finally:
        torch.set_num_threads(before)


def torch_matrix_product(threads: int, device_name: str) -> Iterator[Measurement]:
    """Rates of large matrix products in float32 and float64."""
    device = torch.device(device_name)
    n = 1024 if device.type == "cpu" else 8192
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype, name in ((torch.float32, "gemm_fp32"), (torch.float64, "gemm_fp64")):
            a, b = (torch.rand((n, n), dtype=dtype, device=device) for _ in range(2))
            out = torch.empty_like(a)
            rates = _repeat(functools.partial(torch.mm, a, b, out=out), _finisher(device), 2.0 * n**3 / GB, 0.1)
            yield Measurement(name, device.type, threads, 0, statistics.median(rates), max(rates), "GFLOP/s", "torch")
    finally:
        torch.set_num_threads(before)


def device_is_there(device: str) -> bool:
    """Whether the machine has a "cpu" or a "cuda" device that torch can use."""
    return device == "cpu" or torch.cuda.is_available()


def at_level(rate: Measurement, level: str) -> Measurement:
    """The same rate, with the name of what its working set fits in."""
    return replace(rate, level=level)


# --- in a worker of `kantor bench` ---


def prepare(spec: Spec) -> tuple[Measure, dict[str, Any]]:
    """Goal "limits": every rate that the results are set against. Goal "copy": the copy beyond all caches, once."""

    def measure(goal: str) -> dict[str, Any]:
        if goal == "copy":
            size = DEVICE_BYTES if spec.device == "cuda" else machine.working_sets(spec.threads)["DRAM"]
            return {"rate": next(torch_bandwidth(spec.threads, size, ("copy",), spec.device)).median}
        counts = [1] if spec.device == "cuda" else sorted({1, spec.threads})
        return {"rates": [asdict(rate) for count in counts for rate in _limits(count, spec.device)]}

    return measure, {}


def _limits(threads: int, device: str) -> Iterator[Measurement]:
    levels = {"memory": DEVICE_BYTES} if device == "cuda" else machine.working_sets(threads)
    for level, size in levels.items():
        yield from (at_level(rate, level) for rate in torch_bandwidth(threads, size, ("copy",), device))
    yield from torch_matrix_product(threads, device)


def table(rates: list[Measurement]) -> tables.Table:
    """The measurements as a table, one line per kernel and working set."""
    columns = ("device", "threads", "kernel", "level", "working set", "median", "best", "unit", "source")
    result = tables.Table("Roofline (copy counts 2 words, triad 3, dot 2; write-allocate not counted)", columns)
    for rate in rates:
        size = f"{rate.bytes / 2**20:.1f} MiB" if rate.bytes else ""
        result.add(
            rate.device, rate.threads, rate.kernel, rate.level, size, f"{rate.median:.1f}", f"{rate.best:.1f}",
            rate.unit, rate.source,
        )  # fmt: skip
    return result
