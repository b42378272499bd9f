"""
Heat on a cloud of points
=========================

A graph of nearest neighbours knows the shape of a cloud that distances in space do
not see: heat put at one end of a spiral has to follow it. And with a velocity on the
edges, it drifts.

Source: T. Wang, C. Bao, Z. Shi, *Convection-Diffusion Equation: A Theoretically
Certified Framework for Neural Networks*, 2024.
"""

# %%
# The graph
# ---------
# 600 points on two turns of a spiral. Weights tune themselves to the local spacing,
# which grows outwards.

import math

import matplotlib.pyplot as plt
import torch

from kantor.graph import convection_diffuse, diffuse, knn_graph, stability

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
t = torch.rand(600, dtype=torch.float64, generator=generator).sort().values
angle = 4 * math.pi * t
x = (0.2 + t)[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
x += 0.015 * torch.randn(x.shape, dtype=torch.float64, generator=generator)

graph = knn_graph(x, k=10)
print(graph)
print(stability(graph, step=0.5))

# %%
# Three ways to let time pass
# ---------------------------
# Many explicit steps, the exact exponential by Chebyshev polynomials, or one implicit
# step, which may be as long as one likes and smears more.

heat = torch.zeros(600, 1, dtype=torch.float64)
heat[:20] = 1.0
ways = {
    "explicit, 2000 steps of 0.5": diffuse(heat, graph, 0.5, 2000),
    "exponential (chebyshev)": diffuse(heat, graph, 0.5, 2000, method="chebyshev"),
    "implicit, one step": diffuse(heat, graph, 1000.0, 1, method="implicit"),
}
figure, axes = plt.subplots(1, 3, figsize=(9, 3.3), layout="constrained")
for ax, (name, y) in zip(axes, ways.items(), strict=True):
    print(f"{name:28} heat {float(y.sum()):.6f}, warmest {float(y.max()):.4f}")
    ax.scatter(*x.T, c=y[:, 0].clamp(1e-6).log10(), cmap="inferno", s=6, vmin=-5)
    ax.set_title(name, fontsize=9)
    ax.set_aspect("equal")
    ax.set_axis_off()

# %%
# With a wind
# -----------
# A velocity on every edge, here outwards along the spiral, carries the heat while it
# spreads; the scheme looks upwind, so that nothing becomes negative.

wind = 0.05 * torch.sign(graph.col - graph.rows).double()
still = convection_diffuse(heat, graph, step=0.3, num_steps=600)
blown = convection_diffuse(heat, graph, wind, step=0.3, num_steps=600)

figure, ax = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
ax.plot(t, still[:, 0], label="diffusion")
ax.plot(t, blown[:, 0], label="with a wind")
ax.set(xlabel="along the spiral", ylabel="heat")
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False)
print(f"coldest {float(blown.min()):.1e}")
plt.show()
