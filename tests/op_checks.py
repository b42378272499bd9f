"""What every Kantor operator has to pass, whatever it computes. A new operator adds one :class:`OpCase`:

    CASES = [OpCase("axpby", call=axpby, sample=lambda size, rand: (rand(size), rand(size), 2.0, 3.0),
                    oracle=lambda x, y, a, b: a * x + b * y, differentiable=(0, 1), op=axpby)]

    @pytest.mark.parametrize(("check", "case", "device"), op_checks.parameters(CASES))
    def test_operator(check, case, device):
        op_checks.run(check, case, device)

Tolerances follow a rule: the error is at most ``factor * eps * condition`` relative to the largest result, or at most
twice the error of a plain torch version in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from devices import home, on, require

Arguments = tuple[Any, ...]
Rand = Callable[..., Tensor]

DTYPES = (torch.float64, torch.float32)


@dataclass(frozen=True)
class ErrorCase:
    """Bad input: `spoil` turns good arguments into bad ones; the call must raise `error`, saying `match`."""

    error: type[Exception] | tuple[type[Exception], ...]
    match: str
    spoil: Callable[..., Arguments]


@dataclass(frozen=True)
class OpCase:
    """One operator and what the checks need to know about it.

    Attributes
    ----------
    call
        The callable under test, all arguments positional.
    sample
        ``sample(size, rand)``: arguments for that size. ``rand(*shape)`` draws float64 standard normal tensors; the
        checks convert every floating tensor to the dtype under test.
    oracle
        Same arguments with floating tensors in float64; plain torch or numpy, independent of the code under test.
    differentiable
        Positions of the arguments with derivatives: a Tensor, or a list of which the floating tensors count.
    outputs, differentiable_outputs
        So many results, from the first on, are compared, and have derivatives.
    free
        Positions of arguments that may hold any values, so that expanded ones still make sense (a matrix that must be
        positive definite is not free). Default: `differentiable`.
    constrain
        Makes perturbed arguments valid again, inside gradcheck (``symmetrise A``).
    condition
        Condition estimate of the problem with these arguments.
    factor
        Constant of the tolerance rule.
    plain
        Plain torch version in the same dtype, for the second half of the rule.
    checked
        Whether `call` validates dtypes and devices: public functions do, bare operators rely on them.
    op, op_arguments
        The ``torch.ops`` overload for opcheck, and the arguments it gets for arguments of `call`.
    errors
        Further bad inputs.
    """

    name: str
    call: Callable[..., Any]
    sample: Callable[[int, Rand], Arguments]
    oracle: Callable[..., Any]
    differentiable: tuple[int, ...] = ()
    outputs: int = 1
    differentiable_outputs: int = 1
    free: tuple[int, ...] | None = None
    constrain: Callable[..., Arguments] = lambda *args: args
    condition: Callable[..., float] = lambda *args: 1.0
    factor: float = 16.0
    plain: Callable[..., Any] | None = None
    checked: bool = False
    op: torch._ops.OpOverload[..., Any] | None = None
    op_arguments: Callable[..., Arguments] = lambda *args: args
    errors: tuple[ErrorCase, ...] = ()
    sizes: tuple[int, ...] = (0, 1, 2, 17, 257)
    small_size: int = 4
    large_size: int = 100_003
    gradient_tolerance: float = 1e-5

    def arguments(self, size: int, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu") -> Arguments:
        """Sample arguments, reproducible, in a dtype and on a device."""
        generator = torch.Generator().manual_seed(1000 * seed + size)
        args = self.sample(size, lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator))
        return tree_map_only(Tensor, lambda t: t.to(home(device), dtype if t.is_floating_point() else t.dtype), args)

    def results(self, args: Arguments, device: str = "cpu") -> tuple[Tensor, ...]:
        """The compared results of the code under test."""
        with on(device):
            return as_tuple(self.call(*args))[: self.outputs]


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


# --- values ---


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def float64(args: Arguments) -> Arguments:
    return tree_map_only(Tensor, lambda t: t.detach().cpu().double() if t.is_floating_point() else t.cpu(), args)


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def same_bits(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def difference(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return largest([a.detach().cpu().double() - b.detach().cpu().double() for a, b in zip(left, right, strict=True)])


def largest(tensors: Sequence[Tensor]) -> float:
    maxima = [t.abs().max().double() for t in tensors if t.numel()]
    return torch.stack(maxima).max().item() if maxima else 0.0  # torch's max keeps a NaN, Python's may lose it


def assert_accurate(case: OpCase, actual: Sequence[Tensor], args: Arguments) -> None:
    """Compare results with the oracle by the tolerance rule."""
    exact_args = float64(args)
    expected = as_tuple(case.oracle(*exact_args))[: case.outputs]
    assert [tuple(t.shape) for t in actual] == [tuple(t.shape) for t in expected]
    dtype = next(t.dtype for t in tensors_in(args) if t.is_floating_point())
    error = difference(actual, expected)
    allowed = case.factor * torch.finfo(dtype).eps * case.condition(*exact_args) * largest(expected)
    if error > allowed and case.plain is not None:
        allowed = 2 * difference(as_tuple(case.plain(*args))[: case.outputs], expected)
    assert error <= allowed, f"{case.name}: error {error:.2e}, allowed {allowed:.2e} in {dtype}"


def check_values(case: OpCase, device: str = "cpu") -> None:
    """Every size and dtype against the oracle; inputs stay as they were and results are fresh memory."""
    for dtype in DTYPES:
        for size in case.sizes:
            args = case.arguments(size, dtype, device=device)
            inputs = tensors_in(args)
            before = [t.clone() for t in inputs]
            actual = case.results(args, device)
            assert_accurate(case, actual, args)
            assert same_bits(inputs, before), f"{case.name}: wrote into an input"
            memory = {t.untyped_storage().data_ptr() for t in inputs if t.numel()}
            assert memory.isdisjoint(t.untyped_storage().data_ptr() for t in actual if t.numel()), "returned an input"


def strided(t: Tensor) -> Tensor:
    """Every second entry of a larger buffer."""
    if t.ndim == 0:
        return t
    buffer = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), 77)
    buffer[..., ::2] = t
    return buffer[..., ::2]


def offset(t: Tensor) -> Tensor:
    """Contiguous, but not at the start of its storage and not aligned."""
    buffer = t.new_full((t.numel() + 1,), 77)
    buffer[1:] = t.flatten()
    return buffer[1:].view(t.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": strided,
    "offset": offset,
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "negated": lambda t: torch._neg_view(-t) if t.is_floating_point() else t,
}


def check_layouts(case: OpCase, device: str = "cpu") -> None:
    """Strides, offsets and lazy negation change no bit; expanded arguments (stride 0) give the oracle's values."""
    for dtype in DTYPES:
        args = case.arguments(case.sizes[-1], dtype, device=device)
        expected = case.results(args, device)
        for name, change in LAYOUTS.items():
            actual = case.results(tree_map_only(Tensor, change, args), device)
            assert same_bits(actual, expected), f"{case.name}: {name} arguments change the result in {dtype}"
        for position in case.differentiable if case.free is None else case.free:
            expanded = tree_map_only(Tensor, lambda t: t[..., :1].expand(t.shape) if t.ndim else t, args[position])
            changed = (*args[:position], expanded, *args[position + 1 :])
            assert_accurate(case, case.results(changed, device), changed)


def check_threads(case: OpCase, device: str = "cpu") -> None:
    """One thread and two give the same bits."""
    for dtype in DTYPES:
        args = case.arguments(case.large_size, dtype, device=device)
        results = []
        for count in (1, 2):
            with threads(count):
                results.append(case.results(args, device))
        assert same_bits(*results), f"{case.name}: the number of threads changes bits in {dtype}"


def check_devices(case: OpCase, device: str = "cpu") -> None:
    """A device gives what the CPU path gives, up to the order of its sums."""
    for size in case.sizes:
        args = case.arguments(size)
        expected = case.results(args)
        actual = case.results(case.arguments(size, device=device), device)
        allowed = case.factor * torch.finfo(torch.float64).eps * case.condition(*args) * largest(expected)
        assert difference(actual, expected) <= allowed, f"{case.name}: {device} differs from cpu at size {size}"


# --- derivatives and transforms ---


def flatten(case: OpCase, args: Arguments) -> tuple[list[Tensor], Callable[..., Arguments]]:
    """The differentiable tensors of the arguments, and the way back from such tensors to arguments."""

    def counts(position: int, leaf: Any) -> bool:
        return position in case.differentiable and isinstance(leaf, Tensor) and leaf.is_floating_point()

    def rebuild(*leaves: Tensor) -> Arguments:
        rest = iter(leaves)

        def replace(position: int, value: Any) -> Any:
            if isinstance(value, list):
                return [replace(position, entry) for entry in value]
            return next(rest) if counts(position, value) else value

        return tuple(replace(position, value) for position, value in enumerate(args))

    tensors = [leaf for position, value in enumerate(args) for leaf in tree_leaves(value) if counts(position, leaf)]
    return tensors, rebuild


def differentiable_call(case: OpCase, args: Arguments) -> tuple[list[Tensor], Callable[..., Any]]:
    """The operator as a function of its differentiable tensors alone."""
    tensors, rebuild = flatten(case, args)

    def function(*leaves: Tensor) -> Any:
        results = as_tuple(case.call(*case.constrain(*rebuild(*leaves))))[: case.differentiable_outputs]
        return results[0] if len(results) == 1 else results

    return tensors, function


def check_gradients(case: OpCase, device: str = "cpu") -> None:
    """First and second derivatives against finite differences: reverse, forward, batched, and both over each other."""
    tensors, function = differentiable_call(case, case.arguments(case.small_size, device=device))
    leaves = tuple(t.clone().requires_grad_() for t in tensors)
    tolerance = {"atol": case.gradient_tolerance, "rtol": 1e-4}
    with on(device):
        modes = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
        assert torch.autograd.gradcheck(function, leaves, **modes, **tolerance)
        modes = {"check_fwd_over_rev": True, "check_batched_grad": True}
        assert torch.autograd.gradgradcheck(function, leaves, **modes, **tolerance)


def check_vmap(case: OpCase, device: str = "cpu") -> None:
    """vmap is the loop: over each of the differentiable tensors and over all, at the first and the last dimension."""
    samples = [case.arguments(case.small_size, seed=seed, device=device) for seed in range(3)]
    first, function = differentiable_call(case, samples[0])
    columns = list(zip(*(flatten(case, args)[0] for args in samples), strict=True))
    choices = [{index} for index in range(len(first))] + [set(range(len(first)))] * (len(first) > 1)
    with on(device):
        for chosen in choices:
            rows = [[column[row if index in chosen else 0] for index, column in enumerate(columns)] for row in range(3)]
            looped = [as_tuple(function(*row)) for row in rows]
            expected = tuple(torch.stack(parts) for parts in zip(*looped, strict=True))
            for dim in (0, -1):
                dims = tuple(dim if index in chosen else None for index in range(len(first)))
                batch = [row[0] if at is None else torch.stack(row, at) for row, at in zip(columns, dims, strict=True)]
                actual = as_tuple(torch.vmap(function, dims)(*batch))
                torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14 * largest(expected))


def with_gradients(function: Callable[..., Any], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Results of a function, and the gradients of the sum of their squares."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    results = as_tuple(function(*leaves))
    loss = sum((result**2).sum() for result in results)
    return [*(result.detach() for result in results), *torch.autograd.grad(loss, leaves)]


def check_compile(case: OpCase, device: str = "cpu", backend: str = "aot_eager") -> None:
    """torch.compile in one graph gives the eager results and gradients, also after the size changes."""
    torch._dynamo.reset()

    def step(*args: Any) -> Any:
        return as_tuple(case.call(*args))[: case.differentiable_outputs]

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    with on(device):
        for size in (case.small_size, case.small_size + 3):
            args = case.arguments(size, device=device)
            tensors, rebuild = flatten(case, args)
            eager = with_gradients(lambda *leaves, rebuild=rebuild: step(*rebuild(*leaves)), tensors)
            graph = with_gradients(lambda *leaves, rebuild=rebuild: compiled(*rebuild(*leaves)), tensors)
            torch.testing.assert_close(graph, eager, rtol=1e-12, atol=1e-14)


def check_export(case: OpCase, device: str = "cpu") -> None:
    """torch.export records the operator, and the exported program gives its results."""
    args = case.arguments(case.small_size, device=device)
    tensors, rebuild = flatten(case, args)

    class Module(torch.nn.Module):
        def forward(self, *leaves: Tensor) -> tuple[Tensor, ...]:
            return as_tuple(case.call(*rebuild(*leaves)))[: case.outputs]

    program = torch.export.export(Module(), tuple(tensors))
    if case.op is not None:
        assert any(node.target is case.op for node in program.graph.nodes), f"{case.name}: not in the exported graph"
    with on(device):
        torch.testing.assert_close(as_tuple(program.module()(*tensors)), case.results(args), rtol=0, atol=0)


def check_opcheck(case: OpCase, device: str = "cpu") -> None:
    """torch's own checks: schema (no hidden writes or aliases), registration, fake tensors, AOT dispatch."""
    for wanted in (False, True):
        args = case.arguments(case.small_size, device=device)
        tensors, rebuild = flatten(case, args)
        leaves = [t.clone().requires_grad_(wanted) for t in tensors]
        with on(device):
            torch.library.opcheck(case.op, case.op_arguments(*rebuild(*leaves)))


# --- bad input ---


def check_errors(case: OpCase, device: str = "cpu") -> None:
    """Wrong dtypes, mixed dtypes and devices, and the case's own bad inputs raise, with a message that says why."""
    args = case.arguments(case.small_size, device=device)
    tensors, rebuild = flatten(case, args)
    with on(device):
        for index in range(len(tensors) if case.checked else 0):

            def replaced(tensor: Tensor, index: int = index) -> Arguments:
                return rebuild(*(tensor if at == index else old for at, old in enumerate(tensors)))

            for dtype in (torch.float16, torch.int64, torch.complex128):
                with pytest.raises(TypeError, match=str(dtype).removeprefix("torch.")):
                    case.call(*replaced(tensors[index].to(dtype)))
            if len(tensors) > 1:
                with pytest.raises((TypeError, ValueError), match=r"float32[\s\S]*float64|float64[\s\S]*float32"):
                    case.call(*replaced(tensors[index].float()))
                with pytest.raises((TypeError, ValueError), match=r"meta[\s\S]*(cpu|cuda)|(cpu|cuda)[\s\S]*meta"):
                    case.call(*replaced(tensors[index].to("meta")))
        for bad in case.errors:
            with pytest.raises(bad.error, match=bad.match):
                case.call(*bad.spoil(*args))


# --- parametrisation ---

# Device, and what a case must have for the check to make sense.
PLAN: tuple[tuple[Callable[..., None], tuple[str, ...], Callable[[OpCase], Any]], ...] = (
    (check_values, ("cpu", "emulated", "cuda"), lambda case: True),
    (check_layouts, ("cpu", "emulated", "cuda"), lambda case: True),
    (check_devices, ("emulated", "cuda"), lambda case: True),
    (check_threads, ("cpu",), lambda case: True),
    (check_gradients, ("cpu",), lambda case: case.differentiable),
    (check_vmap, ("cpu",), lambda case: case.differentiable),
    (check_compile, ("cpu",), lambda case: case.differentiable),
    (check_export, ("cpu",), lambda case: case.differentiable),
    (check_opcheck, ("cpu",), lambda case: case.op is not None),
    (check_errors, ("cpu",), lambda case: case.checked or case.errors),
)


def parameters(cases: Sequence[OpCase]) -> list[Any]:
    """All (check, case, device) triples that apply, for ``pytest.mark.parametrize``."""
    return [
        pytest.param(
            check,
            case,
            device,
            id=f"{case.name}-{check.__name__.removeprefix('check_')}-{device}",
            marks=[pytest.mark.gpu] if device == "cuda" else [],
        )
        for case in cases
        for check, devices, applies in PLAN
        for device in devices
        if applies(case)
    ]


def run(check: Callable[..., None], case: OpCase, device: str) -> None:
    """Run one triple; the body of the one test function that a file of operator tests needs."""
    require(device)
    check(case, device)
