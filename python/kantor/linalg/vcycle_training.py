"""Training of the learned V-cycle: conjugate gradients with it, differentiated."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from kantor._errors import NumericalBreakdown
from kantor._progress import steps_bar
from kantor.linalg._training import Checkpoint, Log, TrainingInfo, TrainingResult, after_step
from kantor.linalg._vcycle_reference import Level, build_levels, v_cycle
from kantor.linalg.learned_vcycle import LEVELS, LearnedVCycle, power_step, sweep_eigenvalue
from kantor.linalg.poisson_grid import PoissonGrid

_LAST_LR = 1e-4
_VALIDATE = 50  # steps between looks at the validation loss
_SAVE_SECONDS = 30.0  # between checkpoints
_SMALLEST_SYMBOL = 0.02
_PENALTY = 1.0  # of sweeps that hardly contract, against the logarithm of the residual


def train_vcycle(
    net: LearnedVCycle,
    scenes: PoissonGrid | Sequence[PoissonGrid],
    *,
    guards: PoissonGrid | Sequence[PoissonGrid] = (),
    steps: int = 400,
    batch: int = 2,
    iterations: int = 6,
    groups: int = 2,
    contraction: float = 1.9,
    lr: float = 1e-2,
    seed: int = 0,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    callback: Callable[[TrainingInfo], object] | None = None,
) -> TrainingResult:
    """Train a V-cycle, in place, as the preconditioner of conjugate gradients.

    Each step makes `iterations` of conjugate gradients for white noise b on all scenes and minimises the logarithm of
    what is left, ``|r| / |b|``, by Adam. With one iteration this is the scaled loss of the deep conjugate direction
    method; with more it sees the errors that the cycle itself leaves over, which are those that count.

    What is trained is less than the parameters: stencils that are symmetric under all rotations and reflections of the
    grid, one for each of `groups` groups of levels. Their symbols are positive, and eigenvalues of a sweep beyond
    `contraction` are penalised, on `scenes` and on `guards`, so that the cycle stays positive definite.

    Parameters
    ----------
    net : LearnedVCycle
        With ``smoother="stencil"``; its symmetric part is the start.
    scenes : PoissonGrid or sequence of PoissonGrid
        Of the net's dimension; those of equal size are handled at once, so choose few sizes. More than 64 cells.
    guards : PoissonGrid or sequence of PoissonGrid
        Scenes on which the cycle must be safe, without training for speed: sprays, porous solids, mazes.
    steps, batch : int
        Steps of Adam, and right-hand sides on each scene in each of them.
    iterations : int
        Of conjugate gradients in each.
    groups : int
        1 to 6: levels 0, 1, ... have stencils and scales of their own; the last group is all further levels. Two groups
        generalise best to grids larger than the scenes.
    contraction : float
        Largest eigenvalue of a sweep that is not penalised, in (0, 2).
    lr : float
        Learning rate of the first step; falls linearly to 1e-4.
    seed : int
        Of the right-hand sides.
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
        Losses are mean reductions of the residual norm in an iteration (without the penalty); validation is on
        right-hand sides that are not trained on.

    Raises
    ------
    TypeError
        `net` is no LearnedVCycle, or a scene no PoissonGrid.
    ValueError
        An argument out of range, a scene of another dimension or too small, a checkpoint of another training.
    NumericalBreakdown
        The loss became NaN or infinite.
    KeyboardInterrupt
        After Ctrl-C, once the step under way is complete, the weights are in place and the checkpoint is written.

    Notes
    -----
    Computed in float32. Memory: `iterations` cycles' intermediate vectors, about 40 words a cell, right-hand side and
    iteration. Deterministic for a seed on one machine with one number of threads.

    Examples
    --------
    >>> from kantor.datasets import poisson_scenes
    >>> from kantor.linalg import LearnedVCycle, PoissonGrid, train_vcycle
    >>> net = LearnedVCycle(2, pretrained=False)
    >>> result = train_vcycle(net, PoissonGrid(poisson_scenes.smoke_sphere((16, 16))), steps=30, iterations=4)
    >>> bool(result.losses[-1] < result.losses[0])
    True
    """
    scene_list = _checked(net, "scenes", scenes)
    guard_list = _checked(net, "guards", guards)
    _check_numbers(steps, batch, iterations, groups, contraction, lr)
    if not scene_list:
        raise ValueError("train_vcycle: scenes: expected at least one grid, got none")
    train, watched = _stacks(scene_list), _stacks(scene_list + guard_list)

    tied = _Tied(net, groups, watched)
    adam = torch.optim.Adam(tied.parameters(), lr=lr, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(seed)
    settings = {
        "net": repr(net),
        "scenes": [[list(g.grid), g.num_unknowns] for g in scene_list],
        "guards": [[list(g.grid), g.num_unknowns] for g in guard_list],
        "steps": steps,
        "batch": batch,
        "iterations": iterations,
        "groups": groups,
        "contraction": contraction,
        "lr": lr,
        "seed": seed,
    }
    log = Log()
    store = None if checkpoint is None else Checkpoint("train_vcycle", Path(checkpoint), settings)
    if store is not None:
        log = store.load(tied, adam, generator) or log
    before, started, saved, stopped = log.seconds, time.perf_counter(), time.perf_counter(), False

    def save() -> None:
        tied.write_to(net)
        if store is not None:
            store.save(tied, adam, generator, log)

    with steps_bar(progress, "train_vcycle", steps, start=len(log.losses)) as advance, after_step() as asked:
        for step in range(len(log.losses), steps):
            rate = lr + (_LAST_LR - lr) * step / steps
            for group in adam.param_groups:
                group["lr"] = rate
            stencils, scales = tied()
            loss = _log_reduction(net, train, stencils, scales, batch, iterations, generator)
            if not math.isfinite(float(loss.detach())):
                raise NumericalBreakdown(
                    f"train_vcycle: the loss of step {step} is {float(loss.detach())}: lower lr (it was {lr:g})"
                )
            adam.zero_grad()
            (loss + _PENALTY * tied.penalty(watched, stencils, contraction)).backward()
            adam.step()
            log.losses.append(math.exp(float(loss.detach())))
            if (step + 1) % _VALIDATE == 0 or step + 1 == steps:
                unseen = torch.Generator().manual_seed(seed + 1)
                with torch.no_grad():
                    stencils, scales = tied()
                    held_out = _log_reduction(net, train, stencils, scales, batch, iterations, unseen)
                log.validation_steps.append(step + 1)
                log.validation_losses.append(math.exp(float(held_out)))
            advance(step + 1, f"reduction {log.losses[-1]:.4f}, validation {log.latest:.4f}")
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


def _log_reduction(
    net: LearnedVCycle,
    stacks: Sequence[_Stack],
    stencils: Tensor,
    scales: Tensor,
    batch: int,
    iterations: int,
    generator: torch.Generator,
) -> Tensor:
    """``log(|r| / |b|) / iterations`` after preconditioned conjugate gradients, the mean over scenes and batch."""
    total: Tensor = torch.zeros(())
    count = sum(stack.scenes for stack in stacks)
    for stack in stacks:
        A = stack.levels[0].A
        dims = tuple(range(-A.dim, 0))

        def dot(u: Tensor, v: Tensor, dims: tuple[int, ...] = dims) -> Tensor:
            return (u * v).sum(dims, keepdim=True)

        b = torch.randn((stack.scenes, batch, *A.grid), generator=generator) * (A.diagonal > 0)
        r, p, rz = b, torch.zeros_like(b), torch.ones(())
        for k in range(iterations):
            z = v_cycle(stack.levels, stencils, scales, r, nu=net.nu)
            rz, rz_before = dot(r, z), rz
            p = z if k == 0 else z + (rz / rz_before) * p
            q = A(p)
            r = r - (rz / dot(p, q)) * q
        total = total + (dot(r, r) / dot(b, b)).log().mean() * (stack.scenes / (2 * iterations * count))
    return total


class _Stack:
    """Grids of one size: their levels as one batch ``(scenes, 1, *grid)``, float32."""

    def __init__(self, grids: Sequence[PoissonGrid]) -> None:
        self.scenes = len(grids)
        coefficients = [grid.to(torch.float32).coefficients() for grid in grids]
        faces = [torch.stack(axis).detach().unsqueeze(1) for axis in zip(*(c for c, _ in coefficients), strict=True)]
        self.levels: list[Level] = build_levels(faces, torch.stack([d for _, d in coefficients]).detach().unsqueeze(1))


def _stacks(grids: Sequence[PoissonGrid]) -> list[_Stack]:
    by_size: dict[tuple[int, ...], list[PoissonGrid]] = {}
    for grid in grids:
        by_size.setdefault(grid.grid, []).append(grid)
    return [_Stack(group) for group in by_size.values()]


class _Tied(nn.Module):
    """What is trained: logarithms of the symbols and scales of each group of levels.

    A stencil that is symmetric under all rotations and reflections has one value for each number j of nonzero offsets,
    ``k_0 .. k_dim``. Its symbol ``k^(t) = sum_o k_o cos(t.o)`` is linear in each cos t_i, so that it lies between its
    values at the corners, where j of the cosines are -1 and the others 1: with positive values there the matrix of the
    stencil is positive definite on every domain. Those dim + 1 values stand for the stencil here.
    """

    corners: Tensor

    def __init__(self, net: LearnedVCycle, groups: int, watched: Sequence[_Stack]) -> None:
        super().__init__()
        self.dim = net.dim
        offsets = list(product((-1, 0, 1), repeat=net.dim))
        self.orbits = torch.tensor([sum(map(abs, o)) for o in offsets])  # number of nonzero offsets
        corners = torch.zeros(net.dim + 1, net.dim + 1, dtype=torch.float64)
        for j in range(net.dim + 1):
            for o in offsets:
                corners[j, sum(map(abs, o))] += (-1) ** sum(map(abs, o[:j]))
        self.values_of = torch.linalg.inv(corners).T.float()  # of the orbits, from the symbols
        flat = net.stencils.detach().cpu().reshape(LEVELS, -1)[:groups]
        values = torch.stack([flat[:, self.orbits == j].mean(1) for j in range(net.dim + 1)], 1)
        symbols = (values @ corners.T - _SMALLEST_SYMBOL).clamp_min(1e-3)
        self.log_symbols = nn.Parameter(symbols.log().float())
        self.log_scales = nn.Parameter(net.scales.detach().cpu()[:groups].clamp_min(1e-3).log().float())
        # The power method's vectors go on from step to step: the stencils change little in one.
        generator = torch.Generator().manual_seed(0)
        for s, stack in enumerate(watched):
            for index, level in enumerate(stack.levels[:-1]):
                v = torch.randn(level.A.diagonal.shape, generator=generator) * (level.A.diagonal > 0)
                self.register_buffer(f"vector_{s}_{index}", v)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Stencils ``(groups, 3, ...)`` and scales ``(groups,)``."""
        values = (self.log_symbols.exp() + _SMALLEST_SYMBOL) @ self.values_of
        return values[:, self.orbits].unflatten(-1, [3] * self.dim), self.log_scales.exp()

    def penalty(self, watched: Sequence[_Stack], stencils: Tensor, largest: float) -> Tensor:
        """Sum of squares of what the sweeps' eigenvalues exceed `largest` by; one step of the power method."""
        total = torch.zeros(())
        for s, stack in enumerate(watched):
            for index, level in enumerate(stack.levels[:-1]):
                k = stencils[min(index, len(stencils) - 1)]
                with torch.no_grad():
                    v = power_step(level, k, getattr(self, f"vector_{s}_{index}"))
                    setattr(self, f"vector_{s}_{index}", v)
                total = total + (sweep_eigenvalue(level, k, v) - largest).relu().square().sum()
        return total

    def write_to(self, net: LearnedVCycle) -> None:
        """Set the net's parameters."""
        with torch.no_grad():
            stencils, scales = self()
            group = torch.arange(LEVELS).clamp_max(len(scales) - 1)
            net.stencils.copy_(stencils[group])
            net.scales.copy_(scales[group])


def _checked(net: object, name: str, grids: object) -> list[PoissonGrid]:
    if not isinstance(net, LearnedVCycle):
        raise TypeError(f"train_vcycle: net: expected a LearnedVCycle, got {type(net).__name__}")
    if net.smoother != "stencil":
        raise ValueError(f"train_vcycle: net: expected smoother='stencil', got {net.smoother!r}: nothing to train")
    entries = [grids] if isinstance(grids, PoissonGrid) else grids
    if not isinstance(entries, list | tuple) or not all(isinstance(grid, PoissonGrid) for grid in entries):
        raise TypeError(f"train_vcycle: {name}: expected a PoissonGrid or a list of them, got {type(grids).__name__}")
    for grid in entries:
        if len(grid.grid) != net.dim or math.prod(grid.grid) <= 64:
            raise ValueError(
                f"train_vcycle: {name}: expected grids of {net.dim} dimensions and more than 64 cells, got {grid.grid}"
            )
        if grid.device.type != "cpu":
            raise ValueError(f"train_vcycle: {name}: expected grids on the CPU, got {grid.device}")
    return list(entries)


def _check_numbers(steps: int, batch: int, iterations: int, groups: int, contraction: float, lr: float) -> None:
    for name, count in (("steps", steps), ("batch", batch), ("iterations", iterations)):
        if not (isinstance(count, int) and count >= 1):
            raise ValueError(f"train_vcycle: {name}: expected a positive integer, got {count!r}")
    if not (isinstance(groups, int) and 1 <= groups <= LEVELS):
        raise ValueError(f"train_vcycle: groups: expected an integer from 1 to {LEVELS}, got {groups!r}")
    if not (isinstance(contraction, int | float) and 0 < contraction < 2):
        raise ValueError(f"train_vcycle: contraction: expected a number between 0 and 2, got {contraction!r}")
    if not (isinstance(lr, int | float) and 0 < lr < math.inf):
        raise ValueError(f"train_vcycle: lr: expected a positive finite number, got {lr!r}")


__all__ = ["train_vcycle"]
