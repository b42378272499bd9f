"""
Pruning nine weights of ten
===========================

A network that reads handwritten digits loses 90 % of its weights. Which ones, and
what becomes of the others?

Source: E. Frantar, E. Kurtic, D. Alistarh, *M-FAC: Efficient Matrix-Free
Approximations of Second-Order Information*, NeurIPS 2021.
"""

# %%
# A trained network
# -----------------

import copy

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from kantor.optim import prune_obs

torch.set_num_threads(1)
torch.manual_seed(0)
digits = load_digits()
x, y = torch.from_numpy(digits.data / 16).float(), torch.from_numpy(digits.target)
train, test = slice(1400), slice(1400, None)

trained = nn.Sequential(
    nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
)
optimizer = torch.optim.Adam(trained.parameters(), 1e-3)
for _ in range(30):
    for batch in torch.randperm(1400).split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(trained(x[batch]), y[batch]).backward()
        optimizer.step()


def accuracy(net):
    return float((net(x[test]).argmax(1) == y[test]).double().mean())


def weights_of(net):
    return [layer.weight for layer in net if isinstance(layer, nn.Linear)]


print(f"dense: {accuracy(trained):.1%} of unseen digits read")

# %%
# Three ways to prune
# -------------------
# By magnitude: the smallest weights go. By what their removal costs, which the
# inverse of the empirical Fisher matrix tells: those go that cost least, and the
# others move to make up for it. It needs gradients on small batches, and takes them
# anew where the network has changed. No training follows.


def gradients(net):
    rows = []
    for _ in range(128):
        batch = torch.randint(1400, (16,))
        loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
        parts = torch.autograd.grad(loss, weights_of(net))
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


@torch.no_grad()
def by_magnitude(net, sparsity):
    sizes = torch.cat([w.reshape(-1) for w in weights_of(net)]).abs()
    threshold = sizes.kthvalue(round(sparsity * len(sizes))).values
    for w in weights_of(net):
        w[w.abs() <= threshold] = 0


def by_cost(net, sparsity):
    prune_obs(net, None, sparsity, n_recompute=8, grad_fn=lambda k: gradients(net))


@torch.no_grad()
def unmoved(net, pruned):  # the same weights go, the others stay as they are
    for w, moved in zip(weights_of(net), weights_of(pruned), strict=True):
        w *= moved != 0


shares = (0.5, 0.7, 0.8, 0.9)
scores = {"by magnitude": [], "by cost": [], "by cost, others moved": []}
for share in shares:
    small, masked, moved = (copy.deepcopy(trained) for _ in scores)
    by_magnitude(small, share)
    by_cost(moved, share)
    unmoved(masked, moved)
    for name, net in zip(scores, (small, masked, moved), strict=True):
        scores[name].append(accuracy(net))

figure, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
for name, values in scores.items():
    print(f"{name:22}", *(f"{score:.3f}" for score in values))
    ax.plot([100 * s for s in shares], [100 * s for s in values], "o-", label=name)
ax.axhline(100 * accuracy(trained), color="gray", lw=1, label="dense")
ax.set(xlabel="weights removed, %", ylabel="unseen digits read, %")
ax.legend()

# %%
# The mask of one layer fits torch's own pruning:
# ``torch.nn.utils.prune.custom_from_mask``. An ``MFAC`` optimiser with
# ``sparse_mask=True`` trains on what remains.

plt.show()
