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
import json
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # before torch loads its OpenMP

from kantor.bench import machine
from kantor.bench.roofline import (
    DEVICE_BYTES,
    GB,
    WORDS,
    CopyBandwidth,
    Measurement,
    at_level,
    device_is_there,
    table,
    torch_bandwidth,
    torch_matrix_product,
)

import programs

PROGRAM = "bench_roofline"


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
    return list(torch_bandwidth(threads, working_set, kernels, device))


def peak(threads: int, source: str = "auto") -> list[Measurement]:
    """Multiply-add peak of the processor in fp32 and fp64, GFLOP/s."""
    program = programs.find(PROGRAM) if source in ("auto", "native") else None
    if program is not None:
        return _native(program, [f"--threads={threads}", "--benchmark_filter=^fma"], threads)
    return list(torch_matrix_product(threads, "cpu"))


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


def measure_machine(threads: list[int], device: str = "cpu", source: str = "auto") -> Iterator[Measurement]:
    """Every number of this page, one at a time."""
    if device == "cuda":
        yield from (
            at_level(rate, "HBM") for rate in measure(1, DEVICE_BYTES, ("copy", "triad", "dot"), "cuda", "torch")
        )
        yield from torch_matrix_product(1, "cuda")
        return
    for count in threads:
        for level, size in machine.working_sets(count).items():
            yield from (at_level(rate, level) for rate in measure(count, size, tuple(WORDS), "cpu", source))
        yield from peak(count, source)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, min(2, machine.cpus())}))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--source", choices=["auto", "native", "torch"], default="auto")
    parser.add_argument("--build", action="store_true", help="compile the native program first")
    parser.add_argument("-o", "--output", type=Path, help="append JSON lines to this file")
    options = parser.parse_args(arguments)
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
