"""
Four optimisers on one small network
====================================

Handwritten digits, a network of two hidden layers, the same batches for all. What a
step of each is made of: squared gradients (AdamW), curvature (AdaHessian), a window
of gradients (M-FAC), norms of layers and their noise (LANTON).

Sources: Z. Yao et al., *ADAHESSIAN*, AAAI 2021; E. Frantar et al., *M-FAC*, NeurIPS
2021; J. Hao et al., *Noise-Adaptive Layerwise Learning Rates*, 2025.
"""

# %%
# The task
# --------

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from kantor.optim import LANTON, MFAC, AdaHessian, lmo_param_groups

torch.set_num_threads(1)
digits = load_digits()
x, y = torch.from_numpy(digits.data / 16).float(), torch.from_numpy(digits.target)
train, test = slice(1400), slice(1400, None)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 10)
    )


# %%
# One loop for all
# ----------------
# They are torch optimisers. AdaHessian differentiates the gradient, so it takes the
# loss as a closure. Rates warm up and fall to zero, each the best of a few that were
# tried for this network; one run with one seed ranks nobody.

optimizers = {
    "AdamW": lambda net: torch.optim.AdamW(net.parameters(), 4e-2),
    "AdaHessian": lambda net: AdaHessian(net.parameters(), 0.5, seed=0),
    "M-FAC": lambda net: MFAC(
        net.parameters(), 0.2, m=32, damping=1e-2, divisor="mean"
    ),
    "LANTON": lambda net: LANTON(lmo_param_groups(net), 0.2),
}
steps = 160
figure, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
trained = {}
for name, make in optimizers.items():
    net = trained[name] = network()
    optimizer = make(net)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=20)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        rows = torch.randint(1400, (64,), generator=generator)

        def closure(net=net, rows=rows):
            return nn.functional.cross_entropy(net(x[rows]), y[rows])

        if isinstance(optimizer, AdaHessian):
            loss = optimizer.step(closure)
        else:
            optimizer.zero_grad()
            loss = closure()
            loss.backward()
            optimizer.step()
        warm_up.step()
        decay.step()
        losses.append(float(loss.detach()))
    right = float((net(x[test]).argmax(1) == y[test]).double().mean())
    print(
        f"{name:11} loss of the last 20 batches {sum(losses[-20:]) / 20:.3f}, "
        f"unseen digits read {right:.1%}"
    )
    smooth = torch.tensor(losses).unfold(0, 10, 1).mean(-1)
    ax.semilogy(range(10, steps + 1), smooth, label=name)
ax.set(xlabel="step", ylabel="loss, mean of ten batches")
ax.spines[["top", "right"]].set_visible(False)
ax.legend(frameon=False)

# %%
# What LANTON sees
# ----------------
# The noise of every layer's gradient, in the dual norm of the layer, and the factor
# by which it slows the noisy ones.

for name, entry in optimizer.noise_report().items():
    print(
        f"{name:9} {entry.kind:9} noise {entry.noise:8.2e}, factor {entry.factor:.2f}"
    )
plt.show()
