"""Training of direction networks: right-hand sides from Ritz vectors, and steps of Adam that can be interrupted."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kantor._checks import check_finite, check_float, check_tensor
from kantor._errors import NumericalBreakdown
from kantor._progress import steps_bar
from kantor.linalg._training import Checkpoint, Log, TrainingInfo, TrainingResult, after_step
from kantor.linalg.lanczos_samples import ritz_dataset
from kantor.linalg.poisson_grid import PoissonGrid
from kantor.linalg.variable_stencil_net import VariableStencilNet

Loss = Literal["scaled", "residual"]
Samples = tuple[PoissonGrid, Tensor]

_WARM_UP = 0.1  # of the steps, until the learning rate is highest
_VALIDATE = 50  # steps between looks at the validation loss
_SAVE_SECONDS = 30.0  # between checkpoints


def train_direction_net(
    net: nn.Module,
    data: PoissonGrid | Samples | Sequence[PoissonGrid | Samples],
    *,
    loss: Loss = "scaled",
    steps: int = 2000,
    batch: int = 16,
    lr: float = 2e-3,
    white: float = 0.0,
    validation: float = 0.1,
    seed: int = 0,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: Callable[[TrainingInfo], object] | None = None,
) -> TrainingResult:
    """Train a network, in place, to map residuals b to directions q close to multiples of ``A^-1 b``.

    Parameters
    ----------
    net : DirectionNet or VariableStencilNet
        Or any module called as ``net(r, mask)`` with r ``(batch, *grid)``; its parameters tell dtype and device.
    data : PoissonGrid, or (PoissonGrid, Tensor), or a sequence of these
        Operators, and samples ``(count, *grid)`` or ``(count, n)`` of right-hand sides; their norms do not matter. For
        a grid alone they are ``ritz_dataset(A, 600, 3000)``, or fewer for small grids. Each step draws one entry.
    loss : {"scaled", "residual"}
        ``|b - a A q|^2`` with the best scale ``a = q'b / q'Aq``, for networks whose direction alone matters; or
        ``|b - A q|``, which also teaches the length. Means over the batch, with ``|b| = 1``.
    steps, batch : int
        Steps of Adam, and samples in each.
    lr : float
        Highest learning rate: reached after a tenth of the steps, followed by half a cosine down to zero.
    white : float
        Share of each batch that is white noise instead of samples, from 0 to 1.
    validation : float
        Share of the samples that is never trained on, from 0 to below 1.
    seed : int
        Of the split, the batches and default samples. The initial weights are the network's own.
    progress : bool
        Show a bar (tqdm, or log records without it).
    checkpoint : path, optional
        File that the state goes to every half minute, on Ctrl-C and at the end. If it exists the training goes on from
        there, and ends with the same weights, bit for bit, as one that was never interrupted.
    callback : callable, optional
        Called with a :class:`TrainingInfo` after each step; returning True ends the training.

    Returns
    -------
    TrainingResult
        Losses, time, ``.plot()``.

    Raises
    ------
    TypeError
        `data` are no grids and samples.
    ValueError
        An argument out of range, samples that do not fit their grid, a checkpoint of another training.
    NumericalBreakdown
        The loss became NaN or infinite.
    KeyboardInterrupt
        After Ctrl-C, once the step under way is complete and the checkpoint written.

    Notes
    -----
    Deterministic for a seed on one machine with one number of threads. The network of one pooling level learns in
    minutes on a processor for 64 x 64 cells; see *Direction networks* in the user guide.

    Source: Kaneda et al., *A Deep Conjugate Direction Method for Iteratively Solving Linear Systems*, ICML 2023,
    section 5 (scaled loss); Lan et al., arXiv 2310.00177, section 5 (residual loss). The one-cycle learning rate and
    the disjoint split are ours.

    Examples
    --------
    >>> import torch
    >>> from kantor.datasets import poisson_scenes
    >>> from kantor.linalg import DirectionNet, PoissonGrid, train_direction_net
    >>> _ = torch.manual_seed(0)
    >>> net = DirectionNet(dim=2, channels=4)
    >>> result = train_direction_net(net, PoissonGrid(poisson_scenes.open_box((8, 8))), steps=20)
    >>> bool(result.losses[-5:].mean() < result.losses[:5].mean())
    True
    """
    _check_numbers(loss, steps, batch, lr, white, validation)
    parameter = next(net.parameters())
    sets = [_split(entry, k, validation, seed, parameter) for k, entry in enumerate(_entries(data))]
    if sum(len(s.train) for s in sets) == 0:
        raise ValueError("train_direction_net: data: there are no samples to train on; give more, or less validation")

    adam = torch.optim.Adam(net.parameters(), lr=lr)
    generator = torch.Generator().manual_seed(seed)
    settings = {
        "net": f"{net!r}, {sum(p.numel() for p in net.parameters())} parameters, {parameter.dtype}",
        "data": [[list(s.operator.grid), s.operator.num_unknowns, len(s.train), len(s.held_out)] for s in sets],
        "loss": loss,
        "steps": steps,
        "batch": batch,
        "lr": lr,
        "white": white,
        "validation": validation,
        "seed": seed,
    }
    log = Log()
    store = None if checkpoint is None else Checkpoint("train_direction_net", Path(checkpoint), settings)
    if store is not None:
        log = store.load(net, adam, generator) or log
    before, started, saved, stopped = log.seconds, time.perf_counter(), time.perf_counter(), False

    def save() -> None:
        if store is not None:
            store.save(net, adam, generator, log)

    with steps_bar(progress, "train_direction_net", steps, start=len(log.losses)) as advance, after_step() as asked:
        for step in range(len(log.losses), steps):
            rate = _one_cycle(step, steps, lr)
            for group in adam.param_groups:
                group["lr"] = rate
            chosen = sets[int(torch.randint(len(sets), (), generator=generator))]
            b = chosen.draw(batch, white, generator)
            value = _loss(loss, net, chosen.operator, b)
            if not math.isfinite(float(value.detach())):
                raise NumericalBreakdown(
                    f"train_direction_net: the loss of step {step} is {float(value.detach())}: lower lr (it was {lr:g})"
                )
            adam.zero_grad()
            value.backward()
            adam.step()
            log.losses.append(float(value.detach()))
            if (step + 1) % _VALIDATE == 0 or step + 1 == steps:
                held_out = _validation_loss(loss, net, sets, batch)
                if not math.isnan(held_out):
                    log.validation_steps.append(step + 1)
                    log.validation_losses.append(held_out)
            advance(step + 1, f"loss {log.losses[-1]:.3e}, validation {log.latest:.3e}")
            log.seconds = before + time.perf_counter() - started
            if asked():
                save()
                raise KeyboardInterrupt
            if callback is not None and callback(TrainingInfo(step + 1, log.losses[-1], log.latest, rate)) is True:
                stopped = True
                break
            if time.perf_counter() - saved > _SAVE_SECONDS:
                save()
                saved = time.perf_counter()
    save()
    return log.result(net, stopped)


# --- one step ---


def _loss(kind: Loss, net: nn.Module, A: PoissonGrid, b: Tensor) -> Tensor:
    """The mean over a batch of right-hand sides ``(batch, *grid)`` of norm one."""
    q = net(b, A.flags if isinstance(net, VariableStencilNet) else A.mask)
    image = A.matvec(q)
    b, q, image = (v.flatten(1) for v in (b, q, image))
    if kind == "residual":
        norms: Tensor = torch.linalg.vector_norm(b - image, dim=1)
        return norms.mean()
    # |b - a Aq|^2; where q has no energy (all units dead) a = 0 leaves |b|^2 = 1 and no gradient, rather than NaN
    energy = (q * image).sum(1, keepdim=True)
    scale = (q * b).sum(1, keepdim=True) / energy.clamp_min(torch.finfo(b.dtype).tiny)
    squares: Tensor = (b - scale * image).square().sum(1)
    return squares.mean()


def _validation_loss(kind: Loss, net: nn.Module, sets: list[_Set], batch: int) -> float:
    """The mean over all samples that are not trained on; NaN without any."""
    total, count = 0.0, 0
    with torch.no_grad():
        for chosen in sets:
            for part in chosen.held_out.split(batch):
                total += float(_loss(kind, net, chosen.operator, part)) * len(part)
                count += len(part)
    return total / count if count else math.nan


def _one_cycle(step: int, steps: int, lr: float) -> float:
    """Linear warm-up to `lr`, then half a cosine to zero."""
    warm_up = max(1, round(_WARM_UP * steps))
    if step < warm_up:
        return lr * (step + 1) / warm_up
    return lr * 0.5 * (1 + math.cos(math.pi * (step + 1 - warm_up) / max(1, steps - warm_up)))


# --- samples ---


@dataclass(frozen=True)
class _Set:
    """An operator, and its samples ``(count, *grid)`` of norm one, zero outside the fluid."""

    operator: PoissonGrid
    train: Tensor
    held_out: Tensor

    def draw(self, batch: int, white: float, generator: torch.Generator) -> Tensor:
        noise = round(white * batch)
        if len(self.train) == 0:
            noise = batch
        chosen = torch.randint(max(1, len(self.train)), (batch - noise,), generator=generator)
        b = self.train[chosen.to(self.train.device)]
        if noise == 0:
            return b
        random = torch.randn((noise, *self.operator.grid), generator=generator).to(b)
        return torch.cat([b, _normalised(self.operator, random)])


def _entries(data: Any) -> list[Any]:
    """The operators and samples as a list; a pair of an operator and a tensor is one entry."""
    if isinstance(data, PoissonGrid):
        return [data]
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor):
        return [data]
    if isinstance(data, list | tuple) and data:
        return list(data)
    raise TypeError(
        "train_direction_net: data: expected a PoissonGrid, a pair (PoissonGrid, samples), or a sequence of these, got "
        f"{type(data).__name__}"
    )


def _split(entry: Any, number: int, validation: float, seed: int, like: Tensor) -> _Set:
    pair = isinstance(entry, tuple) and len(entry) == 2
    operator, samples = entry if pair else (entry, None)
    if not isinstance(operator, PoissonGrid) or not (samples is None or isinstance(samples, Tensor)):
        raise TypeError(
            f"train_direction_net: data: expected a PoissonGrid or a pair (PoissonGrid, Tensor) at {number}, got "
            f"{type(entry).__name__}"
        )
    if samples is None:
        samples = ritz_dataset(
            operator, min(600, operator.num_unknowns), min(3000, 5 * operator.num_unknowns), seed=seed
        )
    samples = check_tensor(samples, "train_direction_net", "samples")
    check_float(samples, "train_direction_net", "samples")
    check_finite(samples, "train_direction_net", "samples")
    if samples.ndim == 2 and samples.shape[1] == operator.shape[0]:
        samples = samples.unflatten(1, operator.grid)
    if tuple(samples.shape[1:]) != operator.grid:
        raise ValueError(
            f"train_direction_net: samples: expected shape (count, {', '.join(map(str, operator.grid))}) for entry "
            f"{number}, got {tuple(samples.shape)}"
        )
    operator = operator.to(like.dtype)
    if operator.device != like.device:
        raise ValueError(
            f"train_direction_net: net is on {like.device}, grid {number} on {operator.device}; move one with "
            ".to(device)"
        )
    samples = _normalised(operator, samples.to(like))
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).to(samples.device)
    held_out = round(validation * len(samples))
    return _Set(operator, samples[order[held_out:]], samples[order[:held_out]])


def _normalised(operator: PoissonGrid, samples: Tensor) -> Tensor:
    samples = torch.where(operator.mask, samples, torch.zeros_like(samples))
    norms = samples.flatten(1).norm(dim=1).clamp_min(torch.finfo(samples.dtype).tiny)
    normalised: Tensor = samples / norms.reshape(-1, *([1] * len(operator.grid)))
    return normalised


def _check_numbers(loss: str, steps: int, batch: int, lr: float, white: float, validation: float) -> None:
    if loss not in ("scaled", "residual"):
        raise ValueError(f"train_direction_net: loss: expected 'scaled' or 'residual', got {loss!r}")
    for name, count in (("steps", steps), ("batch", batch)):
        if not (isinstance(count, int) and count >= 1):
            raise ValueError(f"train_direction_net: {name}: expected a positive integer, got {count!r}")
    if not (isinstance(lr, int | float) and 0 < lr < math.inf):
        raise ValueError(f"train_direction_net: lr: expected a positive finite number, got {lr!r}")
    if not 0 <= white <= 1:
        raise ValueError(f"train_direction_net: white: expected a share from 0 to 1, got {white!r}")
    if not 0 <= validation < 1:
        raise ValueError(f"train_direction_net: validation: expected a share from 0 to below 1, got {validation!r}")


__all__ = ["TrainingInfo", "TrainingResult", "ritz_dataset", "train_direction_net"]
