"""The recipe of ``kantor._ops``: every check of the harness, and every transform of torch, on toy operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, func
from torch._subclasses import FakeTensorMode
from torch._vmap_internals import _vmap as first_vmap
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import op_checks
from kantor._ops import Context, batch_first, declare, loop_over_batch
from op_checks import ErrorCase, OpCase
from toy_ops import LIBRARY, add, axpby, exponential, public_axpby, weighted_sum

CASES = [
    OpCase(
        "axpby",
        call=public_axpby,
        sample=lambda size, rand: (rand(size), rand(size), 2.0, 3.0),
        oracle=lambda x, y, a, b: a * x + b * y,
        differentiable=(0, 1),
        checked=True,
        op=axpby,
        errors=(ErrorCase(ValueError, r"y: expected shape \(4,\)", lambda x, y, a, b: (x, y[:-1], a, b)),),
    ),
    OpCase(
        "weighted_sum",
        call=weighted_sum,
        sample=lambda size, rand: ([rand(2, size), rand(2, size)], [2.0, 3.0], rand(2, size)),
        oracle=lambda terms, weights, bias: weights[0] * terms[0] + weights[1] * terms[1] + bias,
        differentiable=(0, 2),
        op=weighted_sum,
    ),
    OpCase(
        "exponential",
        call=exponential,
        sample=lambda size, rand: (rand(size), []),
        oracle=lambda x, steps: (x.exp(), x.sign()),
        outputs=2,
        differentiable=(0,),
        plain=lambda x, steps: (x.exp(), x.sign()),
        op=exponential,
    ),
]


@pytest.mark.parametrize(("check", "case", "device"), op_checks.parameters(CASES))
def test_operator(check: Callable[..., None], case: OpCase, device: str) -> None:
    op_checks.run(check, case, device)


@pytest.fixture
def x() -> Tensor:
    return torch.tensor([0.5, -1.0, 2.0, 0.25, -3.0], dtype=torch.float64)


@pytest.fixture
def rows(x: Tensor) -> Tensor:
    return torch.stack([x, 2 * x, x.flip(0)])


def five(x: Tensor) -> Tensor:
    """5 x, through the operator."""
    return axpby(x, x, 2.0, 3.0)


def cubes(x: Tensor) -> Tensor:
    """sum (5 x)^3, with gradient 375 x^2 and Hessian diag(750 x)."""
    return (five(x) ** 3).sum()


# --- derivatives in eager mode ---


def test_func_grad(x: Tensor) -> None:
    torch.testing.assert_close(func.grad(cubes)(x), 375 * x**2)


def test_grad_inside_no_grad(x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(func.grad(cubes)(x), 375 * x**2)


def test_no_grad_inside_grad(x: Tensor) -> None:
    def half(x: Tensor) -> Tensor:
        with torch.no_grad():
            constant = five(x)
        return (constant * x).sum()

    torch.testing.assert_close(func.grad(half)(x), 5 * x)


def test_vmap(rows: Tensor, x: Tensor) -> None:
    torch.testing.assert_close(torch.vmap(lambda row: axpby(row, x, 2.0, 3.0))(rows), 2 * rows + 3 * x)


def test_nested_vmap(x: Tensor) -> None:
    block = torch.arange(60, dtype=torch.float64).view(5, 4, 3)
    inner = torch.vmap(lambda column: axpby(column, x, 2.0, 3.0), in_dims=1, out_dims=1)
    actual = torch.vmap(inner, in_dims=2)(block)
    torch.testing.assert_close(actual, 2 * block.permute(2, 0, 1) + 3 * x[:, None])


def test_vmap_over_an_empty_batch(x: Tensor) -> None:
    assert torch.vmap(lambda row: axpby(row, x, 2.0, 3.0))(x.new_empty(0, 5)).shape == (0, 5)


@pytest.mark.parametrize("outer", [func.jacfwd, func.jacrev])
@pytest.mark.parametrize("inner", [func.jacfwd, func.jacrev, func.grad])
def test_second_derivatives_nest(outer: Any, inner: Any, x: Tensor, rows: Tensor) -> None:
    hessian = outer(inner(cubes))
    torch.testing.assert_close(hessian(x), torch.diag(750 * x))
    torch.testing.assert_close(torch.vmap(hessian)(rows), torch.diag_embed(750 * rows))


def test_vmap_and_jvp_commute(rows: Tensor) -> None:
    expected = 5 * rows.flip(1)
    over_rows = torch.vmap(lambda row, tangent: func.jvp(five, (row,), (tangent,))[1])
    torch.testing.assert_close(over_rows(rows, rows.flip(1)), expected)
    torch.testing.assert_close(func.jvp(torch.vmap(five), (rows,), (rows.flip(1),))[1], expected)


def test_vmap_of_grad_with_a_loop_rule(rows: Tensor) -> None:
    actual = torch.vmap(func.grad(lambda row: (exponential(row, [])[0] ** 2).sum()))(rows)
    torch.testing.assert_close(actual, 2 * (2 * rows).exp())


def test_vmap_over_one_entry_of_a_list(x: Tensor, rows: Tensor) -> None:
    actual = torch.vmap(lambda row: weighted_sum([x, row], [2.0, 3.0], None))(rows)
    torch.testing.assert_close(actual, 2 * x + 3 * rows)


def test_first_vmap_of_torch(x: Tensor, rows: Tensor) -> None:
    """`is_grads_batched` and `vectorize` use it; by itself it cannot take apart a list of tensors."""

    def loss(x: Tensor) -> Tensor:
        return (weighted_sum([x, five(x)], [2.0, 3.0], None) ** 3).sum()  # (17 x)^3

    hessian = torch.diag(6 * 17**3 * x)
    functional = torch.autograd.functional
    torch.testing.assert_close(functional.hessian(loss, x, vectorize=True), hessian)
    forward = functional.jacobian(func.grad(loss), x, vectorize=True, strategy="forward-mode")
    torch.testing.assert_close(forward, hessian)

    def gradient(x: Tensor) -> Tensor:
        return functional.jacobian(loss, x, create_graph=True, vectorize=True)

    torch.testing.assert_close(functional.jacobian(gradient, x, vectorize=True), hessian)

    def nested(row: Tensor) -> Tensor:
        # The operator meets only the outer level; the inner one comes after it.
        return first_vmap(lambda other: exponential(row, [])[0] + other)(rows)

    torch.testing.assert_close(first_vmap(nested)(rows), rows.exp()[:, None] + rows)
    both = first_vmap(lambda row: first_vmap(lambda other: weighted_sum([row, other], [1.0, 2.0], row))(rows))(rows)
    torch.testing.assert_close(both, 2 * rows[:, None] + 2 * rows)


def test_gradient_outlives_its_transform(x: Tensor) -> None:
    """What vjp saved is a dead functorch wrapper once the function that vjp returns runs."""
    _, pullback = func.vjp(lambda x: five(x) ** 2, x)
    cotangent = torch.ones_like(x, requires_grad=True)
    (grad,) = pullback(cotangent)
    torch.testing.assert_close(grad, 50 * x)
    torch.testing.assert_close(torch.autograd.grad(grad.sum(), cotangent)[0], 50 * x)


def test_autograd_over_func_grad(x: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    func.grad(cubes)(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, 750 * x)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_linearize(x: Tensor) -> None:
    _, push = func.linearize(five, x)
    torch.testing.assert_close(push(x), 5 * x)


def test_dual_tensors(x: Tensor) -> None:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(axpby(forward_ad.make_dual(x, x), x, 2.0, 3.0)).tangent
    torch.testing.assert_close(tangent, 2 * x)


def test_forward_mode_inside_no_grad(x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(func.jvp(five, (x,), (x,))[1], 5 * x)


def test_zero_tangent_of_an_input_the_result_does_not_depend_on(x: Tensor, rows: Tensor) -> None:
    # x - 0 y: the rule returns None for a tangent of y alone, as a solver does for its initial guess.
    first = declare(
        "first(Tensor x, Tensor y) -> Tensor",
        forward=lambda x, y: x.clone(),
        fake=lambda x, y: x.new_empty(x.shape),
        backward=lambda ctx, grad: (grad, None),
        jvp=lambda ctx, dx, dy: dx,
        library=LIBRARY,
    )
    assert not func.jacfwd(lambda y: first(x, y))(x).any()
    assert not torch.vmap(func.hessian(lambda y: first(y, y).sum()))(rows).any()
    leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
    assert torch.autograd.gradcheck(first, leaves, check_forward_ad=True)


def test_checkpoint(x: Tensor) -> None:
    leaf = x.clone().requires_grad_()
    checkpoint(cubes, leaf, use_reentrant=False).backward()
    torch.testing.assert_close(leaf.grad, 375 * x**2)


def test_inference_mode(x: Tensor) -> None:
    with torch.inference_mode():
        assert axpby(x, x, 2.0, 3.0).is_inference()


def test_results_without_derivatives_are_marked(x: Tensor) -> None:
    y, sign, counts = exponential(x.requires_grad_(), [7])
    assert (y.requires_grad, sign.requires_grad, counts.requires_grad) == (True, False, False)
    assert counts.tolist() == [5, 7]
    _, tangents = func.jvp(lambda x: exponential(x, [7])[:2], (x.detach(),), (x.detach(),))
    assert not tangents[1].any()


def test_saved_results(x: Tensor) -> None:
    """A rule may read the results instead of computing them again, also in second derivatives and graphs."""
    calls = []

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return x.exp(), x.sign()

    saving = declare(
        "saving(Tensor x) -> (Tensor y, Tensor sign)",
        forward=forward,
        fake=lambda x: (x.new_empty(x.shape), x.new_empty(x.shape)),
        backward=lambda ctx, grad: (grad * ctx.outputs[0],),
        jvp=lambda ctx, dx: dx * ctx.outputs[0],
        save_outputs=True,
        library=LIBRARY,
    )
    leaf = x.clone().requires_grad_()
    saving(leaf)[0].sum().backward()
    assert len(calls) == 1
    torch.testing.assert_close(leaf.grad, x.exp())
    modes = {"check_forward_ad": True, "check_batched_grad": True}
    assert torch.autograd.gradcheck(lambda x: saving(x)[0], leaf, **modes)
    assert torch.autograd.gradgradcheck(lambda x: saving(x)[0], leaf, check_fwd_over_rev=True)
    torch.library.opcheck(saving, (leaf,))


def test_several_differentiable_results(x: Tensor) -> None:
    def backward(ctx: Context, d_sine: Tensor | None, d_cosine: Tensor | None) -> tuple[Tensor | None]:
        (x,) = ctx.inputs
        parts = (None if d_sine is None else d_sine * x.cos(), None if d_cosine is None else -d_cosine * x.sin())
        return (add(*parts),)

    waves = declare(
        "waves(Tensor x) -> (Tensor sine, Tensor cosine, Tensor sign)",
        forward=lambda x: (x.sin(), x.cos(), x.sign()),
        fake=lambda x: tuple(x.new_empty(x.shape) for _ in range(3)),
        backward=backward,
        jvp=lambda ctx, dx: (dx * ctx.inputs[0].cos(), -dx * ctx.inputs[0].sin()),
        differentiable_outputs=2,
        library=LIBRARY,
    )
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: waves(x)[:2], leaf, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: waves(x)[1], leaf, check_fwd_over_rev=True)
    torch.library.opcheck(waves, (leaf,))


def test_a_rule_of_ones_own_for_vmap(x: Tensor, rows: Tensor) -> None:
    calls = []

    def rule(info: Any, in_dims: tuple[int | None, ...], x: Tensor, y: Tensor) -> tuple[Tensor, int]:
        calls.append(in_dims)
        if in_dims[1] is not None:
            return loop_over_batch(subtract, info, in_dims, x, y)
        return subtract(batch_first(x, in_dims[0], info.batch_size), y), 0

    subtract = declare(
        "subtract(Tensor x, Tensor y) -> Tensor",
        forward=lambda x, y: x - y,
        fake=lambda x, y: x.new_empty(x.shape),
        vmap=rule,
        library=LIBRARY,
    )
    torch.testing.assert_close(torch.vmap(subtract, (1, None))(rows.mT, x), rows - x)
    torch.testing.assert_close(torch.vmap(subtract)(rows, 2 * rows), -rows)
    assert calls == [(1, None), (0, 0)]


def test_missing_derivatives_say_so(x: Tensor) -> None:
    plain = declare(
        "plain(Tensor x) -> Tensor",
        forward=torch.clone,
        fake=lambda x: x.new_empty(x.shape),
        library=LIBRARY,
    )
    with pytest.raises(NotImplementedError, match="kantor_test::plain: this operator has no reverse-mode derivative"):
        plain(x.clone().requires_grad_()).sum().backward()
    with pytest.raises(NotImplementedError, match="kantor_test::plain: this operator has no forward-mode derivative"):
        func.jvp(plain, (x,), (x,))


@pytest.mark.parametrize(
    ("gradients", "match"),
    [
        (lambda ctx, grad: grad, "a tuple with one gradient for each of"),
        (lambda ctx, grad: (grad,), "a tuple with one gradient for each of"),
        (lambda ctx, grad: ([grad], None), "terms: expected 2 gradients, got 1"),
    ],
)
def test_wrong_gradients_say_so(gradients: Callable[..., Any], match: str, x: Tensor) -> None:
    library = torch.library.Library("kantor_test_wrong", "FRAGMENT")
    wrong = declare(
        "wrong(Tensor[] terms, Tensor x) -> Tensor",
        forward=lambda terms, x: x.clone(),
        fake=lambda terms, x: x.new_empty(x.shape),
        backward=gradients,
        library=library,
    )
    with pytest.raises(ValueError, match=match):
        wrong([x, x], x.requires_grad_()).sum().backward()
    library._destroy()


@pytest.mark.parametrize(
    ("schema", "options", "error", "match"),
    [
        ("bad(Tensor(a!) x) -> Tensor", {}, ValueError, "neither writes into nor returns its arguments"),
        ("bad(Tensor(a) x) -> Tensor(a)", {}, ValueError, "neither writes into nor returns its arguments"),
        ("bad(Tensor x, *, int n) -> Tensor", {}, ValueError, "n: expected positional"),
        ("bad(Tensor x, int n=3) -> Tensor", {}, ValueError, "n: expected positional"),
        ("bad(Tensor?[] x) -> Tensor", {}, TypeError, "x: expected Tensor, Tensor"),
        ("bad(Tensor x) -> Tensor[]", {}, TypeError, "results, each a Tensor"),
        ("bad(Tensor x) -> ()", {}, TypeError, "results, each a Tensor"),
        ("bad(Tensor x, int n) -> Tensor", {"batched": ("n",)}, ValueError, "expected names of Tensor arguments"),
        ("bad(Tensor x) -> Tensor", {"batched": ("x",), "vmap": loop_over_batch}, ValueError, "got both"),
        ("bad(Tensor x) -> Tensor", {"differentiable_outputs": 2}, ValueError, "expected 1 to 1"),
    ],
)
def test_bad_declarations(schema: str, options: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        declare(schema, forward=torch.clone, fake=torch.clone, library=LIBRARY, **options)
    assert not hasattr(torch.ops.kantor_test, "bad"), "a bad declaration must leave nothing behind"


# --- graphs ---


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def test_compile_with_inductor() -> None:
    torch._dynamo.reset()
    op_checks.check_compile(CASES[0], backend="inductor")


def test_compile_with_dynamic_shapes() -> None:
    graph = compiled(lambda x, y: axpby(x, y, 2.0, 3.0), dynamic=True)
    for size in (3, 7):
        x = torch.arange(size, dtype=torch.float64)
        torch.testing.assert_close(graph(x, x), 5 * x)


def test_compile_with_changing_numbers(x: Tensor) -> None:
    graph = compiled(lambda x, a: axpby(x, x, a, 1.0))
    for a in (1.0, 2.5, -7.0):
        torch.testing.assert_close(graph(x, a), (a + 1) * x)


@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(lambda: func.grad(cubes), id="grad"),
        pytest.param(lambda: lambda x: func.jvp(five, (x,), (x,))[1], id="jvp"),
        pytest.param(lambda: func.hessian(cubes), id="hessian"),
        pytest.param(lambda: lambda x: torch.vmap(func.grad(cubes))(torch.stack([x, 2 * x])), id="vmap-grad"),
    ],
)
def test_compile_of_transforms(transform: Callable[..., Any], x: Tensor) -> None:
    """Also forward mode, whose tangents `torch.library.register_autograd` loses in graphs."""
    torch.testing.assert_close(compiled(transform())(x), transform()(x))


def test_compile_around_a_dual_level(x: Tensor) -> None:
    def tangent(x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(five(forward_ad.make_dual(x, x))).tangent

    torch.testing.assert_close(compiled(tangent)(x), 5 * x)


def test_fake_tensors_reach_only_the_fake() -> None:
    with FakeTensorMode():
        x = torch.empty(4, dtype=torch.float64, requires_grad=True)
        y = axpby(x, x, 2.0, 3.0)
        (grad,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == grad.shape == (4,)
    assert axpby(x.to("meta"), x.to("meta"), 2.0, 3.0).device.type == "meta"
