"""M-FAC as a torch optimiser: natural gradients from a window of the last m gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from kantor._checks import check_same, check_tensor
from kantor.optim._fisher_checks import check_options
from kantor.optim._multi_tensor import state_dtype
from kantor.optim.empirical_fisher import EmpiricalFisher


class MFAC(torch.optim.Optimizer):
    """Natural gradients with the full empirical Fisher matrix of the last m gradients (M-FAC, arXiv 2107.03356).

    For models of 1e5 to 1e8 parameters of any architecture: the curvature is neither diagonal nor factored by layers,
    needs no second derivatives, and costs two passes over the m gradients a step.

    Parameters
    ----------
    params : iterable of Parameter, or of groups
        Real, dense, on one device. Groups may have their own ``lr, momentum, weight_decay, maximize``; the curvature is
        that of all groups together.
    lr : float
        Step length.
    momentum : float
        In [0, 1), of the preconditioned direction: ``v = momentum v + (1 - momentum) u``.
    weight_decay : float
        Added to the gradient, times the parameter, before it enters the window.
    m : int
        Gradients in the window, any number.
    damping : float
        lambda > 0 of ``F = lambda I + (1/m) sum_i g_i g_i'``.
    block_size : int, optional
        Coordinates of a block of F; see :class:`EmpiricalFisher`.
    storage_dtype : dtype, optional
        Of the stored gradients: float32, float64, bfloat16, float16 or int8. Default: float64 where all parameters are
        float64, else float32.
    sparse_mask : True or sequence of bool tensors, optional
        What may change, one mask a parameter in the order of the groups (None: all of it). True: what is not zero at
        the first step; biases that begin at zero need masks. Zeros of a pruned model stay exactly zero.
    divisor : {"window", "mean"}
        Of the sum: m from the first step on, as published, or the number of gradients there are.
    maximize : bool
        Ascend.
    factor, on_nonfinite, max_bytes
        See :class:`EmpiricalFisher`. With ``on_nonfinite="skip"`` a step with such a gradient does nothing.
    process_group : torch.distributed.ProcessGroup, optional
        Under data parallelism, where all ranks have the same gradients: each keeps the window of its slice of the
        coordinates only. Checkpoints are then one a rank.

    Attributes
    ----------
    fisher : EmpiricalFisher or None
        The window, made at the first step.

    Raises
    ------
    ValueError, TypeError
        Options out of range; at a step, parameters on several devices, complex ones, sparse gradients, or a gradient
        that is not finite: parameters and state are then as before.
    MemoryError
        At the first step: the window would not fit.

    Notes
    -----
    One step reads the m gradients twice, ``2 m d`` numbers, and factorises an m x m matrix. Parameters whose gradient
    is None keep their value and momentum, and count as zeros in the gradient. Gradient clipping, GradScaler, schedulers
    and ``DistributedDataParallel`` work as with torch's optimisers.

    Until the window is full, F is small with ``divisor="window"`` and first steps are long: begin with a small lr, or
    with ``divisor="mean"``.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import MFAC
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(256, 5)
    >>> y = x @ torch.arange(5.0)
    >>> net = torch.nn.Linear(5, 1)
    >>> optimizer = MFAC(net.parameters(), lr=0.3, m=16, damping=1.0)
    >>> for _ in range(300):
    ...     optimizer.zero_grad()
    ...     loss = (net(x).squeeze(1) - y).square().mean()
    ...     loss.backward()
    ...     _ = optimizer.step()
    >>> bool(loss < 1e-2)
    True
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        m: int = 1024,
        damping: float = 1e-5,
        block_size: int | None = None,
        storage_dtype: torch.dtype | None = None,
        sparse_mask: Any = None,
        divisor: Literal["window", "mean"] = "window",
        maximize: bool = False,
        factor: Literal["refactor", "update"] = "refactor",
        on_nonfinite: Literal["raise", "skip"] = "raise",
        max_bytes: int | None = None,
        process_group: Any = None,
    ) -> None:
        check_options(m, damping, block_size, storage_dtype, divisor, factor, on_nonfinite, function="MFAC")
        self.fisher: EmpiricalFisher | None = None
        self._options: dict[str, Any] = {
            "m": m,
            "damping": damping,
            "block_size": block_size,
            "storage_dtype": storage_dtype,
            "divisor": divisor,
            "factor": factor,
            "on_nonfinite": on_nonfinite,
            "max_bytes": max_bytes,
        }
        self._group = process_group
        self._sparse_mask = sparse_mask
        self._mask: Tensor | None = None
        self._dim = self._begin = self._end = self._length = 0  # of all coordinates, of this rank's, of any rank's
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "maximize": maximize})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, before the first step."""
        if self.fisher is not None:
            raise ValueError("MFAC.add_param_group: the window has its size already; make a new optimiser")
        group = self.defaults | param_group
        for name, fits in (
            ("lr", group["lr"] >= 0),
            ("momentum", 0 <= group["momentum"] < 1),
            ("weight_decay", group["weight_decay"] >= 0),
        ):
            if not fits:
                expected = "a number in [0, 1)" if name == "momentum" else "a number >= 0"
                raise ValueError(f"MFAC: {name}: expected {expected}, got {group[name]!r}")
        super().add_param_group(param_group)

    # --- one step ---

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step: ``g`` into the window, ``u = F^-1 g``, ``v = mu v + (1 - mu) u``, ``theta -= lr v``.

        Parameters
        ----------
        closure : callable, optional
            Evaluates the model again and returns the loss, which is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if all(p.grad is None for group in self.param_groups for p in group["params"]):
            return loss
        fisher = self._window()
        if fisher.push(self._slice(self._gradient())):
            self._update(self._whole(fisher.ihvp_last()))
        return loss

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _window(self) -> EmpiricalFisher:
        if self.fisher is None:
            parameters = self._parameters()
            for number, p in enumerate(parameters):
                if not p.is_floating_point():
                    raise TypeError(f"MFAC: params[{number}]: expected a real floating-point dtype, got {p.dtype}")
                if p.device != parameters[0].device:
                    check_same("MFAC", [("params[0]", parameters[0]), (f"params[{number}]", p)])
            self._dim = sum(p.numel() for p in parameters)
            all_double = all(p.dtype == torch.float64 for p in parameters)
            self._begin, self._end = self._share()
            options = dict(self._options)
            options["storage_dtype"] = options["storage_dtype"] or (torch.float64 if all_double else torch.float32)
            self._mask = self._flat_mask(parameters)
            self.fisher = EmpiricalFisher(
                dim=self._end - self._begin, device=parameters[0].device, process_group=self._group, **options
            )
        return self.fisher

    def _gradient(self) -> Tensor:
        """All coordinates, in the window's dtype; the parameters' own gradients are not changed."""
        fisher = self._window()
        parts: list[Tensor] = []
        for group in self.param_groups:
            gradients = [self._dense(p).to(fisher.dtype) for p in group["params"]]
            if group["maximize"]:
                gradients = list(torch._foreach_neg(gradients))
            if group["weight_decay"]:
                gradients = list(torch._foreach_add(gradients, group["params"], alpha=float(group["weight_decay"])))
            parts += [gradient.reshape(-1) for gradient in gradients]
        flat = torch.cat(parts)
        return flat if self._mask is None else flat.mul_(self._mask)

    @staticmethod
    def _dense(p: Tensor) -> Tensor:
        if p.grad is None:
            return torch.zeros_like(p)
        if p.grad.layout is not torch.strided:
            raise TypeError(f"MFAC.step: expected dense gradients, got layout {p.grad.layout}; use sparse=False")
        return p.grad

    def _update(self, u: Tensor) -> None:
        at = 0
        for group in self.param_groups:
            parameters, directions = [], []
            for p in group["params"]:
                if p.grad is not None:
                    parameters.append(p)
                    directions.append(u[at : at + p.numel()].view(p.shape))
                at += p.numel()
            mu = float(group["momentum"])
            if mu and parameters:
                for p in parameters:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros(p.shape, dtype=state_dtype(p), device=p.device)
                buffers = [self.state[p]["momentum_buffer"] for p in parameters]
                torch._foreach_mul_(buffers, mu)
                torch._foreach_add_(buffers, directions, alpha=1 - mu)
                directions = buffers
            if parameters:
                torch._foreach_add_(parameters, directions, alpha=-float(group["lr"]))

    def _flat_mask(self, parameters: list[Tensor]) -> Tensor | None:
        masks = self._sparse_mask
        if masks is None or masks is False:
            return None
        masks = [p != 0 for p in parameters] if masks is True else list(masks)
        if len(masks) != len(parameters):
            raise ValueError(f"MFAC: sparse_mask: expected {len(parameters)} masks, got {len(masks)}")
        for number, (mask, p) in enumerate(zip(masks, parameters, strict=True)):
            if mask is None:
                masks[number] = torch.ones_like(p, dtype=torch.bool)
            elif check_tensor(mask, "MFAC", f"sparse_mask[{number}]").shape != p.shape:
                raise ValueError(
                    f"MFAC: sparse_mask[{number}]: expected shape {tuple(p.shape)}, got {tuple(mask.shape)}"
                )
        return torch.cat([mask.reshape(-1).to(parameters[0].device).bool() for mask in masks])

    # --- a slice of the coordinates on each rank ---

    def _share(self) -> tuple[int, int]:
        """Coordinates of the rank: equal numbers of whole blocks, but for the last ranks."""
        if self._group is None:
            return 0, self._dim
        ranks, rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        unit = self._options["block_size"] or 1
        self._length = -(-self._dim // (ranks * unit)) * unit
        if self._length * (ranks - 1) >= self._dim:
            raise ValueError(f"MFAC: process_group: {self._dim} coordinates do not give each of {ranks} ranks a block")
        return rank * self._length, min(self._dim, (rank + 1) * self._length)

    def _slice(self, flat: Tensor) -> Tensor:
        return flat if self._group is None else flat[self._begin : self._end]

    def _whole(self, u: Tensor) -> Tensor:
        if self._group is None:
            return u
        mine = torch.zeros(self._length, dtype=u.dtype, device=u.device)
        mine[: u.numel()] = u
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(parts, mine, group=self._group)
        return torch.cat(parts)[: self._dim]

    # --- state ---

    def __getstate__(self) -> dict[str, Any]:
        own = ("fisher", "_options", "_group", "_sparse_mask", "_mask", "_dim", "_begin", "_end", "_length")
        return super().__getstate__() | {name: self.__dict__[name] for name in own}

    def state_dict(self) -> dict[str, Any]:
        """Return what torch's optimisers return, and the window under ``"fisher"``."""
        state = super().state_dict()
        state["fisher"] = None if self.fisher is None else self.fisher.state_dict()
        state["mask"] = self._mask
        return state

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where another optimiser stopped, bit for bit; from any device.

        Raises
        ------
        ValueError
            The state belongs to other parameters or another window; nothing is changed.
        """
        if missing := {"state", "param_groups", "fisher", "mask"} - set(state_dict):
            raise ValueError(
                "MFAC.load_state_dict: expected the state of an MFAC, got one without " + ", ".join(sorted(missing))
            )
        saved, made = state_dict["fisher"], self.fisher
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        states = [state_dict["state"].get(number, {}) for number in numbers]
        for number, (state, p) in enumerate(zip(states, self._parameters(), strict=False)):  # torch compares lengths
            v = state.get("momentum_buffer", p)
            if v.shape != p.shape:
                raise ValueError(
                    f"MFAC.load_state_dict: params[{number}]: expected momentum of shape {tuple(p.shape)}, "
                    f"got {tuple(v.shape)}; give the parameters in the order in which they were when it was saved"
                )
        try:
            if saved is not None:
                self._window().check_state(saved)
            super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        except ValueError:
            self.fisher = made
            raise
        for state, p in zip(states, self._parameters(), strict=True):
            if "momentum_buffer" in state:  # torch has converted it to the parameter's dtype
                self.state[p]["momentum_buffer"] = state["momentum_buffer"].to(p.device, state_dtype(p), copy=True)
        if saved is None:
            self.fisher = None  # as before a first step
        else:
            fisher = self._window()
            fisher.load_state_dict(saved)
            self._mask = None if state_dict["mask"] is None else state_dict["mask"].to(fisher.device)
