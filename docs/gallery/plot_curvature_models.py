"""
How much curvature does a step need
===================================

Newton's method wants the Hessian. Often something cheaper is at hand: a bound, a part
of it, nothing. Gradient-normalised smoothness takes any of them, and one radius,
found by doubling and halving, makes up for what is missing.

Source: A. Semenov, M. Jaggi, N. Doikov, *Gradient-Normalized Smoothness for
Optimization with Approximate Hessians*, 2025.
"""

# %%
# Breast tumours, benign or not
# -----------------------------
# Logistic regression on 569 samples of 30 measurements in units of their own.

import warnings

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_breast_cancer

from kantor.optim import curvature, minimize, minimize_gns

warnings.simplefilter("ignore", RuntimeWarning)  # limits are reached on purpose
torch.set_num_threads(1)
data = load_breast_cancer()
A = torch.from_numpy(data.data)
A = (A - A.mean(0)) / A.std(0)
A = torch.cat([A, torch.ones(len(A), 1, dtype=torch.float64)], 1)
y = torch.from_numpy(2.0 * data.target - 1)


def loss(x):
    """Mean logistic loss with a small penalty."""
    return torch.nn.functional.softplus(-y * (A @ x)).mean() + 5e-4 * x @ x


# %%
# Four curvatures
# ---------------
# Work counts linear solves: with a curvature of low rank or a diagonal each is cheap.

x0 = torch.zeros(A.shape[1], dtype=torch.float64)
models = {
    "Hessian, by products": "hessian",
    "Hessian, closed form": curvature.logistic(A, l2=1e-3),
    "its bound, factored once": curvature.logistic(A, l2=1e-3, exact=False),
    "none": "zero",
}
best = minimize(loss, x0, tol=1e-10).fun
figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
for name, model in models.items():
    result = minimize_gns(loss, x0, curvature=model, tol=1e-8, max_iter=200)
    print(f"{name:25} {result.status!s:10} {result.n_solve:4} solves")
    axes[0].semilogy(result.history["fun"] - best + 1e-16, label=name)
    axes[1].semilogy(result.history["gamma"], label=name)
axes[0].set(xlabel="step", ylabel="loss above the best", xlim=(0, 100))
axes[1].set(xlabel="step", ylabel="radius", xlim=(0, 100))
axes[1].legend(frameon=False, fontsize=8)
for ax in axes:
    ax.spines[["top", "right"]].set_visible(False)

# %%
# The radius tells how far a model is to be trusted: exact curvature earns a larger
# one at every step. Where most samples are far on their side of the border, the bound
# is far from the Hessian, and no better than none.
plt.show()
