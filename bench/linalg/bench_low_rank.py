"""Low-rank operators against two matrix products of torch, and multi-shift CG against one solve for each shift.

    python bench/linalg/bench_low_rank.py --threads 2 [--device cuda]

Products with F' diag(w) F for shapes from one long factor to many short ones; torch's side is ``F' (w * (F x))``, the
faster of two ways to write it. Shifted systems are those of a grid Laplacian with eight shifts, each twice the one
before, to 1e-8; the peer is Kantor's own cg, once for each shift. Medians over interleaved repetitions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from kantor.linalg import Diagonal, LowRank, Stencil, cg, multishift_cg

SHAPES = ((1, 1_000_000), (5000, 30), (20_000, 200), (1000, 1000), (200, 20_000), (20, 50_000), (5000, 5000))


def medians(runs: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Seconds of each, taking turns."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for run, record in zip(runs, times, strict=True):
            started = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            record.append(time.perf_counter() - started)
    return [statistics.median(record[1:]) for record in times]


def products(dtype: torch.dtype, device: str) -> None:
    """One matrix-vector product."""
    print(f"{str(dtype)[6:]}: {'r':>6} {'n':>9} {'torch us':>10} {'Kantor us':>10} {'ratio':>6} {'difference':>11}")
    for r, n in SHAPES:
        generator = torch.Generator().manual_seed(0)
        F, w, x = (
            torch.randn(*shape, dtype=torch.float64, generator=generator).to(device, dtype)
            for shape in ((r, n), (r,), (n,))
        )
        A = LowRank(F, w)

        def rows(F: torch.Tensor = F, w: torch.Tensor = w, x: torch.Tensor = x) -> torch.Tensor:
            return torch.mv(F.mT, torch.mv(F, x).mul_(w))

        def row_vectors(F: torch.Tensor = F, w: torch.Tensor = w, x: torch.Tensor = x) -> torch.Tensor:
            return ((x @ F.mT) * w) @ F

        exact = rows().double()
        difference = float((A.matvec(x).double() - exact).norm() / exact.norm())
        one, other, mine = medians(
            [rows, row_vectors, lambda A=A, x=x: A.matvec(x)],  # type: ignore[misc]
            max(5, min(300, 40_000_000 // (r * n))),
        )
        best = min(one, other)
        print(f"{r:>15} {n:>9} {1e6 * best:>10.1f} {1e6 * mine:>10.1f} {mine / best:>6.2f} {difference:>11.1e}")


def shifted(side: int, device: str) -> None:
    """Eight shifts."""
    A, n = Stencil((side, side), device=device), side * side
    b = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    shifts = 0.005 * 2.0 ** torch.arange(8, dtype=torch.float64)
    systems = [A + float(s) * Diagonal(torch.ones_like(b)) for s in shifts]
    together = multishift_cg(A, b, shifts, rtol=1e-8)
    apart = [cg(system, b, rtol=1e-8) for system in systems]
    difference = max(float((x - one.x).norm() / one.x.norm()) for x, one in zip(together.x, apart, strict=True))
    one, many, seed = medians(
        [
            lambda: multishift_cg(A, b, shifts, rtol=1e-8),
            lambda: [cg(system, b, rtol=1e-8) for system in systems],
            lambda: cg(systems[0], b, rtol=1e-8),
        ],
        5,
    )
    print(
        f"{n:>9} unknowns: {1e3 * one:.2f} ms, {together.iterations} products; one by one {1e3 * many:.2f} ms, "
        f"{sum(result.iterations for result in apart)} products; the smallest shift alone {1e3 * seed:.2f} ms; "
        f"ratio {one / many:.2f}, difference {difference:.0e}"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for dtype in (torch.float64, torch.float32):
        products(dtype, arguments.device)
    print("eight shifts of a Laplacian, to 1e-8")
    for side in (30, 200, 1000):
        shifted(side, arguments.device)


if __name__ == "__main__":
    main()
