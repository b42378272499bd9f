"""What a minimiser sees of a user's function: values, gradients and Hessian-vector products on flat vectors, counted.

Four kinds of problem come down to the same three calls:

* ``fun`` alone, in torch: gradients by reverse mode, Hessian products by a second reverse pass through the graph that
  the gradient left behind. One forward pass serves the value, the gradient and all Hessian products at a point.
* ``fun`` and ``grad`` in torch: Hessian products by differentiating ``grad``.
* ``fun``, ``grad`` and ``hvp`` in torch: no autograd at all.
* the same three on NumPy arrays, when ``x0`` is one: arrays and tensors share their memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kantor._checks import check_float, check_tensor
from kantor.linalg.capped_cg import plain

Product = Callable[[Tensor], Tensor]


class Point:
    """A point with what is known there. The graph behind value and gradient lives as long as the point does."""

    __slots__ = ("f", "g", "graph", "leaf", "x")

    def __init__(self, x: Tensor, f: Any, leaf: Tensor | None = None, graph: Tensor | None = None) -> None:
        self.x = x  # (n,) or (B, n)
        self.f = f  # float, or a tensor (B,)
        self.g: Any = None  # like x, once asked for
        self.leaf = leaf  # x as the leaf of the graph
        self.graph = graph  # the value, later the gradient, as its output


class Objective:
    """A function with its derivatives and their counters.

    Parameters
    ----------
    name : str
        Of the public function, for messages.
    fun : callable
        ``fun(x)``: a scalar, or ``(B,)`` for a batch.
    x0 : Tensor, ndarray or sequence of floats
        Starting point; everything is computed in its kind, dtype and device.
    grad, hvp : callable, optional
        ``grad(x)`` shaped like x; ``hvp(x, v)`` likewise. The vector v is valid during the call only.
    batched : bool
        The first dimension of x0 counts independent problems.
    second_order : bool
        Hessian products will be asked for.

    Raises
    ------
    TypeError, ValueError
        x0 is not real floating point, is empty or not finite; a callable is missing.
    """

    def __init__(
        self,
        name: str,
        fun: Callable[..., Any],
        x0: Any,
        grad: Callable[..., Any] | None = None,
        hvp: Callable[..., Any] | None = None,
        *,
        batched: bool = False,
        second_order: bool = True,
    ) -> None:
        self.name, self.fun, self.grad, self.product = name, fun, grad, hvp
        for argument, value in (("fun", fun), ("grad", grad), ("hvp", hvp)):
            if not callable(value) and not (value is None and argument != "fun"):
                raise TypeError(f"{name}: {argument}: expected a callable, got {type(value).__name__}")
        self.numpy = not isinstance(x0, Tensor)
        start = _as_tensor(name, x0)
        check_float(start, name, "x0")
        if start.numel() == 0:
            raise ValueError(f"{name}: x0: expected at least one unknown, got shape {tuple(start.shape)}")
        if batched and start.ndim < 2:
            raise ValueError(f"{name}: x0: expected shape (B, ...) with batched=True, got {tuple(start.shape)}")
        if not bool(torch.isfinite(start).all()):
            raise ValueError(f"{name}: x0: expected finite values, got {start[~torch.isfinite(start)][0].item()}")
        if self.numpy and (grad is None or (second_order and hvp is None)):
            missing = "grad= and hvp=" if grad is None and second_order else "grad=" if grad is None else "hvp="
            first_order = "" if not second_order or name != "minimize" else ", or grad= alone with method='lbfgs'"
            raise TypeError(
                f"{name}: x0: a NumPy array has no automatic differentiation; pass {missing}{first_order}; or write "
                "fun with torch and pass x0 as a tensor"
            )
        self.shape, self.batched, self.second_order = tuple(start.shape), batched, second_order
        self.start = start.detach().reshape((start.shape[0], -1) if batched else -1).clone()
        self._is_flat = self.start.shape == start.shape
        self._numpy_dtype = np.dtype(np.float64 if start.dtype is torch.float64 else np.float32)
        self.problems = start.shape[0] if batched else 1
        self.n = self.start.shape[-1]
        self.dtype, self.device = start.dtype, start.device
        self.n_fun = self.n_grad = self.n_hvp = 0
        self._constant_gradient: Tensor | None = None
        self._sweeps = True

    # --- the three calls ---

    def evaluate(self, x: Tensor) -> Point:
        """Value at x; with autograd the graph is kept for :meth:`gradient`."""
        self.n_fun += 1
        if self.grad is not None:
            return Point(x, self._value(self.fun(self._copy(x))))
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            try:
                value = self.fun(leaf.view(self.shape))
            except (RuntimeError, TypeError) as error:
                if "numpy()" in str(error) or "unexpected keyword argument" in str(error):  # NumPy was handed a tensor
                    error.add_note(
                        f"{self.name}: fun: got a torch tensor, as x0 is one; write it with torch operations in place "
                        "of NumPy's, or pass x0 as an array with grad= and hvp="
                    )
                raise
        point = Point(x, self._value(value), leaf, value)
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise RuntimeError(
                f"{self.name}: fun returned a value that does not depend on x through torch operations; build it from "
                "x without .detach(), .item() or NumPy, or pass grad= and hvp="
            )
        return point

    def gradient(self, point: Point) -> Tensor:
        """Gradient at a point that was evaluated."""
        if point.g is not None:
            return point.g  # type: ignore[no-any-return]
        self.n_grad += 1
        if self.grad is None:
            value = point.graph
            assert value is not None
            assert point.leaf is not None
            with torch.enable_grad():
                total = value.sum() if self.batched else value.reshape(())
            (g,) = torch.autograd.grad(total, point.leaf, create_graph=self.second_order and self.product is None)
            point.graph, point.g = g, g.detach()
            if self.second_order and self.product is None and not g.requires_grad:
                self._require_linear(point.g)
        elif self.second_order and self.product is None:
            point.leaf = point.x.detach().requires_grad_()
            with torch.enable_grad():
                point.graph = self._vector("grad", self.grad(point.leaf.view(self.shape)))
            point.g = point.graph.detach()
            if not point.graph.requires_grad:
                raise RuntimeError(
                    f"{self.name}: grad returned a tensor that does not depend on x through torch operations, so it "
                    "cannot be differentiated for Hessian-vector products; pass hvp="
                )
        else:
            # A copy: the callable may hand out the same memory each time.
            point.g = self._vector("grad", self.grad(self._copy(point.x))).detach().clone()
        return point.g  # type: ignore[no-any-return]

    def hessian(self, point: Point) -> Product:
        """The map v -> H v at a point whose gradient is known; v like x."""
        if self.product is not None:
            user, x = self.product, self._copy(point.x)

            seen: Tensor | None = None
            shown: Any = None

            def by_hand(v: Tensor) -> Tensor:
                nonlocal seen, shown
                self.n_hvp += 1
                if v is not seen:  # a solver shows the same vector again and again
                    seen, shown = v, self._out(v)
                return self._vector("hvp", user(x, shown))

            return by_hand
        g, leaf = point.graph, point.leaf
        assert g is not None
        assert leaf is not None
        if not g.requires_grad:  # linear: nothing of x is left in the gradient

            def zero(v: Tensor) -> Tensor:
                self.n_hvp += 1
                return torch.zeros_like(v)

            return zero

        def by_autograd(v: Tensor) -> Tensor:
            self.n_hvp += 1
            try:
                (product,) = torch.autograd.grad(g, leaf, v, retain_graph=True, allow_unused=True)
            except RuntimeError as error:
                if type(error) is not RuntimeError:  # a callable's own exception
                    raise
                raise RuntimeError(
                    f"{self.name}: fun cannot be differentiated twice by torch ({error}); pass hvp="
                ) from error
            return torch.zeros_like(v) if product is None else plain(product)

        return by_autograd

    def hessian_rows(self, point: Point) -> Product:
        """The map of rows ``V -> (H v for v in V)``; with autograd all rows in one sweep, where torch can."""
        product, g, leaf = self.hessian(point), point.graph, point.leaf

        def one_by_one(V: Tensor) -> Tensor:
            return torch.stack([product(v).clone() for v in V])

        def at_once(V: Tensor) -> Tensor:
            if g is None or leaf is None or len(V) == 1 or not self._sweeps:
                return one_by_one(V)
            try:
                (rows,) = torch.autograd.grad(g, leaf, V, retain_graph=True, is_grads_batched=True, allow_unused=True)
            except RuntimeError as error:
                if type(error) is not RuntimeError:  # a callable's own exception
                    raise
                self._sweeps = False  # a function that vmap does not know
                return one_by_one(V)
            self.n_hvp += len(V)
            return torch.zeros_like(V) if rows is None else plain(rows)

        return at_once if self.product is None and g is not None and g.requires_grad else one_by_one

    # --- between flat vectors and what the user has in hand ---

    def restore(self, flat: Tensor) -> Any:
        """A flat vector in the kind and shape of x0."""
        return self._out(flat)

    def _copy(self, flat: Tensor) -> Any:
        """For callables that are trusted with nothing: they may keep or overwrite what they get."""
        return self._out(flat.clone())

    def _out(self, flat: Tensor) -> Any:
        shaped = flat if self._is_flat else flat.view(self.shape)
        return shaped.numpy() if self.numpy else shaped

    def _require_linear(self, g: Tensor) -> None:
        """A gradient without a graph is the same everywhere, or a part of fun cannot be differentiated twice."""
        if self._constant_gradient is None:
            self._constant_gradient = g
        elif not torch.allclose(g, self._constant_gradient):
            raise RuntimeError(
                f"{self.name}: the gradient of fun changes from point to point, but torch has no derivative of it: fun "
                "is piecewise linear, or a part of it cannot be differentiated twice; pass hvp="
            )

    def _value(self, value: Any) -> Any:
        if value is None:
            raise TypeError(f"{self.name}: fun: expected a number, got None; return the value of the function")
        if not self.batched:
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise ValueError(
                        f"{self.name}: fun: expected a scalar, got shape {tuple(value.shape)}; return a sum, a mean or "
                        "a norm"
                    )
                return value.item()
            if not isinstance(value, float) and np.size(value) != 1:
                raise ValueError(
                    f"{self.name}: fun: expected a scalar, got shape {np.shape(value)}; return a sum, a mean or a norm"
                )
            return float(value) if np.ndim(value) == 0 else float(np.reshape(value, ()))
        value = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
        if tuple(value.shape) != (self.problems,):
            raise ValueError(
                f"{self.name}: fun: expected one value for each of {self.problems} problems, shape ({self.problems},), "
                f"got {tuple(value.shape)}"
            )
        return value.detach()

    def _vector(self, what: str, value: Any) -> Tensor:
        """A vector that the user's code returned, flat."""
        if self.numpy:
            if not isinstance(value, np.ndarray):
                value = np.asarray(value)
            if value.dtype != self._numpy_dtype or not value.flags.c_contiguous:
                value = np.ascontiguousarray(value, dtype=self._numpy_dtype)
            value = torch.from_numpy(value)
        elif not isinstance(value, Tensor):
            raise TypeError(f"{self.name}: {what}: expected a torch.Tensor, got {type(value).__name__}")
        if value.shape != self.shape:
            raise ValueError(f"{self.name}: {what}: expected shape {self.shape}, got {tuple(value.shape)}")
        if value.dtype != self.dtype or value.device != self.device:
            raise ValueError(
                f"{self.name}: {what}: expected {self.dtype} on {self.device}, got {value.dtype} on {value.device}"
            )
        flat: Tensor = value if self._is_flat else value.reshape(self.start.shape)
        return flat if self.numpy else plain(flat)


def _as_tensor(name: str, x0: Any) -> Tensor:
    if isinstance(x0, Tensor):
        return check_tensor(x0, name, "x0")
    array = np.asarray(x0)
    if array.dtype not in (np.float32, np.float64):
        raise TypeError(
            f"{name}: x0: expected a tensor or array of float32 or float64, got {type(x0).__name__} of {array.dtype}; "
            "write 1.0 for 1, or convert it"
        )
    return torch.from_numpy(np.ascontiguousarray(array))
