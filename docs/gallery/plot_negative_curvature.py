"""
Negative curvature is a result
==============================

Conjugate gradients need a positive definite matrix. When the matrix is not, some direction ``d`` has negative
curvature, ``d'Ad < 0``, and the method meets one sooner or later. Many codes go on, or hide it behind a small constant.
Kantor stops and hands the direction over: for whoever minimises a function it is the best news there is, because the
function falls along it without end in its quadratic model.

Here it leads a minimisation away from a saddle point.
"""

# %%
# A saddle
# --------
# ``f(x, y) = x^2 + (y^2 - 1)^2 / 4`` has two minima, at (0, 1) and (0, -1), and a saddle at the origin between them.

import warnings

import matplotlib.pyplot as plt
import torch

from kantor.linalg import SolveStatus, cg

warnings.simplefilter("ignore", RuntimeWarning)  # a solve that does not converge warns; here its status is looked at


def f(point):
    """Two valleys and a saddle."""
    x, y = point
    return x**2 + (y**2 - 1) ** 2 / 4


# %%
# Newton's step solves ``H s = -g`` with the Hessian ``H`` as a matrix-free operator, one Hessian-vector product an
# iteration. Close to the saddle ``H`` is indefinite.

point = torch.tensor([0.8, 0.05], dtype=torch.float64)
gradient = torch.func.grad(f)


def hessian_times(vectors):
    """Hessian-vector products for vectors of shape (..., 2)."""
    return torch.vmap(lambda v: torch.func.jvp(gradient, (point,), (v,))[1])(vectors.reshape(-1, 2)).reshape(
        vectors.shape
    )


result = cg(hessian_times, -gradient(point), rtol=1e-8)
print(result)
print("direction", result.direction.tolist())

# %%
# Newton and a line search
# ------------------------
# When CG converges, take Newton's step. When it meets negative curvature, walk along the direction, downhill, with a
# step that is halved until the function falls.

path, statuses = [point], []
for _ in range(20):
    g = gradient(point)
    if g.norm() < 1e-8:
        break
    result = cg(hessian_times, -g, rtol=1e-8)
    statuses.append(str(result.status))
    step = result.direction if result.status is SolveStatus.NEGATIVE_CURVATURE else result.x
    if step @ g > 0:
        step = -step
    length = 1.0
    while f(point + length * step) > f(point) + 1e-4 * length * (step @ g):
        length /= 2
    point = point + length * step
    path.append(point)

print(statuses)
print(f"ends at ({point[0]:.6f}, {point[1]:.6f}), f = {f(point):.1e}")

# %%
figure, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
x, y = torch.meshgrid(torch.linspace(-1, 1, 201), torch.linspace(-1.5, 1.5, 301), indexing="xy")
ax.contour(x, y, f((x, y)), levels=[0.01, 0.05, 0.1, 0.2, 0.25, 0.35, 0.5, 0.8, 1.2], colors="0.75", linewidths=1)
track = torch.stack(path)
ax.plot(track[:, 0], track[:, 1], marker="o", color="#0b5c8a")
ax.plot(0, 0, marker="x", color="#b3541e", markersize=9, linestyle="none")
ax.annotate("saddle", (0, 0), (8, -4), textcoords="offset points", color="#b3541e")
ax.annotate("start", path[0].tolist(), (8, -4), textcoords="offset points", color="#0b5c8a")
ax.set(xlabel="x", ylabel="y", aspect="equal")
plt.show()
