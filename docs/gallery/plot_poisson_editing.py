"""
Editing photographs with the Poisson equation
=============================================

A piece of one photograph is put into another, and nobody sees the seam. The trick
is to copy *slopes* instead of colours: inside a region the new picture ``f`` shall
have the slopes of the source ``g``, on the rim of the region the colours of the
target ``f*``. That is a Poisson equation, with one unknown a pixel:

.. code-block:: text

    4 f(p) - sum of f(q)  =  4 g(p) - sum of g(q)     over the neighbours q of p
                    f(p)  =  f*(p)                    on the rim

Source: P. Pérez, M. Gangnet, A. Blake, *Poisson image editing*, ACM Transactions on
Graphics 22(3), 2003, equations 7 and 11.

This page assembles the system, solves it with :py:func:`kantor.linalg.cg`, looks at
the picture, and compares the solution with SciPy's.
"""

# %%
# Two photographs
# ---------------
# A cup of coffee is the target, a cat the source. Both ship with scikit-image and
# are in the public domain (CC0): the coffee by Rachel Michetti, the cat, Chelsea, by
# Stefan van der Walt. The cup is enlarged twice; the cat is squeezed into the
# perspective of the coffee's surface, an ellipse.

import matplotlib.pyplot as plt
import numpy as np
import scipy.sparse.linalg
import torch
from skimage import data, transform

from kantor.linalg import CSR, cg, ic0

cup = data.coffee()[5:225, 150:420] / 255
target = transform.rescale(cup, 2, order=3, channel_axis=-1).clip(0, 1)
height, width, _ = target.shape

centre, radii = (280, 274), (84, 147)
y, x = np.mgrid[:height, :width]
mask = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1

face = data.chelsea()[15:290, 20:400] / 255
size = (2 * radii[0] + 10, 2 * radii[1] + 10)
top, left = centre[0] - size[0] // 2, centre[1] - size[1] // 2
source = np.zeros_like(target)
source[top : top + size[0], left : left + size[1]] = transform.resize(
    face, size, anti_aliasing=True
)

pasted = np.where(mask[..., None], source, target)

# %%
# The system
# ----------
# One row for each pixel of the region: 4 on the diagonal, -1 for each neighbour that
# is in the region too. A neighbour on the rim is known, so it goes to the right-hand
# side. The three colours share the matrix: they are one batch of right-hand sides,
# ``b`` of shape ``(3, n)``.

pixels = np.argwhere(mask)
n = len(pixels)
number = np.zeros(mask.shape, dtype=np.int64)
number[mask] = np.arange(n)


def assemble(slopes):
    """Matrix and right-hand side; ``slopes(p, q)`` are those wanted from q to p."""
    rows, cols, values = [np.arange(n)], [np.arange(n)], [np.full(n, 4.0)]
    b = np.zeros((n, 3))
    p = tuple(pixels.T)
    for step in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        q = tuple((pixels + step).T)
        inside = mask[q]
        rows.append(np.flatnonzero(inside))
        cols.append(number[q][inside])
        values.append(np.full(inside.sum(), -1.0))
        b += slopes(p, q) + np.where(inside[:, None], 0.0, target[q])
    triplets = (np.concatenate(part) for part in (rows, cols, values))
    A = CSR.from_coo(*map(torch.from_numpy, triplets), (n, n))
    return A, torch.from_numpy(b.T.copy())


A, b = assemble(lambda p, q: source[p] - source[q])
print(A)

# %%
# The solution
# ------------
# ``ic0`` is the incomplete Cholesky factorisation; it is made once and serves every
# right-hand side. All three channels are solved in one call.

M = ic0(A)
result = cg(A, b, M=M, rtol=1e-6)
print(result)


def insert(solution):
    """The target with the region replaced."""
    picture = target.copy()
    picture[mask] = solution.numpy().T.clip(0, 1)
    return picture


def show(**pictures):
    """Pictures side by side."""
    count = len(pictures)
    _, axes = plt.subplots(1, count, figsize=(4.6 * count, 4), layout="constrained")
    for ax, (title, picture) in zip(axes, pictures.items(), strict=True):
        ax.imshow(picture)
        ax.set_title(title)
        ax.axis("off")


show(pasted=pasted, cloned=insert(result.x))

# %%
# Left, the pixels are copied. Right, their slopes are: the light of the cup reaches
# the cat.
#
# Keeping what is there
# ---------------------
# Imported slopes wipe out the reflection of the lamp on the coffee. Taking the larger
# of the two slopes for each pair of pixels keeps the strong edges of both pictures
# (equation 13 of the paper). The matrix is the same, and so is ``M``.


def larger_slope(p, q):
    """The slope of the source or of the target, whichever is larger."""
    imported, own = source[p] - source[q], target[p] - target[q]
    return np.where(np.abs(imported) > np.abs(own), imported, own)


_, b_mixed = assemble(larger_slope)
mixed = cg(A, b_mixed, M=M, rtol=1e-6)
show(cloned=insert(result.x), mixed=insert(mixed.x))

# %%
# Against SciPy
# -------------
# Without a preconditioner Kantor and SciPy run the same recurrence, so their
# residuals coincide, iteration by iteration. SciPy's ``cg`` takes one right-hand
# side: the red channel. Which one is faster, and by how much, is a question for a
# quiet machine: ``python bench/run.py cg``.

red = b[0]
matrix, column = A.to_scipy(), red.numpy()
scipy_residuals = [np.linalg.norm(column)]


def record(x):
    """Keep the norm of the true residual."""
    scipy_residuals.append(np.linalg.norm(column - matrix @ x))


expected, _ = scipy.sparse.linalg.cg(matrix, column, rtol=1e-6, callback=record)
plain = cg(A, red, rtol=1e-6)
preconditioned = cg(A, red, M=M, rtol=1e-6)

print("iterations:")
print(f"  SciPy            {len(scipy_residuals) - 1}")
print(f"  Kantor           {plain.iterations}")
print(f"  Kantor with ic0  {preconditioned.iterations}")
levels = 255 * np.abs(plain.x.numpy() - expected).max()
print(f"largest difference of a pixel: {levels:.0e} of 255 grey levels")

# %%
# How the residual falls. ``result.plot()`` draws one such curve; here are three.

figure, ax = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
ax.semilogy(scipy_residuals, color="0.8", linewidth=7, label="SciPy")
for run, colour, label in (
    (plain, "#0b5c8a", "Kantor"),
    (preconditioned, "#b3541e", "Kantor with ic0"),
):
    history = run.history
    ax.semilogy(history.iterations, history.residual_norms, color=colour, label=label)
ax.axhline(
    plain.tolerance, color="0.5", linewidth=1, linestyle=":", label="tolerance"
)
ax.set(xlabel="iteration", ylabel="residual norm, red channel")
ax.spines[["top", "right"]].set_visible(False)
ax.grid(color="0.9")
ax.legend(frameon=False)
plt.show()
