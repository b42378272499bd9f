"""The limits of this machine: copy, triad and dot bandwidth, FMA peak, and a GPU's copy bandwidth.

    python bench/roofline.py [--threads 1 2] [--device cpu|cuda] [--source auto|native|torch] [--build] [-o FILE]

Bandwidth counts the words a kernel names per element: copy y = x 2 (one read, one write), triad y = a + s b 3, dot 2.
The read that an ordinary store adds (write-allocate) is NOT counted; the `_nt` kernels use non-temporal stores, which
have no such read, so `copy_nt` is what the memory can do and `copy` what a plain loop gets. Numbers come from the
native program bench_roofline when it is built (--build compiles it), else from torch (copy_, add(out=), dot), which has
no non-temporal stores and whose best matrix product stands in for the FMA peak; every record says which.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import machine
import programs
import tables

if TYPE_CHECKING:
    import torch

PROGRAM = "bench_roofline"
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


def copy_bandwidth(threads: int, bytes: int, device: str = "cpu", source: str = "auto") -> CopyBandwidth:  # noqa: A002
    """Copy bandwidth of `device` with `threads` threads on a working set (both arrays together) of `bytes` bytes.

    `source` is "native", "torch" or "auto" (native where the program is built). Takes about half a second.
    """
    rates = {rate.kernel: rate for rate in measure(threads, bytes, ("copy", "copy_nt"), device, source)}
    non_temporal = rates["copy_nt"].median if "copy_nt" in rates else None
    return CopyBandwidth(rates["copy"].median, non_temporal, rates["copy"].source)


def measure(
    threads: int, working_set: int, kernels: tuple[str, ...], device: str = "cpu", source: str = "auto"
) -> list[Measurement]:
    """Rates of the named bandwidth kernels on one working set."""
    program = programs.find(PROGRAM) if device == "cpu" and source in ("auto", "native") else None
    if program is not None:
        pattern = f"--benchmark_filter=^({'|'.join(kernels)})/"
        return _native(program, [f"--threads={threads}", f"--bytes={working_set}", pattern], threads)
    if source == "native":
        raise programs.ProgramError(f"measure: {PROGRAM} is not built; run `python bench/roofline.py --build`")
    return list(_torch_bandwidth(threads, working_set, kernels, device))


def peak(threads: int, source: str = "auto") -> list[Measurement]:
    """Multiply-add peak of the processor in fp32 and fp64, GFLOP/s."""
    program = programs.find(PROGRAM) if source in ("auto", "native") else None
    if program is not None:
        return _native(program, [f"--threads={threads}", "--benchmark_filter=^fma"], threads)
    return list(_torch_matrix_product(threads, "cpu"))


def _native(program: Path, arguments: list[str], threads: int) -> list[Measurement]:
    rates: dict[str, list[float]] = {}
    for entry in programs.run(program, arguments):
        rates.setdefault(entry["run_name"], []).append(entry.get("bytes_per_second", entry.get("flops", 0.0)))
    found = []
    for name, values in rates.items():
        kernel, size = name.split("/")[:2]
        bandwidth = kernel in WORDS
        found.append(
            Measurement(
                kernel=kernel,
                device="cpu",
                threads=threads,
                bytes=int(size) if bandwidth else 0,
                median=statistics.median(values) / GB,
                best=max(values) / GB,
                unit="GB/s" if bandwidth else "GFLOP/s",
                source="native",
            )
        )
    return found


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
    import torch

    return functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None


def _torch_bandwidth(
    threads: int, working_set: int, kernels: tuple[str, ...], device_name: str
) -> Iterator[Measurement]:
    import torch

    device = torch.device(device_name)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for kernel in kernels:
            if kernel not in ("copy", "triad", "dot"):
                continue  # torch has no non-temporal stores
            n = working_set // (8 * WORDS[kernel])
            x, y, z = (torch.full((n,), 1.0 + k, dtype=torch.float64, device=device) for k in range(3))
            calls: dict[str, Callable[[], object]] = {
                "copy": functools.partial(z.copy_, x),
                "triad": functools.partial(torch.add, x, y, alpha=1.5, out=z),
                "dot": functools.partial(torch.dot, x, y),
            }
            rates = _repeat(calls[kernel], _finisher(device), 8.0 * WORDS[kernel] * n / GB, 0.05)
            yield Measurement(
                kernel, device.type, threads, working_set, statistics.median(rates), max(rates), "GB/s", "torch"
            )
    finally:
        torch.set_num_threads(before)


def _torch_matrix_product(threads: int, device_name: str) -> Iterator[Measurement]:
    import torch

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


def measure_machine(threads: list[int], device: str = "cpu", source: str = "auto") -> Iterator[Measurement]:
    """Every number of this page, one at a time."""
    if device == "cuda":
        yield from (
            _at_level(rate, "HBM") for rate in measure(1, DEVICE_BYTES, ("copy", "triad", "dot"), "cuda", "torch")
        )
        yield from _torch_matrix_product(1, "cuda")
        return
    for count in threads:
        for level, size in machine.working_sets(count).items():
            yield from (_at_level(rate, level) for rate in measure(count, size, tuple(WORDS), "cpu", source))
        yield from peak(count, source)


def device_is_there(device: str) -> bool:
    """Whether the machine has a "cpu" or a "cuda" device that torch can use."""
    import torch

    return device == "cpu" or torch.cuda.is_available()


def _at_level(rate: Measurement, level: str) -> Measurement:
    return Measurement(**(asdict(rate) | {"level": level}))


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


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, min(2, machine.cpus())}))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--source", choices=["auto", "native", "torch"], default="auto")
    parser.add_argument("--build", action="store_true", help="compile the native program first")
    parser.add_argument("-o", "--output", type=Path, help="append JSON lines to this file")
    options = parser.parse_args(arguments)
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch loads its OpenMP
    if options.build:
        programs.build(PROGRAM)
    if not device_is_there(options.device):
        print("roofline: torch sees no CUDA device", file=sys.stderr)
        return 1
    rates = []
    for rate in measure_machine(options.threads, options.device, options.source):
        rates.append(rate)
        line = json.dumps({"kind": "roofline"} | asdict(rate))
        if options.output is None:
            print(line, flush=True)
        else:
            with options.output.open("a") as file:
                file.write(line + "\n")
    table(rates).print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
