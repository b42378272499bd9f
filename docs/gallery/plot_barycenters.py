"""
The mean of handwritten digits
==============================

The mean of several pictures, pixel by pixel, is a blur. The mean in the sense of
transport moves ink instead of fading it. And where two pictures do not hold the same
things, transport may be told to leave the odd ones alone.

Sources: M. Cuturi, A. Doucet, *Fast Computation of Wasserstein Barycenters*, 2014;
L. Chizat et al., *Scaling Algorithms for Unbalanced Optimal Transport Problems*,
Math. Comp. 2018.
"""

# %%
# Two means
# ---------
# Eight threes, put down anywhere on 18 x 18 pixels, each a distribution of ink over
# the pixels. The cost is the squared distance of two pixels.

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

from kantor import transport

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(1)
digits = load_digits()
threes = torch.zeros(8, 18, 18, dtype=torch.float64)
for picture, digit in zip(threes, digits.images[digits.target == 3][:8], strict=True):
    row, column = torch.randint(11, (2,), generator=generator)
    picture[row : row + 8, column : column + 8] = torch.from_numpy(digit)
ink = threes.flatten(1)
ink /= ink.sum(1, keepdim=True)

axis = torch.arange(18, dtype=torch.float64) / 17
pixels = torch.cartesian_prod(axis, axis)
cost = torch.cdist(pixels, pixels).square()

result = transport.barycenter(cost, ink, reg=1e-3, tol=1e-4)
print(result)

figure, axes = plt.subplots(1, 6, figsize=(8, 1.8), layout="constrained")
pictures = [*ink[:4], ink.mean(0), result.barycenter]
titles = ["", "", "", "", "pixel by pixel", "transport"]
for ax, picture, title in zip(axes, pictures, titles, strict=True):
    ax.imshow(picture.reshape(18, 18), cmap="gray_r")
    ax.set_title(title, fontsize=9)
    ax.set_axis_off()

# %%
# The odd ones out
# ----------------
# Two clouds; the left one has ten points far off, without a partner in the right one.
# Balanced transport must bring them somewhere. ``unbalanced`` may destroy mass, at a
# price of ``rho`` for each unit, and does where the way is longer.

X = 0.3 * torch.randn(60, 2, dtype=torch.float64, generator=generator)
X[50:] += torch.tensor([-1.0, 3.0], dtype=torch.float64)  # these ten
Y = 0.3 * torch.randn(60, 2, dtype=torch.float64, generator=generator)
Y[:, 0] += 2
C = torch.cdist(X, Y).square()

plans = {
    "balanced": transport.solve(C, reg=0.05).plan,
    "unbalanced, rho = 5": transport.unbalanced(C, reg=0.05, rho=5.0).plan,
}
figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
for ax, (name, plan) in zip(axes, plans.items(), strict=True):
    strongest = plan.argmax(1)
    for i, j in enumerate(strongest):
        strength = min(1.0, float(plan[i].sum()) * len(X))
        ax.plot(*zip(X[i], Y[j], strict=True), color="0.6", lw=0.8, alpha=strength)
    ax.scatter(*X.T, s=12, label="from")
    ax.scatter(*Y.T, s=12, label="to")
    ax.set_title(f"{name}: {plan.sum():.2f} of the mass moves", fontsize=10)
    ax.set_aspect("equal")
    ax.set_axis_off()
axes[0].legend(frameon=False)
plt.show()
