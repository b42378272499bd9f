"""Joining the processes that ``torchrun`` started."""

from __future__ import annotations

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from kantor._errors import RankError
from kantor._ranks import Ranks


def init(timeout: float = 30.0, backend: str | None = None) -> Ranks:
    """Join the processes that share the work, and return them; alone, outside ``torchrun``, one rank of one.

    Parameters
    ----------
    timeout : float
        Seconds that an operation waits for the other ranks before it raises :class:`kantor.RankError`. A rank that
        dies is usually noticed at once; one that stalls, after this time.
    backend : str, optional
        Of ``torch.distributed``. Default: gloo for tensors on the CPU, and NCCL beside it where there is a GPU; each
        process then takes the GPU of its local rank.

    Returns
    -------
    Ranks
        Of the default group, which is left when the process ends. A group that exists already is taken as it is, with
        its own timeout.

    Raises
    ------
    ValueError
        The timeout is not positive.
    RankError
        The processes did not find each other.

    Examples
    --------
    >>> from kantor.distributed import init
    >>> init()
    Ranks(rank 0 of 1)
    """
    if not timeout > 0:
        raise ValueError(f"init: timeout: expected a number of seconds > 0, got {timeout!r}")
    if not dist.is_available() or dist.is_initialized() or "RANK" not in os.environ:
        return Ranks()
    if backend is None:
        backend = "gloo"
        if torch.cuda.is_available() and dist.is_nccl_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    except RuntimeError as error:
        raise RankError(
            f"init: the processes did not find each other within {timeout:g} s: {error}; start them with torchrun, and "
            "look whether each machine reaches the address of the first"
        ) from error
    atexit.register(_leave)
    return Ranks()


def _leave() -> None:
    """Threads of the group that outlive the interpreter would abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()
