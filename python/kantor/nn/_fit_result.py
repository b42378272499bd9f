"""What a training on the nodes of a graph returns."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from kantor._errors import ConvergenceError
from kantor._result import Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class FitStatus(Status):
    """How a training ended: ``str(status)`` is the plain word, ``status.advice`` what it means and what to try."""

    CONVERGED = (
        "converged",
        "The validation set saw no improvement for `patience` epochs; the best state is in place.",
    )
    COMPLETED = ("completed", "All epochs were made; without a validation set the last state is in place.")
    MAX_EPOCHS = (
        "max_epochs",
        "The limit of epochs was reached while the validation set still improved; the best state is in place. Raise "
        "max_epochs, or go on with resume=result.state.",
    )
    STOPPED = ("stopped", "Stopped by the callback; the best state is in place.")
    INTERRUPTED = (
        "interrupted",
        "Interrupted by Ctrl-C; the best state is in place. To go on pass resume=result.state.",
    )
    BREAKDOWN = (
        "breakdown",
        "The loss became NaN or infinite; the best state before it is in place. Lower lr, or look for values that are "
        "far too large in the features.",
    )


@dataclass(frozen=True)
class FitInfo:
    """What a callback gets after every epoch.

    Attributes
    ----------
    epoch : int
        Epochs made so far.
    loss : float
        Training loss of this epoch.
    val_loss, val_accuracy : float
        On the validation nodes; NaN without any.
    """

    epoch: int
    loss: float
    val_loss: float
    val_accuracy: float


@dataclass(frozen=True, repr=False)
class FitResult:
    """How a training on the nodes of a graph went. The network itself was trained in place. Prints as a small table.

    Attributes
    ----------
    model : torch.nn.Module
        The network, in evaluation mode and in the state that was kept.
    status : FitStatus
        How it ended.
    epochs, best_epoch : int
        Epochs made, and the one whose state was kept.
    probabilities : Tensor (n, C)
        Of the classes of all nodes, in that state.
    predicted : Tensor (n,)
        The most probable classes, int64.
    labels : Tensor (n,)
        What was given.
    val_accuracy : float
        On the validation nodes, in the state that was kept; NaN without any.
    history : dict of ndarray
        ``loss``, ``val_loss`` and ``val_accuracy`` of each epoch, float64.
    seconds : float
        Wall-clock time, that before a resumption included.
    state : dict
        To go on with: ``fit_nodes(..., resume=result.state)``.
    """

    model: nn.Module
    status: FitStatus
    epochs: int
    best_epoch: int
    probabilities: Tensor
    predicted: Tensor
    labels: Tensor
    val_accuracy: float
    history: dict[str, np.ndarray[Any, np.dtype[np.float64]]]
    seconds: float
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def converged(self) -> bool:
        """Whether the training ended by itself: no more improvement, or all epochs where there is no validation set."""
        return self.status in (FitStatus.CONVERGED, FitStatus.COMPLETED)

    @property
    def message(self) -> str:
        """What happened and what to try."""
        return f"{self.status.value}: {self.status.advice}"

    def accuracy(self, nodes: Tensor) -> float:
        """Return the share of these nodes, indices or a mask, whose predicted class is their label."""
        return float((self.predicted[nodes] == self.labels[nodes]).double().mean())

    def check(self) -> FitResult:
        """Return self if converged, else raise :class:`kantor.ConvergenceError` carrying this result."""
        if not self.converged:
            raise ConvergenceError(f"fit_nodes: {self.message}", self)
        return self

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the losses against the epoch, and the validation accuracy, dotted (needs matplotlib, extra ``demo``)."""
        from kantor.plotting import axes_or_new

        ax = axes_or_new(ax)
        epochs = np.arange(1, self.epochs + 1)
        names = {"loss": "training loss", "val_loss": "validation loss", "val_accuracy": "validation accuracy"}
        for name, label in names.items():
            if np.isfinite(self.history[name]).any():
                ax.plot(epochs, self.history[name], ":" if name == "val_accuracy" else "-", linewidth=1.6, label=label)
        if math.isfinite(self.val_accuracy):
            ax.axvline(self.best_epoch + 1, color="0.6", linewidth=0.8, label="kept")
        ax.set_xlabel("epoch")
        ax.set_ylim(bottom=0)
        ax.grid(visible=True, color="0.5", alpha=0.25, linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False)
        return ax

    def __repr__(self) -> str:
        rows = [
            ("status", self.status.value),
            ("epochs", f"{self.epochs:,}" + (f", the best {self.best_epoch:,}" if self.epochs else "")),
            ("loss", f"{self.history['loss'][-1]:.4g}" if self.epochs else "none"),
            ("validation", f"{100 * self.val_accuracy:.1f} % right" if math.isfinite(self.val_accuracy) else "none"),
            ("seconds", f"{self.seconds:.3g}"),
        ]
        lines = [f"training of {type(self.model).__name__} on {len(self.labels):,} nodes"]
        lines += [f"  {name:<10}  {value}" for name, value in rows]
        if not self.converged:
            lines.append(f"  {self.status.advice}")
        return "\n".join(lines)


__all__ = ["FitInfo", "FitResult", "FitStatus"]
