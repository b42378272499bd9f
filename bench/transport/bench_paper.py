"""The table of "Accelerating Sinkhorn algorithm with sparse Newton iterations" (ICLR 2024), to machine accuracy.

    python bench/transport/bench_paper.py [--seeds 0 1 2]

A random cost, n = 500, uniform weights, eta = 1200, and two photographs as densities on a 28 x 28 grid with squared and
absolute distances, costs scaled to a largest entry of 1. Three methods: Sinkhorn's plain iteration, over-relaxed, and
Sinkhorn-Newton-Sparse with the paper's parameters; beside them Kantor's default. Tolerance 1e-11 of the L1 error for
Sinkhorn's iteration, 1e-13 for the others.
"""

from __future__ import annotations

import argparse
import warnings

import torch
from kantor import transport
from skimage import data, transform
from torch import Tensor

ETA = 1200.0


def problems(seed: int) -> dict[str, tuple[Tensor, Tensor, Tensor, dict[str, float]]]:
    """Cost, weights, and the paper's parameters for it."""
    n = 500
    C = torch.rand(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    uniform = torch.full((n,), 1 / n, dtype=torch.float64)
    out: dict[str, tuple[Tensor, Tensor, Tensor, dict[str, float]]] = {
        "random, n = 500": (C, uniform, uniform, {"warm_up": 20, "density": 2 / n})
    }
    side = 28
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, side, dtype=torch.float64)] * 2)
    pictures = []
    for image in (data.camera(), data.moon()):
        small = torch.from_numpy(transform.resize(image, (side, side), anti_aliasing=True)).double().flatten()
        small = small - small.min() + 0.01 * (small.max() - small.min())
        pictures.append(small / small.sum())
    for name, power, warm_up, factor in (("squared distance", 2, 20, 2), ("absolute distance", 1, 700, 15)):
        C = (grid[:, None] - grid[None]).abs().pow(power).sum(-1)
        options: dict[str, float] = {"warm_up": warm_up, "density": factor / side**2}
        out[f"photographs, {name}"] = (C / C.max(), *pictures, options)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sweeps", type=int, default=60_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)
    row = "{:<32} {:<26} {:>8} {:>8} {:>9} {:>9}  {}"
    print(row.format("problem", "method", "sweeps", "Newton", "seconds", "error", "status"))
    for seed in arguments.seeds:
        for name, (C, a, b, paper) in problems(seed).items():
            for label, tol, options in (
                ("Sinkhorn", 1e-11, {"method": "sinkhorn", "relaxation": 1.0, "max_iter": arguments.sweeps}),
                ("Sinkhorn, over-relaxed", 1e-11, {"method": "sinkhorn", "max_iter": arguments.sweeps}),
                ("SNS as published", 1e-13, {"method": "sns", **paper}),
                ("SNS, three times as dense", 1e-13, {"method": "sns", **paper, "density": 3 * paper["density"]}),
                ("newton (default)", 1e-13, {}),
            ):
                result = transport.solve(C, a, b, reg=1 / ETA, tol=tol, **options)
                sweeps = int((result.history["kind"] == "sinkhorn").sum())
                if options.get("method") == "sinkhorn":
                    sweeps = result.n_iter
                numbers = (sweeps, result.n_newton, f"{result.seconds:.3f}", f"{result.marginal_error:.0e}")
                print(row.format(name, label, *numbers, result.status.value), flush=True)


if __name__ == "__main__":
    main()
