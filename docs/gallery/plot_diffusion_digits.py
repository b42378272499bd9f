"""
Handwritten digits from three labels of each
============================================

1797 pictures of digits, and 30 of them labelled. A graph joins every picture with
those most like it; a network whose outputs diffuse along the graph learns the rest.

Source of the network: T. Wang, C. Bao, Z. Shi, *Convection-Diffusion Equation: A
Theoretically Certified Framework for Neural Networks*, 2024.
"""

# %%
# Pictures and a graph
# --------------------
# The digits ship with scikit-learn: 8 x 8 grey values. ``knn_graph`` finds the
# nearest ones of each, and weighs them by their distance, in units of the distance of
# the sixth.

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import nll_loss

from kantor.graph import classify, knn_graph, stability
from kantor.nn import COIN

torch.set_num_threads(1)
digits = load_digits()
x = torch.from_numpy(digits.data / 16).float()
truth = torch.from_numpy(digits.target)

graph = knn_graph(x, k=11, bandwidth_k=6)
print(graph)
same = (truth[graph.rows] == truth[graph.col.long()]).double().mean()
print(f"{100 * same:.1f} % of the edges join equal digits")

# %%
# The first three of each class are labelled.

labelled = torch.cat([torch.nonzero(truth == c)[:3, 0] for c in range(10)])

figure, axes = plt.subplots(3, 10, figsize=(7, 2.2), layout="constrained")
for ax, row in zip(axes.T.flat, labelled, strict=True):
    ax.imshow(1 - x[row].view(8, 8), cmap="gray")
    ax.axis("off")

# %%
# A network whose outputs diffuse
# -------------------------------
# COIN is a residual block, a linear classifier, a softmax, and then ``num_steps``
# steps of diffusion on the ten probabilities of every picture. How long may a step
# be?

print(stability(graph, step=0.5))

# %%
# It is trained on the labelled rows alone. Without diffusion, ``num_steps=0``, the
# same network knows 30 pictures and nothing else.


def learn(num_steps, epochs=150):
    """A trained network, and the share of the others it gets right in each epoch."""
    torch.manual_seed(0)
    net = COIN(64, 10, 0.5, num_steps, hidden=64)
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    others = torch.ones(len(x), dtype=torch.bool).index_fill(0, labelled, False)
    right = []
    for _ in range(epochs):
        optimiser.zero_grad()
        log_prob = net.log_prob(x, graph)
        nll_loss(log_prob[labelled], truth[labelled]).backward()
        optimiser.step()
        right.append(
            100 * float((log_prob.argmax(1) == truth)[others].double().mean())
        )
    return net, right


figure, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
for num_steps, colour in ((0, "0.6"), (5, "#7cb0d0"), (40, "#0b5c8a")):
    net, right = learn(num_steps)
    ax.plot(right, color=colour, label=f"{num_steps} steps")
    print(f"{num_steps:3} steps of diffusion: {right[-1]:.1f} % right")
ax.set_xlabel("epoch")
ax.set_ylabel("right, % of the unlabelled")
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False)

# %%
# What is still wrong
# -------------------
# Pictures that end up in the wrong class, with what they were taken for. Most sit
# between two clusters of the graph.

guess = net(x, graph).argmax(1)
wrong = torch.nonzero(guess != truth)[:, 0]
chosen = wrong[torch.linspace(0, len(wrong) - 1, 20).long()]
figure, axes = plt.subplots(2, 10, figsize=(7, 1.9), layout="constrained")
for ax, row in zip(axes.flat, chosen, strict=True):
    ax.imshow(1 - x[row].view(8, 8), cmap="gray")
    ax.set_title(f"{truth[row]}, not {guess[row]}", fontsize=7)
    ax.axis("off")

# %%
# All of it in one call
# ---------------------
# ``classify`` makes the graph, chooses a step, trains, and estimates its accuracy
# from the labels that it was given.

labels = torch.full_like(truth, -1)
labels[labelled] = truth[labelled]
result = classify(x, labels)
print(result)
_, ax = plt.subplots(figsize=(7, 5.6), layout="constrained")
result.plot(ax)
plt.show()
