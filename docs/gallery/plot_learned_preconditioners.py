"""
Preconditioners that were trained
=================================

Conjugate gradients take as many iterations as the grid is wide. Three ways to need
fewer: multigrid, multigrid whose smoothers were trained, and a small network that
proposes directions, trained here for two seconds.

Sources: A. Kaneda et al., *A Deep Conjugate Direction Method for Iteratively Solving
Linear Systems*, ICML 2023; D. Greenfeld et al., *Learning to Optimize Multigrid PDE
Solvers*, ICML 2019.
"""

# %%
# A scene that none of them has seen
# ----------------------------------
# The pressure equation in a box with six balls, open above.

import logging

import matplotlib.pyplot as plt
import torch

from kantor.datasets import poisson_scenes
from kantor.linalg import (
    DirectionNet,
    LearnedVCycle,
    Multigrid,
    PoissonGrid,
    cg,
    dcdm,
    train_direction_net,
)

torch.set_num_threads(1)
torch.manual_seed(0)
logging.getLogger("kantor").setLevel(logging.ERROR)
A = PoissonGrid(poisson_scenes.smoke_balls((40, 40), seed=3))
b = torch.where(A.mask, torch.randn(40, 40, dtype=torch.float64), 0.0)
print(A)

# %%
# A network in two seconds
# ------------------------
# It learns to send a residual to a direction in which the error lies, on an empty
# box of 24 x 24 cells. Whatever it proposes, ``dcdm`` makes it conjugate to the
# directions before, and takes the best step along it: a bad network costs
# iterations, never the solution. The papers train for days; this is a taste.

net = DirectionNet(dim=2, channels=12)
empty = PoissonGrid(poisson_scenes.open_box((24, 24)))
training = train_direction_net(net, empty, steps=150, batch=8, lr=1e-2)
print(f"loss {training.losses[0]:.2f} -> {training.losses[-1]:.2f}")

# %%
# Four solves
# -----------

results = {
    "conjugate gradients": cg(A, b, rtol=1e-8),
    "network, dcdm": dcdm(A, b, net, rtol=1e-8, maxiter=400),
    "multigrid": cg(A, b, M=Multigrid(A), rtol=1e-8),
    "learned V-cycle": cg(A, b, M=LearnedVCycle(2).bind(A), rtol=1e-8),
}
figure, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
for name, result in results.items():
    print(f"{name:20} {result.status!s:10} {result.iterations:4} iterations")
    history = result.history
    ax.semilogy(history.iterations, history.residual_norms / b.norm(), label=name)
ax.set(xlabel="iteration", ylabel="|b - Ax| / |b|")
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False)

# %%
# The smoothers of the learned V-cycle are nine numbers a level, and come with the
# package: ``train_vcycle`` makes others.

figure, axes = plt.subplots(1, 2, figsize=(6.4, 3.2), layout="constrained")
axes[0].imshow(A.flags, origin="lower", cmap="Blues_r")
axes[0].set_title("solids, fluid, air")
axes[1].imshow(results["multigrid"].x, origin="lower", cmap="RdBu")
axes[1].set_title("pressure")
for ax in axes:
    ax.set_axis_off()
plt.show()
