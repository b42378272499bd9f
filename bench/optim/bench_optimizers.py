"""Training optimisers side by side: digits, and the next byte of Python's own source code.

    python bench/optim/bench_optimizers.py [--tasks mlp conv bytes] [--optimizers Adam AdaHessian ...] [--seeds 0 1]
                                           [--rates 0.001 0.003 0.01 0.03 0.1 0.3 1] [--epochs 15] [--steps 300]
                                           [--warmup 20] [--plot losses.png] [-o optimizers.jsonl]

mlp     64-64-64-10, tanh, on scikit-learn's digits (1400 to train on, 397 to test)
conv    two convolutions and two dense layers, tanh, on the same pictures
bytes   a causal convolutional model of the next byte, on the sources of the standard library

Every optimiser is tried at each of the learning rates, reached linearly over the first steps (--warmup), and stands in
the table with the one of the least training loss, mean of all seeds; a star says that it is at an end of the grid. All
have the same batches and the same first parameters. A new optimiser is one line of OPTIMIZERS, in
kantor.bench.cases.optimizers.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from kantor.bench.cases.optimizers import OPTIMIZERS, digits_network
from kantor.bench.tables import Table
from kantor.demo.optimizers import NextByte
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

# --- tasks ---


@dataclass(frozen=True)
class Task:
    """A model, batches in order, and what is measured at the end: (training loss, test accuracy)."""

    model: Callable[[], nn.Module]
    batches: list[tuple[Tensor, Tensor]]
    measure: Callable[[nn.Module], tuple[float, float]]


def digits(convolutional: bool, seed: int, options: argparse.Namespace) -> Task:
    """Handwritten digits, 8 x 8."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y)

    def model() -> nn.Module:
        return digits_network(convolutional, seed)

    def measure(net: nn.Module) -> tuple[float, float]:
        accuracy = (net(x[1400:]).argmax(1) == y[1400:]).double().mean()
        return float(cross_entropy(net(x[:1400]), y[:1400])), float(accuracy)

    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(1400, generator=generator) for _ in range(options.epochs)]
    return Task(model, [(x[rows], y[rows]) for order in orders for rows in order.split(128)], measure)


def source_code(characters: int = 400_000) -> Tensor:
    """ASCII from the standard library, its modules in alphabetic order."""
    text = ""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += path.read_text(encoding="utf-8", errors="ignore")
        if len(text) >= characters:
            break
    return torch.tensor(list(text[:characters].encode("ascii", "ignore")))


def bytes_task(seed: int, options: argparse.Namespace) -> Task:
    """Windows of 64 characters, 32 a batch; the last tenth of the text tests."""
    text, length = source_code(), 65
    split = 9 * len(text) // 10
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> tuple[Tensor, Tensor]:
        starts = torch.randint(low, high - length, (32, 1), generator=generator)
        window = text[starts + torch.arange(length)]
        return window[:, :-1], window[:, 1:]

    batches = [draw(0, split) for _ in range(options.steps)]
    check = [draw(0, split) for _ in range(8)], [draw(split, len(text)) for _ in range(8)]

    def model() -> nn.Module:
        torch.manual_seed(seed)
        return NextByte(64)

    def measure(net: nn.Module) -> tuple[float, float]:
        losses = [float(cross_entropy(net(x), y)) for x, y in check[0]]
        hits = [float((net(x).argmax(1) == y).double().mean()) for x, y in check[1]]
        return sum(losses) / len(losses), sum(hits) / len(hits)

    return Task(model, batches, measure)


TASKS: dict[str, Callable[[int, argparse.Namespace], Task]] = {
    "mlp": lambda seed, options: digits(False, seed, options),
    "conv": lambda seed, options: digits(True, seed, options),
    "bytes": bytes_task,
}


# --- runs ---


@dataclass(frozen=True)
class Run:
    """One training: losses of all its batches, and what it came to."""

    task: str
    optimizer: str
    lr: float
    seed: int
    losses: list[float]
    loss: float
    accuracy: float
    seconds: float  # a step


def train(name: str, task: Task, optimizer: str, lr: float, seed: int, warmup: int, bar: Any) -> Run:
    """Train once."""
    method, net = OPTIMIZERS[optimizer], task.model()
    optimizers = method.make(net, lr)
    schedules = [LambdaLR(each, lambda k: min(1.0, (k + 1) / warmup)) for each in optimizers]
    losses, started = [], time.perf_counter()
    for x, y in task.batches:
        losses.append(float(method.step(optimizers, lambda x=x, y=y: cross_entropy(net(x), y))))  # type: ignore[misc]
        for schedule in schedules:
            schedule.step()
        bar.update()
    seconds = (time.perf_counter() - started) / len(task.batches)
    with torch.no_grad():
        loss, accuracy = task.measure(net)
    return Run(name, optimizer, lr, seed, losses, loss, accuracy, seconds)


def mean_loss(runs: list[Run]) -> float:
    """What rates are chosen by; infinite where one diverged."""
    losses = [run.loss for run in runs]
    return sum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.inf


def run_task(name: str, options: argparse.Namespace) -> list[Run]:
    """The trainings of each optimiser at the rate that is best for it."""
    from tqdm import tqdm

    tasks = {seed: TASKS[name](seed, options) for seed in options.seeds}
    steps = sum(len(task.batches) for task in tasks.values())
    found: list[Run] = []
    with tqdm(total=len(options.optimizers) * len(options.rates) * steps, desc=name) as bar:
        for optimizer in options.optimizers:
            bar.set_postfix_str(optimizer)
            tried = [
                [train(name, task, optimizer, lr, seed, options.warmup, bar) for seed, task in tasks.items()]
                for lr in options.rates
            ]
            found += min(tried, key=mean_loss)
    return found


def tabulate(name: str, runs: list[Run], options: argparse.Namespace) -> Table:
    """A row for each optimiser: means over the seeds."""
    table = Table(
        f"{name}: {len(runs[0].losses)} steps, mean of {len(options.seeds)} seed(s), {options.threads} thread(s)",
        ("", "rate", "training loss", "test accuracy", "ms/step", "of Adam"),
    )
    seconds = {each: min(run.seconds for run in runs if run.optimizer == each) for each in options.optimizers}
    for each in options.optimizers:
        mine = [run for run in runs if run.optimizer == each]
        loss, accuracy = (sum(getattr(run, what) for run in mine) / len(mine) for what in ("loss", "accuracy"))
        ratio = f"{seconds[each] / seconds['Adam']:.2f}" if "Adam" in seconds else "-"
        rate = f"{mine[0].lr:g}{'*' if mine[0].lr in (min(options.rates), max(options.rates)) else ''}"
        table.add(each, rate, f"{loss:.4f}", f"{accuracy:.3f}", f"{1e3 * seconds[each]:.2f}", ratio)
    return table


def plot(runs: list[Run], path: Path) -> None:
    """Losses of the first seed, smoothed over steps, a panel for each task."""
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(run.task for run in runs))
    figure = Figure(figsize=(5 * len(tasks), 3.6), dpi=150, layout="constrained")
    for axes, name in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        seed = next(run.seed for run in runs if run.task == name)
        for run in (run for run in runs if run.task == name and run.seed == seed):
            smooth, smoothed = run.losses[0], []
            for loss in run.losses:
                smooth = 0.9 * smooth + 0.1 * loss
                smoothed.append(smooth)
            axes.semilogy(smoothed, label=f"{run.optimizer}, {run.lr:g}")
        axes.set(title=name, xlabel="step", ylabel="training loss")
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(path)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS))
    parser.add_argument("--optimizers", nargs="+", choices=tuple(OPTIMIZERS), default=list(OPTIMIZERS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0])
    parser.add_argument("--epochs", type=int, default=15, help="of the digits")
    parser.add_argument("--steps", type=int, default=300, help="on the source code")
    parser.add_argument("--warmup", type=int, default=20, help="steps until the full rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="a picture of the losses")
    parser.add_argument("-o", "--output", type=Path, help="append one JSON record a line")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    runs: list[Run] = []
    for name in options.tasks:
        found = run_task(name, options)
        tabulate(name, found, options).print()
        print()
        runs += found
    if options.plot:
        plot(runs, options.plot)
    if options.output:
        with options.output.open("a") as file:
            file.writelines(json.dumps(asdict(run)) + "\n" for run in runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
