"""The one recipe by which a native algorithm becomes a torch operator.

A new operator is one call of :func:`declare`: a schema, ``forward`` (allocates the results, calls the native module),
``fake`` (shapes only) and, where it has them, its derivatives and its batching. What comes back is the overload
``torch.ops.kantor.<name>.default`` itself: called with all arguments in order, it works in eager mode, under
``torch.func`` and ``vmap`` in any nesting, with dual tensors, and inside ``torch.compile`` and ``torch.export``.

Rules are written once, on whole arguments and in terms of such operators, so that second derivatives, ``vmap`` of
``grad`` and ``hessian`` follow by themselves.

Example, for a native ``multiply_add(x, y, out, a, b, threads)``::

    def _forward(x, y, a, b):
        out = torch.empty_like(x)
        backend().multiply_add(x, y, out, a, b, torch.get_num_threads())
        return out


    multiply_add = declare(
        "multiply_add(Tensor x, Tensor y, float a, float b) -> Tensor",
        forward=_forward,
        fake=lambda x, y, a, b: x.new_empty(x.shape),
        backward=lambda ctx, grad: (ctx.inputs[2] * grad, ctx.inputs[3] * grad, None, None),
        jvp=lambda ctx, dx, dy, da, db: multiply_add(dx, dy, *ctx.inputs[2:]),
        batched=("x", "y"),
    )

How it works. ``torch.library`` has ``define``, kernels, fake and vmap, but its ``register_autograd`` fails under
``torch.func.grad`` and loses forward-mode tangents. The kernel registered here for the Autograd key is an
``autograd.Function`` of one level, the class that functorch itself generates from an ordinary Function: it
differentiates at the level at which the dispatcher calls it and hands the call down to the next, as the kernels of
torch's own operators do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import VmapInfo
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from kantor import _C

__all__ = ["Context", "backend", "batch_first", "declare", "emulated", "loop_over_batch"]

Rule = Callable[..., Any]

_library = torch.library.Library("kantor", "FRAGMENT")
# Context-local, so that one thread may emulate while another runs the compiled extension.
_backend: ContextVar[ModuleType] = ContextVar("kantor_backend", default=_C)


def backend() -> ModuleType:
    """Return the native module that forwards call: ``kantor._C``, or ``kantor._emu`` inside :func:`emulated`."""
    return _backend.get()


@contextmanager
def emulated() -> Iterator[None]:
    """Run the CUDA code path on CPU tensors under the fiber emulator (tests only).

    Raises
    ------
    ImportError
        The package was built without its test module ``kantor._emu``.
    """
    token = _backend.set(import_module("kantor._emu"))
    try:
        yield
    finally:
        _backend.reset(token)


@dataclass(frozen=True, slots=True)
class Context:
    """What a derivative rule sees of the call it differentiates.

    Attributes
    ----------
    inputs
        The arguments of the call, nested as in the schema.
    outputs
        The results of the call; empty unless the operator was declared with ``save_outputs=True``.
    needs
        In ``backward``, per argument whether its gradient is wanted; a list of such for ``Tensor[]``.
    """

    inputs: tuple[Any, ...]
    outputs: tuple[Tensor, ...]
    needs: tuple[Any, ...] = ()


class _Signature:
    """How the arguments of an operator fall into tensors and plain values.

    ``autograd.Function`` tracks only tensors that are arguments of their own. A call is therefore split into the flat
    list of its tensors, and its plain part: per argument the value, the length for a ``Tensor[]``, None for a tensor.
    """

    _KINDS = {"Tensor": "tensor", "Optional[Tensor]": "tensor", "List[Tensor]": "list"}  # noqa: RUF012

    def __init__(self, schema: torch._C.FunctionSchema) -> None:
        for entry in (*schema.arguments, *schema.returns):
            if entry.alias_info is not None:
                raise ValueError(f"declare: {schema.name}: an operator neither writes into nor returns its arguments")
        for argument in schema.arguments:
            if argument.kwarg_only or argument.has_default_value():
                raise ValueError(f"declare: {schema.name}: {argument.name}: expected positional, without a default")
            if "Tensor" in str(argument.type) and str(argument.type) not in self._KINDS:
                raise TypeError(f"declare: {schema.name}: {argument.name}: expected Tensor, Tensor? or Tensor[]")
        if not schema.returns or any(str(result.type) != "Tensor" for result in schema.returns):
            raise TypeError(f"declare: {schema.name}: expected one or more results, each a Tensor")
        self.op = schema.name
        self.names = tuple(argument.name for argument in schema.arguments)
        self.outputs = len(schema.returns)
        self._kinds = tuple(self._KINDS.get(str(argument.type), "plain") for argument in schema.arguments)

    def is_tensor(self, name: str) -> bool:
        return name in self.names and self._kinds[self.names.index(name)] == "tensor"

    def split(self, args: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Nested arguments -> plain part, tensors (None for an absent optional one)."""
        plain: list[Any] = []
        tensors: list[Any] = []
        for kind, value in zip(self._kinds, args, strict=True):
            if kind == "tensor":
                plain.append(None)
                tensors.append(value)
            elif kind == "list":
                plain.append(len(value))
                tensors.extend(value)
            else:
                plain.append(value)
        return plain, tensors

    def join(self, plain: Sequence[Any], tensors: Sequence[Any], *, values: bool = True) -> tuple[Any, ...]:
        """Inverse of `split`, also for what belongs to the tensors; without `values`, None for plain arguments."""
        rest = iter(tensors)
        nested: list[Any] = []
        for kind, value in zip(self._kinds, plain, strict=True):
            if kind == "tensor":
                nested.append(next(rest))
            elif kind == "list":
                nested.append(list(islice(rest, value)))
            else:
                nested.append(value if values else None)
        return tuple(nested)

    def contiguous(self, args: Sequence[Any]) -> tuple[Any, ...]:
        plain, tensors = self.split(args)
        return self.join(plain, [None if tensor is None else tensor.contiguous() for tensor in tensors])

    def gradients(self, plain: Sequence[Any], result: Any) -> list[Tensor | None]:
        """Check what a backward rule returned and flatten it; None stands for the gradients of a whole list."""
        if not isinstance(result, tuple) or len(result) != len(self.names):
            raise ValueError(f"{self.op}: backward: expected a tuple with one gradient for each of {self.names}")
        filled: list[Any] = []
        for name, kind, value, grad in zip(self.names, self._kinds, plain, result, strict=True):
            if kind == "list" and grad is not None and len(grad) != value:
                raise ValueError(f"{self.op}: backward: {name}: expected {value} gradients, got {len(grad)}")
            filled.append([None] * value if kind == "list" and grad is None else grad)
        return self.split(filled)[1]


def declare(
    schema: str,
    *,
    forward: Rule,
    fake: Rule,
    backward: Rule | None = None,
    jvp: Rule | None = None,
    vmap: Rule | None = None,
    batched: Sequence[str] = (),
    differentiable_outputs: int = 1,
    save_outputs: bool = False,
    library: torch.library.Library = _library,
) -> torch._ops.OpOverload[..., Any]:
    """Register an operator with torch and return it.

    Parameters
    ----------
    schema
        torch's schema without the namespace: ``"matvec(Tensor[] operands, int[] layout, Tensor x) -> Tensor"``.
        Arguments are ``Tensor``, ``Tensor?``, ``Tensor[]`` and plain values, positional and without defaults. Results
        are one Tensor or a tuple of them, never an argument or a view of one.
    forward
        Computes the results, on CPU and on CUDA. It receives contiguous tensors, lazy negation and conjugation
        resolved, and must not write into them: torch would not notice.
    fake
        Same arguments; returns empty results of the same shape, dtype, device and (contiguous) strides.
    backward
        ``backward(ctx, *grads)`` returns a tuple with one gradient per argument: None where there is none, a list for a
        ``Tensor[]``. `ctx` is a `Context`. `grads` belong to the differentiable results; with several of them, some may
        be None. A gradient may be expanded (stride 0).
    jvp
        ``jvp(ctx, *tangents)`` returns the tangents of the differentiable results, None for zero. `tangents` has one
        entry per argument, None where there is none.
    vmap
        ``vmap(info, in_dims, *args)`` returns ``(results, out_dims)``, as for `torch.library.register_vmap`.
    batched
        Instead of `vmap`: names of the tensor arguments that take leading batch dimensions, which then lead in every
        result. ``vmap`` over these alone is one call. Anything else, and an operator with neither, loops.
    differentiable_outputs
        This many results, from the first on, have derivatives; the others are marked as having none.
    save_outputs
        Keep the results for the rules, as ``ctx.outputs``.
    library
        Where to register; tests bring their own namespace.

    Raises
    ------
    ValueError
        An argument or result is aliased, keyword-only or has a default; `batched` names no tensor or comes with
        `vmap`; `differentiable_outputs` is out of range.
    TypeError
        A type of tensor argument or result other than those above.

    Notes
    -----
    A call without `backward` or `jvp` raises NotImplementedError when that derivative is asked for.
    """
    signature = _Signature(torch._C.parse_schema(f"{library.ns}::{schema}"))
    if wrong := [name for name in batched if not signature.is_tensor(name)]:
        raise ValueError(f"declare: {signature.op}: batched: expected names of Tensor arguments, got {wrong}")
    if batched and vmap is not None:
        raise ValueError(f"declare: {signature.op}: expected vmap or batched, got both")
    if not 1 <= differentiable_outputs <= signature.outputs:
        raise ValueError(f"declare: {signature.op}: differentiable_outputs: expected 1 to {signature.outputs}")
    namespace, name = signature.op.split("::")
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op: torch._ops.OpOverload[..., Any] = getattr(getattr(torch.ops, namespace), name).default
    function = _make_function(op, signature, backward, jvp, differentiable_outputs, save_outputs)

    def kernel(*args: Any) -> Any:
        return forward(*signature.contiguous(args))

    def autograd_kernel(keyset: Any, *args: Any) -> Any:
        plain, tensors = signature.split(args)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return function.apply(keyset, plain, *tensors)
        if _derivatives_wanted(tensors):
            return function.apply(keyset, plain, *tensors)
        return _below_autograd(op, keyset, args)

    for key in ("CPU", "CUDA"):
        library.impl(name, kernel, key)
    library.impl(name, autograd_kernel, "Autograd", with_keyset=True)
    torch.library.register_fake(signature.op, fake, lib=library)
    vmap = vmap or _vmap_rule(op, signature.names, batched)
    torch.library.register_vmap(signature.op, vmap, lib=library)
    library.impl(name, _old_vmap_kernel(vmap, signature), "Batched")
    return op


def _derivatives_wanted(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call outside of torch.func needs the Function, which costs 10 us."""
    if forward_ad._current_level >= 0:
        return True
    present = [tensor for tensor in tensors if tensor is not None]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in present):
        return True
    # Tensors of other types may be tracing a graph whose dual level torch's _current_level does not show.
    return any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in present)


def _below_autograd(op: Any, keyset: torch._C.DispatchKeySet, args: Sequence[Any]) -> Any:
    """Go on to what the dispatcher has below autograd: the next level of torch.func, fake, or a kernel."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)


def _make_function(
    op: torch._ops.OpOverload[..., Any],
    signature: _Signature,
    backward_rule: Rule | None,
    jvp_rule: Rule | None,
    differentiable: int,
    save_outputs: bool,
) -> Any:
    """Make the Function that differentiates at one level, over ``(keyset, plain, *tensors)``."""

    def forward(keyset: Any, plain: list[Any], *tensors: Tensor | None) -> Any:
        args = signature.join(plain, tensors)
        if not torch._C._are_functorch_transforms_active():
            return _below_autograd(op, keyset, args)
        # A Function's forward runs with derivatives off, but the levels of torch.func further down want theirs.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return _below_autograd(op, keyset, args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _, ctx.plain, *tensors = inputs
        ctx.tensor_count = len(tensors)
        outputs = output if isinstance(output, tuple) else (output,)
        # Saved through torch, which drops them after use and raises if one is written to in between.
        saved = (*tensors, *outputs) if save_outputs else tensors
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.results = [(out.shape, out.dtype, out.device) for out in outputs[:differentiable]]
        ctx.mark_non_differentiable(*outputs[differentiable:])
        ctx.set_materialize_grads(False)

    def context(ctx: Any, needs: tuple[Any, ...] = ()) -> Context:
        saved: tuple[Any, ...] = ctx.saved_tensors
        return Context(signature.join(ctx.plain, saved), saved[ctx.tensor_count :], needs)

    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if backward_rule is None:
            raise NotImplementedError(f"{signature.op}: this operator has no reverse-mode derivative")
        if all(grad is None for grad in grads):  # only results without derivatives were used
            return (None,) * (2 + ctx.tensor_count)
        needs = signature.join(ctx.plain, ctx.needs_input_grad[2:], values=False)
        result = backward_rule(context(ctx, needs), *grads[:differentiable])
        return (None, None, *signature.gradients(ctx.plain, result))

    def jvp(ctx: Any, _keyset: None, _plain: None, *tangents: Tensor | None) -> Any:
        if jvp_rule is None:
            raise NotImplementedError(f"{signature.op}: this operator has no forward-mode derivative")
        result = jvp_rule(context(ctx), *signature.join(ctx.plain, tangents, values=False))
        result = result if isinstance(result, tuple) else (result,)
        filled = tuple(
            torch.zeros(shape, dtype=dtype, device=device) if tangent is None else tangent
            for tangent, (shape, dtype, device) in zip(result, ctx.results, strict=True)
        )
        return filled[0] if signature.outputs == 1 else (*filled, *(None,) * (signature.outputs - differentiable))

    rules = {rule.__name__: staticmethod(rule) for rule in (forward, setup_context, backward, jvp)}
    return type(signature.op.split("::")[1].title().replace("_", ""), (_SingleLevelFunction,), rules)


def _vmap_rule(op: Rule, names: Sequence[str], batched: Sequence[str]) -> Rule:
    """Make the rule of an operator that declares none: one call where only `batched` arguments are, else a loop."""

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
        named = list(zip(names, args, in_dims, strict=True))
        if not all(name in batched or _is_unbatched(dim) for name, _, dim in named):
            return loop_over_batch(op, info, in_dims, *args)
        moved = [batch_first(arg, dim, info.batch_size) if name in batched else arg for name, arg, dim in named]
        return op(*moved), 0

    return rule


def _old_vmap_kernel(rule: Rule, signature: _Signature) -> Rule:
    """Make the kernel for torch's first vmap, which still serves ``is_grads_batched`` and ``vectorize=True``.

    Its own fallback knows no ``Tensor[]``. Removing a level from a tensor that lacks it adds a dimension of any size.
    """

    def in_dim(tensor: Tensor | None, level: int) -> int | None:
        if tensor is None or not torch._C._functorch.is_legacy_batchedtensor(tensor):
            return None
        sizes = {torch._remove_batch_dim(tensor, level, size, 0).shape[0] for size in (1, 2)}
        return 0 if len(sizes) == 1 else None

    def batched(result: Tensor, dim: int | None, level: int) -> Tensor:
        return result if dim is None else torch._add_batch_dim(result, dim, level)

    def kernel(*args: Any) -> Any:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        plain, tensors = signature.split(args)
        dims = [in_dim(tensor, level) for tensor in tensors]
        while _is_unbatched(dims):  # the arguments are batched at outer levels only
            level -= 1
            dims = [in_dim(tensor, level) for tensor in tensors]
        pairs = zip(tensors, dims, strict=True)
        bare = [t if dim is None else torch._remove_batch_dim(t, level, 0, dim) for t, dim in pairs]
        info = VmapInfo(next(t.shape[0] for t, dim in zip(bare, dims, strict=True) if dim == 0), "error")
        results, out = rule(info, signature.join(plain, dims, values=False), *signature.join(plain, bare))
        if isinstance(results, Tensor):
            return batched(results, out, level)
        outs = out if isinstance(out, tuple) else (out,) * len(results)
        return tuple(batched(result, dim, level) for result, dim in zip(results, outs, strict=True))

    return kernel


def _is_unbatched(dim: Any) -> bool:
    return all(entry is None for entry in dim) if isinstance(dim, list | tuple) else dim is None


def batch_first(tensor: Tensor | None, dim: int | None, batch_size: int) -> Tensor | None:
    """Return the tensor with its batch dimension `dim` in front; one that has none is repeated, without a copy."""
    if tensor is None:
        return None
    return tensor.expand(batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def loop_over_batch(op: Rule, info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    """Apply `op` to one batch entry after the other and stack the results in front: a vmap rule for any operator."""

    def entry(arg: Any, dim: Any, index: int) -> Any:
        if isinstance(dim, int):
            return arg.select(dim, index)
        return arg if _is_unbatched(dim) else [entry(*pair, index) for pair in zip(arg, dim, strict=True)]

    calls = [[entry(*pair, index) for pair in zip(args, in_dims, strict=True)] for index in range(info.batch_size)]
    results = [op(*call) for call in calls]
    if isinstance(results[0], tuple):
        return tuple(torch.stack(column) for column in zip(*results, strict=True)), (0,) * len(results[0])
    return torch.stack(results), 0
