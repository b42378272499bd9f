"""One step of LANTON for the tensors of one device and dtype: Algorithm 1 of arXiv 2510.14009, for all at once.

Everything that depends on values stays on the device: `sums`, `book` and the rates are vectors with an entry for each
tensor. The tensors are sorted, so that those of a kind, and those of a kind and shape, are neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from kantor._ops import backend
from kantor.linalg.msign import iterate
from kantor.optim.lmo import DEFAULT_SCALE, MATRIX_KINDS, Ball, unit

# A tensor's entries of the book: noise H, NaN before it is known; factor of the rate; accepted and skipped gradients.
BOOK = ("noise", "factor", "accepted", "skipped")
_START = (math.nan, 1.0, 0.0, 0.0)


@dataclass(slots=True, eq=False)
class Layer:
    """A parameter that steps now."""

    p: Tensor
    grad: Tensor  # contiguous, float32 or float64
    group: dict[str, Any]
    ball: Ball
    state: dict[str, Any]
    second: Tensor | None = None  # the independent gradient
    measures: bool = False  # the noise, at this step
    keeps: bool = False  # this gradient, for the next

    def schedule(self) -> None:
        """Decide what happens to the gradient: kept at steps 1, 1 + k, ..., compared at the next ones."""
        if not self.group["noise_adaptive"]:
            return
        step, k = self.state.get("step", 0) + 1, self.group["noise_every"]
        if self.group["second_gradient"] == "independent":
            self.measures = (step - 1) % k == 0
        else:
            self.keeps = (step - 1) % k == 0
            self.measures = step >= 2 and (step - 2) % k == 0

    def prepare(self) -> None:
        """Make the state that is not there yet."""
        if "step" not in self.state:
            self.state["step"] = 0
            self.state["momentum"] = torch.zeros_like(self.grad)
            for name, value in zip(BOOK, _START, strict=True):
                self.state[name] = torch.tensor(value, dtype=torch.float64, device=self.grad.device)
        if self.keeps and "previous" not in self.state:
            self.state["previous"] = torch.zeros_like(self.grad)

    def order(self) -> tuple[Any, ...]:
        """Sort by kind, then by what one batch of polar factors has in common."""
        g = self.group
        options = (g["msign_method"], g["msign_steps"] or 0, str(g["matmul_dtype"]), g["noise_estimator"])
        return self.ball.kind, self.ball.shape, self.measures, options

    @property
    def compares_matrices(self) -> bool:
        """Whether the difference of the gradients itself is needed, not only its sums."""
        if not self.measures or self.ball.kind in ("sign", "rms"):
            return False
        return self.ball.kind not in MATRIX_KINDS or self.group["noise_estimator"] == "nuclear"


class Ledger:
    """The book of some layers as one tensor (4, n), of which the state of each layer has views."""

    def __init__(self, layers: list[Layer]) -> None:
        self.book = torch.stack([torch.stack([layer.state[name] for layer in layers]) for name in BOOK])
        self._views = [column.unbind() for column in self.book.T.unbind()]
        for layer, views in zip(layers, self._views, strict=True):
            layer.state.update(zip(BOOK, views, strict=True))

    def belongs_to(self, layers: list[Layer]) -> bool:
        """Whether these layers, in this order, have the views."""
        return len(layers) == len(self._views) and all(
            layer.state[name] is view
            for layer, views in zip(layers, self._views, strict=True)
            for name, view in zip(BOOK, views, strict=True)
        )


def update(layers: list[Layer], ledger: Ledger) -> Tensor | None:
    """Make one step; returns whether all gradients were finite, on the device."""
    noise, factor, accepted, skipped = ledger.book.unbind()
    buffers = _Buffers(layers)
    sums = _momentum(layers, buffers, accepted)
    marks = sums[:, 0]  # sum |G|
    finite = torch.isfinite(marks)
    active = finite & (marks > 0)
    directions, totals = buffers.oracles(sums)
    numbers = _numbers(layers, marks.device)
    if any(layer.measures for layer in layers):
        # H = beta2 H + (1 - beta2) dual^2, which the first value initialises.
        dual_square = (numbers.size * totals).square()
        measured = active & numbers.measures & ((accepted > 0) | numbers.independent) & dual_square.isfinite()
        decayed = torch.where(noise.isnan(), dual_square, torch.lerp(dual_square, noise, numbers.beta2))
        noise.copy_(torch.where(measured, decayed, noise))
        _factors(layers, noise, factor, numbers)
    accepted += active
    skipped += ~finite

    rate = numbers.lr * factor * active
    length = rate * numbers.scale * numbers.size
    norm = sums[:, 3].sqrt()  # |B|, by which the vectors are divided
    length = torch.where(numbers.normalises, torch.where(norm > 0, length / norm, 0.0), length)
    _apply(layers, directions, length, 1 - rate * numbers.weight_decay)
    return finite.all()


def _factors(layers: list[Layer], noise: Tensor, factor: Tensor, numbers: _Numbers) -> None:
    """Set eta_l / eta = sqrt(a_l / max_j a_j), a = alpha / sqrt(alpha^2 + H), over the tensors of each kind."""
    for _, first, end in _runs([layer.ball.kind for layer in layers]):
        H, alpha = noise[first:end], numbers.alpha[first:end]
        alpha = torch.where(alpha.isnan(), 1e-3 * H.sqrt().nanmedian(), alpha)
        square = alpha.square() + H
        a = torch.where(square > 0, alpha / square.sqrt(), torch.where(H.isnan(), 0.0, 1.0))
        values = (a / a.max()).sqrt().maximum(numbers.min_factor[first:end])
        factor[first:end] = torch.where(H.isnan(), 1.0, values)


# --- the native passes ---


def _momentum(layers: list[Layer], buffers: _Buffers, accepted: Tensor) -> Tensor:
    """Update momenta and kept gradients; returns (n, 4): sum |G|, sum D^2, sum |D|, sum B^2."""
    native = backend()
    flags = []
    previous = []
    for layer in layers:
        given = layer.second is not None
        flags.append(
            native.lmo_keep_gradient * layer.keeps
            | native.lmo_nesterov * bool(layer.group["nesterov"])
            | native.lmo_measure * layer.measures
            | native.lmo_previous_is_given * given
        )
        previous.append(layer.second if given else layer.state.get("previous"))
    sums = accepted.new_empty(len(layers), 4)
    work = accepted.new_empty(sum(native.lmo_work(layer.grad.numel()) for layer in layers))
    native.lmo_momentum(
        [layer.grad for layer in layers],
        [layer.state["momentum"] for layer in layers],
        buffers.inputs,
        previous,
        buffers.differences,
        [layer.group["beta1"] for layer in layers],
        flags,
        accepted,
        sums,
        work,
        torch.get_num_threads(),
    )
    return sums


def _apply(layers: list[Layer], directions: list[Tensor], lengths: Tensor, decays: Tensor) -> None:
    """X = decay X - length direction, in place, through a copy where X is of another dtype or not contiguous."""
    works = [
        layer.p.detach().to(layer.grad.dtype, memory_format=torch.contiguous_format).contiguous() for layer in layers
    ]
    signs = [layer.ball.kind == "sign" for layer in layers]
    backend().lmo_apply(works, directions, signs, lengths, decays, torch.get_num_threads())
    in_place = []
    for layer, work in zip(layers, works, strict=True):
        if work.dtype == layer.p.dtype and work.is_set_to(layer.p):
            in_place.append(layer.p)
        else:
            layer.p.copy_(work)
    torch.autograd.graph.increment_version(in_place)


class _Buffers:
    """Where the native pass writes what the oracles read: the matrices of a run stand in one stack."""

    def __init__(self, layers: list[Layer]) -> None:
        self._layers = layers
        self._stacks: list[Tensor | None] = []
        self._runs = list(_runs([layer.order() for layer in layers]))
        self.inputs: list[Tensor] = []
        self.differences: list[Tensor | None] = []
        for _, first, end in self._runs:
            members = layers[first:end]
            one = members[0]
            if one.ball.kind in MATRIX_KINDS:
                rows, columns = one.ball.matrix
                stack = one.grad.new_empty(len(members) * (1 + one.compares_matrices), rows, columns)
                slices = list(stack.unbind())
                self._stacks.append(stack)
                self.inputs += slices[: len(members)]
                self.differences += slices[len(members) :] or [None] * len(members)
            else:
                self._stacks.append(None)
                self.inputs += [
                    torch.empty_like(layer.grad) if layer.group["nesterov"] else layer.state["momentum"]
                    for layer in members
                ]
                self.differences += [
                    torch.empty_like(layer.grad) if layer.compares_matrices else None for layer in members
                ]

    def oracles(self, sums: Tensor) -> tuple[list[Tensor], Tensor]:
        """Directions, without their sizes, and the dual norms of the differences, likewise."""
        directions: list[Tensor] = []
        totals: list[Tensor] = []
        for (_, first, end), stack in zip(self._runs, self._stacks, strict=True):
            members, own = self._layers[first:end], sums[first:end]
            kind, count = members[0].ball.kind, end - first
            if stack is not None:
                group = members[0].group
                polar = iterate(stack, group["msign_method"], group["msign_steps"], group["matmul_dtype"]).contiguous()
                directions += polar[:count].unbind()
                # <A, msign(A)> of the differences, or of the momenta and then scaled to the differences
                totals.append(_inner(stack[-count:], polar[-count:]) if members[0].measures else own[:, 1])
                if members[0].measures and not members[0].compares_matrices:
                    totals[-1] = torch.where(own[:, 3] > 0, totals[-1] * (own[:, 1] / own[:, 3]).sqrt(), 0.0)
            elif kind in ("sign", "rms"):
                directions += self.inputs[first:end]
                totals.append(own[:, 2] if kind == "sign" else own[:, 1].sqrt())
            else:
                directions += [
                    unit(layer.ball, B, torch.sign) for layer, B in zip(members, self.inputs[first:end], strict=True)
                ]
                dim = 1 if kind == "row" else 0
                totals += [
                    own[i : i + 1, 1]
                    if D is None
                    else torch.linalg.vector_norm(D, dim=dim, dtype=torch.float64).sum().view(1)
                    for i, D in enumerate(self.differences[first:end])
                ]
        return directions, torch.cat(totals)


def _inner(A: Tensor, B: Tensor) -> Tensor:
    return (A * B).sum((1, 2), dtype=torch.float64)


# --- small things ---


@dataclass(slots=True)
class _Numbers:
    """Options and constants as vectors on the device."""

    lr: Tensor
    scale: Tensor
    size: Tensor
    weight_decay: Tensor
    beta2: Tensor
    alpha: Tensor  # NaN: automatic
    min_factor: Tensor
    measures: Tensor
    independent: Tensor
    normalises: Tensor


def _numbers(layers: list[Layer], device: torch.device) -> _Numbers:
    rows = []
    for layer in layers:
        g, kind = layer.group, layer.ball.kind
        rows.append(
            (
                float(g["lr"]),
                DEFAULT_SCALE[kind] if g["scale"] is None else g["scale"],
                layer.ball.size,
                g["weight_decay"],
                g["beta2"] ** g["noise_every"],
                math.nan if g["alpha"] == "auto" else g["alpha"],
                g["min_factor"],
                layer.measures,
                layer.second is not None,
                kind == "rms",
            )
        )
    columns = torch.tensor(rows, dtype=torch.float64, device=device).T.unbind()
    return _Numbers(*columns[:7], *(column > 0 for column in columns[7:]))


def _runs(keys: list[Any]) -> Iterator[tuple[Any, int, int]]:
    """Neighbours with equal keys: key, first, end."""
    end = 0
    for key, members in groupby(keys):
        first, end = end, end + len(list(members))
        yield key, first, end
