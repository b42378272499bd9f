"""The command ``kantor``: ``kantor info``, ``kantor solve`` and ``kantor demo`` (extra ``cli``).

Exit codes: 0 solved, 1 not converged, 2 bad input (one message on stderr, no traceback), 130 interrupted.
"""

from __future__ import annotations

import gzip
import json
import os
import platform
import sys
import tempfile
import time
import warnings
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import numpy as np
import torch

import kantor
from kantor._progress import log_fraction
from kantor.linalg import CSR, LinearOperator, SolveResult, SolveStatus, cg, ic0, jacobi

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError as error:
    _MISSING: str | None = error.name
else:
    _MISSING = None

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.floating[Any]]

SOLVED, NOT_CONVERGED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
TINY = 64  # unknowns below which a preconditioner cannot pay for its own set-up


class Preconditioner(str, Enum):
    """Choices of ``--preconditioner``."""

    auto = "auto"
    none = "none"
    jacobi = "jacobi"
    ic0 = "ic0"


class Precision(str, Enum):
    """Choices of ``--dtype``."""

    float64 = "float64"
    float32 = "float32"


class Size(str, Enum):
    """Choices of ``--size``."""

    small = "small"
    full = "full"


class BadInput(Exception):
    """What was given cannot be solved; the message says what, and what to do."""


@dataclass(frozen=True)
class System:
    """A linear system read from files: ``b`` is (n,) or (k, n), ``shape`` that of the right-hand side in its file."""

    A: CSR
    b: torch.Tensor
    shape: tuple[int, ...]
    nonzeros: int


# kantor info -------------------------------------------------------------------------------------------------------


def info(json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, how the native code was built, and what it finds on this machine."""
    build = kantor._C.build_info()
    facts = {
        "kantor": kantor.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "compiler": build["compiler"],
        "simd": build["simd"],
        "openmp": build["openmp"],
        "threads": torch.get_num_threads(),
        "cuda_built": build["cuda_built"],
        "cuda_architectures": build["cuda_architectures"],
        "cuda_available": kantor.cuda.is_available(),
    }
    if json_output:
        print(json.dumps(facts, indent=2))
        return
    table = Table(title="Kantor", title_justify="left", show_header=False, box=None)
    for name, value in facts.items():
        text = {True: "yes", False: "no", "": "none"}.get(value, str(value)) if isinstance(value, bool | str) else value
        table.add_row(name.replace("_", " ").replace("cuda", "CUDA"), escape(str(text)))
    Console().print(table)
