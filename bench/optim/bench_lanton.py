"""LANTON beside the same steps at fixed rates, Muon, AdamW and SGD; its speed and that of polar factors.

    python bench/optim/bench_lanton.py train [--rates 0.01 0.02 0.04 0.08 0.16 0.32] [--seeds 0 1] [--steps 200]
                                             [--methods fixed LANTON Muon AdamW SGD] [--embedding-std 0.02]
    python bench/optim/bench_lanton.py msign [--threads 1] [--repeats 5]
    python bench/optim/bench_lanton.py step  [--threads 1] [--repeats 20]

`train`: eval loss of a byte-level transformer on Python's own sources (byte_model.py), means over the seeds; every
method over the same rates, cosine to zero. `fixed` is LANTON with noise_adaptive=False; Muon is torch.optim.Muon
on the hidden matrices with AdamW at a tenth of its rate on the rest.
`msign`: polar factors of stacks of matrices, beside the loop of products that torch.optim.Muon makes, in float32.
`step`: a step of each optimiser on the parameters of a 12-layer transformer of width 64, least of the repetitions.
Ratios within one run count; the optimisers take turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import byte_model
import torch
from kantor.bench.tables import Table
from kantor.linalg import msign
from kantor.optim import LANTON, lmo_param_groups
from torch import Tensor, nn

SCALES = {"spectral": 1.0, "sign": 10.0, "rms": 0.3}
Optimizers = list[torch.optim.Optimizer]


def lanton(model: nn.Module, lr: float, adaptive: bool) -> Optimizers:
    """As the acceptance run has it: alpha towards 0, five Muon steps."""
    groups = [group | {"scale": SCALES[group["kind"]]} for group in lmo_param_groups(model)]
    return [LANTON(groups, lr, alpha=1e-12, msign_method="muon5", noise_adaptive=adaptive)]


def muon(model: nn.Module, lr: float) -> Optimizers:
    hidden = [p for g in lmo_param_groups(model) if g["kind"] == "spectral" for _, p in g["params"]]
    others = [p for g in lmo_param_groups(model) if g["kind"] != "spectral" for _, p in g["params"]]
    return [
        torch.optim.Muon(hidden, lr, weight_decay=0.0, nesterov=False),
        torch.optim.AdamW(others, 0.1 * lr, weight_decay=0.0),
    ]


METHODS: dict[str, Callable[[nn.Module, float], Optimizers]] = {
    "fixed": lambda model, lr: lanton(model, lr, False),
    "LANTON": lambda model, lr: lanton(model, lr, True),
    "Muon": muon,
    "AdamW": lambda model, lr: [torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)],
    "SGD": lambda model, lr: [torch.optim.SGD(model.parameters(), lr, momentum=0.95)],
}


def run_train(args: argparse.Namespace) -> None:
    """Print a row for each rate."""
    torch.set_num_threads(1)
    table = Table(
        f"Eval loss, nats a byte, {args.steps} steps, seeds {args.seeds}, embeddings {args.embedding_std:g}",
        ("lr", *args.methods),
    )
    for lr in args.rates:
        row = [f"{lr:g}"]
        for name in args.methods:
            losses = [
                byte_model.train(
                    lambda model: METHODS[name](model, lr),  # noqa: B023
                    steps=args.steps,
                    seed=seed,
                    embedding_std=args.embedding_std,
                )
                for seed in args.seeds
            ]
            row.append(f"{sum(losses) / len(losses):.3f}")
        table.add(*row)
        print(*row, file=sys.stderr, flush=True)
    table.print()


# --- speed ---


def least(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Least seconds of each; they take turns, after one call to warm up."""
    best = dict.fromkeys(functions, float("inf"))
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat > 0:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def products(stack: Tensor, steps: int) -> list[Tensor]:
    """The iteration of torch.optim.Muon, matrix by matrix, in the dtype of the stack."""
    results = []
    for B in stack:
        X = B / B.norm().clamp(min=1e-7)
        for _ in range(steps):
            A = X @ X.T
            X = torch.addmm(X, torch.addmm(A, A, A, beta=-4.775, alpha=2.0315), X, beta=3.4445)
        results.append(X)
    return results


def run_msign(args: argparse.Namespace) -> None:
    """Print a row for each shape."""
    torch.set_num_threads(args.threads)
    table = Table(
        f"Polar factors in float32, {args.threads} thread(s), ms",
        ("count", "rows", "columns", "msign polar 6", "Muon's loop 5", "per step", "msign one by one"),
    )
    for count, rows, columns in ((24, 256, 1024), (64, 64, 64), (64, 32, 32), (64, 16, 16), (64, 64, 128)):
        stack = torch.randn(count, rows, columns)
        repeats = args.repeats if rows > 64 else 10 * args.repeats
        best = least(
            {
                "ours": lambda: msign(stack),  # noqa: B023
                "loop": lambda: products(stack, 5),  # noqa: B023
                "single": lambda: [msign(B) for B in stack],  # noqa: B023
            },
            repeats,
        )
        ratio = best["ours"] / 6 / (best["loop"] / 5)
        table.add(
            count,
            rows,
            columns,
            f"{1e3 * best['ours']:.2f}",
            f"{1e3 * best['loop']:.2f}",
            f"{ratio:.2f}",
            f"{1e3 * best['single']:.2f}",
        )
    table.notes.append("per step: time of a step of ours over one of the loop's, which makes 5 where ours makes 6")
    table.print()


def run_step(args: argparse.Namespace) -> None:
    """Print a row for each optimiser."""
    torch.set_num_threads(args.threads)
    width, layers = 64, 12

    def model() -> nn.Module:
        torch.manual_seed(0)
        parts: list[nn.Module] = []
        for _ in range(layers):
            parts += [nn.RMSNorm(width), *(nn.Linear(width, width, bias=False) for _ in range(4))]
            parts += [nn.RMSNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)]
        made = nn.ModuleList(parts)
        for p in made.parameters():
            p.grad = torch.randn_like(p)
        return made

    optimizers: dict[str, Optimizers] = {
        "LANTON": [LANTON(model().named_parameters(), 1e-3)],
        "LANTON frobenius": [LANTON(model().named_parameters(), 1e-3, noise_estimator="frobenius")],
        "LANTON fixed": [LANTON(model().named_parameters(), 1e-3, noise_adaptive=False)],
        "LANTON fixed, muon5": [LANTON(model().named_parameters(), 1e-3, noise_adaptive=False, msign_method="muon5")],
        "Muon + AdamW": muon(model(), 1e-3),
        "AdamW": [torch.optim.AdamW(model().parameters(), 1e-3)],
    }

    def four_steps(several: Optimizers) -> None:
        for _ in range(4):  # one of which measures the noise
            for optimizer in several:
                optimizer.step()

    best = least(
        {name: lambda several=several: four_steps(several) for name, several in optimizers.items()}, args.repeats
    )
    table = Table(f"A step, {args.threads} thread(s), mean of 4", ("optimiser", "ms", "x AdamW"))
    for name, seconds in best.items():
        table.add(name, f"{1e3 * seconds / 4:.2f}", f"{seconds / best['AdamW']:.2f}")
    table.print()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.02, 0.04, 0.08, 0.16, 0.32])
    training.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    training.add_argument("--steps", type=int, default=200)
    training.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    training.add_argument("--embedding-std", type=float, default=0.02)
    training.set_defaults(run=run_train)
    for name, run, repeats in (("msign", run_msign, 5), ("step", run_step, 20)):
        speed = commands.add_parser(name)
        speed.add_argument("--threads", type=int, default=1)
        speed.add_argument("--repeats", type=int, default=repeats)
        speed.set_defaults(run=run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
