"""What the commands of ``kantor`` share: exit codes, one message for bad input, a progress bar, a table.

Typer and Rich are imported on first use, so that a missing one is reported by ``kantor.cli`` in one line.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from typing import Final

from kantor._errors import RankError
from kantor._solve_files import BadInputError

NOT_SOLVED: Final = 1
BAD_INPUT: Final = 2
INTERRUPTED: Final = 130  # the shell's convention for a process ended by SIGINT

PLOT_SUFFIXES = (".png", ".pdf", ".svg")

Measure = Callable[[], tuple[float, str]]  # the share of the work that is done, and words about it
Update = Callable[[Measure], None]

_REDRAW_SECONDS = 0.1


class Precision(StrEnum):
    """Choices of ``--dtype``."""

    float64 = "float64"
    float32 = "float32"


@contextmanager
def one_message(command: str, *, speaks: bool = True) -> Iterator[None]:
    """Turn what is wrong with the input into one message and exit code 2, and Ctrl-C into exit code 130.

    Of several processes that know the same one `speaks`. One that lost the others exits with 1 and says so itself.
    """
    import typer

    try:
        yield
    except (BadInputError, ImportError, OSError) as error:
        if speaks:
            print(f"kantor {command}: {error}", file=sys.stderr)
        raise typer.Exit(BAD_INPUT) from error
    except RankError as error:
        print(f"kantor {command}: {error}", file=sys.stderr)
        raise typer.Exit(NOT_SOLVED) from error
    except KeyboardInterrupt as error:
        if speaks:
            print(f"kantor {command}: interrupted", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from error


@contextmanager
def progress(name: str, *, enabled: bool) -> Iterator[Update | None]:
    """Yield a function that draws progress on stderr, or None when disabled or where stderr is no terminal.

    It is given a function that measures, which it calls no more than ten times a second.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not (enabled and console.is_terminal):
        yield None
        return
    columns = (TextColumn(name), BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(name, total=1.0, text="")
        drawn = gained = 0.0

        def update(measure: Measure) -> None:
            nonlocal drawn, gained
            if time.perf_counter() - drawn >= _REDRAW_SECONDS:
                drawn = time.perf_counter()
                share, text = measure()
                gained = max(gained, share)  # a bar that runs backwards only confuses
                bar.update(task, completed=gained, text=text)

        yield update


def warn_of_lone_processes(command: str) -> None:
    """Say once that the processes of torchrun all do the same work where they were not asked to share it."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if "TORCHELASTIC_RUN_ID" in os.environ and processes != "1" and os.environ.get("RANK") == "0":
        print(
            f"kantor {command}: warning: each of {processes} processes does the whole work and writes the same files; "
            "pass --distributed to share it",
            file=sys.stderr,
        )


def print_rows(rows: Mapping[str, object]) -> None:
    """Print names and values as a table of two columns."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(escape(name), escape(str(value)))
    Console().print(table)


def finite(value: float) -> float | None:
    """Return None for NaN and infinity, which JSON does not know."""
    return value if math.isfinite(value) else None


def scientific(value: float | None) -> str:
    """Return four digits, or words for a value that :func:`finite` refused."""
    return "not finite" if value is None else f"{value:.3e}"
