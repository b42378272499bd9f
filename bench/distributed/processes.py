"""Processes for the distributed benchmarks: those of torchrun, or as many as are asked for, started here."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp
from kantor.distributed import Ranks, init

Work = Callable[..., Any]


def under_torchrun() -> bool:
    """Whether other processes were started together with this one."""
    return "RANK" in os.environ


def run(size: int, work: Work, *arguments: Any) -> Any:
    """The first rank's result of ``work(ranks, *arguments)`` on `size` new processes of one thread each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answer = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_take_part, args=(size, port, answer, work, arguments), nprocs=size)
    return answer.get()


def _take_part(rank: int, size: int, port: int, answer: Any, work: Work, arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    ranks: Ranks = init(timeout=60)
    result = work(ranks, *arguments)
    ranks.barrier()
    if rank == 0:
        answer.put(result)
    torch.distributed.destroy_process_group()
