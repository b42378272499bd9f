"""
Two moons that a tiny network cannot tell apart
===============================================

A network with two hidden units draws a line with one bend through the plane, too
little to part two interlocked moons. Diffusion on a graph of nearest neighbours
contracts each moon first. What is left for the network is easy.

Source: T. Wang et al., *Diffusion Mechanism in Residual Neural Network: Theory and
Applications*, IEEE TPAMI 2024, whose synthetic experiment this is.
"""

# %%
# The graph
# ---------
# 1000 points. Each is joined with its 25 nearest ones, itself included, by Gaussian
# weights, and the weights of a point sum to one.

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy

from kantor.graph import diffuse, knn_graph, stability
from kantor.nn import DiffResNet

torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
angle = torch.pi * torch.rand(500, generator=generator)
upper = torch.stack([angle.cos(), angle.sin()], 1)
lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
x = torch.cat([upper, lower])
x += 0.05 * torch.randn(x.shape, generator=generator)
moon = torch.arange(2).repeat_interleave(500)

graph = knn_graph(x, k=25, weights="gaussian", sigma=0.5)
print(graph)
print(stability(graph, step=1.0))


def show(ax, points, colour, title):
    """Points in the colours of two classes."""
    ax.scatter(*points.T, c=colour, cmap="coolwarm", s=3)
    ax.set_title(title)
    ax.set_aspect("equal")
    ax.axis("off")


# %%
# What diffusion does
# -------------------
# Every step replaces a point by the weighted mean of its neighbours. Each moon
# shrinks along itself; the two stay apart, since no edge joins them.

figure, axes = plt.subplots(
    2, 2, figsize=(8, 5.4), sharex=True, sharey=True, layout="constrained"
)
for ax, steps in zip(axes.flat, (0, 60, 600, 6000), strict=True):
    show(ax, diffuse(x, graph, 1.0, steps), moon, f"{steps} steps")

# %%
# The smallest distance between the moons, over the largest inside one: it decides how
# easily a network parts them, and grows with every step.

counts = [0, 1, 3, 10, 30, 100, 300, 1000, 3000]
ratios = []
for steps in counts:
    y = diffuse(x, graph, 1.0, steps)
    apart = torch.cdist(y[:500], y[500:]).min()
    within = max(torch.cdist(part, part).max() for part in y.split(500))
    ratios.append(float(apart / within))
    print(f"{steps:5} steps: distance / diameter {ratios[-1]:.3f}")

figure, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
ax.plot(counts, ratios, "o-", color="#0b5c8a")
ax.set_xscale("symlog")
ax.set_yscale("log")
ax.set_xlabel("steps")
ax.set_ylabel("distance / diameter")
ax.spines[["top", "right"]].set_visible(False)

# %%
# The network
# -----------
# A residual block with two hidden units, K steps of diffusion, and a linear
# classifier, trained by 100 steps of gradient descent from five starts. The diffusion
# has no parameters; derivatives go through all of its steps. A start may still get
# stuck: two units leave none to spare.

figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
for ax, steps in zip(axes, (0, 60), strict=True):
    right = []
    for seed in range(5):
        torch.manual_seed(seed)
        net = DiffResNet(2, 2, 1.0, steps, residual="two_layer")
        optimiser = torch.optim.SGD(net.parameters(), lr=1.0, weight_decay=5e-4)
        for _ in range(100):
            optimiser.zero_grad()
            cross_entropy(net(x, graph), moon).backward()
            optimiser.step()
        guess = net(x, graph).argmax(1)
        if seed == 0:
            show(ax, x, guess, f"taken for, {steps} steps of diffusion")
        right.append(100 * float((guess == moon).double().mean()))
    print(f"{steps:2} steps of diffusion, % right:", *(f"{r:5.1f}" for r in right))
plt.show()
