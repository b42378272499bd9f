"""Native inference of direction networks: the whole network in one call, without a temporary.

csrc/linalg/direction_net.h describes the network. On the CPU the 3^d convolutions are computed by Winograd's
F(2x2, 3x3), with ReLU, residual sums, pooling, upsampling and the last layer fused into them (csrc/linalg/winograd.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kantor._checks import check_finite, check_float, check_tensor
from kantor._ops import backend, declare

PRECISIONS = ("float32", "bfloat16", "tf32")


def _forward(r: Tensor, prepared: Tensor, mask: Tensor | None, workspace: Tensor, layout: list[int]) -> Tensor:
    q, threads, native = torch.empty_like(r), torch.get_num_threads(), backend()
    cells = layout[5] * layout[6] * layout[7]
    if r.numel():
        needed = native.direction_net_workspace_bytes(layout, r.numel() // cells, r, threads)
        if workspace.numel() < needed:
            workspace = workspace.new_empty(needed)
        native.direction_net(layout, prepared, mask, r, q, workspace, threads)
    return q


direction_net = declare(
    "direction_net(Tensor r, Tensor prepared, Tensor? mask, Tensor workspace, int[] layout) -> Tensor",
    forward=_forward,
    fake=lambda r, prepared, mask, workspace, layout: r.new_empty(r.shape),
    batched=("r",),
)


class PackedNet:
    """A direction network, ready to be applied many times: weights, and what the mask allows to skip, prepared once.

    Computes what the module computes with padding to even sizes, r zeroed and q zeroed outside of the mask.

    Parameters
    ----------
    net : torch.nn.Module
        With attributes ``dim`` (2 or 3), ``counts`` ``(pre, mid, post)`` and ``convolutions``, the convolutions in
        forward order: 1 to C channels, C to C, the residual pairs before pooling, one more, those of the coarse level,
        those after upsampling, and C to 1 with one weight a channel. C is a multiple of 4. The weights are copied:
        later changes are not seen.
    mask : Tensor, optional
        ``(ny, nx)`` or ``(nz, ny, nx)``, bool or uint8: nonzero on fluid cells. Default: all cells are.
    grid : sequence of int, optional
        Sizes of the grid where there is no mask. With neither, r must have the shape of the grid.
    precision : {"float32", "bfloat16", "tf32"}
        ``bfloat16``: activations and weights are rounded to 8 bits of mantissa, sums are float32. On CPUs without
        AVX512-BF16 it is computed in float32. ``tf32`` is for CUDA; the CPU then computes in float32.

    Raises
    ------
    TypeError
        Weights or mask are no tensors, or of a wrong dtype.
    ValueError
        Dimensions, counts, shapes or the precision do not fit; a weight is NaN or infinite.

    Notes
    -----
    About ``16 C^2 (pre + post + 1 + mid / 8)`` multiply-adds for a cell in 3-D, as many a second as the processor has
    fused multiply-adds; 2.25 activations of ``C`` numbers a cell of memory, kept between calls. Deterministic: the same
    bits for any number of threads, and with and without blocks of cells skipped. No gradients.

    The network is that of Kaneda, Akar, Chen, Kala, Hyde and Teran, "A Deep Conjugate Direction Method for Iteratively
    Solving Linear Systems" (2023), section 4.

    Examples
    --------
    >>> import torch
    >>> from kantor.linalg._conv_inference import PackedNet
    >>> conv = torch.nn.Conv2d
    >>> class Net(torch.nn.Module):
    ...     dim, counts = 2, (0, 1, 1)
    ...     def __init__(self):
    ...         super().__init__()
    ...         inner = [conv(8, 8, 3, padding=1, bias=False) for _ in range(6)]
    ...         self.convolutions = torch.nn.ModuleList(
    ...             [conv(1, 8, 3, padding=1, bias=False), *inner, conv(8, 1, 1, bias=False)]
    ...         )
    >>> packed = PackedNet(Net(), torch.ones(6, 10, dtype=torch.bool))
    >>> packed(torch.randn(6, 10)).shape
    torch.Size([6, 10])
    """

    def __init__(
        self,
        net: Any,
        mask: Tensor | None = None,
        *,
        grid: Sequence[int] | None = None,
        precision: str = "float32",
        _widest: int = 512,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"PackedNet: precision: expected one of {PRECISIONS}, got {precision!r}")
        self.dim, self.precision = int(net.dim), precision
        self.counts: tuple[int, ...] = tuple(int(n) for n in net.counts)
        self._widest = _widest
        if self.dim not in (2, 3):
            raise ValueError(f"PackedNet: net: expected dim 2 or 3, got {self.dim}")
        if len(self.counts) != 3 or self.counts[0] < 0 or min(self.counts[1:]) < 1:
            raise ValueError(
                f"PackedNet: net: expected counts (pre, mid, post), mid and post positive, got {self.counts}"
            )
        self._weights, self._biases = self._read(list(net.convolutions))
        self.channels = self._weights[0].shape[0]
        self.device = self._weights[0].device
        self.mask = None if mask is None else self._read_mask(mask)
        if mask is not None:
            if grid is not None and tuple(grid) != tuple(mask.shape):
                raise ValueError(
                    f"PackedNet: grid is {tuple(grid)}, mask has shape {tuple(mask.shape)}; give one of them"
                )
            grid = mask.shape
        self.grid = None if grid is None else self._checked_grid(tuple(int(n) for n in grid))
        self._prepared: dict[tuple[int, ...], Tensor] = {}
        self._workspaces: list[Tensor] = []  # those that no running call uses
        if self.grid is not None:
            self._prepare(self.grid)

    def __call__(self, r: Tensor) -> Tensor:
        """Apply the network.

        Parameters
        ----------
        r : Tensor
            ``(..., *grid)`` or ``(..., cells)``, float32 or float64, on the device of the weights. float64 is rounded
            to float32 and the result converted back. NaN and infinite values spread to the cells that they reach.

        Returns
        -------
        Tensor
            q, of the shape and dtype of r, contiguous.

        Raises
        ------
        TypeError
            r is no tensor, or neither float32 nor float64.
        ValueError
            Its shape or device does not fit, or it requires a gradient: detach it, or call the module instead.
        """
        check_tensor(r, "PackedNet", "r")
        check_float(r, "PackedNet", "r")
        if r.requires_grad and torch.is_grad_enabled():
            raise ValueError("PackedNet: r: expected a tensor without gradient; call r.detach(), or the network itself")
        if r.device != self.device:
            raise ValueError(f"PackedNet: r is on {r.device}, the weights on {self.device}; move one with .to(device)")
        grid = self._grid_of(r)
        layout, prepared = self._layout(grid), self._prepare(grid)
        # A list's pop and append are atomic: calls on several Python threads have a workspace each.
        try:
            workspace = self._workspaces.pop()
        except IndexError:
            workspace = prepared.new_empty(0)
        needed = backend().direction_net_workspace_bytes(layout, 1, prepared, torch.get_num_threads())
        if workspace.numel() < needed:
            workspace = prepared.new_empty(needed)
        try:
            q: Tensor = direction_net(r.detach().to(torch.float32), prepared, self.mask, workspace, layout)
        finally:
            self._workspaces.append(workspace)
        return q.to(r.dtype)

    def __repr__(self) -> str:
        """Say what it is."""
        grid = "any grid" if self.grid is None else "x".join(str(n) for n in self.grid)
        masked = "" if self.mask is None else ", masked"
        network = f"dim={self.dim}, channels={self.channels}, counts={self.counts}"
        return f"PackedNet({network}, {grid}{masked}, {self.precision})"

    def _read(self, convolutions: list[Any]) -> tuple[list[Tensor], list[Tensor | None]]:
        """Copies of the weights and biases in float32, contiguous, checked."""
        count = 4 + 2 * sum(self.counts)
        if len(convolutions) != count:
            raise ValueError(
                f"PackedNet: net: expected {count} convolutions for counts {self.counts}, got {len(convolutions)}"
            )
        channels = int(check_tensor(convolutions[0].weight, "PackedNet", "weight").shape[0])
        if channels % 4 or not 4 <= channels <= 1024:
            raise ValueError(f"PackedNet: net: expected channels to be a multiple of 4 up to 1024, got {channels}")
        weights: list[Tensor] = []
        biases: list[Tensor | None] = []
        for k, convolution in enumerate(convolutions):
            last = k + 1 == count
            out, into = 1 if last else channels, 1 if k == 0 else channels
            name = f"weight of convolution {k}"
            weight = check_tensor(convolution.weight, "PackedNet", name)
            expected = (out, into, *((1 if last else 3,) * self.dim))
            if tuple(weight.shape) != expected:
                raise ValueError(f"PackedNet: {name}: expected shape {expected}, got {tuple(weight.shape)}")
            weights.append(self._copy(weight, name))
            bias = convolution.bias
            if bias is not None and tuple(bias.shape) != (out,):
                raise ValueError(
                    f"PackedNet: bias of convolution {k}: expected shape {(out,)}, got {tuple(bias.shape)}"
                )
            biases.append(None if bias is None else self._copy(bias, f"bias of convolution {k}"))
        return weights, biases

    @staticmethod
    def _copy(parameter: Tensor, name: str) -> Tensor:
        if not parameter.is_floating_point():
            raise TypeError(f"PackedNet: {name}: expected a floating-point dtype, got {parameter.dtype}")
        check_finite(parameter, "PackedNet", name)
        return parameter.detach().to(torch.float32, copy=True).contiguous()

    def _read_mask(self, mask: Tensor) -> Tensor:
        check_tensor(mask, "PackedNet", "mask")
        if mask.dtype not in (torch.bool, torch.uint8):
            raise TypeError(
                f"PackedNet: mask: expected dtype bool or uint8, got {str(mask.dtype).removeprefix('torch.')}"
            )
        if mask.device != self.device:
            raise ValueError(
                f"PackedNet: mask is on {mask.device}, the weights on {self.device}; move one with .to(device)"
            )
        return (mask != 0).to(torch.uint8).contiguous()

    def _checked_grid(self, grid: tuple[int, ...]) -> tuple[int, ...]:
        if len(grid) != self.dim:
            raise ValueError(f"PackedNet: grid: expected {self.dim} sizes for a {self.dim}-D network, got {grid}")
        if min(grid) < 1:
            raise ValueError(f"PackedNet: grid: expected positive sizes, got {grid}")
        return grid

    def _grid_of(self, r: Tensor) -> tuple[int, ...]:
        if self.grid is None:
            if r.ndim < self.dim:
                raise ValueError(
                    f"PackedNet: r: expected at least {self.dim} dimensions, got shape {tuple(r.shape)}; give the "
                    "grid at construction to pass flat vectors"
                )
            return self._checked_grid(tuple(r.shape[-self.dim :]))
        cells = 1
        for n in self.grid:
            cells *= n
        if tuple(r.shape[-self.dim :]) != self.grid and (r.ndim == 0 or r.shape[-1] != cells):
            raise ValueError(
                f"PackedNet: r: expected shape (..., {', '.join(map(str, self.grid))}) or (..., {cells}), got "
                f"{tuple(r.shape)}"
            )
        return self.grid

    def _layout(self, grid: tuple[int, ...]) -> list[int]:
        sizes = (1,) * (3 - self.dim) + grid
        return [self.dim, self.channels, *self.counts, *sizes, PRECISIONS.index(self.precision), self._widest]

    def _prepare(self, grid: tuple[int, ...]) -> Tensor:
        """What the native code makes of the weights and the mask."""
        if grid not in self._prepared:
            layout, native, like = self._layout(grid), backend(), self._weights[0]
            size = native.direction_net_prepared_bytes(layout, self.mask is not None, like)
            prepared = torch.empty(size, dtype=torch.uint8, device=self.device)
            native.prepare_direction_net(
                layout, self._weights, self._biases, self.mask, prepared, torch.get_num_threads()
            )
            self._prepared[grid] = prepared
        return self._prepared[grid]
