"""The processes that share a problem: collective operations of ``torch.distributed``, counted, with errors for hangs.

Everything distributed in Kantor talks through a :class:`Ranks`. With one process all operations are free of charge.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from kantor._errors import ConvergenceError, KantorError, NumericalBreakdown, RankError

# What `together` passes on under its own name; anything else becomes a KantorError on the other ranks.
_SHARED_ERRORS = (ValueError, TypeError, NumericalBreakdown, ImportError, FileNotFoundError, NotImplementedError)


@dataclass
class Count:
    """Of one kind of operation.

    Attributes
    ----------
    messages : int
        Collective calls, or point-to-point messages that this rank sent.
    bytes : int
        Payload that this rank handed over.
    """

    messages: int = 0
    bytes: int = 0


@dataclass
class Traffic:
    """What this rank handed to the network since the last :meth:`reset`, kind by kind.

    A collective operation counts the bytes of its tensor once; how often they cross a wire is the library's affair
    (about ``2 (p - 1) / p`` times for an all-reduce over p ranks).
    """

    all_reduce: Count = field(default_factory=Count)
    exchange: Count = field(default_factory=Count)
    all_gather: Count = field(default_factory=Count)
    broadcast: Count = field(default_factory=Count)

    def reset(self) -> None:
        """Start counting anew."""
        for kind in fields(self):
            setattr(self, kind.name, Count())

    def add(self, kind: str, messages: int, size: int) -> None:
        """Count `messages` more, of `size` bytes together."""
        count: Count = getattr(self, kind)
        count.messages += messages
        count.bytes += size


class Ranks:
    """A process group of ``torch.distributed``, or this process alone.

    Parameters
    ----------
    group : ProcessGroup, optional
        Default: the default group where there is one, else this process alone. Its timeout is how long an operation
        waits for the others; :func:`kantor.distributed.init` sets it.

    Attributes
    ----------
    rank, size : int
        The number of this process, ``0..size-1``, and how many there are.
    traffic : Traffic
        Messages and bytes so far.

    Raises
    ------
    RankError
        By every operation: a rank died, stalled longer than the timeout, or took another path. From then on every
        operation raises at once.

    Notes
    -----
    All ranks must call the same operations in the same order with tensors of the same size and dtype. Tensors are
    contiguous, on the CPU with gloo, on the rank's GPU with NCCL; gloo takes GPU tensors too, through the host. With
    gloo and with NCCL every rank gets the same bits from an all-reduce.

    Examples
    --------
    >>> from kantor.distributed import Ranks
    >>> ranks = Ranks()
    >>> ranks
    Ranks(rank 0 of 1)
    >>> ranks.sum(2.0, 3.0)
    [2.0, 3.0]
    """

    def __init__(self, group: Any = None) -> None:
        there = dist.is_available() and dist.is_initialized()
        if group is None and there:
            group = dist.group.WORLD
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        if self.rank < 0:
            raise ValueError("Ranks: group: expected a group that this process is in; create the Ranks on members only")
        self.traffic = Traffic()
        config = str(dist.get_backend_config(group)) if group is not None else "cpu:gloo"
        self._gpu_by_nccl = "nccl" in config
        self._host_only = "nccl" in config and "gloo" not in config and "mpi" not in config  # no CPU tensors at all
        self._broken: str | None = None
        self.interrupted = False  # by Ctrl-C inside `deferred_interrupts`
        self._defers = False

    def __repr__(self) -> str:
        return f"Ranks(rank {self.rank} of {self.size})"

    @property
    def device(self) -> torch.device:
        """Where small tensors of one's own must live: the GPU when NCCL alone carries the group, else the CPU."""
        return torch.device("cuda", torch.cuda.current_device()) if self._host_only else torch.device("cpu")

    # --- operations on tensors ---

    def all_reduce_(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        """Replace the tensor by its sum, or maximum, over the ranks, in place. A maximum may lose NaN."""
        if self.size > 1 and tensor.numel():
            operation = dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX
            self._call("all_reduce", lambda: dist.all_reduce(tensor, operation, group=self.group))
            self.traffic.add("all_reduce", 1, tensor.nbytes)
        return tensor

    def all_gather(self, tensor: Tensor, counts: Sequence[int] | None = None) -> list[Tensor]:
        """Every rank's tensor, in the order of the ranks. They may differ in their first dimension only.

        The lengths, `counts`, are exchanged first unless they are given.
        """
        if self.size == 1:
            return [tensor]
        if counts is None:
            counts = [row[0] for row in self.table(tensor.shape[0])]
        longest = max(counts)
        mine = tensor.new_zeros((longest, *tensor.shape[1:]))
        mine[: tensor.shape[0]] = tensor
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        if mine.numel():
            self._call("all_gather", lambda: dist.all_gather(parts, mine, group=self.group))
            self.traffic.add("all_gather", 1, mine.nbytes)
        return [part[:count] for part, count in zip(parts, counts, strict=True)]

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Replace the tensor, in place, by that of the rank `source`."""
        if self.size > 1 and tensor.numel():
            self._call("broadcast", lambda: dist.broadcast(tensor, group=self.group, group_src=source))
            self.traffic.add("broadcast", int(self.rank == source), tensor.nbytes if self.rank == source else 0)
        return tensor

    def broadcast_object(self, value: Any, source: int = 0) -> Any:
        """The rank `source`'s value, pickled: for headers, names and messages."""
        if self.size == 1:
            return value
        box = [value]
        device = self.device
        self._call(
            "broadcast", lambda: dist.broadcast_object_list(box, group=self.group, device=device, group_src=source)
        )
        return box[0]

    def exchange(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> None:
        """Send ``sends[r]`` to rank r and fill ``receives[r]`` from rank r, all at once; returns when all is there."""
        self.start_exchange(sends, receives)()

    def start_exchange(self, sends: Mapping[int, Tensor], receives: Mapping[int, Tensor]) -> Callable[[], None]:
        """Begin an :meth:`exchange`; the function that comes back waits for its end. Leave the tensors alone till then.

        Empty tensors are not sent, so both sides must agree on the sizes.
        """
        operations, landed = [], []
        for peer, tensor in sends.items():
            if tensor.numel():
                data = tensor.cpu() if tensor.is_cuda and not self._gpu_by_nccl else tensor
                operations.append(dist.P2POp(dist.isend, data, group=self.group, group_peer=peer))
                self.traffic.add("exchange", 1, tensor.nbytes)
        for peer, tensor in receives.items():
            if tensor.numel():
                data = tensor
                if tensor.is_cuda and not self._gpu_by_nccl:
                    data = torch.empty(tensor.shape, dtype=tensor.dtype)
                    landed.append((tensor, data))
                operations.append(dist.P2POp(dist.irecv, data, group=self.group, group_peer=peer))
        if not operations:
            return lambda: None
        works = self._call("exchange", lambda: dist.batch_isend_irecv(operations))

        def finish() -> None:
            self._call("exchange", lambda: [work.wait() for work in works])
            for tensor, data in landed:
                tensor.copy_(data)

        return finish

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.all_reduce_(torch.zeros(1, dtype=torch.float64, device=self.device))

    # --- numbers ---

    def sum(self, *values: float) -> list[float]:
        """The sum over ranks of each number."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        result: list[float] = self.all_reduce_(tensor).tolist()
        return result

    def max(self, *values: float) -> list[float]:
        """The maximum over ranks of each number."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        result: list[float] = self.all_reduce_(tensor, "max").tolist()
        return result

    def table(self, *values: int) -> list[list[int]]:
        """The integers of every rank, one row a rank."""
        rows = torch.zeros(self.size, len(values), dtype=torch.int64, device=self.device)
        rows[self.rank] = torch.tensor(values)
        result: list[list[int]] = self.all_reduce_(rows).tolist()
        return result

    # --- errors ---

    def agree(self, function: str, **arguments: float) -> None:
        """Raise ValueError, on every rank, where an argument differs between ranks: they would part ways on it."""
        if self.size == 1:
            return
        values = list(arguments.values())
        both = self.max(*values, *(-value for value in values))
        for name, high, low in zip(arguments, both[: len(values)], both[len(values) :], strict=True):
            if high != -low:
                raise ValueError(f"{function}: {name}: expected the same on every rank, got {-low:g} to {high:g}")

    @contextmanager
    def deferred_interrupts(self) -> Iterator[None]:
        """Inside, Ctrl-C sets :attr:`interrupted` and nothing else: the ranks end together at a reduction point.

        An exception in the midst of an exchange would leave the others waiting. One that came too late for that is
        raised at the end, on all ranks.
        """
        main = threading.current_thread() is threading.main_thread()
        if self.size == 1 or self._defers or not main or signal.getsignal(signal.SIGINT) is None:
            yield
            return
        self._defers, self.interrupted = True, False
        before = signal.signal(signal.SIGINT, lambda *_: setattr(self, "interrupted", True))
        try:
            yield
            late = self.max(self.interrupted)[0] > 0
        finally:
            signal.signal(signal.SIGINT, before)
            self._defers = self.interrupted = False
        if late:
            raise KeyboardInterrupt

    @contextmanager
    def together(self) -> Iterator[None]:
        """Local work, such as checks, whose failure concerns all: what one rank raises inside, every rank raises.

        The work must not itself communicate. The message names the rank; one all-reduce of 8 bytes when all is well.
        """
        problem: Exception | None = None
        try:
            yield
        except RankError:
            raise
        except Exception as error:  # passed on below, here and to the others
            problem = error
        if self.size == 1:
            if problem is not None:
                raise problem
            return
        (code,) = self.max(0 if problem is None else self.size - self.rank)
        if code == 0:
            return
        source = self.size - int(code)
        kind = next((i for i, known in enumerate(_SHARED_ERRORS) if isinstance(problem, known)), -1)
        kind, message = self.broadcast_object((kind, str(problem)), source)
        if source == self.rank:
            if kind >= 0 and problem is not None and not isinstance(problem, ConvergenceError):
                raise _SHARED_ERRORS[kind](f"rank {source}: {message}") from problem
            assert problem is not None
            problem.add_note(f"on rank {source} of {self.size}")
            raise problem
        raise (_SHARED_ERRORS[kind] if kind >= 0 else KantorError)(f"rank {source}: {message}")

    def _call(self, name: str, operation: Callable[[], Any]) -> Any:
        if self._broken is not None:
            raise RankError(self._broken)
        try:
            return operation()
        except RuntimeError as error:  # gloo's, NCCL's and the store's
            self._broken = (
                f"rank {self.rank} of {self.size}: {name} failed: {_first_line(error)}; another rank died, kept the "
                "others waiting beyond the timeout of the process group, or took another path: look for the first "
                "error among the ranks' messages; for ranks that are merely slow raise the timeout in "
                "kantor.distributed.init"
            )
            raise RankError(self._broken) from error


class RankSums:
    """What native code calls at a reduction point: csrc/core/all_reduce.h.

    Parameters
    ----------
    ranks : Ranks
    systems : int
        Of the batch.
    like : Tensor
        A vector; the sums live on its device.
    """

    def __init__(self, ranks: Ranks, systems: int, like: Tensor) -> None:
        self._ranks = ranks
        self.sums = torch.zeros(4 * systems + 2, dtype=torch.float64, device=like.device)

    def __call__(self, count: int) -> None:
        """Sum the first `count` numbers over the ranks."""
        self._ranks.all_reduce_(self.sums[:count])

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C was pressed on this rank."""
        return self._ranks.interrupted


def together(ranks: Ranks | None) -> AbstractContextManager[None]:
    """:meth:`Ranks.together`, or nothing for one process without ranks."""
    return nullcontext() if ranks is None else ranks.together()


def largest(v: Tensor, ranks: Ranks | None) -> Tensor:
    """Per vector (..., n) its largest absolute entry, over all ranks, shape (..., 1)."""
    if ranks is None:
        return v.abs().amax(-1, keepdim=True)
    mine = v.abs().amax(-1, keepdim=True) if v.shape[-1] else v.new_zeros((*v.shape[:-1], 1))
    return ranks.all_reduce_(mine, "max")


def _first_line(error: Exception) -> str:
    """The library's first sentence, without the source file in front of it and the C++ stack behind."""
    line = str(error).strip().split("\n", 1)[0]
    return re.sub(r"^\[[^\]]*\.cc:\d+\]\s*", "", line).split(". ", 1)[0]
