"""Training optimisers: seconds and steps until a network has learnt its digits, each at the rate best for it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from kantor.bench.case import OWN, Peer, Problem, Run
from kantor.optim import LANTON, MFAC, AdaHessian, lmo_param_groups

TITLE = "Training on handwritten digits, float32, until the training loss is <= 0.05; the best of five rates each"
SIZES = {"tiny": (("mlp",), 2), "small": (("mlp",), 12), "full": (("mlp", "conv"), 30)}  # networks, most epochs
GOAL = 0.05
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
TRAINED, BATCH, WARMUP = 1400, 128, 20  # digits, digits a step, steps until the full rate

Closure = Callable[[], Tensor]
Optimizers = list[torch.optim.Optimizer]


def backward_step(optimizers: Optimizers, closure: Closure) -> Tensor:
    """The usual loop: clear, differentiate, step."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss = closure()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()


def closure_step(optimizers: Optimizers, closure: Closure) -> Tensor:
    """For optimisers that differentiate the loss themselves."""
    (optimizer,) = optimizers
    return optimizer.step(closure)  # type: ignore[return-value,arg-type]


def muon(net: nn.Module, lr: float) -> Optimizers:
    """Muon for matrices, Adam for everything else: torch's takes no kernels."""
    matrices, others = ([p for p in net.parameters() if (p.ndim == 2) == wanted] for wanted in (True, False))
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.Adam(others, lr=lr),
    ]


def adahessian(net: nn.Module, lr: float, period: int) -> Optimizers:
    """The diagonal of the Hessian, formed anew every `period` steps."""
    return [AdaHessian(net.parameters(), lr, update_period=period, seed=0)]


@dataclass(frozen=True)
class Method:
    """How to make an optimiser, and how to take a step."""

    make: Callable[[nn.Module, float], Optimizers]
    step: Callable[[Optimizers, Closure], Tensor] = backward_step


OPTIMIZERS = {
    "SGD": Method(lambda net, lr: [torch.optim.SGD(net.parameters(), lr, momentum=0.9)]),
    "Adam": Method(lambda net, lr: [torch.optim.Adam(net.parameters(), lr)]),
    "Muon": Method(muon),
    "AdaHessian": Method(lambda net, lr: adahessian(net, lr, 1), closure_step),
    "AdaHessian, every 5": Method(lambda net, lr: adahessian(net, lr, 5), closure_step),
    "MFAC": Method(lambda net, lr: [MFAC(net.parameters(), lr, momentum=0.9, m=64, damping=1e-4)]),
    "LANTON": Method(lambda net, lr: [LANTON(lmo_param_groups(net), lr)]),
}


def digits_network(convolutional: bool, seed: int) -> nn.Module:
    """64-64-64-10, or two convolutions and two dense layers; tanh."""
    torch.manual_seed(seed)
    if convolutional:
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.Tanh(),
            nn.Flatten(), nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 10),
        )  # fmt: skip
    layers = [nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


# --- the case ---


@dataclass(frozen=True)
class Task:
    """Pictures (n, 1, 8, 8) and classes to train on, the network, and the most epochs."""

    x: Tensor
    y: Tensor
    convolutional: bool
    epochs: int

    def network(self) -> nn.Module:
        """The same parameters for everyone."""
        return digits_network(self.convolutional, seed=0).to(self.x.device)


@dataclass(frozen=True)
class Training:
    """A trained network, its steps, and the seconds that they took."""

    net: nn.Module
    steps: int
    seconds: float


def train(task: Task, method: Method, lr: float) -> Training:
    """Until the goal, which is looked at after every epoch while the clock stands still, or the last epoch."""
    net = task.network()
    optimizers = method.make(net, lr)
    schedules = [LambdaLR(each, lambda k: min(1.0, (k + 1) / WARMUP)) for each in optimizers]
    generator = torch.Generator().manual_seed(0)
    seconds, steps = 0.0, 0
    for _ in range(task.epochs):
        begin = time.perf_counter()
        for rows in torch.randperm(len(task.x), generator=generator).split(BATCH):
            x, y = task.x[rows], task.y[rows]
            method.step(optimizers, lambda x=x, y=y: cross_entropy(net(x), y))  # type: ignore[misc]
            for schedule in schedules:
                schedule.step()
            steps += 1
        if task.x.is_cuda:
            torch.cuda.synchronize()
        seconds += time.perf_counter() - begin
        loss = training_loss(task, net)
        if loss <= GOAL or not math.isfinite(loss):
            break
    return Training(net, steps, seconds)


def training_loss(task: Task, net: nn.Module) -> float:
    """On everything."""
    with torch.no_grad():
        return float(cross_entropy(net(task.x), task.y))


def _peer(name: str, library: str, configuration: str) -> Peer:
    method = OPTIMIZERS[name]

    def prepare(task: Task) -> Run:
        def cost(lr: float) -> tuple[float, float]:
            """What a rate is chosen by: the loss that is left above the goal, then the steps."""
            run = train(task, method, lr)
            loss = training_loss(task, run.net)
            return max(loss, GOAL) if math.isfinite(loss) else math.inf, run.steps

        lr = min(RATES, key=cost)
        return lambda: train(task, method, lr)

    return Peer(name, library, configuration, prepare, devices=("cpu", "cuda"))


PEERS = {
    peer.name: peer
    for peer in (
        _peer("AdaHessian, every 5", OWN, "AdaHessian(update_period=5)"),
        _peer("AdaHessian", OWN, "AdaHessian()"),
        _peer("LANTON", OWN, "LANTON(lmo_param_groups(net))"),
        _peer("MFAC", OWN, "MFAC(momentum=0.9, m=64, damping=1e-4)"),
        _peer("Adam", "torch", "torch.optim.Adam"),
        _peer("SGD", "torch", "torch.optim.SGD(momentum=0.9)"),
        _peer("Muon", "torch", "torch.optim.Muon for matrices, Adam for the others"),
    )
}


def problems(size: str, device: str) -> tuple[Problem, ...]:
    """A dense network, and one with convolutions."""
    networks, epochs = SIZES[size]
    return tuple(
        Problem(f"{name}, at most {epochs} epochs", "training loss", GOAL, ("seconds", "steps"), needs=("sklearn",))
        for name in networks
    )


def make(problem: str, device: str) -> Task:
    """The network that a name stands for, and the digits."""
    from sklearn.datasets import load_digits

    name, epochs = problem.split(", at most ")
    x, y = load_digits(return_X_y=True)
    pictures = torch.tensor(x[:TRAINED] / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    return Task(pictures.to(device), torch.tensor(y[:TRAINED]).to(device), name == "conv", int(epochs.split()[0]))


def judge(task: Task, answer: Training) -> dict[str, Any]:
    """Training loss, formed anew; the seconds are those of the steps alone."""
    return {"accuracy": training_loss(task, answer.net), "steps": answer.steps, "seconds": answer.seconds}
