"""Train the V-cycles whose weights come with the package, and count iterations with them.

    python bench/linalg/train_vcycle.py --dim 2 3 [--write]       at most 3 minutes each, one thread
    python bench/linalg/train_vcycle.py --dim 2 3 --count-only    the table alone, of the weights in the package

Training sees scenes of 64 x 64 or 32 x 32 x 32 cells only. The table has iterations of preconditioned conjugate
gradients to a relative residual of 1e-6 in float64, for a standard normal right-hand side, with damped Jacobi,
red-black Gauss-Seidel and the learned stencils in the same cycle, one sweep before and one after.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import kantor
import torch
from kantor.datasets import poisson_scenes as scenes
from kantor.linalg import LearnedVCycle, PoissonGrid, cg, train_vcycle
from torch import Tensor

SIZE = {2: 64, 3: 32}
BATCH, ITERATIONS, STEPS = {2: 2, 3: 1}, {2: 6, 3: 5}, {2: 800, 3: 350}
Scene = Callable[[tuple[int, ...]], Tensor]
TABLE: list[tuple[str, Scene]] = [
    ("balls", lambda shape: scenes.smoke_balls(shape, seed=100)),
    ("sphere", scenes.smoke_sphere),
    ("tank", scenes.tank),
    ("box", scenes.box_dirichlet),
    ("dam", scenes.dam),
    ("droplets", lambda shape: scenes.droplets(shape, seed=100)),
]


def training_scenes(dim: int) -> tuple[list[PoissonGrid], list[PoissonGrid]]:
    """Six scenes of balls and a tank; and those on which the sweeps must only contract."""
    shape = (SIZE[dim],) * dim
    learn = [scenes.smoke_balls(shape, seed=seed) for seed in range(6)] + [scenes.tank(shape)]
    guard = [scenes.dam(shape), scenes.box_dirichlet(shape), scenes.baffles(shape)]
    return [PoissonGrid(flags) for flags in learn], [PoissonGrid(flags) for flags in guard]


def train(dim: int) -> LearnedVCycle:
    learn, guard = training_scenes(dim)
    net = LearnedVCycle(dim, pretrained=False)
    started = time.process_time()
    result = train_vcycle(
        net,
        learn,
        guards=guard,
        steps=STEPS[dim],
        batch=BATCH[dim],
        iterations=ITERATIONS[dim],
        contraction=1.97,
        progress=True,
    )
    print(f"{result}\n  CPU seconds {time.process_time() - started:.0f}")
    return net


def write(net: LearnedVCycle) -> None:
    def rounded(values: Tensor) -> object:
        return [rounded(v) for v in values] if values.ndim else round(float(values), 6)

    made_by = f"bench/linalg/train_vcycle.py --dim {net.dim}, {SIZE[net.dim]}^{net.dim} cells"
    weights = {
        "made_by": made_by,
        "scales": rounded(net.scales.detach()),
        "stencils": rounded(net.stencils.detach()),
    }
    path = Path(kantor.__file__).parent / "linalg" / "weights" / f"vcycle_{net.dim}d.json"
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in weights.items()]
    path.write_text("{\n" + ",\n".join(lines).replace("]], [[", "]],\n    [[") + "\n}\n", encoding="utf-8")
    print(f"wrote {path}, {path.stat().st_size} bytes")


def count(net: LearnedVCycle, sizes: list[int]) -> None:
    nets = [LearnedVCycle(net.dim, "jacobi"), LearnedVCycle(net.dim, "rbgs"), net]
    print(f"{'scene':<10} {'size':>6}  Jacobi  red-black  learned")
    for name, scene in TABLE:
        for size in sizes:
            A = PoissonGrid(scene((size,) * net.dim))
            b = torch.randn(A.grid, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * A.mask
            its = [cg(A, b, M=n.bind(A), rtol=1e-6, maxiter=500).iterations for n in nets]
            print(f"{name:<10} {f'{size}^{net.dim}':>6}  {its[0]:>6}  {its[1]:>9}  {its[2]:>7}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, nargs="+", choices=(2, 3), default=[2, 3])
    parser.add_argument("--write", action="store_true", help="put the weights into the package")
    parser.add_argument("--count-only", action="store_true", help="no training")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for dim in arguments.dim:
        net = LearnedVCycle(dim) if arguments.count_only else train(dim)
        if arguments.write and not arguments.count_only:
            write(net)
        count(net, [64, 256] if dim == 2 else [32, 64, 128])


if __name__ == "__main__":
    main()
