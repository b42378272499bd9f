"""A physics-informed network: what ARNCG makes of a loss at which L-BFGS stalls.

    python bench/optim/bench_pinn.py --seeds 0 1 2

The convection equation u_t + beta u_x = 0 on [0, 2 pi] x [0, 1], periodic in x, u(x, 0) = sin x, by a tanh network of
two hidden layers of 30, float64, 1000 collocation points. 300 steps of Adam, 300 of L-BFGS; then, from the same
parameters and for the same work (a Hessian-vector product counts as two gradients), L-BFGS goes on, or Kantor's method
takes over.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from kantor.optim import minimize
from torch import Tensor

F64 = torch.float64


def problem(beta: float, points: int, seed: int) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The loss of the flat parameter vector, and where it starts."""
    generator = torch.Generator().manual_seed(seed)
    net = torch.nn.Sequential(
        torch.nn.Linear(2, 30), torch.nn.Tanh(), torch.nn.Linear(30, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1)
    ).to(F64)
    shapes = [p.shape for p in net.parameters()]
    sizes = [math.prod(shape) for shape in shapes]
    start = []
    for p in net.parameters():
        fan = sum(p.shape) if p.ndim == 2 else 1
        noise = torch.randn(p.shape, dtype=F64, generator=generator)
        start.append((noise * math.sqrt(2 / fan) if p.ndim == 2 else torch.zeros_like(p)).detach().reshape(-1))
    x = 2 * math.pi * torch.rand(points, 1, dtype=F64, generator=generator)
    t = torch.rand(points, 1, dtype=F64, generator=generator)
    x0 = torch.linspace(0, 2 * math.pi, 101, dtype=F64)[:, None]
    t0 = torch.linspace(0, 1, 101, dtype=F64)[:, None]
    ends = torch.full_like(t0, 2 * math.pi)

    def layers(z: Tensor) -> list[Tensor]:
        return [part.view(shape) for part, shape in zip(z.split(sizes), shapes, strict=True)]

    def value(W: list[Tensor], x: Tensor, t: Tensor) -> Tensor:
        h = torch.tanh(torch.cat([x, t], 1) @ W[0].T + W[1])
        h = torch.tanh(h @ W[2].T + W[3])
        return h @ W[4].T + W[5]

    def residual(W: list[Tensor]) -> Tensor:
        """u_t + beta u_x, by carrying the derivative along (1 direction, so no second graph is needed)."""
        a = torch.cat([x, t], 1) @ W[0].T + W[1]
        da = beta * W[0][:, 0] + W[0][:, 1]
        h = torch.tanh(a)
        dh = (1 - h**2) * da
        a, da = h @ W[2].T + W[3], dh @ W[2].T
        h = torch.tanh(a)
        return ((1 - h**2) * da) @ W[4].T

    def loss(z: Tensor) -> Tensor:
        W = layers(z)
        initial = value(W, x0, torch.zeros_like(x0)) - torch.sin(x0)
        periodic = value(W, torch.zeros_like(t0), t0) - value(W, ends, t0)
        return residual(W).square().mean() + initial.square().mean() + periodic.square().mean()

    return loss, torch.cat(start)


def adam(loss: Callable[[Tensor], Tensor], z: Tensor, steps: int) -> Tensor:
    z = z.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(z).backward()
        optimizer.step()
    return z.detach()


def lbfgs(loss: Callable[[Tensor], Tensor], z: Tensor, iterations: int, gradients: int) -> tuple[Tensor, float, int]:
    """torch's L-BFGS with strong Wolfe search, history 100; ends after so many iterations or gradients."""
    z = z.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [z], max_iter=iterations, max_eval=gradients, history_size=100, line_search_fn="strong_wolfe",
        tolerance_grad=0.0, tolerance_change=0.0,
    )  # fmt: skip
    count, best = 0, math.inf

    def closure() -> Tensor:
        nonlocal count, best
        count += 1
        optimizer.zero_grad()
        f = loss(z)
        f.backward()
        best = min(best, f.item())
        return f

    optimizer.step(closure)
    return z.detach(), best, count


def compare(seed: int, beta: float, points: int, work: int) -> dict[str, Any]:
    """Losses after the same work."""
    loss, z = problem(beta, points, seed)
    z = adam(loss, z, 300)
    z, _, _ = lbfgs(loss, z, 300, 10**9)
    record: dict[str, Any] = {"seed": seed, "work": work, "start": loss(z).item()}
    started = time.perf_counter()
    _, record["lbfgs"], record["lbfgs_gradients"] = lbfgs(loss, z, 10**9, work)
    record["lbfgs_seconds"] = time.perf_counter() - started

    def over(info: Any) -> bool:  # an evaluation with its gradient counts as one
        return info.n_fun + 2 * info.n_hvp >= work

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the work ends first
        result = minimize(loss, z, tol=1e-12, max_hvp=(work - 1) // 2, callback=over)
    record |= {"arncg": result.fun, "arncg_work": result.n_fun + 2 * result.n_hvp, "arncg_seconds": result.seconds}
    return record | {"ratio": result.fun / record["lbfgs"]}


def main() -> None:
    """Print a JSON record a seed, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--beta", type=float, default=5.0)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--work", type=int, default=8000, help="gradient equivalents")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = []
    for seed in arguments.seeds:
        records.append(compare(seed, arguments.beta, arguments.points, arguments.work))
        print(json.dumps(records[-1]), file=sys.stderr, flush=True)
    print(f"{'seed':>4} {'start':>10} {'L-BFGS':>10} {'arncg':>10} {'ratio':>7} {'seconds':>8} {'seconds':>8}")
    for r in records:
        print(
            f"{r['seed']:>4} {r['start']:>10.2e} {r['lbfgs']:>10.2e} {r['arncg']:>10.2e} {r['ratio']:>7.3f} "
            f"{r['lbfgs_seconds']:>8.1f} {r['arncg_seconds']:>8.1f}"
        )
    mean = math.exp(sum(math.log(r["ratio"]) for r in records) / len(records))
    print(f"geometric mean of the ratios {mean:.3f} (wanted <= 0.2)")


if __name__ == "__main__":
    main()
