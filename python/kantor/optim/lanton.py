"""LANTON: norm-constrained steps (Muon, Scion) whose rate is smaller where a layer's gradient is noisier."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kantor.linalg.msign import check_msign_options
from kantor.optim._exact_state import load_exactly
from kantor.optim._lanton_checks import MSIGN_NAMES, check_group, check_parameters, check_second
from kantor.optim._lanton_step import BOOK, Layer, Ledger, update
from kantor.optim._multi_tensor import state_dtype
from kantor.optim.lmo import Ball, kind_of


class Noise(NamedTuple):
    """What :meth:`LANTON.noise_report` says about one parameter.

    Attributes
    ----------
    kind : str
        Its norm.
    noise : float
        H, the running mean of the squared dual norm of the difference of two gradients; NaN before the first.
    factor : float
        Of its rate: 1 for the quietest of its kind.
    skipped : int
        Steps left out because its gradient was not finite.
    """

    kind: str
    noise: float
    factor: float
    skipped: int


class LANTON(torch.optim.Optimizer):
    """Norm-constrained steps with noise-adaptive layerwise rates (Hao et al., arXiv 2510.14009).

    Each tensor's momentum goes through the linear minimisation oracle of its norm: orthogonalised matrices, signs for
    embeddings and output layers, normalised vectors. One optimiser for all parameters of a network. Tensors whose
    stochastic gradient is noisy, in the dual norm and beside the others of their kind, take smaller steps. With
    ``noise_adaptive=False`` it is Scion, or Muon where every kind is ``spectral``.

    Parameters
    ----------
    params : iterable of Parameter, of (name, Parameter), or of groups
        :func:`kantor.optim.lmo_param_groups` sorts those of a model. A group may have options of its own.
    lr : float
        Rate of the quietest tensor of each kind, in units of ``scale``.
    beta1 : float
        Of the momentum ``B = beta1 B + (1 - beta1) G``, which starts as the first gradient.
    beta2 : float
        Of the noise estimate H, for one step.
    alpha : float or "auto"
        Noise, as a dual norm, below which a rate is not reduced. Large values give fixed rates; towards 0 rates are
        ``lr (H_min / H)^(1/4)``. ``"auto"``: 1e-3 of the median of sqrt(H) of the kind, so that the scale of the loss
        does not matter.
    kind : str
        See :func:`kantor.optim.lmo`. ``"auto"``: ``spectral`` for matrices, but ``sign`` for those whose name says
        embedding or head; ``spectral_conv`` from three dimensions; ``rms`` for vectors.
    scale : float, optional
        Radius of the ball. Default: 10 for ``sign``, 0.3 for ``rms``, else 1.
    weight_decay : float
        Decoupled: ``X`` is first multiplied by ``1 - rate weight_decay``, with the tensor's own rate; 1 is Scion's
        constrained mode.
    nesterov : bool
        Steps along ``beta1 B + (1 - beta1) G`` instead of ``B``.
    second_gradient : {"previous", "independent"}
        The other gradient of the difference: that of the step before, or one of a fresh batch at the same parameters,
        given to :meth:`step`.
    noise_every : int
        H is measured every so many steps, with ``beta2**noise_every``: first at the second step (``"previous"``).
    noise_estimator : {"nuclear", "frobenius"}
        Dual norm of the difference for matrices: exact, at the price of a second polar factor, or its Frobenius norm
        times the ratio of the two norms of the momentum, which costs nothing.
    min_factor : float
        Least factor of a rate, from 0 to 1.
    msign_method, msign_steps, matmul_dtype
        See :func:`kantor.linalg.msign`: method, steps and dtype.
    noise_adaptive : bool
        Without, no noise is measured, all factors are 1, and no second gradient is kept.
    maximize : bool
        Go uphill.

    Raises
    ------
    ValueError
        An option out of range, or a kind that a tensor's shape does not fit.
    TypeError, NotImplementedError
        Parameters that are not floating-point; complex ones.

    Notes
    -----
    Memory: momentum and, with ``second_gradient="previous"``, one gradient: float32, or float64 for float64 parameters,
    and the matrices of one step. A step is one native pass over all tensors for the momenta, one batch of polar factors
    for each shape, and one native pass for the update. Nothing waits for the device. Tensors are compared with
    those of their kind on their device that step with them. Results are the same for any number of threads, except for
    torch's own matrix products, which :func:`kantor.linalg.msign` uses for large matrices.

    A tensor without a gradient, or whose gradient is zero, is left alone: no step, momentum and factor unchanged. One
    whose gradient is not finite, too; that is counted (``state["skipped"]``) and warned of once, on CUDA by
    :meth:`noise_report`, since looking costs a wait. bfloat16 and float16 parameters are computed in float32 and
    rounded. Schedulers of the rate work; those that would cycle the momentum too want ``cycle_momentum=False``. Under
    DistributedDataParallel gradients have been averaged when :meth:`step` sees them: all ranks agree.

    References
    ----------
    J. Hao, X. Gong, J. Xu, Z. Wang, M. Liu, *Noise-Adaptive Layerwise Learning Rates*, arXiv 2510.14009, Algorithm 1.
    T. Pethick et al., *Scion*, arXiv 2502.07529. K. Jordan et al., *Muon*, 2024.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import LANTON, lmo_param_groups
    >>> _ = torch.manual_seed(0)
    >>> x = torch.linspace(-1, 1, 64).view(-1, 1)
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> optimizer = LANTON(lmo_param_groups(net), lr=0.03)
    >>> for _ in range(200):
    ...     batch = x[torch.randint(64, (16,))]
    ...     optimizer.zero_grad()
    ...     loss = (net(batch) - torch.sin(3 * batch)).square().mean()
    ...     loss.backward()
    ...     optimizer.step()
    >>> bool((net(x) - torch.sin(3 * x)).square().mean() < 0.05)
    True
    >>> sorted(optimizer.noise_report())
    ['0.bias', '0.weight', '2.bias', '2.weight']
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        *,
        beta1: float = 0.95,
        beta2: float = 0.9,
        alpha: float | str = "auto",
        kind: str = "auto",
        scale: float | None = None,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        second_gradient: str = "previous",
        noise_every: int = 4,
        noise_estimator: str = "nuclear",
        min_factor: float = 1e-2,
        msign_method: str = "polar",
        msign_steps: int | None = None,
        matmul_dtype: torch.dtype | None = None,
        noise_adaptive: bool = True,
        maximize: bool = False,
    ) -> None:
        defaults = dict(locals())
        for name in ("self", "params", "__class__"):
            defaults.pop(name)
        self._ledgers: dict[Any, Ledger] = {}
        self._warned = False
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, which start without momentum.

        Parameters
        ----------
        param_group : dict
            ``params`` and options of its own.

        Raises
        ------
        ValueError, TypeError, NotImplementedError
            As the constructor.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group)
            check_parameters(group["params"])
            names = group.get("param_names", [None] * len(group["params"]))
            group["kinds"] = [
                kind_of(p, name) if group["kind"] == "auto" else group["kind"]
                for p, name in zip(group["params"], names, strict=True)
            ]
            for p, kind in zip(group["params"], group["kinds"], strict=True):
                Ball(kind, tuple(p.shape)).check("LANTON")
                check_msign_options("LANTON", "polar", None, group["matmul_dtype"], p.device, MSIGN_NAMES)
        except BaseException:
            self.param_groups.pop()
            raise

    # --- one step ---

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, second_grads: Sequence[Tensor | None] | None = None
    ) -> Any:
        """Make one step.

        Parameters
        ----------
        closure : callable, optional
            Computes the gradients and returns the loss.
        second_grads : sequence of Tensor or None, optional
            With ``second_gradient="independent"``: the gradients of a fresh batch at the same parameters, in the order
            of the parameters of all groups. Needed at the first step and every ``noise_every`` steps.

        Returns
        -------
        The loss, if there is a closure.

        Raises
        ------
        RuntimeError
            A sparse gradient; ``second_grads`` missing.
        TypeError, ValueError
            ``second_grads`` are no list of dense tensors of the parameters' shapes, or no group uses them.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layers = self._layers(second_grads)  # checks first: nothing has changed when it raises
        buckets: dict[Any, list[Layer]] = {}
        for layer in layers:
            layer.state["step"] += 1
            buckets.setdefault((layer.grad.device, layer.grad.dtype), []).append(layer)
        for bucket, members in buckets.items():
            members.sort(key=Layer.order)
            if bucket not in self._ledgers or not self._ledgers[bucket].belongs_to(members):
                self._ledgers[bucket] = Ledger(members)
            all_finite = update(members, self._ledgers[bucket])
            if all_finite is not None and members[0].grad.device.type == "cpu" and not bool(all_finite):
                self._warn_once()
        return loss

    def _layers(self, second_grads: Sequence[Tensor | None] | None) -> list[Layer]:
        """Collect the tensors that have a gradient, with new state where they have none."""
        total = sum(len(group["params"]) for group in self.param_groups)
        if second_grads is not None:
            if not isinstance(second_grads, list | tuple):
                raise TypeError(f"LANTON.step: second_grads: expected a list, got {type(second_grads).__name__}")
            if len(second_grads) != total:
                raise ValueError(
                    f"LANTON.step: second_grads: expected one for each of {total} parameters, got {len(second_grads)}"
                )
            if all(group["second_gradient"] != "independent" for group in self.param_groups):
                raise ValueError(
                    "LANTON.step: second_grads: no group uses them; make the optimiser with "
                    "second_gradient='independent', or leave them out"
                )
        layers: list[Layer] = []
        number = -1
        for group in self.param_groups:
            for p, kind in zip(group["params"], group["kinds"], strict=True):
                number += 1
                if p.grad is None or p.numel() == 0:
                    continue
                if p.grad.layout is not torch.strided:
                    raise RuntimeError(
                        f"LANTON.step: expected dense gradients, got layout {p.grad.layout}; use sparse=False, which "
                        "kind 'sign' handles"
                    )
                dtype = state_dtype(p)
                grad = p.grad.to(dtype).contiguous()
                layer = Layer(p, grad, group, Ball(kind, tuple(p.shape)), self.state.get(p, {}))
                if group["maximize"]:
                    layer.grad = -layer.grad
                layer.schedule()
                if layer.measures and group["second_gradient"] == "independent":
                    second = None if second_grads is None else second_grads[number]
                    if second is None:
                        raise RuntimeError(
                            "LANTON.step: second_grads: expected the gradients of a second batch, which "
                            "second_gradient='independent' needs at this step, got None"
                        )
                    check_second(second, p, number)
                    layer.second = second.detach().to(p.device, dtype).contiguous()
                    if group["maximize"]:
                        layer.second = -layer.second
                layers.append(layer)
        for layer in layers:
            layer.prepare()
            self.state[layer.p] = layer.state
        return layers

    # --- what it measured ---

    def noise_report(self) -> dict[str, Noise]:
        """Noise and rate factor of every parameter that has made a step, by name.

        Returns
        -------
        dict of str to Noise
            Names are those of named parameters, else ``group.index``. Waits for the device.

        Examples
        --------
        See :class:`LANTON`.
        """
        report: dict[str, Noise] = {}
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{number}.{i}" for i in range(len(group["params"]))]
            for p, name, kind in zip(group["params"], names, group["kinds"], strict=True):
                if p in self.state:
                    noise, factor, skipped = (float(self.state[p][key]) for key in ("noise", "factor", "skipped"))
                    report[name] = Noise(kind, noise, factor, int(skipped))
        if any(entry.skipped for entry in report.values()):
            self._warn_once()
        return report

    def _warn_once(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "LANTON: a gradient was not finite; its tensor was left alone, as it will be from now on. "
                "noise_report() counts such steps; a smaller rate or gradient clipping may help",
                RuntimeWarning,
                stacklevel=3,
            )

    # --- state ---

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run: as of any torch optimiser, on whatever device the parameters are.

        Parameters
        ----------
        state_dict : dict
            What ``state_dict()`` returned.

        Raises
        ------
        ValueError
            It belongs to another optimiser, or to parameters of other shapes or groups; nothing has changed then.
        """

        def check(groups: list[dict[str, Any]], states: list[dict[str, Any]]) -> None:
            parameters = [p for group in self.param_groups for p in group["params"]]
            kinds = [kind for group in groups for kind in group["kinds"]]
            for number, (p, kind, values) in enumerate(zip(parameters, kinds, states, strict=True)):
                where = f"LANTON.load_state_dict: parameter {number}"
                Ball(kind, tuple(p.shape)).check(where)
                if values and (missing := {"step", "momentum", *BOOK} - set(values)):
                    raise ValueError(
                        f"{where}: expected a state of LANTON, got one without {', '.join(sorted(missing))}"
                    )
                for name in ("momentum", "previous"):
                    if name in values and values[name].shape != p.shape:
                        raise ValueError(
                            f"{where}: {name}: expected shape {tuple(p.shape)}, got {tuple(values[name].shape)}; "
                            "the state belongs to another model"
                        )

        load_exactly(
            self, super().load_state_dict, state_dict, check,
            lambda p, name: torch.float64 if name in BOOK else state_dtype(p),
        )  # fmt: skip

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._ledgers = {}
        self._warned = False
