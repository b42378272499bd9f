"""Optimal Brain Surgeon pruning: optimality of one removal, exact sparsity, digits."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.prune import custom_from_mask

from kantor.optim import MFAC, prune_obs
from mfac_reference import accuracy, classifier, dense, gradients, random, train


def test_one_removal_is_optimal() -> None:
    """On a quadratic whose Hessian is F: the loss rises by rho, to the minimum under the constraint."""
    G, start = random(30, 12), random(12, seed=1)
    w = start.clone()
    F = dense(G, 0.01, 30)
    result = prune_obs([w], G, 1 / 12, damping=0.01, block_size=None, n_recompute=1)
    (gone,) = (~result["mask"][0]).nonzero().squeeze(1).tolist()
    rho = start.square() / (2 * torch.linalg.inv(F).diagonal())
    assert gone == int(rho.argmin())
    torch.testing.assert_close(result["saliency"][0], rho, rtol=1e-10, atol=0)
    step = w - start
    torch.testing.assert_close(0.5 * step @ F @ step, rho[gone], rtol=1e-10, atol=0)
    rest = [j for j in range(12) if j != gone]
    best = torch.zeros_like(w)
    best[rest] = torch.linalg.solve(F[rest][:, rest], -F[rest][:, gone] * -start[gone])
    torch.testing.assert_close(step[rest], best[rest], rtol=1e-9, atol=1e-12)
    assert w[gone] == 0
    torch.testing.assert_close(result["delta"][0], step)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("n_recompute", [1, 5])
def test_sparsity_is_exact_and_nothing_comes_back(per_layer: bool, n_recompute: int) -> None:
    weights = [random(7, 9, dtype=torch.float32), random(31, seed=1, dtype=torch.float32)]
    mask = [torch.ones(7, 9, dtype=torch.bool), torch.arange(31) % 7 > 0]
    G = random(10, 94, seed=2, dtype=torch.float32)
    result = prune_obs(weights, G, 0.61, block_size=16, n_recompute=n_recompute, per_layer=per_layer, mask=mask)
    zeros = [int((~part).sum()) for part in result["mask"]]
    assert zeros == [round(0.61 * 63), round(0.61 * 31)] if per_layer else sum(zeros) == round(0.61 * 94)
    for weight, before, after in zip(weights, mask, result["mask"], strict=True):
        assert not (after & ~before).any()
        assert torch.equal(weight != 0, after)
        assert weight.dtype == torch.float32
    again = [random(7, 9, dtype=torch.float32), random(31, seed=1, dtype=torch.float32)]
    prune_obs(again, G, 0.61, block_size=16, n_recompute=n_recompute, per_layer=per_layer, mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


def test_models_and_masks_for_torch() -> None:
    net = nn.Sequential(nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.Flatten(), nn.Linear(12, 2))
    bias = net[3].bias.detach().clone()
    seen: list[int] = []

    def grad_fn(k: int) -> Tensor:
        seen.append(k)
        assert torch.is_grad_enabled()
        assert k == 0 or int((net[3].weight == 0).sum() + (net[0].weight == 0).sum()) > 0
        return random(8, 33, seed=k)

    result = prune_obs(net, None, 0.5, n_recompute=3, grad_fn=grad_fn)
    assert seen == [0, 1, 2]
    assert set(result["mask"]) == {"0.weight", "3.weight"}
    assert torch.equal(net[3].bias, bias)
    custom_from_mask(net[3], "weight", result["mask"]["3.weight"])
    assert torch.equal(net[3].weight != 0, result["mask"]["3.weight"])
    more = prune_obs({"a": net[0].weight}, random(4, 9), 0.9, mask={"a": result["mask"]["0.weight"]})
    assert not (more["mask"]["a"] & ~result["mask"]["0.weight"]).any()


TWICE = torch.ones(3)


def test_shared_weights_count_once_and_computed_ones_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    assert set(prune_obs(net, random(4, 9), 0.5)["mask"]) == {"0.weight"}
    assert int((net[1].weight == 0).sum()) == round(4.5)
    result = prune_obs(nn.Linear(2, 2), random(4, 4), 0.5)
    for made in (custom_from_mask(nn.Linear(2, 2), "weight", result["mask"]["weight"]),
                 nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))):  # fmt: skip
        before = made.weight.detach().clone()
        with pytest.raises(ValueError, match="model: weight: expected a parameter, got a tensor that is computed"):
            prune_obs(made, random(4, 4), 0.75)
        assert torch.equal(made.weight, before)


def test_masked_weights_are_gone_from_the_beginning() -> None:
    w, mask = torch.ones(6), torch.arange(6) > 0
    seen = []

    def grad_fn(k: int) -> Tensor:
        seen.append(float(w[0]))
        return random(4, 6, seed=k)

    result = prune_obs([w], None, 0.5, mask=[mask], n_recompute=2, grad_fn=grad_fn)
    assert seen == [0, 0]
    assert int((w == 0).sum()) == 3
    assert float(result["delta"][0][0]) == -1


def test_sparse_training_goes_on_from_the_pruned_model() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
    pruned = prune_obs(net, random(16, 64), 0.75)["mask"]
    masks = [pruned.get(name) for name, _ in net.named_parameters()]
    x, y = random(20, 6, dtype=torch.float32), random(20, 2, seed=1, dtype=torch.float32)
    optimizer = MFAC(net.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1, m=4, damping=0.1, sparse_mask=masks)
    start = [p.detach().clone() for p in net.parameters()]
    for _ in range(5):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
    for p, before, mask in zip(net.parameters(), start, masks, strict=True):
        assert torch.equal(p != before, torch.ones_like(p, dtype=torch.bool) if mask is None else mask)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"sparsity": 1.0}, ValueError, r"prune_obs: sparsity: expected a number in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, ValueError, "sparsity"),
        ({"n_recompute": 0}, ValueError, "n_recompute: expected an integer >= 1"),
        ({"grads": None}, ValueError, "expected gradients .* or grad_fn"),
        ({"grads": torch.ones(3, 5)}, ValueError, r"grads: expected shape \(m, 6\), got \(3, 5\)"),
        ({"grads": torch.ones(3, 6) * torch.inf}, ValueError, "expected finite values"),
        ({"damping": 0.0}, ValueError, "damping"),
        ({"block_size": 0}, ValueError, "block_size"),
        ({"mask": [torch.ones(5)]}, ValueError, r"mask: expected shapes \[\(2, 3\)\], got \[\(5,\)\]"),
        ({"mask": [torch.zeros(2, 3)]}, ValueError, "sparsity: expected at least that of mask"),
        ({"mask": {"a": torch.ones(2, 3)}}, ValueError, r"mask: expected a list, got a dict of \['a'\]"),
        ({"mask": [[True] * 6]}, TypeError, r"mask\[0\]: expected a torch.Tensor, got list"),
        ({"grads": torch.ones(3, 6, dtype=torch.int64)}, TypeError, "prune_obs: grads: expected a real floating-point"),
        ({"grads": torch.ones(3, 6, device="meta")}, ValueError, "grads are on meta, the weights on cpu"),
        ({"grads": None, "grad_fn": lambda k: None}, TypeError, "grads: expected a torch.Tensor, got NoneType"),
        ({"model_or_params": [torch.full((2, 3), torch.nan)]}, ValueError, "weights: expected finite values, got nan"),
        ({"model_or_params": [TWICE, TWICE]}, ValueError, r"params\[1\]: expected every weight once, got it twice"),
        ({"model_or_params": torch.ones(2, 3)}, TypeError, "expected an iterable of tensors, got a tensor"),
        ({"model_or_params": [torch.ones(3), torch.ones(3, device="meta")]}, ValueError, r"params\[1\] is on meta"),
        ({"model_or_params": []}, ValueError, "expected at least one tensor"),
        ({"model_or_params": nn.ReLU()}, ValueError, "expected linear or convolutional layers"),
        ({"model_or_params": [torch.ones(2, 3, dtype=torch.int32)]}, TypeError, "real floating-point dtype"),
    ],
)  # fmt: skip
def test_bad_arguments(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    w = random(2, 3, dtype=torch.float32)
    before = w.clone()
    arguments = {"model_or_params": [w], "grads": random(4, 6), "sparsity": 0.5} | changes
    with pytest.raises(kind, match=message):
        prune_obs(**arguments)
    assert torch.equal(w, before)


def test_weights_are_restored_when_fresh_gradients_fail() -> None:
    w = random(6, dtype=torch.float32)
    before = w.clone()

    def grad_fn(k: int) -> Tensor:
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        prune_obs([w], random(4, 6), 0.5, grad_fn=grad_fn, n_recompute=3)
    assert torch.equal(w, before)


def fresh_gradients(net: nn.Module, weights: list[Tensor], k: int) -> Tensor:
    return gradients(net, weights, seed=k)


@pytest.mark.slow
def test_digits(size: str) -> None:
    """At 90 % a quarter better than magnitude pruning, and close to the dense network."""
    pytest.importorskip("sklearn")
    torch.set_num_threads(1)
    results: dict[tuple[str, float], float] = {}

    def note(name: str, sparsity: float, net: nn.Module) -> None:
        results[name, sparsity] = results.get((name, sparsity), 0) + accuracy(net) / len(seeds)

    seeds = (0, 1, 2) if size == "full" else (0,)
    for seed in seeds:
        trained = classifier(seed)
        train(trained, torch.optim.Adam(trained.parameters(), 1e-3), 30, seed=seed)
        note("dense", 0, trained)
        for sparsity in (0.5, 0.7, 0.8, 0.9) if size == "full" else (0.8, 0.9):
            net = copy.deepcopy(trained)
            weights = [layer.weight for layer in net if isinstance(layer, nn.Linear)]
            fresh = partial(fresh_gradients, net, weights)
            prune_obs(net, None, sparsity, n_recompute=8, grad_fn=fresh)
            note("ours", sparsity, net)
            net = copy.deepcopy(trained)
            weights = [layer.weight for layer in net if isinstance(layer, nn.Linear)]
            magnitudes = torch.cat([w.detach().reshape(-1) for w in weights]).abs()
            threshold = magnitudes.kthvalue(round(sparsity * len(magnitudes))).values
            with torch.no_grad():
                for w in weights:
                    w[w.abs() <= threshold] = 0
            note("magnitude", sparsity, net)
    torch.set_num_threads(2)
    assert results["ours", 0.9] >= results["magnitude", 0.9] + 0.25
    assert results["ours", 0.9] >= results["dense", 0] - 0.06
    assert results["ours", 0.8] >= results["magnitude", 0.8] + 0.03
