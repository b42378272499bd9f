"""Native passes over lists of tensors: one call, and on CUDA one launch, however many tensors there are."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kantor._ops import backend

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")


def run(
    name: str,
    lists: Sequence[Sequence[Tensor]],
    blocks: Sequence[int],
    numbers: Sequence[Sequence[float]],
    *arguments: int,
    whole_blocks: bool = False,
) -> None:
    """Call the native pass ``name`` (see ``csrc/optim/tensor_table.h``) on contiguous tensors of one dtype and device.

    Raises
    ------
    BackendUnavailable
        CUDA tensors, and a build without CUDA code.
    """
    native, like = backend(), lists[0][0]
    # Page-locked, so that the copy to the device does not wait, and kept by torch until it is done.
    table = torch.empty(len(blocks) * native.table_row_words, dtype=torch.int64, pin_memory=like.is_cuda)
    chunks = native.tensor_table(lists, blocks, numbers, whole_blocks, table)
    call = getattr(native, name)
    call(table.to(like.device, non_blocking=True), chunks, like, *arguments, torch.get_num_threads())


def buckets(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    """Items by their key, in order."""
    found: dict[Key, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def state_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which a parameter's state is kept and its step computed: float32 for half precision."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
