"""What trainings of networks share: their results, checkpoints, and a Ctrl-C that waits for the step to be complete."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from kantor._result import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class TrainingInfo:
    """What a callback gets after every step.

    Attributes
    ----------
    step : int
        Steps made so far.
    loss : float
        Training loss of this step.
    validation : float
        Latest validation loss; NaN before the first.
    lr : float
        Learning rate of this step.
    """

    step: int
    loss: float
    validation: float
    lr: float


@dataclass(frozen=True, repr=False)
class TrainingResult:
    """How a training went. The network itself was trained in place.

    Attributes
    ----------
    net : torch.nn.Module
        The network.
    steps : int
        Steps made, those before a resumption included.
    losses : ndarray
        Training loss of each step ``(steps,)``, float64.
    validation_steps, validation_losses : ndarray
        Steps after which the loss on the samples that are not trained on was formed, and that loss.
    seconds : float
        Wall-clock time, that before a resumption included.
    stopped : bool
        Whether the callback ended it early.
    """

    net: nn.Module
    steps: int
    losses: np.ndarray[Any, np.dtype[np.float64]]
    validation_steps: np.ndarray[Any, np.dtype[np.int64]]
    validation_losses: np.ndarray[Any, np.dtype[np.float64]]
    seconds: float
    stopped: bool

    @property
    def validation_loss(self) -> float:
        """The last one; NaN where there is none."""
        return float(self.validation_losses[-1]) if self.validation_losses.size else math.nan

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot both losses against the step (needs matplotlib, extra ``cli``)."""
        from kantor.plotting import plot_convergence

        steps = np.arange(1, len(self.losses) + 1)
        ax = plot_convergence(History(steps, self.losses), ax=ax, linewidth=0.7, alpha=0.5)
        if self.validation_losses.size:
            plot_convergence(History(self.validation_steps, self.validation_losses), ax=ax, label="validation")
        ax.set_xlabel("step")
        ax.set_ylabel("loss")
        return ax

    def __repr__(self) -> str:
        rows = [
            ("steps", f"{self.steps:,}" + (" (stopped by the callback)" if self.stopped else "")),
            ("loss", f"{self.losses[-100:].mean():.4g} (mean of the last {min(100, len(self.losses))})"),
            ("validation", f"{self.validation_loss:.4g}"),
            ("seconds", f"{self.seconds:.3g}"),
        ]
        return "\n".join([f"training of {self.net!r}", *(f"  {name:<10}  {value}" for name, value in rows)])


@dataclass
class Log:
    """What a training keeps of its steps; see :class:`TrainingResult`."""

    losses: list[float] = field(default_factory=list)
    validation_steps: list[int] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def latest(self) -> float:
        """The last validation loss, NaN before the first."""
        return self.validation_losses[-1] if self.validation_losses else math.nan

    def result(self, net: nn.Module, stopped: bool) -> TrainingResult:
        """The result that a user gets."""
        return TrainingResult(
            net,
            len(self.losses),
            np.array(self.losses),
            np.array(self.validation_steps, dtype=np.int64),
            np.array(self.validation_losses),
            self.seconds,
            stopped,
        )


class Checkpoint:
    """The state of a training in a file, written in one go so that there is always a whole one."""

    def __init__(self, name: str, path: Path, settings: dict[str, Any]) -> None:
        self.name, self.path, self.settings = name, path, settings

    def load(self, net: nn.Module, adam: torch.optim.Adam, generator: torch.Generator) -> Log | None:
        """Set everything to the saved state and return its log; None where there is no file yet."""
        if not self.path.exists():
            return None
        state = torch.load(self.path, weights_only=True, map_location="cpu")
        found = state.get("settings") if isinstance(state, dict) else None
        if found != self.settings:
            changed = [k for k in self.settings if not isinstance(found, dict) or found.get(k) != self.settings[k]]
            raise ValueError(
                f"{self.name}: checkpoint: {self.path} is of another training: {', '.join(changed)} differ; "
                "remove it or name another file"
            )
        net.load_state_dict(state["net"])
        adam.load_state_dict(state["adam"])
        generator.set_state(state["generator"])
        return Log(**state["log"])

    def save(self, net: nn.Module, adam: torch.optim.Adam, generator: torch.Generator, log: Log) -> None:
        """Write the state."""
        state = {
            "settings": self.settings,
            "net": net.state_dict(),
            "adam": adam.state_dict(),
            "generator": generator.get_state(),
            "log": vars(log),
        }
        unfinished = self.path.with_name(self.path.name + ".part")
        torch.save(state, unfinished)
        unfinished.replace(self.path)


@contextmanager
def after_step() -> Iterator[Callable[[], bool]]:
    """Hold the first Ctrl-C back until the step is complete, a second one not; yields whether there was one."""
    if threading.current_thread() is not threading.main_thread():  # no signals here
        yield lambda: False
        return
    asked = False
    before = signal.getsignal(signal.SIGINT) or signal.default_int_handler  # None: set from outside of Python

    def handler(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


__all__ = ["Checkpoint", "Log", "TrainingInfo", "TrainingResult", "after_step"]
