"""Capped conjugate gradients: time of an iteration against the same loop in torch, and against memory traffic.

    python bench/linalg/bench_capped.py --size 1000000 --threads 2 [--device cuda]

The torch loop is written as well as torch allows: in place, without temporaries, norms by dot products. Every operator
is used by both: a diagonal, a tridiagonal and a diagonal plus a rank-one matrix natively by Kantor and as torch
operations by the loop, and the last one once more as the same torch function by both. Iterations are made without a
tolerance; what is reported is the slope between two counts of them, median over interleaved repetitions. The floor is
the words that the passes move (13 for a native operator, 14 for a function) at the speed of a copy of the same size,
and the product's own.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from kantor.linalg import CSR, Diagonal, LinearOperator, LowRank
from kantor.linalg.capped_cg import CappedSolver
from torch import Tensor

EPS, TINY = 1e-3, 1e-300
# An unknown; the factor is read twice, and the vector once before any row of the product is known.
MATRIX_BYTES = {"diagonal": 8.0, "tridiagonal CSR": 3 * 12 + 4.0, "diagonal + rank one": 8.0 + 3 * 8.0}
Product = Callable[[Tensor], Tensor]


class TorchLoop:
    """Capped CG in torch operations, with the vectors made once; tests 1 to 3 and the estimate of the norm."""

    def __init__(self, g: Tensor) -> None:
        self.y, self.Hy, self.r, self.p, self.Hp, self.work = (torch.empty_like(g) for _ in range(6))

    def solve(self, product: Product, g: Tensor, iterations: int) -> None:
        y, Hy, r, p, Hp, work = self.y, self.Hy, self.r, self.p, self.Hp, self.work
        y.zero_(), Hy.zero_(), r.copy_(g), torch.neg(r, out=p)
        Hp.copy_(product(p))
        M, rr = 0.0, float(torch.dot(r, r))
        pp, p_Hp = float(torch.dot(p, p)), float(torch.dot(p, Hp))
        for _ in range(iterations):
            alpha = rr / (p_Hp + 2 * EPS * pp)
            y.add_(p, alpha=alpha)
            Hy.add_(Hp, alpha=alpha)
            r.add_(Hp, alpha=alpha).add_(p, alpha=2 * EPS * alpha)
            rr_new = float(torch.dot(r, r))
            yy, y_Hy, Hy_Hy = float(torch.dot(y, y)), float(torch.dot(y, Hy)), float(torch.dot(Hy, Hy))
            if y_Hy + 2 * EPS * yy < EPS * yy or math.sqrt(rr_new) <= TINY:
                return
            beta = rr_new / rr
            rr = rr_new
            p.mul_(beta).sub_(r)
            work.copy_(Hp)
            Hp.copy_(product(p))
            work.mul_(beta).sub_(Hp)
            pp, p_Hp, Hp_Hp = float(torch.dot(p, p)), float(torch.dot(p, Hp)), float(torch.dot(Hp, Hp))
            Hr_Hr = float(torch.dot(work, work))
            M = max(M, math.sqrt(Hy_Hy / yy), math.sqrt(Hp_Hp / pp), math.sqrt(Hr_Hr / rr))
            if p_Hp + 2 * EPS * pp < EPS * pp:
                return


def wait() -> None:
    """Until a GPU has done what it was asked."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def slope(run: Callable[[int], Any], repeats: int, few: int = 5, many: int = 25) -> list[float]:
    """Seconds an iteration, per repetition."""
    run(few)
    wait()
    out = []
    for _ in range(repeats):
        times = []
        for count in (few, many):
            started = time.perf_counter()
            run(count)
            wait()
            times.append(time.perf_counter() - started)
        out.append((times[1] - times[0]) / (many - few))
    return out


def copy_speed(elements: int, device: str, repeats: int = 9) -> float:
    """Bytes a second of a copy between vectors whose sizes add up to the working set of the loop."""
    a = torch.ones(elements, dtype=torch.float64, device=device)
    b = torch.empty_like(a)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        b.copy_(a)
        wait()
        seconds.append(time.perf_counter() - started)
    return 16 * elements / min(seconds)


def problems(n: int, device: str) -> list[tuple[str, LinearOperator | None, Product]]:
    """Name, native operator, and the product in torch."""
    d = torch.logspace(0, 4, n, dtype=torch.float64, device=device)
    f = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device) / math.sqrt(n)
    out = torch.empty_like(d)
    side = torch.full((n - 1,), -1.0, dtype=torch.float64, device=device)
    row = torch.arange(n, device=device)
    rows = torch.cat([row, row[:-1], row[1:]])
    cols = torch.cat([row, row[1:], row[:-1]])
    A = CSR.from_coo(rows, cols, torch.cat([d + 2, side, side]), (n, n))
    warnings.simplefilter("ignore", UserWarning)  # on torch's sparse tensors
    sparse = torch.sparse_csr_tensor(A.crow, A.col, A.values, (n, n))
    return [
        ("diagonal", Diagonal(d), lambda v: torch.mul(d, v, out=out)),
        ("tridiagonal CSR", A, lambda v: sparse @ v),
        (
            "diagonal + rank one",
            Diagonal(d) + LowRank(f.unsqueeze(0)),
            lambda v: torch.mul(d, v, out=out).addcmul_(f, f @ v),
        ),
        ("diagonal + rank one, a function", None, lambda v: torch.mul(d, v, out=out).addcmul_(f, f @ v)),
    ]


def large(n: int, repeats: int, device: str) -> None:
    """Iterations limited by memory."""
    g = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(device)
    speed = copy_speed(5 * n // 2, device)
    where = device if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"n = {n:,}, {where}; a copy of that size moves {speed / 1e9:.1f} GB/s")
    print(f"{'operator':<34} {'torch ms':>9} {'Kantor ms':>10} {'ratio':>6} {'product ms':>11} {'of the floor':>13}")
    for name, A, product in problems(n, device):
        loop, solver = TorchLoop(g), CappedSolver(g)
        H = product if A is None else A.encode()

        def ours(count: int, solver: CappedSolver = solver, H: Any = H) -> None:
            solver.solve(H, g, EPS, 0.5, rule="step", atol=TINY, max_iter=count)

        def theirs(count: int, loop: TorchLoop = loop, product: Product = product) -> None:
            loop.solve(product, g, count)

        mine: list[float] = []
        torch_loop: list[float] = []
        for _ in range(repeats):
            torch_loop += slope(theirs, 1)
            mine += slope(ours, 1)
        apply = product if A is None else A.matvec
        v, times = g.clone(), []
        for _ in range(20):
            started = time.perf_counter()
            apply(v)
            wait()
            times.append(time.perf_counter() - started)
        a, b = statistics.median(torch_loop), statistics.median(mine)
        alone = statistics.median(times)
        # A native operator reads its matrix beside what the passes move; a function's product is all on top.
        matrix = 0.0 if A is None else MATRIX_BYTES[name]
        floor = (13 * 8 + matrix) * n / speed if A is not None else 14 * 8 * n / speed + alone
        print(
            f"{name:<34} {1e3 * a:>9.2f} {1e3 * b:>10.2f} {b / a:>6.2f} {1e3 * alone:>11.2f} {100 * floor / b:>12.0f}%"
        )


def small(n: int, repeats: int) -> None:
    """What the solver adds to a Python product."""
    torch.set_num_threads(1)
    d = torch.linspace(1, 1e4, n, dtype=torch.float64)
    g, out = torch.ones(n, dtype=torch.float64), torch.empty(n, dtype=torch.float64)

    def product(v: Tensor) -> Tensor:
        return torch.mul(d, v, out=out)

    solver = CappedSolver(g)
    per, whole = [], []
    for _ in range(repeats):
        per += slope(lambda count: solver.solve(product, g, 1e-9, 0.5, rule="step", atol=TINY, max_iter=count), 5)
        started = time.perf_counter()
        for _ in range(100):
            solver.solve(product, g, 1e6, 0.5, rule="step")
        whole.append((time.perf_counter() - started) / 100)
    started = time.perf_counter()
    for _ in range(10_000):
        product(g)
    alone = (time.perf_counter() - started) / 10_000
    beside, one = 1e6 * (statistics.median(per) - alone), 1e6 * statistics.median(whole)
    print(f"n = {n}, a Python product of {1e6 * alone:.2f} us: {beside:.2f} us an iteration beside it (wanted <= 15)")
    print(f"a solve of one product {one:.1f} us in all")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    large(arguments.size, arguments.repeats, arguments.device)
    small(256, arguments.repeats)


if __name__ == "__main__":
    main()
