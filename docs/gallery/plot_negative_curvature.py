"""
Negative curvature is a result
==============================

Conjugate gradients need a positive definite matrix. When the matrix is not, some
direction ``d`` has negative curvature, ``d'Ad < 0``, and sooner or later the method
meets one. Many codes go on, or hide it behind a small constant. Kantor stops and
hands the direction over. For whoever minimises a function that is useful: along it
the quadratic model of the function falls without end.

Here it leads a minimisation away from a saddle point.
"""

# %%
# A saddle
# --------
# ``f(x, y) = x^2 + (y^2 - 1)^2 / 4`` has two minima, at (0, 1) and (0, -1), and a
# saddle at the origin between them.

import warnings

import matplotlib.pyplot as plt
import torch

from kantor.linalg import SolveStatus, cg

# A solve that does not converge warns; here its status is looked at instead.
warnings.simplefilter("ignore", RuntimeWarning)


def f(point):
    """Two valleys and a saddle."""
    x, y = point
    return x**2 + (y**2 - 1) ** 2 / 4


# %%
# Newton's step solves ``H s = -g`` with the Hessian ``H`` as a matrix-free operator:
# one Hessian-vector product an iteration. Close to the saddle ``H`` is indefinite.

point = torch.tensor([0.8, 0.05], dtype=torch.float64)
gradient = torch.func.grad(f)


def hessian_times(v):
    """Hessian-vector product at the current point."""
    return torch.func.jvp(gradient, (point,), (v,))[1]


result = cg(hessian_times, -gradient(point), rtol=1e-8)
print(result)
print("direction", result.direction.tolist())

# %%
# Newton and a line search
# ------------------------
# When CG converges, take Newton's step. When it meets negative curvature, walk along
# the direction, downhill. Halve the step until the function falls.

path, statuses = [point], []
for _ in range(20):
    g = gradient(point)
    if g.norm() < 1e-8:
        break
    result = cg(hessian_times, -g, rtol=1e-8)
    statuses.append(str(result.status))
    negative = result.status is SolveStatus.NEGATIVE_CURVATURE
    step = result.direction if negative else result.x
    if step @ g > 0:
        step = -step
    length = 1.0
    while f(point + length * step) > f(point) + 1e-4 * length * (step @ g):
        length /= 2
    point = point + length * step
    path.append(point)

print("\n".join(statuses))
print(f"ends at ({abs(point[0]):.6f}, {point[1]:.6f}), f = {f(point):.0e}")

# %%
# Three steps along negative curvature lead into the upper valley, where Newton's
# method takes over.

figure, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
x, y = torch.linspace(-1, 1, 201), torch.linspace(-1.5, 1.5, 301)
x, y = torch.meshgrid(x, y, indexing="xy")
levels = [0.01, 0.05, 0.1, 0.2, 0.25, 0.35, 0.5, 0.8, 1.2]
ax.contour(x, y, f((x, y)), levels=levels, colors="0.75", linewidths=1)
ax.plot(*torch.stack(path).T, marker="o", color="#0b5c8a", label="path")
ax.plot(*path[0], marker="o", color="#0b5c8a", markerfacecolor="white", label="start")
ax.plot(0, 0, marker="x", color="#b3541e", linestyle="none", label="saddle")
ax.set(xlabel="x", ylabel="y", aspect="equal")
ax.legend(frameon=False, bbox_to_anchor=(1.02, 1), loc="upper left")
plt.show()
