"""What a graph checks of its arrays, once, when it is made."""

from __future__ import annotations

import torch
from torch import Tensor

from kantor import _C
from kantor._checks import check_float, check_tensor, host, is_readable


def check_types(rowptr: Tensor, col: Tensor, weight: Tensor) -> None:
    """Raise unless the three are tensors of the right dtypes and lengths, on one device."""
    for name, tensor in (("rowptr", rowptr), ("col", col), ("weight", weight)):
        check_tensor(tensor, "Graph", name)
        if tensor.ndim != 1:
            raise ValueError(f"Graph: {name}: expected one dimension, got shape {tuple(tensor.shape)}")
        if tensor.device != weight.device:
            raise ValueError(
                f"Graph: {name} is on {tensor.device}, weight on {weight.device}; move one with .to(device)"
            )
        if name != "weight" and tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"Graph: {name}: expected int32 or int64, got {str(tensor.dtype).removeprefix('torch.')}")
    check_float(weight, "Graph", "weight")
    if rowptr.numel() == 0:
        raise ValueError("Graph: rowptr: expected n + 1 entries for n nodes, got none")
    if col.numel() != weight.numel():
        raise ValueError(f"Graph: col has {col.numel()} entries, weight {weight.numel()}; they must match")
    if col.numel() >= 2**31 - 64:
        raise ValueError(f"Graph: col: expected fewer than 2^31 entries, got {col.numel()}; split the graph")


def narrow(name: str, index: Tensor) -> Tensor:
    """Return indices as contiguous int32; raise where they do not fit."""
    if index.dtype != torch.int32 and index.numel() and is_readable(index):
        low, high = int(index.min()), int(index.max())
        if not -(2**31) <= low <= high < 2**31:
            raise ValueError(f"Graph: {name}: {high if high >= 2**31 else low} is out of range")
    return index.to(torch.int32).contiguous()


def check_entries(rowptr: Tensor, col: Tensor, weight: Tensor) -> bool:
    """Whether all rows are sorted and without duplicates; raises where the structure is wrong."""
    n = rowptr.numel() - 1
    report = _C.csr_check(host(rowptr), host(col), host(weight), n)
    if (row := report["bad_row"]) >= 0:
        raise ValueError(
            f"Graph: rowptr: must start at 0, never decrease and end at {col.numel()}; it fails at row {row}"
        )
    if (entry := report["bad_entry"]) >= 0:
        raise ValueError(f"Graph: col: entry {entry} is {int(col[entry])}, outside 0..{n - 1}")
    if (entry := report["nonfinite_entry"]) >= 0:
        raise ValueError(f"Graph: weight: entry {entry} is {float(weight.detach()[entry])}; expected finite weights")
    return bool(report["sorted"])


def check_sign(function: str, argument: str, weight: Tensor) -> None:
    """Raise ValueError at the first negative weight, naming its entry; nothing where values cannot be looked at."""
    if is_readable(weight) and weight.numel() and bool((negative := weight.detach() < 0).any()):
        entry = int(negative.nonzero()[0, 0])
        raise ValueError(
            f"{function}: {argument}: entry {entry} is {float(weight.detach()[entry])}; expected weights that are not "
            "negative"
        )
