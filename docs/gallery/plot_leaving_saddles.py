"""
Who leaves a saddle
===================

A matrix of low rank is the product of two thin ones. Finding them is smooth, with a
saddle at zero and no bad local minima. Near the saddle the gradient says next to
nothing; a method that sees negative curvature walks off along it.
"""

# %%
# The problem
# -----------
# ``f(U, V) = |UV - M|^2 / 2`` for a photograph M, reduced to rank 8, from near zero.

import warnings

import matplotlib.pyplot as plt
import skimage
import torch

from kantor.optim import minimize

warnings.simplefilter("ignore", RuntimeWarning)  # limits are reached on purpose

grey = torch.from_numpy(skimage.data.camera()[::8, ::8] / 255.0)
left, values, right = torch.linalg.svd(grey - grey.mean())
rank = 8
M = (left[:, :rank] * values[:rank]) @ right[:rank]
rows, columns = M.shape
cut = rows * rank


def product(x):
    """The matrix that the unknowns stand for."""
    return x[:cut].view(rows, rank) @ x[cut:].view(rank, columns)


def f(x):
    """Half the squared misfit."""
    return 0.5 * (product(x) - M).square().sum()


generator = torch.Generator().manual_seed(0)
x0 = 1e-4 * torch.randn(
    cut + rank * columns, dtype=torch.float64, generator=generator
)
x0_gradient = torch.func.grad(f)(x0).norm()
print(f"{len(x0)} unknowns, gradient norm at the start {x0_gradient:.1e}")

# %%
# One call, several methods
# -------------------------
# Work counts gradients, and two for a product of the Hessian with a vector.

results = {
    "arncg": minimize(f, x0, tol=1e-6),
    "trust-krylov": minimize(f, x0, tol=1e-6, method="trust-krylov"),
    "lbfgs": minimize(f, x0, tol=1e-6, method="lbfgs", max_iter=400),
}
for name, result in results.items():
    work = result.n_grad + 2 * result.n_hvp
    print(f"{name:13} {result.status!s:10} value {result.fun:.1e}, work {work}")

figure, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
for result in results.values():
    result.plot(ax)

# %%
# Exactly at the saddle
# ---------------------
# There the gradient is zero, and nothing that looks at gradients can tell it from a
# minimum. ``curvature_tol`` asks for a second-order check.

zero = torch.zeros_like(x0)
for options in ({}, {"curvature_tol": 1e-3}):
    result = minimize(f, zero, tol=1e-6, **options)
    print(options, result.status, f"value {result.fun:.1e}")

figure, axes = plt.subplots(1, 2, figsize=(6.4, 3.4), layout="constrained")
for ax, picture, title in zip(
    axes, (M, product(result.x)), ("M", "found from zero"), strict=True
):
    ax.imshow(picture, cmap="gray")
    ax.set_title(title)
    ax.set_axis_off()
