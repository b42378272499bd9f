"""Progress of an iterative solve: a bar on a logarithmic scale when tqdm is installed, else log records.

A Krylov method gains digits at a roughly steady rate, so the useful "how far is it" is the share of the
requested digits already gained, log(r0/r) / log(r0/target), not the share of ``maxiter`` used up.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Update = Callable[[int, float, float], None]

_REDRAW_SECONDS = 0.1
_LOG_SECONDS = 1.0


def log_fraction(initial: float, residual: float, target: float) -> float:
    """Share of the requested digits gained so far, in [0, 1].

    ``log(initial / residual) / log(initial / target)``; 0 while nothing is gained or where the ratio has no
    meaning (no positive target, a residual that is not finite), 1 at or below the target.
    """
    if residual <= target:
        return 1.0
    if not (0.0 < target < initial and residual < initial and math.isfinite(initial)):
        return 0.0
    return min(1.0, math.log(initial / residual) / math.log(initial / target))


def _ignore(iteration: int, residual_norm: float, target: float) -> None:
    """Update function of a disabled progress bar."""


@contextmanager
def progress_bar(
    enabled: bool, description: str, rtol: float, quantity: str = "residual", goal: str = "rtol"
) -> Iterator[Update]:
    """Context manager yielding ``update(iteration, residual_norm, target)``.

    The first call of ``update`` sets the starting residual. With tqdm installed a bar is drawn on stderr; without it
    the logger ``kantor`` gets an INFO record once a second and one at the end. Redraws are limited to ten a second,
    so that an update costs one clock reading in most iterations.

    Parameters
    ----------
    enabled : bool
        When False the update function does nothing and nothing is imported.
    description : str
        Short name shown in front of the bar, such as ``"cg"``.
    rtol : float
        Requested relative residual, shown as the goal.
    quantity, goal : str
        What is counted down, and what its goal is called.
    """
    if not enabled:
        yield _ignore
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield from _logged(description, rtol, quantity, goal)
        return

    bar = tqdm(
        total=1.0,
        desc=description,
        bar_format="{desc}: {percentage:3.0f}%|{bar}| {postfix} [{elapsed}]",
        dynamic_ncols=True,
    )
    initial = math.nan
    last = (0, math.nan, math.nan)
    drawn = 0.0

    def draw() -> None:
        iteration, residual, target = last
        # The residual of CG may rise between iterations; a bar that runs backwards only confuses.
        bar.n = max(bar.n, log_fraction(initial, residual, target))
        bar.set_postfix_str(f"iteration {iteration}, {quantity} {residual:.1e}, {goal} {rtol:.0e}", refresh=False)
        bar.refresh()

    def update(iteration: int, residual_norm: float, target: float) -> None:
        nonlocal initial, last, drawn
        if math.isnan(initial):
            initial = residual_norm
        last = (iteration, residual_norm, target)
        now = time.perf_counter()
        if now - drawn >= _REDRAW_SECONDS:
            drawn = now
            draw()

    try:
        yield update
    finally:
        if not math.isnan(initial):
            draw()
        bar.close()


def _logged(description: str, rtol: float, quantity: str, goal: str) -> Iterator[Update]:
    """Report progress like :func:`progress_bar`, through the logging module."""
    logger = logging.getLogger("kantor")
    last = (0, math.nan, math.nan)
    logged = time.perf_counter()

    def record() -> None:
        iteration, residual, target = last
        logger.info(
            "%s: iteration %d, %s %.3e, target %.3e (%s %.0e)",
            description,
            iteration,
            quantity,
            residual,
            target,
            goal,
            rtol,
        )

    def update(iteration: int, residual_norm: float, target: float) -> None:
        nonlocal last, logged
        last = (iteration, residual_norm, target)
        now = time.perf_counter()
        if now - logged >= _LOG_SECONDS:
            logged = now
            record()

    try:
        yield update
    finally:
        if not math.isnan(last[1]):
            record()


@contextmanager
def steps_bar(enabled: bool, description: str, total: int, start: int = 0) -> Iterator[Callable[[int, str], None]]:
    """Context manager yielding ``advance(step, note)``, for loops whose number of steps is known.

    With tqdm installed a bar is drawn on stderr; without it the logger ``kantor`` gets an INFO record once a second.

    Parameters
    ----------
    enabled : bool
        When False the function does nothing and nothing is imported.
    description : str
        Short name shown in front of the bar.
    total, start : int
        Number of steps, and how many are done already.
    """
    if not enabled:
        yield lambda step, note: None
        return
    logged = time.perf_counter()
    try:
        from tqdm import tqdm
    except ImportError:

        def record(step: int, note: str) -> None:
            nonlocal logged
            if time.perf_counter() - logged >= _LOG_SECONDS:
                logged = time.perf_counter()
                logging.getLogger("kantor").info("%s: step %d of %d, %s", description, step, total, note)

        yield record
        return

    with tqdm(total=total, initial=start, desc=description, dynamic_ncols=True) as bar:

        def advance(step: int, note: str) -> None:
            bar.set_postfix_str(note, refresh=False)
            bar.update(step - bar.n)

        yield advance
