"""
Pressure on a voxel grid
========================

What a simulation of smoke or water spends most of its time on: after gravity and
buoyancy have pushed the fluid, its velocity ``u`` flows together in some cells and
apart in others. The pressure ``p`` takes that back. Subtracting its gradient leaves a
velocity without divergence that is tangential at walls:

.. code-block:: text

    sum of p(i) - p(j)  =  - divergence of u at i      over the neighbours j that
                                                       are no walls;  p = 0 in air

One unknown a cell, walls that move from step to step, so another matrix each time: a
preconditioner has to be cheap to make as well.

Source: A. McAdams, E. Sifakis, J. Teran, *A parallel multigrid Poisson solver for
fluids simulation on large grids*, Symposium on Computer Animation, 2010.
"""

# %%
# Cells
# -----
# A grid of flags: 0 is solid, 2 fluid, 3 air. Outside of the array everything is
# solid. Six balls in a box that is open above; axis 0 points up.

import matplotlib.pyplot as plt
import torch

from kantor.datasets import poisson_scenes as scenes
from kantor.linalg import Multigrid, PoissonGrid, cg

size = (320, 256)
flags = scenes.smoke_balls(size, seed=4)
A = PoissonGrid(flags)
print(A)

# %%
# A bubble of warm air
# --------------------
# Velocities live on the faces between cells, that is how divergence and gradient fit
# together. Warm air at the bottom has begun to rise; nothing moves through walls.

height, width = size
y = (torch.arange(height + 1, dtype=torch.float64) / height)[:, None]
x = ((torch.arange(width, dtype=torch.float64) + 0.5) / width)[None, :]
v = torch.exp(-((x - 0.5) ** 2 + (y - 0.25) ** 2) / 0.015)  # (height + 1, width)
u = torch.zeros(height, width + 1, dtype=torch.float64)

solid = flags == 0
closed_v = torch.ones(height + 1, width, dtype=torch.bool)
closed_v[1:-1] = solid[1:] | solid[:-1]
closed_u = torch.ones(height, width + 1, dtype=torch.bool)
closed_u[:, 1:-1] = solid[:, 1:] | solid[:, :-1]
v[closed_v] = 0


def divergence(u, v):
    """What flows out of each cell of fluid."""
    return (u[:, 1:] - u[:, :-1] + v[1:] - v[:-1]) * A.mask


def project(u, v, p):
    """The velocity without the gradient of p."""
    u, v = u.clone(), v.clone()
    u[:, 1:-1] -= p[:, 1:] - p[:, :-1]
    v[1:-1] -= p[1:] - p[:-1]
    u[closed_u], v[closed_v] = 0, 0
    return u, v


# %%
# The solve
# ---------
# :py:class:`kantor.linalg.Multigrid` looks at the flags a few times and is ready.

b = -divergence(u, v)
M = Multigrid(A)
result = cg(A, b, M=M, rtol=1e-8)
print(M)
print(result)

u, v = project(u, v, result.x)
left_over = divergence(u, v).abs().max()
print(f"divergence: {b.abs().max():.1e} before, {left_over:.1e} after")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 5.4), layout="constrained")
shade = {"cmap": "Greys", "vmin": 0, "vmax": 1.6, "origin": "lower"}
outside = torch.where(solid, 1.0, torch.nan)
pressure = torch.where(A.mask, result.x, torch.nan)
reach = float(result.x.abs().max())
left.imshow(pressure, origin="lower", cmap="RdBu_r", vmin=-reach, vmax=reach)
left.imshow(outside, **shade)
left.set_title("pressure")
across, up = ((u[:, 1:] + u[:, :-1]) / 2).numpy(), ((v[1:] + v[:-1]) / 2).numpy()
right.imshow(outside, **shade)
right.streamplot(
    range(width),
    range(height),
    across,
    up,
    density=1.6,
    linewidth=0.8,
    color="#0b5c8a",
)
right.set_title("velocity after the solve")
for ax in (left, right):
    ax.set(xlim=(0, width), ylim=(0, height), xticks=[], yticks=[])
plt.show()

# %%
# Iterations
# ----------
# Conjugate gradients need twice as many when the grid is twice as fine, with an
# incomplete Cholesky factorisation as well. Multigrid does not.


def count(A, b, M=None):
    """Iterations to 1e-6."""
    return cg(A, b, M=M, rtol=1e-6).iterations


def noise(A, seed=0):
    """A right-hand side that has all frequencies."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(A.grid, dtype=torch.float64, generator=generator) * A.mask


print("  size   cg  ic0  multigrid")
for n in (64, 128, 256):
    grid = PoissonGrid(scenes.smoke_balls((n, n)))
    b = noise(grid)
    counts = count(grid, b), count(grid, b, "ic0"), count(grid, b, Multigrid(grid))
    print("{:4}^2 {:4} {:4} {:10}".format(n, *counts))

# %%
# Walls one cell thick
# --------------------
# Coarse cells know nothing of thin walls: they mix what is on both sides. Here, where
# a wall cuts a coarse cell, it gets a value for each side, and the levels below are
# graphs. ``walls=False`` shows what happens without.

maze = PoissonGrid(scenes.labyrinth((96, 96), width=3))
b = noise(maze)
runs = {
    "cg": cg(maze, b, rtol=1e-6),
    "ic0": cg(maze, b, M="ic0", rtol=1e-6),
    "multigrid, walls=False": cg(maze, b, M=Multigrid(maze, walls=False), rtol=1e-6),
    "multigrid": cg(maze, b, M=Multigrid(maze), rtol=1e-6),
}
for name, run in runs.items():
    print(f"{name:23} {run.iterations:5}")

figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 4.2), layout="constrained", width_ratios=(1, 1.4)
)
solution = torch.where(maze.mask, runs["multigrid"].x, torch.nan)
left.imshow(solution, origin="lower", cmap="viridis")
left.set_title("pressure in a maze")
left.axis("off")
colours = ("0.6", "#b3541e", "#5b8c5a", "#0b5c8a")
for (name, run), colour in zip(runs.items(), colours, strict=True):
    norms = run.history.residual_norms
    right.loglog(range(1, len(norms) + 1), norms / norms[0], color=colour, label=name)
right.set(xlabel="iteration", ylabel="residual norm, relative", ylim=(1e-7, None))
right.spines[["top", "right"]].set_visible(False)
right.grid(color="0.9")
right.legend(frameon=False)
plt.show()

# %%
# A wall that moves
# -----------------
# Every position of the ball is another matrix; the hierarchy is made anew.

counts = []
for step in range(8):
    A = PoissonGrid(scenes.moving_ball((256, 256), t=step / 8))
    counts.append(count(A, noise(A, step), Multigrid(A)))
print("iterations:", *counts)
