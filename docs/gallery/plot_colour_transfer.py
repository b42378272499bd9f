"""
The colours of one photograph on another
========================================

A photograph is a cloud of colours, three numbers a pixel. Optimal transport finds the
cheapest way to move one cloud onto another, and with it says which colour becomes
which. A little entropy, ``reg``, makes that map smooth.

Source of the solver: X. Tang et al., *Accelerating Sinkhorn Algorithm with Sparse
Newton Iterations*, ICLR 2024.
"""

# %%
# Two photographs
# ---------------
# A cup of coffee (Rachel Michetti, CC0) and a rocket before its launch at dusk
# (SpaceX, public domain). Both ship with scikit-image.

import matplotlib.pyplot as plt
import numpy as np
import torch
from skimage import data

from kantor.plotting import plot_displacement
from kantor.transport import solve, solve_sample

coffee, night = data.coffee() / 255, data.rocket() / 255


def show(**pictures):
    """Pictures side by side."""
    count = len(pictures)
    _, axes = plt.subplots(1, count, figsize=(4.6 * count, 3.4), layout="constrained")
    for ax, (title, picture) in zip(axes, pictures.items(), strict=True):
        ax.imshow(picture.clip(0, 1))
        ax.set_title(title)
        ax.axis("off")


show(coffee=coffee, night=night)

# %%
# The plan
# --------
# 2000 pixels of each stand for all. ``solve_sample`` takes the points and computes
# squared distances on the fly.

random = np.random.default_rng(0)


def sample(picture, count=2000):
    """Colours of some pixels."""
    colours = picture.reshape(-1, 3)
    return torch.from_numpy(colours[random.choice(len(colours), count, False)])


X, Y = sample(coffee), sample(night)
result = solve_sample(X, Y, reg=0.02)
print(result)

# %%
# Where the colours go: sources, their images under the barycentric map, and the
# heaviest entries of the plan.

figure = plt.figure(figsize=(6.4, 5.2), layout="constrained")
ax = figure.add_subplot(projection="3d")
plot_displacement(X, Y, result.plan_sparse(), ax)
ax.set(xlabel="red", ylabel="green", zlabel="blue")

# %%
# Every pixel
# -----------
# The plan is ``exp((f + g - C) / reg)``. Its rows, normalised, depend on the source
# only through the cost, so the potential ``g`` maps colours that were not drawn too:
# to the mean of the targets, weighted by a softmax. ``|x|^2`` is the same for a whole
# row and drops out.

_, g = result.potentials


def transfer(colours):
    """Barycentric images of colours (k, 3)."""
    scores = (2 * colours @ Y.T - Y.square().sum(1) + g) / result.reg
    return torch.softmax(scores, 1) @ Y


moved = transfer(X)
print("largest difference to the plan's own map:")
print(f"  {(moved - result.barycentric_map()).abs().max():.1e}")

pixels = torch.from_numpy(coffee.reshape(-1, 3))
recoloured = torch.cat([transfer(part) for part in pixels.split(4096)])
show(coffee=coffee, recoloured=recoloured.numpy().reshape(coffee.shape))

# %%
# How much entropy
# ----------------
# Less entropy, a sharper map: more of the target's colours, and more noise. A result
# is the start of the next solve.

versions = {}
for reg in (0.2, 0.02, 0.002):
    result = solve_sample(X, Y, reg=reg, x0=result)
    _, g = result.potentials
    parts = [transfer(part) for part in pixels.split(4096)]
    versions[f"reg = {reg}"] = torch.cat(parts).numpy().reshape(coffee.shape)
    print(f"reg {reg}: {result.n_newton} Newton steps, {result.n_sweeps} sweeps")
show(**versions)

# %%
# Newton or Sinkhorn
# ------------------
# The same problem as a matrix, at a thousandth of its largest cost. Each sweep of
# Sinkhorn's method gains the same share of a digit; Newton's method doubles the
# digits with each step. Marks show where ``reg`` is lowered on the way.

C = torch.cdist(X[:800], Y[:800]).square()
figure, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
for method in ("newton", "sinkhorn"):
    run = solve(C, reg=1e-3 * C.max(), method=method, max_iter=20_000)
    run.plot(ax)
    print(f"{method:9} {run.status.value}, {run.n_sweeps} sweeps, {run.value:.12f}")
ax.set_xscale("log")
plt.show()
