"""Train a direction network on one empty open box, and count iterations on scenes that it has not seen.

    python bench/linalg/train_direction_net.py                                  # the paper's network, 64 x 64
    python bench/linalg/train_direction_net.py --dim 3 --size 16 --steps 1500
    python bench/linalg/train_direction_net.py --net stencil --steps 3000       # the linear network, on several scenes

Iterations to a residual of 1e-6, right-hand side standard normal: conjugate gradients, and conjugate directions of the
network that keep 0, 1, 2 and 8 directions. One thread. ``--save`` writes the weights, ``--checkpoint`` makes the
training resumable, ``--plot`` writes the loss curve.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence

import torch
from kantor.datasets import poisson_scenes
from kantor.linalg import DirectionNet, PoissonGrid, VariableStencilNet, cg, dcdm, ritz_dataset, train_direction_net
from kantor.plotting import save_figure

KEPT = (0, 1, 2, 8)
TESTED = ("open_box", "smoke_sphere", "smoke_balls", "tank", "dam", "box_dirichlet", "baffles")


def table(net: DirectionNet | VariableStencilNet, sizes: Sequence[int]) -> None:
    """Print iterations for scenes and sizes; with two kept, their share of CG's and how often the net was no help."""
    logging.getLogger("kantor").setLevel(logging.ERROR)  # that a network was given up shows in the last column
    head = "".join(f"{f'keep {kept}':>8}" for kept in KEPT)
    print(f"{'scene':>14} {'size':>5} {'unknowns':>9} {'CG':>6}{head} {'x CG':>7}{'fell':>6}")
    for size in sizes:
        for name in TESTED:
            A = PoissonGrid(poisson_scenes.SCENES[name]((size,) * net.dim))
            generator = torch.Generator().manual_seed(1)
            b = torch.randn(A.grid, dtype=torch.float64, generator=generator) * A.mask
            f = net.bind(A)
            runs = [dcdm(A, b, f, k_prev=kept, maxiter=2000) for kept in KEPT]
            counts = [run.iterations for run in runs]
            plain = cg(A, b, rtol=1e-6, maxiter=10_000).iterations
            row = "".join(f"{count:>8}" for count in counts)
            share = f"{counts[2] / plain:>7.3f}{runs[2].fallbacks:>6}"
            print(f"{name:>14} {size:>5} {A.num_unknowns:>9} {plain:>6}{row} {share}", flush=True)


def turned(flags: torch.Tensor, seed: int) -> torch.Tensor:
    """The scene with its axes exchanged and reflected at random."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randperm(flags.ndim, generator=generator).tolist()
    reflected = torch.randint(2, (flags.ndim,), generator=generator).nonzero().squeeze(1).tolist()
    return flags.permute(axes).flip(reflected).contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=("direction", "stencil"), default="direction")
    parser.add_argument("--dim", type=int, default=2, choices=(2, 3))
    parser.add_argument("--size", type=int, default=64, help="of the training grid")
    parser.add_argument("--sizes", type=int, nargs="*", help="of the test grids; default: that of the training")
    parser.add_argument("--levels", type=int, default=4, help="of the stencil network")
    parser.add_argument("--turned", action="store_true", help="train the stencil network on more scenes, turned about")
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--white", type=float, default=0.0, help="share of white noise in each batch")
    parser.add_argument("--loss", choices=("scaled", "residual"))
    parser.add_argument("--ritz", type=int, default=600, help="Ritz vectors")
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint")
    parser.add_argument("--save")
    parser.add_argument("--plot")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)

    shape = (arguments.size,) * arguments.dim
    net: DirectionNet | VariableStencilNet
    if arguments.net == "direction":
        net, scenes = DirectionNet(arguments.dim), [poisson_scenes.open_box(shape)]
    else:  # conditioned on the geometry, so it has to see several
        net = VariableStencilNet(arguments.dim, arguments.levels)
        scenes = [poisson_scenes.open_box(shape), poisson_scenes.tank(shape, 7)]
        scenes += [poisson_scenes.smoke_balls(shape, seed) for seed in range(100, 106)]
        if arguments.turned:
            scenes += [poisson_scenes.droplets(shape, 100, 20), poisson_scenes.baffles(shape, 2)]
            scenes += [poisson_scenes.labyrinth(shape, 100, 5), poisson_scenes.box_dirichlet(shape)]
            scenes = [turned(flags, k) for flags in scenes for k in range(2)]
    started = time.process_time()
    grids = [PoissonGrid(flags) for flags in scenes]
    data = [(A, ritz_dataset(A, arguments.ritz, arguments.samples // len(grids))) for A in grids]
    sampled = time.process_time()
    result = train_direction_net(
        net,
        data,
        loss=arguments.loss or ("scaled" if arguments.net == "direction" else "residual"),
        steps=arguments.steps,
        batch=arguments.batch,
        lr=arguments.lr,
        white=arguments.white,
        seed=arguments.seed,
        progress=True,
        checkpoint=arguments.checkpoint,
    )
    trained = time.process_time()
    print(result)
    print(f"  CPU seconds  {sampled - started:.1f} for samples, {trained - sampled:.1f} for training")
    if arguments.save:
        torch.save(net.state_dict(), arguments.save)
    if arguments.plot:
        save_figure(result.plot(), arguments.plot)
    table(net, arguments.sizes or [arguments.size])


if __name__ == "__main__":
    main()
