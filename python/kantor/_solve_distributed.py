"""``kantor solve --distributed``: the first process reads and writes, all of them solve."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from kantor import KantorError
from kantor._errors import RankError
from kantor._ranks import Ranks
from kantor._solve_files import BadInputError, System
from kantor._solve_preconditioner import TINY, Chosen, Preconditioner, because
from kantor.distributed import ShardedCSR
from kantor.linalg.grid_detection import detect_grid
from kantor.linalg.preconditioners import as_preconditioner

_PATIENCE = timedelta(days=1)  # for the process that reads: a death is noticed at once all the same


@contextmanager
def bad_input_of_all(ranks: Ranks | None, *, patient: bool = False) -> Iterator[None]:
    """What one process finds wrong with the input ends all of them; nothing for one process.

    `patient`: the work inside, such as reading a large file, may take longer than the timeout of the group.
    """
    if ranks is None or ranks.size == 1:
        yield
        return
    try:
        with (Ranks(dist.new_group(timeout=_PATIENCE)) if patient else ranks).together():
            yield
    except (RankError, BadInputError):
        raise
    except (KantorError, ValueError, TypeError, ImportError, OSError) as error:
        raise BadInputError(str(error)) from error


def share_system(ranks: Ranks, system: System | None, wanted: Preconditioner) -> tuple[Chosen, Tensor]:
    """Deal out the rows that the first process has read, and build the preconditioner of each process's block.

    Raises
    ------
    BadInputError
        On all processes: the preconditioner that is wanted cannot be built.
    """
    A = ShardedCSR.from_csr(None if system is None else system.A, ranks, source=0)
    b = A.split(None if system is None else system.b, source=0)
    if wanted is Preconditioner.multigrid:
        raise BadInputError(
            "--preconditioner multigrid: matrices from files have it on one process only; take jacobi or ic0, or "
            "kantor.distributed.ShardedPoissonGrid in Python"
        )
    if wanted is Preconditioner.none:
        return Chosen(A, None, "none"), b
    if wanted is Preconditioner.auto and A.n <= TINY:
        return Chosen(A, None, "none", f"{A.n} unknowns need none"), b
    failures: dict[str, str] = {}
    if wanted is Preconditioner.auto and ranks.broadcast_object(system is not None and _is_grid(system)):
        failures["multigrid"] = "a grid's needs one process"
    for name in ("ic0", "jacobi"):
        if wanted.value not in ("auto", name):
            continue
        try:
            M = as_preconditioner(name, A, b)
        except RankError:
            raise
        except (ValueError, KantorError) as error:  # on all processes
            failures[name] = str(error).replace(f"{name}: A: ", "")
            continue
        notes = ["of each process's block"] if name == "ic0" and ranks.size > 1 else []
        return Chosen(A, M, name, "; ".join([*notes, *filter(None, [because(failures)])])), b
    if wanted is not Preconditioner.auto:
        raise BadInputError(f"--preconditioner {wanted.value}: {failures[wanted.value]}")
    return Chosen(A, None, "none", because(failures)), b


def _is_grid(system: System) -> bool:
    try:
        detect_grid(system.A)
    except (ValueError, KantorError):
        return False
    return True
