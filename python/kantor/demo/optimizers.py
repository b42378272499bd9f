"""Station: small networks trained by optimisers with and without knowledge of curvature and noise."""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from torch.optim.lr_scheduler import LambdaLR

from kantor.demo.figures import Ink, draw_picture
from kantor.demo.page import Check, Finding, Gallery, Picture, Section, StationReport, Table
from kantor.optim import LANTON, MFAC, AdaHessian, lmo_param_groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLE = "Training that knows the curvature"
WARM_UP = 20  # steps until the full rate: curvature that is renewed rarely needs it, and nobody minds

_LEAD = (
    "How far to step in each weight of a network? SGD steps by the gradient alone, Adam by the size of past gradients. "
    "AdaHessian measures how the slope bends: one product of the Hessian with a vector of random signs a step, and "
    "each weight steps by its slope over its curvature. M-FAC knows the curvature between weights from the last "
    "gradients. LANTON steps by whole matrices, and less far where a layer's gradient is noisy."
)
_CREDITS = (
    "Handwritten digits: E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, CC BY 4.0 (scikit-learn). Text: the "
    "source code of Python's standard library.",
    "Methods: Z. Yao, A. Gholami, S. Shen, M. Mustafa, K. Keutzer, M. Mahoney, <cite>ADAHESSIAN: an adaptive second "
    "order optimizer for machine learning</cite>, AAAI 2021; E. Frantar, E. Kurtic, D. Alistarh, <cite>M-FAC: "
    "efficient matrix-free approximations of second-order information</cite>, NeurIPS 2021; J. Hao, X. Gong, J. Xu, "
    "Z. Wang, M. Liu, <cite>Noise-adaptive layerwise learning rates</cite>, arXiv 2510.14009.",
)


# --- the optimisers: a new one is one line ---


@dataclass(frozen=True)
class Method:
    """An optimiser, or two for different parameters, and its learning rate."""

    rate: float
    make: Callable[[nn.Module, float], list[torch.optim.Optimizer]]
    by_closure: bool = False  # whether it differentiates the loss itself


def _muon(net: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices, Adam for the rest: torch's takes no kernels."""
    matrices, others = ([p for p in net.parameters() if (p.ndim == 2) == wanted] for wanted in (True, False))
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.Adam(others, lr)]


def _adahessian(net: nn.Module, lr: float, period: int) -> list[torch.optim.Optimizer]:
    return [AdaHessian(net.parameters(), lr, update_period=period, seed=0)]


# Each rate has the least product of both losses at the end, of 0.001, 0.003, 0.01, ..., 1, but for Muon's: at 0.03 its
# loss on digits is 6e-7 instead of 1e-4, and it does worse on unseen digits and in loss on text.
METHODS = {
    "SGD": Method(0.3, lambda net, lr: [torch.optim.SGD(net.parameters(), lr, momentum=0.9)]),
    "Adam": Method(0.03, lambda net, lr: [torch.optim.Adam(net.parameters(), lr)]),
    "Muon": Method(0.01, _muon),
    "AdaHessian": Method(0.3, lambda net, lr: _adahessian(net, lr, 1), by_closure=True),
    "AdaHessian, every 5": Method(0.3, lambda net, lr: _adahessian(net, lr, 5), by_closure=True),
    "M-FAC": Method(0.003, lambda net, lr: [MFAC(net.parameters(), lr, momentum=0.9, m=64, damping=1e-4)]),
    "LANTON": Method(0.1, lambda net, lr: [LANTON(lmo_param_groups(net), lr)]),
}
_TORCHS = ("SGD", "Adam", "Muon")


# --- what is learned ---


@dataclass(frozen=True)
class Task:
    """Batches, a model, and how well it does on what it has not seen (a share in [0, 1])."""

    model: Callable[[], nn.Module]
    batches: list[tuple[Tensor, Tensor]]
    test: tuple[Tensor, Tensor]


def digits_task(epochs: int) -> Task:
    """Ten digits of 8 x 8 pixels, read by a network of convolutions."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the demo needs scikit-learn: pip install "kantor[demo]"') from error
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(data.target)
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(1400, generator=generator) for _ in range(epochs)]

    def model() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.Tanh(),
            nn.Flatten(), nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 10),
        )  # fmt: skip

    return Task(model, [(x[rows], y[rows]) for order in orders for rows in order.split(128)], (x[1400:], y[1400:]))


class NextByte(nn.Module):
    """Logits of the next character (batch, 128, length) from the last fifteen, by causal convolutions."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, width)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 3, dilation=2**k) for k in range(3))
        self.head = nn.Linear(width, 128)

    def forward(self, text: Tensor) -> Tensor:
        """Text (batch, length) of ASCII codes."""
        h = self.embedding(text).mT
        for k, layer in enumerate(self.layers):
            h = h + torch.tanh(layer(pad(h, (2 * 2**k, 0))))
        logits: Tensor = self.head(h.mT)
        return logits.mT


def text_task(steps: int) -> Task:
    """The next character of Python's own library."""
    source = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="utf-8")
    text = torch.tensor(list(source.encode("ascii", "ignore")))
    split, window = 9 * len(text) // 10, torch.arange(49)
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int, count: int) -> tuple[Tensor, Tensor]:
        rows = text[torch.randint(low, high - 49, (count, 1), generator=generator) + window]
        return rows[:, :-1], rows[:, 1:]

    return Task(NextByte, [draw(0, split, 16) for _ in range(steps)], draw(split, len(text), 64))


@dataclass(frozen=True)
class Training:
    """Losses of all batches, the share right on unseen data, seconds a step."""

    losses: list[float]
    accuracy: float
    seconds: float

    @property
    def end(self) -> float:
        """Mean loss over the last tenth."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)


def train(task: Task, method: Method) -> Training:
    """Train from the same parameters, on the same batches."""
    torch.manual_seed(0)
    net = task.model()
    optimizers = method.make(net, method.rate)
    schedules = [LambdaLR(optimizer, lambda k: min(1.0, (k + 1) / WARM_UP)) for optimizer in optimizers]
    losses, began = [], time.perf_counter()
    for x, y in task.batches:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            return cross_entropy(net(x), y)

        if method.by_closure:
            loss: Any = optimizers[0].step(closure)  # type: ignore[arg-type]
        else:
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = closure()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        for schedule in schedules:
            schedule.step()
        losses.append(float(loss.detach()))
    seconds = (time.perf_counter() - began) / len(task.batches)
    with torch.no_grad():
        x, y = task.test
        accuracy = float((net(x).argmax(1) == y).double().mean())
    return Training(losses, accuracy, seconds)


# --- the station ---


def run(folder: Path, size: Literal["small", "full"] = "full") -> StationReport:
    """Run the station: pictures into ``folder / "optimizers"``, and the report for the page and the terminal.

    Parameters
    ----------
    folder : Path
        The demo's folder.
    size : {"small", "full"}
        15 epochs of digits and 300 steps on text; or 3 and 30.

    Raises
    ------
    ImportError
        scikit-learn or matplotlib is missing.
    """
    started = time.perf_counter()
    epochs, steps = (15, 300) if size == "full" else (3, 30)
    tasks = {"digits": digits_task(epochs), "text": text_task(steps)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks as small as these gain nothing from more
    try:
        found = {(task, name): train(tasks[task], method) for task in tasks for name, method in METHODS.items()}
    finally:
        torch.set_num_threads(threads)
    own = folder / "optimizers"
    own.mkdir(parents=True, exist_ok=True)
    pictures = tuple(_chart(own, task, {name: found[task, name] for name in METHODS}) for task in tasks)
    table = _table(found)
    return StationReport(
        name="optimizers",
        title=TITLE,
        lead=_LEAD,
        sections=(
            Section("The step", _STEP_TEXT),
            Section("Digits and source code", (_TASK_TEXT, Gallery(pictures), table)),
        ),
        table=table,
        checks=_checks(found),
        seconds=time.perf_counter() - started,
        credits=_CREDITS,
        finding=_finding(found),
    )


_STEP_TEXT = (
    "For random signs <i>z</i> the mean of <i>z</i> &middot; <i>Hz</i> is the diagonal of the Hessian, and <i>Hz</i> "
    "costs two more backward passes, whatever the number of weights:",
    '<span class="equation"><i>D</i> = mean<sub>block</sub> |<i>z</i> &middot; <i>Hz</i>|, &emsp; <i>&theta;</i> '
    "&larr; <i>&theta;</i> &minus; <i>&eta; m</i> / &radic;<i>v</i></span>",
    "<i>m</i> averages gradients, <i>v</i> the squares of <i>D</i>. The weights of a convolution's window share one "
    "curvature. Renewed at every fifth step only, it costs little more than Adam.",
)
_TASK_TEXT = (
    "A network of two convolutions reads digits; one of three guesses the next character of a Python module. The same "
    "first weights and batches for all, and one learning rate each, tuned on one grid for all, reached in "
    f"{WARM_UP} steps: {', '.join(f'{method.rate:g} ({name})' for name, method in METHODS.items())}."
)


def same_in_other_units() -> tuple[float, float]:
    """How far AdaHessian and Adam part when unknowns are measured in other units, relative."""
    scale = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)
    gaps = []
    for make in (
        lambda p: AdaHessian([p], 0.1, eps=0.0, seed=0),
        lambda p: torch.optim.Adam([p], 0.1, eps=0.0),
    ):
        ends = []
        for units in (torch.ones_like(scale), scale):
            p = nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) / units)
            optimizer: Any = make(p)

            def loss(p: Tensor = p, units: Tensor = units) -> Tensor:
                return (units * p).pow(4).sum() + (units * p).pow(2).sum()

            for _ in range(20):
                if isinstance(optimizer, AdaHessian):
                    optimizer.step(loss)
                else:
                    optimizer.zero_grad()
                    loss().backward()
                    optimizer.step()
            ends.append(units * p.detach())
        gaps.append(float((ends[0] - ends[1]).norm() / ends[0].norm()))
    return gaps[0], gaps[1]


def _checks(found: dict[tuple[str, str], Training]) -> tuple[Check, ...]:
    hessian, adam = same_in_other_units()
    digits, every = found["digits", "AdaHessian"], found["digits", "AdaHessian, every 5"]
    return (
        Check(
            "Steps do not depend on units",
            hessian < 1e-10 < adam,
            f"unknowns in units from 0.001 to 1000: AdaHessian ends {hessian:.0e} apart, Adam {adam:.1f}",
        ),
        Check(
            "Digits are learned",
            digits.end < 0.5 * digits.losses[0] and digits.accuracy > 0.8,
            f"loss {digits.losses[0]:.2f} to {digits.end:.3f}; {100 * digits.accuracy:.1f} % of unseen digits",
        ),
        Check(
            "Curvature from every fifth step will do",
            every.accuracy > digits.accuracy - 0.05,
            f"{100 * every.accuracy:.1f} % of unseen digits",
        ),
        Check(
            "Source code is learned",
            found["text", "AdaHessian"].end < 0.9 * found["text", "AdaHessian"].losses[0],
            f"loss {found['text', 'AdaHessian'].losses[0]:.2f} to {found['text', 'AdaHessian'].end:.2f}",
        ),
    )


def _finding(found: dict[tuple[str, str], Training]) -> Finding:
    def best(task: str) -> str:
        own, others = (
            min((name for name in METHODS if (name in _TORCHS) == theirs), key=lambda name: found[task, name].end)
            for theirs in (False, True)
        )
        return f"{task} {found[task, own].end:.3f} ({own}) and {found[task, others].end:.3f} ({others})"

    return Finding(
        "Two small networks, one for digits and one for text, each optimiser at a rate that suits it.",
        "torch's SGD, Adam and Muon, on the same batches from the same parameters.",
        f"Least loss at the end, Kantor's and torch's: {best('digits')}; {best('text')}.",
    )


def _table(found: dict[tuple[str, str], Training]) -> Table:
    digits, text = ({name: found[task, name] for name in METHODS} for task in ("digits", "text"))
    return Table(
        caption="Loss at the end, and percent right on unseen data",
        header=("Optimiser", "Digits: loss", "right", "ms a step", "Text: loss", "right", "ms a step"),
        rows=tuple(
            (
                name,
                *(
                    cell
                    for run in (digits[name], text[name])
                    for cell in (f"{run.end:.3f}", f"{100 * run.accuracy:.1f}", f"{1e3 * run.seconds:.1f}")
                ),
            )
            for name in METHODS
        ),
        numeric=frozenset(range(1, 7)),
        note=f"{len(digits['Adam'].losses)} steps on digits, {len(text['Adam'].losses)} on text; mean loss over the "
        "last tenth. One CPU thread.",
    )


def _chart(folder: Path, task: str, runs: dict[str, Training]) -> Picture:
    """Smoothed losses over steps."""

    def draw(ax: Axes, ink: Ink) -> None:
        for (name, training), colour in zip(runs.items(), ink.colours, strict=False):
            smooth, curve = training.losses[0], []
            for loss in training.losses:
                smooth = 0.8 * smooth + 0.2 * loss
                curve.append(smooth)
            ax.plot(curve, color=colour, linewidth=1.6, label=name)
        ax.set_yscale("log")
        ax.set_xlabel("step")
        ax.set_ylabel("training loss")
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)

    ends = ", ".join(f"{name} {training.end:.2f}" for name, training in runs.items())
    what = {"digits": "Handwritten digits", "text": "The next character of argparse.py"}[task]
    return draw_picture(
        folder, task, 4.6, 3.4, f"Curves of the training loss over steps. At the end: {ends}.",
        f"{what}: training loss.", draw,
    )  # fmt: skip
