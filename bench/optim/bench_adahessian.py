"""AdaHessian: its passes beside torch's foreach operations, its step beside its peers, delayed curvature.

    python bench/optim/bench_adahessian.py [--parts passes steps delay] [--elements 4000000] [--tensors 60]
                                           [--threads 1 2] [--repeats 20] [-o adahessian.jsonl]

passes  a step without the Hessian-vector product, with and without new curvature: this library's native passes against
        the same algebra in `torch._foreach_*` operations. Bytes are the least that a step has to move.
steps   one training step of a convolutional network on random pictures of 8 x 8, Hessian-vector product included:
        Adam, SGD, AdaHessian, and the AdaHessian of torch-optimizer and of pytorch_optimizer where they are installed.
delay   the same step with the curvature renewed at every step, and at every fifth.

Alternatives take turns; the least of the repetitions counts.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from kantor.bench.tables import Table
from kantor.optim import AdaHessian
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

BETAS, LR, EPS = (0.9, 0.999), 0.15, 1e-4


def least(candidates: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Seconds of each, the least of interleaved repetitions."""
    best = dict.fromkeys(candidates, math.inf)
    for repetition in range(repeats + 2):
        for name, call in candidates.items():
            started = time.perf_counter()
            call()
            if repetition >= 2:
                best[name] = min(best[name], time.perf_counter() - started)
    return best


# --- passes ---


def foreach_step(
    params: list[Tensor], gradients: list[Tensor], m: list[Tensor], v: list[Tensor], products: list[Tensor] | None
) -> None:
    """The step in torch's operations on lists, in place where they allow."""
    beta1, beta2 = BETAS
    if products is not None:
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, products, products, 1 - beta2)
    torch._foreach_lerp_(m, gradients, 1 - beta1)
    denominators = torch._foreach_sqrt(v)
    torch._foreach_mul_(denominators, 1 / math.sqrt(1 - beta2**7))
    torch._foreach_add_(denominators, EPS)
    torch._foreach_addcdiv_(params, m, denominators, -LR / (1 - beta1**7))


def passes(options: argparse.Namespace, log: list[dict[str, Any]]) -> None:
    """Native passes against foreach."""
    size = options.elements // options.tensors
    generator = torch.Generator().manual_seed(0)

    def tensors() -> list[Tensor]:
        return [torch.rand(size, generator=generator) + 0.1 for _ in range(options.tensors)]

    params = [nn.Parameter(p) for p in tensors()]
    gradients, products = tensors(), tensors()
    optimizer = AdaHessian(params, LR, BETAS, EPS)
    plain, m, v = tensors(), tensors(), tensors()

    def native(renew: bool) -> None:
        with torch.no_grad():
            if renew:
                optimizer._renew_curvature(list(products), 1.0)
            optimizer._move(list(gradients), 1.0)

    native(True)
    candidates = {
        "step, native": lambda: native(False),
        "step, foreach": lambda: foreach_step(plain, gradients, m, v, None),
        "with curvature, native": lambda: native(True),
        "with curvature, foreach": lambda: foreach_step(plain, gradients, m, v, products),
    }
    words = {"step": 6, "with curvature": 9}
    for threads in options.threads:
        torch.set_num_threads(threads)
        found = least(candidates, options.repeats)
        table = Table(
            f"{options.elements:,} float32 in {options.tensors} tensors, {threads} thread(s), least of "
            f"{options.repeats}",
            ("", "ms", "GB/s of the least traffic", "of foreach"),
        )
        for name, seconds in found.items():
            what = name.split(",")[0]
            rate = 4e-9 * words[what] * options.elements / seconds
            ratio = seconds / found[f"{what}, foreach"]
            table.add(name, f"{1e3 * seconds:.2f}", f"{rate:.1f}", f"{ratio:.2f}")
            log.append({"part": "passes", "what": name, "threads": threads, "seconds": seconds, "of_foreach": ratio})
        table.print()
        print()


# --- steps ---


def network() -> nn.Sequential:
    """The convolutional network of the acceptance figures."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.Tanh(),
        nn.Flatten(), nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 10),
    )  # fmt: skip


def training_step(make: Callable[[Any], Any], graph: bool) -> Callable[[], None]:
    """One step of a loop with backward()."""
    net = network()
    optimizer = make(net.parameters())
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(128, 1, 8, 8, generator=generator), torch.randint(10, (128,), generator=generator)

    def step() -> None:
        optimizer.zero_grad()
        needed = optimizer.refresh_due if isinstance(optimizer, AdaHessian) else graph
        cross_entropy(net(x), y).backward(create_graph=needed)
        optimizer.step()
        if graph and not isinstance(optimizer, AdaHessian):
            for p in net.parameters():  # their users must break the cycle themselves
                p.grad = None

    return step


def peers() -> dict[str, Callable[[], None]]:
    """The same algorithm of other packages, where they are installed."""
    found = {}
    try:
        import torch_optimizer

        found["torch-optimizer"] = training_step(lambda params: torch_optimizer.Adahessian(params, LR), True)
    except ImportError:
        pass
    try:
        import pytorch_optimizer

        found["pytorch_optimizer"] = training_step(lambda params: pytorch_optimizer.AdaHessian(params, LR), True)
    except ImportError:
        pass
    return found


def compare(part: str, candidates: dict[str, Callable[[], None]], options: argparse.Namespace, log: list[Any]) -> None:
    """A table of training steps."""
    for threads in options.threads:
        torch.set_num_threads(threads)
        averaged = {name: _five(call) for name, call in candidates.items()}
        found = {name: seconds / 5 for name, seconds in least(averaged, options.repeats).items()}
        first = next(iter(found))
        table = Table(
            f"a training step, batch 128, {threads} thread(s), least mean of five steps", ("", "ms", f"of {first}")
        )
        for name, seconds in found.items():
            table.add(name, f"{1e3 * seconds:.2f}", f"{seconds / found[first]:.2f}")
            log.append({"part": part, "what": name, "threads": threads, "seconds": seconds})
        table.print()
        print()


def _five(call: Callable[[], None]) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(5):
            call()

    return calls


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", nargs="+", choices=("passes", "steps", "delay"), default=["passes", "steps", "delay"]
    )
    parser.add_argument("--elements", type=int, default=4_000_000)
    parser.add_argument("--tensors", type=int, default=60)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("-o", "--output", type=Path, help="append one JSON record a line")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    log: list[dict[str, Any]] = []
    if "passes" in options.parts:
        passes(options, log)
    if "steps" in options.parts:
        first = {
            "SGD": training_step(lambda params: torch.optim.SGD(params, 0.1, momentum=0.9), False),
            "Adam": training_step(torch.optim.Adam, False),
            "AdaHessian": training_step(lambda params: AdaHessian(params, LR), True),
        }
        compare("steps", first | peers(), options, log)
    if "delay" in options.parts:
        delayed = {
            "update_period=1": training_step(lambda params: AdaHessian(params, LR), True),
            "update_period=5": training_step(lambda params: AdaHessian(params, LR, update_period=5), True),
        }
        compare("delay", delayed, options, log)
    if options.output:
        with options.output.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in log)
    return 0


if __name__ == "__main__":
    sys.exit(main())
