"""M-FAC: passes against the memory's speed, steps and static precomputation against torch, accuracy, pruning, training.

    python bench/optim/bench_mfac.py
    python bench/optim/bench_mfac.py passes steps --repeats 9 --threads 1
    python bench/optim/bench_mfac.py passes steps --device cuda

Prints a table a part, and one JSON line a row on standard error. Times are minima of interleaved repetitions in one
process; what is compared is their ratios. "floor" is the time to read the same bytes, as torch.dot reads them.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "tests" / "optim"))

from kantor.bench.tables import Table
from kantor.optim import MFAC, EmpiricalFisher, prune_obs
from mfac_reference import Dynamic, accuracy, classifier, correlated, dense, gradients, random, recursion, train

F64 = torch.float64
STORAGE = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def note(**record: Any) -> None:
    """One JSON line."""
    print(json.dumps(record), file=sys.stderr, flush=True)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def best_of(functions: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, float]:
    """Least seconds of each; they take turns, so that a slow minute hits all of them."""
    seen = dict.fromkeys(functions, float("inf"))
    for round_ in range(repeats + 1):  # the first warms up
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if round_:
                seen[name] = min(seen[name], time.perf_counter() - started)
    return seen


def read_once(G: Tensor) -> Callable[[], Any]:
    """What reads all of G, and does little else."""
    flat = G.view(-1)
    half = flat.numel() // 2
    return lambda: torch.dot(flat[:half], flat[half : 2 * half])


# --- the two passes ---


def both_passes(G: Tensor, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """``G g`` with the insertion of g, and ``G'c``, by name."""
    g, c = torch.randn_like(G[0]), torch.randn_like(G[:, 0])
    window, double = EmpiricalFisher(G, storage_dtype=dtype)._window, c.double().view(1, 1, -1)
    plain = G if dtype == torch.int8 else G.to(dtype)  # torch has no product of int8 and float
    like_g, like_c, wide = g.to(plain.dtype), c.to(plain.dtype), G.double()
    return {
        "floor": read_once(G),
        "insert": lambda: window.insert(1, g, 6.0),
        "combine": lambda: window.combine(double),
        "torch insert": lambda: (plain[1].copy_(like_g), plain @ like_g),
        "torch combine": lambda: plain.T @ like_c,
        "double insert": lambda: (wide[1].copy_(g), wide @ g.double()),
        "double combine": lambda: wide.T @ double.view(-1),
    }


def passes(arguments: argparse.Namespace) -> None:
    """``G g`` with the insertion of g, and ``G'c``: sums in double for kantor, in the storage dtype for torch.

    For the same sums torch is given the gradients in double.
    """
    columns = ("m x d", "storage", "pass", "kantor ms", "torch ms", "torch, double", "of floor")
    table = Table("Two passes", columns)
    for m, d in [(64, 500_000), (512, 100_000)] if arguments.device == "cpu" else [(64, 4_000_000), (512, 2_000_000)]:
        G = torch.randn(m, d, device=arguments.device)
        for dtype in STORAGE:
            seconds = best_of(both_passes(G, dtype), arguments.repeats, arguments.device)
            floor = seconds["floor"] * dtype.itemsize / 4
            for which in ("insert", "combine"):
                ours, plain, double = (seconds[prefix + which] for prefix in ("", "torch ", "double "))
                record = {"ours": ours, "torch": plain, "double": double, "of_floor": floor / ours}
                note(part="passes", m=m, d=d, storage=name_of(dtype), which=which, **record)
                twin = "" if dtype == torch.int8 else f"{1e3 * plain:.2f} ({plain / ours:.2f}x)"
                cells = (f"{1e3 * ours:.2f}", twin, f"{double / ours:.1f}x", f"{floor / ours:.0%}")
                table.add(f"{m} x {d}", name_of(dtype), which, *cells)
    table.print()


# --- whole steps ---


class TorchStep:
    """The same algebra in torch operations: float32 products, the small system in double."""

    def __init__(self, G: Tensor, damping: float) -> None:
        self.G, self.damping, self.slot = G.clone(), damping, 0
        self.K = (G.double() @ G.double().T).contiguous()

    def step(self, g: Tensor) -> Tensor:
        m = len(self.G)
        self.G[self.slot] = g
        k = (self.G @ g).double()
        self.K[self.slot] = k
        self.K[:, self.slot] = k
        unit = torch.zeros(m, 1, dtype=F64, device=g.device)
        unit[self.slot] = 1
        system = self.K / m + self.damping * torch.eye(m, dtype=F64, device=g.device)
        c = torch.cholesky_solve(unit, torch.linalg.cholesky(system)).squeeze(1)
        self.slot = (self.slot + 1) % m
        return self.G.T @ c.float()


class PublishedStep:
    """The published algebra, coefficients D and B, in torch operations."""

    def __init__(self, G: Tensor, damping: float) -> None:
        self.G, self.damping, self.slot = G.clone(), damping, 0

    def step(self, g: Tensor) -> Tensor:
        self.G[self.slot] = g
        self.slot = (self.slot + 1) % len(self.G)
        return Dynamic(self.G, self.damping).ihvp(g)


def steps_of(G: Tensor) -> dict[str, Callable[[], Any]]:
    """A gradient into the window and its direction out, by name."""
    g, options = torch.randn_like(G[0]), {"damping": 1e-2}
    same, published = TorchStep(G, 1e-2), PublishedStep(G, 1e-2)

    def ours(**more: Any) -> Callable[[], Any]:
        fisher = EmpiricalFisher(G, **options, **more)
        return lambda: (fisher.push(g), fisher.ihvp_last())

    return {
        "floor": read_once(G),
        "same": lambda: same.step(g),
        "published": lambda: published.step(g),
        "float32": ours(),
        "float32, updated factor": ours(factor="update"),
        "bfloat16": ours(storage_dtype=torch.bfloat16, factor="update"),
        "int8": ours(storage_dtype=torch.int8, factor="update"),
    }


def steps(arguments: argparse.Namespace) -> None:
    """A gradient into the window and its direction out."""
    columns = ("m x d", "kantor", "ms", "torch, same algebra", "torch, published algebra", "of floor")
    table = Table("Steps", columns)
    for m, d in ((64, 8_000), (64, 500_000), (256, 100_000), (512, 50_000)):
        functions = steps_of(torch.randn(m, d, device=arguments.device))
        seconds = best_of(functions, arguments.repeats, arguments.device)
        for name in list(functions)[3:]:
            size = {"bfloat16": 2, "int8": 1}.get(name, 4)
            ours, floor = seconds[name], 2 * seconds["floor"] * size / 4
            ratios = [seconds[peer] / ours for peer in ("same", "published")]
            note(part="steps", m=m, d=d, storage=name, seconds=ours, ratios=ratios, of_floor=floor / ours)
            cells = (f"{1e3 * ours:.2f}", f"{ratios[0]:.2f}x", f"{ratios[1]:.1f}x", f"{floor / ours:.0%}")
            table.add(f"{m} x {d}", name, *cells)
    table.print()


# --- static ---


def static(arguments: argparse.Namespace) -> None:
    """All that precedes products: for kantor the Gram matrix and its factor; and that with the diagonal of ``F^-1``."""
    table = Table("Static", ("m x d", "block", "kantor ms", "and the diagonal", "published recursion ms", "ratios"))
    for m, d, block in ((256, 20_000, None), (512, 20_000, None), (64, 64 * 128, 128)):
        G = torch.randn(m, d)

        def ours(diagonal: bool, G: Tensor = G, block: int | None = block) -> Any:
            fisher = EmpiricalFisher(G, damping=1e-2, block_size=block)
            fisher._cholesky()
            return fisher.diag_inverse() if diagonal else None

        def published(G: Tensor = G, block: int | None = block) -> Any:
            if block is None:
                return recursion(G, 1e-2)
            blocks = G.view(len(G), -1, block).transpose(0, 1).contiguous()
            V, q = torch.empty_like(blocks), blocks.new_empty(blocks.shape[:2])
            for i in range(len(G)):  # all blocks at once
                g = blocks[:, i]
                dots = torch.einsum("bkj,bj->bk", V[:, :i], g) / q[:, :i]
                V[:, i] = g / 1e-2 - torch.einsum("bk,bkj->bj", dots, V[:, :i])
                q[:, i] = len(G) + (g * V[:, i]).sum(-1)
            return V

        seconds = best_of(
            {"products": lambda f=ours: f(False), "diagonal": lambda f=ours: f(True), "published": published},
            arguments.repeats, "cpu",
        )  # fmt: skip
        ratios = [seconds["published"] / seconds[name] for name in ("products", "diagonal")]
        note(part="static", m=m, d=d, block=block, ratios=ratios, **seconds)
        table.add(f"{m} x {d}", str(block), f"{1e3 * seconds['products']:.1f}", f"{1e3 * seconds['diagonal']:.1f}",
                  f"{1e3 * seconds['published']:.1f}", f"{ratios[0]:.1f}x, {ratios[1]:.1f}x")  # fmt: skip
    table.print()


# --- accuracy ---


def accuracy_(arguments: argparse.Namespace) -> None:
    """Relative errors of ``F^-1 g`` on correlated gradients, |g| = 10, m = 64, d = 4000."""
    table = Table(
        "Relative errors", ("damping", "storage", "newest gradient", "general vector", "published form, float32")
    )
    G = correlated()
    for damping in (1e-6, 1e-5, 1e-3):
        stored = G.float().double()
        exact, x = EmpiricalFisher(stored, damping=damping), random(4000, seed=9).float()
        published = Dynamic(G.float(), damping).ihvp(G[-1].float())
        for dtype in STORAGE:
            fisher = EmpiricalFisher(G.float(), damping=damping, storage_dtype=dtype)
            errors = []
            for value, reference in (
                (fisher.ihvp_last(), exact.ihvp_last()),
                (fisher.ihvp(x), exact.ihvp(x)),
                (published, exact.ihvp_last()),
            ):
                errors.append(float((value.double() - reference).norm() / reference.norm()))
            note(part="accuracy", damping=damping, storage=name_of(dtype), errors=errors)
            table.add(f"{damping:g}", name_of(dtype), *(f"{error:.1e}" for error in errors))
    table.print()
    F = dense(random(30, 12), 0.01, 30)
    w = random(12, seed=1)
    moved = w.clone()
    gone = ~prune_obs([moved], random(30, 12), 1 / 12, damping=0.01, block_size=None, n_recompute=1)["mask"][0]
    rho = w.square() / (2 * torch.linalg.inv(F).diagonal())
    step = moved - w
    print(f"one removal: loss rises by rho to {abs(float(step @ F @ step) / 2 / float(rho[gone]) - 1):.1e}")


# --- pruning and training, handwritten digits ---


def pruning(arguments: argparse.Namespace) -> None:
    """No fine-tuning after it; 8 recomputes, m = 128 gradients of 16 samples, blocks of 128."""
    table = Table("Test accuracy", ("sparsity", "dense", "magnitude", "M-FAC"))
    seeds, shares = range(arguments.seeds), (0.5, 0.7, 0.8, 0.9)
    found: dict[tuple[str, float], list[float]] = {}
    for seed in seeds:
        trained = classifier(seed)
        train(trained, torch.optim.Adam(trained.parameters(), 1e-3), 30, seed=seed)
        for share in shares:
            found.setdefault(("dense", share), []).append(accuracy(trained))
            for name in ("magnitude", "M-FAC"):
                net = copy.deepcopy(trained)
                weights = [layer.weight for layer in net if isinstance(layer, nn.Linear)]
                if name == "M-FAC":
                    prune_obs(net, None, share, n_recompute=8,
                              grad_fn=lambda k, n=net, w=weights: gradients(n, w, seed=k))  # fmt: skip
                else:
                    sizes = torch.cat([w.detach().reshape(-1) for w in weights]).abs()
                    threshold = sizes.kthvalue(round(share * len(sizes))).values
                    for w in weights:
                        w.data[w.data.abs() <= threshold] = 0
                found.setdefault((name, share), []).append(accuracy(net))
    for share in shares:
        means = {name: sum(found[name, share]) / len(seeds) for name in ("dense", "magnitude", "M-FAC")}
        note(part="pruning", sparsity=share, **means)
        table.add(f"{share:.0%}", *(f"{means[name]:.3f}" for name in ("dense", "magnitude", "M-FAC")))
    table.print()


def training(arguments: argparse.Namespace) -> None:
    """8 epochs of batches of 64."""
    table = Table("Training", ("optimiser", "train loss", "test accuracy", "ms a step"))
    optimizers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {}
    for damping in (1e-6, 1e-5, 1e-4, 1e-3):
        optimizers[f"M-FAC, lr 3e-3, damping {damping:g}"] = lambda p, v=damping: MFAC(p, 3e-3, 0.9, m=64, damping=v)
    optimizers["M-FAC, bfloat16, damping 1e-4"] = lambda p: MFAC(
        p, 3e-3, 0.9, m=64, damping=1e-4, storage_dtype=torch.bfloat16
    )
    for lr in (1e-3, 3e-3, 1e-2, 3e-2):
        optimizers[f"Adam, lr {lr:g}"] = lambda p, v=lr: torch.optim.Adam(p, v)
    for lr in (0.03, 0.1, 0.3):
        optimizers[f"SGD, momentum 0.9, lr {lr:g}"] = lambda p, v=lr: torch.optim.SGD(p, v, 0.9)
    for name, make in optimizers.items():
        losses, scores, seconds = [], [], 0.0
        for seed in range(arguments.seeds):
            net = classifier(seed)
            optimizer = make(net.parameters())
            started = time.perf_counter()
            losses.append(train(net, optimizer, 8, seed=seed))
            seconds += time.perf_counter() - started
            scores.append(accuracy(net))
        n = arguments.seeds
        note(part="training", optimizer=name, loss=sum(losses) / n, accuracy=sum(scores) / n)
        table.add(name, f"{sum(losses) / n:.3f}", f"{sum(scores) / n:.3f}", f"{1e3 * seconds / n / 8 / 22:.2f}")
    table.print()


PARTS = {"passes": passes, "steps": steps, "static": static, "accuracy": accuracy_, "pruning": pruning,
         "training": training}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of passes and steps")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for part in arguments.parts or PARTS:
        print(f"\n{part}: {inspect.getdoc(PARTS[part])}")
        PARTS[part](arguments)


if __name__ == "__main__":
    main()
