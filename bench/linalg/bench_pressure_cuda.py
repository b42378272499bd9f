"""Pressure solves on a GPU: iterations and time with multigrid and without, and the share of the copy bandwidth.

    python bench/linalg/bench_pressure_cuda.py --sizes 64 128 256

Set-up runs on the host and is counted apart, with the copy of the levels to the device. Times are medians of five
calls, between two events on the stream.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from kantor.datasets import poisson_scenes
from kantor.linalg import LearnedVCycle, Multigrid, PoissonGrid, cg


def milliseconds(call: Callable[[], object], repeats: int = 5) -> float:
    """Median time of a call on the current stream, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def main() -> None:
    """Print one line for each scene, size and preconditioner."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 256])
    sizes = parser.parse_args().sizes
    print(torch.cuda.get_device_name(0))
    for n in sizes:
        for name in ("open_box", "smoke_balls"):
            flags = getattr(poisson_scenes, name)((n, n, n)).cuda()
            A = PoissonGrid(flags)
            torch.manual_seed(0)
            b = torch.randn(A.grid, dtype=torch.float64, device="cuda")
            x = torch.randn_like(b)
            copy, apply = milliseconds(lambda b=b: b.clone()), milliseconds(lambda A=A, x=x: A.matvec(x))
            print(f"{name} {n}^3: product {apply:.3f} ms, {18 / 16 * copy / apply:.0%} of the copy's bandwidth")
            makers: dict[str, Callable[[], object]] = {
                "none": lambda: None,
                "red-black": lambda A=A: Multigrid(A),
                "learned": lambda A=A: LearnedVCycle(3).bind(A),
            }
            for label, make in makers.items():
                begin = time.perf_counter()
                M = make()
                torch.cuda.synchronize()
                setup = 1e3 * (time.perf_counter() - begin)
                result = cg(A, b, M=M, rtol=1e-6)
                solve = milliseconds(lambda A=A, b=b, M=M: cg(A, b, M=M, rtol=1e-6))
                cycle = "" if M is None else f", cycle {milliseconds(lambda M=M, b=b: M.matvec(b)):.3f} ms"
                counts = f"{result.iterations:5d} iterations, set-up {setup:7.2f} ms"
                print(f"  {label:10s} {counts}, solve {solve:8.2f} ms{cycle}")


if __name__ == "__main__":
    main()
