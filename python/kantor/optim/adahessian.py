"""AdaHessian: Adam whose denominators are the diagonal of the Hessian instead of the squared gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kantor.optim._adahessian_checks import (
    COMMON,
    check_gradients,
    check_group,
    check_parameter,
    check_probes,
    check_state,
)
from kantor.optim._exact_state import load_exactly
from kantor.optim._hessian_products import cut_graphs, evaluate, products
from kantor.optim._multi_tensor import buckets, run, state_dtype
from kantor.optim._ranks import all_finite, mean_over_ranks, shared
from kantor.optim.hessian_diagonal import Block, block_size, draw_seed, rademacher

_BOTH_WAYS = (
    "expected gradients with a graph, as this step renews the curvature: either return the loss from a closure, "
    "step(closure), without calling backward() on it; or call loss.backward(create_graph=True) before step()"
)


class AdaHessian(torch.optim.Optimizer):
    """Adaptive diagonal second-order training (Yao et al., AAAI 2021, arXiv 2006.00719).

    Adam with the squared gradient replaced by the squared diagonal of the Hessian, estimated with one Hessian-vector
    product a step, averaged over small blocks of each parameter and smoothed over steps. Two vectors of state.

    Parameters
    ----------
    params : iterable of Parameter, of (name, Parameter), or of groups
        Of any real floating-point dtypes, on any devices. Groups may have their own ``lr, betas, eps, weight_decay,
        hessian_power, block, max_update, maximize``.
    lr : float
        Step length. Much larger than Adam's: 0.05 to 0.15 is usual.
    betas : (float, float)
        Decay of the averages of the gradient and of the squared curvature.
    eps : float
        Added to the denominator. What has no curvature, such as a parameter in which the loss is linear, moves by
        ``lr / eps`` times its gradient: see ``max_update``. With 0, it stands still.
    weight_decay : float
        Each step shrinks parameters by ``lr * weight_decay``, apart from the gradient.
    hessian_power : float
        k in [0, 1]: the power of the curvature in the denominator. 0 is momentum SGD.
    block : "auto", "row", int or dict
        Over which consecutive entries of a parameter the curvature is averaged. ``"auto"``: a convolution's window, and
        no averaging for vectors and matrices; ``"row"``: rows of matrices too, often better for transformers; a number
        that divides the parameter's entries; or one of these for each number of dimensions.
    update_period : int
        Steps between two estimates of the curvature. 5 costs little more than Adam.
    first_estimates : int
        Estimates that a parameter gets in a row before `update_period` begins to count. A single one, of one probe,
        takes some entries for flat by chance, and would rule several steps; 1 is the published rule.
    n_samples : int
        Probes in an estimate, one Hessian-vector product each. Signed products are averaged, which makes for smaller
        denominators and longer steps.
    max_update : float, optional
        Bound of ``|m / denominator|``, so that a step moves no entry by more than ``lr * max_update``.
    skip_nonfinite : bool
        Leave parameters and state alone where the loss, a gradient or the squared curvature is not finite, and
        set ``last_step_skipped``. Looking costs a wait for the device.
    generator, seed : torch.Generator, int, optional
        Where the seed of the probes is drawn from, or the seed itself. Default: torch's generator.
    process_group : "auto", None or ProcessGroup
        Over whose ranks the products are averaged (and the gradients of a closure). ``"auto"``: all, where
        torch.distributed is initialised. None: every rank for itself. Use a closure, with a model under
        DistributedDataParallel or not: ``backward(create_graph=True)`` is not supported by it.
    maximize : bool
        Climb instead.

    Attributes
    ----------
    refresh_due : bool
        Whether the next step renews the curvature and so needs a graph.
    last_step_skipped : bool
        Whether the last step left everything alone: gradients overflowed under a GradScaler, or ``skip_nonfinite``.

    Raises
    ------
    ValueError, TypeError, RuntimeError, NotImplementedError
        Options out of range; a block that does not divide; sparse or complex parameters.

    Notes
    -----
    Step t, counted from 0, with the curvature renewed at t < `first_estimates` and every ``update_period`` steps from
    then on::

        D = blockmean |z * H z|,   v = b2 v + (1 - b2) D^2
        m = b1 m + (1 - b1) g
        theta = theta - lr ( m / (1 - b1^t) / ((v / (1 - b2^refreshes))^(k/2) + eps) + weight_decay theta )

    A Hessian-vector product costs about two more backward passes. State: ``m`` and ``v`` per parameter, in at least
    float32; v has one entry for each block. On the CPU the same bits for any number of threads; probes depend on the
    seed, the parameter's position and its number of estimates, not on the device.

    A parameter whose first gradient comes between two estimates begins at its next gradient, with an estimate. One is
    made as soon as any parameter has made ``update_period`` steps on its last, unless that has had no gradient for as
    long: frozen ones do not count.

    Examples
    --------
    >>> import torch
    >>> from kantor.optim import AdaHessian
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(256, 2)
    >>> y = (x[:, 0] * x[:, 1] > 0).long()
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
    >>> optimizer = AdaHessian(net.parameters(), lr=0.15)
    >>> for _ in range(200):
    ...     loss = optimizer.step(lambda: torch.nn.functional.cross_entropy(net(x), y))
    >>> bool(loss < 0.2)
    True

    In a loop that calls ``backward()`` itself:

    >>> for _ in range(5):
    ...     optimizer.zero_grad()
    ...     loss = torch.nn.functional.cross_entropy(net(x), y)
    ...     loss.backward(create_graph=optimizer.refresh_due)
    ...     optimizer.step()
    """

    _step_supports_amp_scaling = True  # a GradScaler hands grad_scale and found_inf over as attributes

    last_step_skipped = False
    _process_group: Any = "auto"
    _seed_is_shared = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        *,
        hessian_power: float = 1.0,
        block: Block = "auto",
        update_period: int = 1,
        first_estimates: int = 3,
        n_samples: int = 1,
        max_update: float | None = None,
        skip_nonfinite: bool = False,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        process_group: Any = "auto",
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_power": hessian_power,
            "block": block,
            "update_period": update_period,
            "first_estimates": first_estimates,
            "n_samples": n_samples,
            "max_update": max_update,
            "skip_nonfinite": skip_nonfinite,
            "maximize": maximize,
            "seed": draw_seed(generator) if seed is None else seed,
        }
        check_group(defaults)
        if isinstance(process_group, str) and process_group != "auto":
            raise ValueError(f"AdaHessian: process_group: expected 'auto', None or a group, got {process_group!r}")
        self._process_group = process_group
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with the optimiser's options where it has none of its own.

        Raises
        ------
        ValueError, RuntimeError, NotImplementedError
            As for the constructor, which adds its groups through this.
        """
        first = self.param_groups[0] if self.param_groups else self.defaults
        if isinstance(param_group, dict):
            param_group = {name: first[name] for name in COMMON} | param_group
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group, first)
            before = sum(len(each["params"]) for each in self.param_groups[:-1])
            for number, p in enumerate(group["params"]):
                check_parameter(p, before + number)
                block_size(p, group["block"], f"AdaHessian: params[{before + number}]")
        except Exception:
            self.param_groups.pop()
            raise

    @property
    def refresh_due(self) -> bool:
        """Whether the next step renews the curvature and so needs a graph."""
        period, first = self.param_groups[0]["update_period"], self.param_groups[0]["first_estimates"]
        used = [state for state in self.state.values() if state["idle"] < period]
        return not self.state or any(state["t_h"] < first or state["age"] >= period for state in used)

    # --- one step ---

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], Tensor] | None = None,
        *,
        probes: Sequence[Tensor] | None = None,
        grad_scale: Tensor | float | None = None,
    ) -> Tensor | None:
        """Make one step.

        Parameters
        ----------
        closure : callable, optional
            ``closure()`` computes the loss, with its graph, and returns it; ``.grad`` is then neither read nor written.
            It may also call ``backward(create_graph=True)``, and clip. Without one, ``.grad`` must come from
            ``loss.backward(create_graph=True)`` where :attr:`refresh_due`; its graph is cut off afterwards.
        probes : sequence of Tensor, optional
            z, like all parameters in order, in the place of random signs; one sample.
        grad_scale : Tensor or float, optional
            What the loss was multiplied by. A GradScaler says so itself, except after ``unscale_``: then gradients are
            right and their graph is not, and this is its scale: ``scaler.step(optimizer,
            grad_scale=scaler.get_scale())``.

        Returns
        -------
        Tensor or None
            The closure's loss before the step.

        Raises
        ------
        RuntimeError
            No graph where one is needed; an operation that cannot be differentiated twice.
        TypeError, ValueError
            The closure returns no scalar tensor; probes do not fit.
        """
        parameters = self._parameters()
        if probes is not None:
            check_probes(probes, parameters)
        gradient_factor, product_factor = self._factors(grad_scale)
        self.last_step_skipped = bool(getattr(self, "found_inf", None))
        if self.last_step_skipped:
            cut_graphs(parameters)
            return None
        due = self.refresh_due
        group = self._group_of_ranks()
        loss, gradients, own = evaluate(closure, parameters, due)
        curvatures: list[Tensor | None] = [None] * len(parameters)
        try:
            check_gradients(gradients)
            if due:
                given = [g for g in gradients if g is not None]
                if given and not own and not any(g.requires_grad for g in given):
                    raise RuntimeError(f"AdaHessian.step: {_BOTH_WAYS}")
                curvatures = self._products(parameters, gradients, probes, signed=group is not None)
        finally:
            cut_graphs(parameters)
        gradients = [None if g is None else g.detach() for g in gradients]
        if group is not None:
            if own:
                gradients = mean_over_ranks(gradients, parameters, group)
            if due:
                curvatures = mean_over_ranks(curvatures, parameters, group)
        if self.param_groups[0]["skip_nonfinite"]:
            squares = [None if u is None else (product_factor * u).square() for u in curvatures]
            if not all_finite([loss, *gradients, *squares], group):
                self.last_step_skipped = True
                return loss
        if due:
            self._renew_curvature(curvatures, product_factor)
        self._move(gradients, gradient_factor)
        return loss

    def _products(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor | None],
        probes: Sequence[Tensor] | None,
        *,
        signed: bool,
    ) -> list[Tensor | None]:
        """The mean of z * H z over the samples; for a single sample H z will do, which differs in signs alone."""
        seed, samples = self.param_groups[0]["seed"], self.param_groups[0]["n_samples"]
        if probes is not None:
            return products(gradients, parameters, [lambda inputs: [probes[i] for i in inputs]], self._name)

        def signs(sample: int, inputs: list[int]) -> list[Tensor]:
            counters = [(i, self.state.get(parameters[i], {}).get("t_h", 0), sample) for i in inputs]
            return rademacher([parameters[i] for i in inputs], seed, counters)

        draws = [partial(signs, sample) for sample in range(samples)]
        return products(gradients, parameters, draws, self._name, signed=signed or samples > 1)

    def _renew_curvature(self, products: list[Tensor | None], factor: float) -> None:
        """v = b2 v + (1 - b2) D^2 where there is a product."""
        items = []
        for (p, group), u in zip(self._with_groups(), products, strict=True):
            if u is None:
                continue
            state, beta2 = self._state_of(p, group), group["betas"][1]
            state["t_h"] += 1
            state["age"] = 0
            items.append((u.to(state["v"].dtype).contiguous(), state["v"], (beta2, 1 - beta2, factor)))
        for some in buckets(items, lambda item: (item[1].device, item[1].dtype)).values():
            u_list, v_list, numbers = map(list, zip(*some, strict=True))
            blocks = [_ratio(u, v) for u, v, _ in some]
            run("average_curvature", [u_list, v_list], blocks, numbers, whole_blocks=True)

    def _move(self, gradients: list[Tensor | None], factor: float) -> None:
        """m = b1 m + (1 - b1) g, and the step, where there is a gradient and curvature."""
        items = []
        for (p, group), g in zip(self._with_groups(), gradients, strict=True):
            if g is None:
                if p in self.state:
                    self.state[p]["idle"] += 1
                continue
            state = self._state_of(p, group)
            state["idle"] = 0
            if state["t_h"] == 0:
                continue
            state["t"] += 1
            state["age"] += 1
            dtype = state["m"].dtype
            theta = p.detach().to(dtype).contiguous()  # itself, where it is that already
            g = g.to(dtype).contiguous()
            items.append((p, theta, g, state["m"], state["v"], _numbers(group, state, factor)))
        for some in buckets(items, lambda item: (item[1].device, item[1].dtype)).values():
            ps, *lists, numbers = map(list, zip(*some, strict=True))
            run("adahessian_step", lists, [_ratio(item[1], item[4]) for item in some], numbers)
            for p, theta, *_ in some:
                if theta.dtype != p.dtype or not theta.is_set_to(p):
                    p.copy_(theta)
            torch.autograd.graph.increment_version(ps)

    # --- state ---

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, whatever the device it was saved on. Averages keep their precision.

        Raises
        ------
        ValueError
            The state of another optimiser, of parameters of another shape, or of other blocks; nothing is changed.
        """

        def check(groups: list[dict[str, Any]], states: list[dict[str, Any]]) -> None:
            blocks = [group["block"] for group in groups for _ in group["params"]]
            for number, (p, state, block) in enumerate(zip(self._parameters(), states, blocks, strict=True)):
                check_state(state, p, block, number)

        load_exactly(self, super().load_state_dict, state_dict, check, lambda p, _: state_dtype(p))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_process_group": self._process_group}

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:
            block = block_size(p, group["block"], "AdaHessian")
            shape = tuple(p.shape) if block == 1 else (p.numel() // block,)
            state["t"], state["t_h"] = 0, 0
            state["age"], state["idle"] = 0, 0  # steps since its last estimate, steps without a gradient
            state["m"] = torch.zeros(p.shape, dtype=state_dtype(p), device=p.device)
            state["v"] = torch.zeros(shape, dtype=state_dtype(p), device=p.device)
        return state

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _with_groups(self) -> Iterable[tuple[Tensor, dict[str, Any]]]:
        return ((p, group) for group in self.param_groups for p in group["params"])

    def _name(self, number: int) -> str:
        names = [
            name for group in self.param_groups for name in group.get("param_names", [None] * len(group["params"]))
        ]
        return f"params[{number}]" + (f" ({names[number]})" if names[number] else "")

    def _factors(self, grad_scale: Tensor | float | None) -> tuple[float, float]:
        """What gradients and products are multiplied by: the inverse of the loss's scale."""
        of_scaler, scaler_at_work = getattr(self, "grad_scale", None), hasattr(self, "found_inf")
        unscaled = scaler_at_work and of_scaler is None
        scale = of_scaler if grad_scale is None else grad_scale
        if scale is None and unscaled and self.refresh_due:
            raise RuntimeError(
                "AdaHessian.step: grad_scale: expected the scale of the loss, as the scaler has unscaled the gradients "
                "but not their graph; call scaler.step(optimizer, grad_scale=scaler.get_scale())"
            )
        inverse = 1.0 if scale is None else 1 / float(scale)
        return 1.0 if unscaled else inverse, inverse

    def _group_of_ranks(self) -> Any:
        """The process group, with one seed for all its ranks; None where there is nothing to average."""
        if self._process_group is None or not (dist.is_available() and dist.is_initialized()):
            return None
        ranks = dist.group.WORLD if self._process_group == "auto" else self._process_group
        if dist.get_world_size(ranks) == 1:
            return None
        if not self._seed_is_shared:
            seed = shared(self.param_groups[0]["seed"], self._parameters()[0].device, ranks)
            for group in self.param_groups:
                group["seed"] = seed
            self._seed_is_shared = True
        return ranks


def _numbers(group: dict[str, Any], state: dict[str, Any], factor: float) -> tuple[float, ...]:
    """What ``Step`` in ``csrc/optim/adahessian.h`` reads."""
    beta1, beta2 = group["betas"]
    lr, started = float(group["lr"]), 1 - beta1 ** state["t"]
    limit = math.inf if group["max_update"] is None else group["max_update"] * started
    weight = (1 - beta1) * (-factor if group["maximize"] else factor)
    correction = 1 / math.sqrt(1 - beta2 ** state["t_h"])
    decay = lr * group["weight_decay"]
    return beta1, weight, correction, group["eps"], group["hessian_power"], lr / started, decay, limit


def _ratio(whole: Tensor, blocks: Tensor) -> int:
    return max(1, whole.numel() // max(1, blocks.numel()))
