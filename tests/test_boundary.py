"""One test for each trap of the torch boundary: all were met once, none may come back. And what the boundary costs."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, func
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

import kantor
from devices import device, home  # noqa: F401  (device is a fixture)
from kantor import _C
from kantor._ops import declare
from toy_ops import axpby, exponential


@pytest.fixture
def x() -> Tensor:
    return torch.tensor([0.5, -1.0, 2.0, 0.25, -3.0], dtype=torch.float64)


def multiply_add(x: Any, y: Any = None, out: Any = None, a: float = 1.0, b: float = 0.0, threads: int = 1) -> Any:
    """out = a x + b y by the native function itself, without torch in between."""
    out = torch.empty_like(x) if out is None else out
    _C.multiply_add(x, x if y is None else y, out, a, b, threads)
    return out


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int64", "int32", "complex64", "bool"])
def test_trap_dtypes_by_their_width(dtype: str) -> None:
    """float16 was once read as float64, and int64 and complex64 have its width."""
    with pytest.raises(TypeError, match="expected float32 or float64"):
        multiply_add(torch.ones(8, dtype=getattr(torch, dtype)))


def test_trap_mixed_dtypes(x: Tensor) -> None:
    with pytest.raises(TypeError, match="expected float64, got float32"):
        multiply_add(x, x.float())
    with pytest.raises(TypeError, match="expected float64, got float32"):
        multiply_add(x, x, x.float())


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_trap_fake_tensors_have_no_memory() -> None:
    """A FakeTensor says it is a CPU tensor of some shape; the pointer behind it is null."""
    with FakeTensorMode():
        fake = torch.empty(8)
        with pytest.raises(ValueError, match="no memory behind it"):
            multiply_add(fake)


def test_trap_tensors_without_storage() -> None:
    x = torch.ones(8)
    for strange in (x.to("meta"), x.to_sparse()):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            multiply_add(strange, x, x)
    with pytest.raises(RuntimeError):
        torch.vmap(multiply_add)(x[None])
    with pytest.raises(RuntimeError):
        func.grad(lambda x: multiply_add(x).sum())(x)
    for not_a_tensor in (x.numpy(), None, 3.0):
        with pytest.raises(TypeError):
            _C.multiply_add(x, not_a_tensor, x, 1.0, 1.0, 1)


def test_trap_strides_at_the_boundary(x: Tensor) -> None:
    """The native function refuses what it would read wrongly; an empty tensor is no null pointer."""
    for wrong in (x[::2], x[:1].expand(3)):
        with pytest.raises(ValueError, match="contiguous"):
            multiply_add(wrong, out=torch.empty(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="same size"):
        multiply_add(x, x[:3], torch.empty_like(x))
    assert multiply_add(x[:0]).shape == (0,)


def test_trap_expanded_gradients(device: str) -> None:  # noqa: F811
    """sum().backward() hands a gradient with stride 0 to the backward rule, which hands it to the kernel."""
    x = torch.randn(1000, dtype=torch.float64, device=home(device), requires_grad=True)
    axpby(x, x, 2.0, 3.0).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(x, 5.0), rtol=0, atol=0)


def test_trap_lazy_negation() -> None:
    """imag of a lazily conjugated tensor is a real tensor whose memory holds the opposite sign."""
    z = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex128).conj().imag
    assert z.is_neg()
    torch.testing.assert_close(axpby(z, z, 1.0, 0.0), torch.tensor([-2.0, 4.0], dtype=torch.float64))


def test_trap_freed_temporaries() -> None:
    """The contiguous copies that an operator makes must outlive the call that runs without the GIL."""
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            [torch.full((50_000,), float("nan"), dtype=torch.float64) for _ in range(8)]

    churner = threading.Thread(target=churn)
    churner.start()
    try:
        x = torch.randn(100_000, dtype=torch.float64)[::2]
        for _ in range(50):
            assert torch.equal(axpby(x, x.clone()[:], 2.0, 3.0), 2 * x + 3 * x)
    finally:
        stop.set()
        churner.join()


def test_trap_data_pointers_stay_out_of_python() -> None:
    """`f(x.contiguous().data_ptr())` frees the copy before f runs: no such pointer is taken in the package."""
    sources = list(Path(kantor.__file__).parent.rglob("*.py"))
    assert len(sources) > 3
    assert not [path.name for path in sources if re.search(r"\bdata_ptr\b", path.read_text())]


def test_trap_shape_is_copied_before_the_gil_is_released() -> None:
    """While a kernel runs, another Python thread goes on, and may change the shape of the kernel's tensors in place."""
    x, y, out = (torch.ones(4_000_000, dtype=torch.float64) for _ in range(3))
    overlaps = 0
    for _ in range(30):
        out.zero_()
        ends = out[:1], out[-1:]
        caller = threading.Thread(target=_C.multiply_add, args=(x, y, out, 2.0, 3.0, 1))
        caller.start()
        while caller.is_alive() and not ends[0].any():
            time.sleep(1e-4)
        if not ends[1].any():  # begun and not finished: it has its shapes, and must not look again
            for tensor in (x, y, out):
                tensor.unsqueeze_(0).unsqueeze_(0)
            overlaps += not ends[1].any()
        caller.join()
        for tensor in (x, y, out):
            tensor.squeeze_()
        assert bool((out == 5.0).all())
        if overlaps == 5:
            break
    assert overlaps, "no thread ran beside the kernel: is the GIL released?"


def test_trap_native_writes_are_invisible_to_autograd(x: Tensor) -> None:
    """A write through the boundary does not bump the version counter, so operators return fresh tensors only."""
    out = torch.empty_like(x)
    version = out._version
    multiply_add(x, out=out)
    assert out._version == version
    leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
    before = [leaf.detach().clone() for leaf in leaves]
    result = axpby(*leaves, 2.0, 3.0)
    assert all(torch.equal(leaf, old) for leaf, old in zip(leaves, before, strict=True))
    assert result._version == 0
    assert not result._is_view()


def test_trap_inputs_changed_before_backward(x: Tensor) -> None:
    """What a rule reads is saved through torch, which notices."""
    leaf = x.clone().requires_grad_()
    inner = leaf * 1
    y, *_ = exponential(inner, [])
    inner.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_trap_empty_number_lists(x: Tensor) -> None:
    """torch.library takes an empty int[] for an empty Tensor[] when it compares the nesting of gradients."""
    library = torch.library.Library("kantor_test_lists", "FRAGMENT")
    lists = declare(
        "lists(Tensor[] terms, int[] layout, float[] scales, Tensor x) -> Tensor",
        forward=lambda terms, layout, scales, x: x.clone(),
        fake=lambda terms, layout, scales, x: x.new_empty(x.shape),
        backward=lambda ctx, grad: (None, None, None, grad),
        jvp=lambda ctx, d_terms, d_layout, d_scales, dx: dx,
        library=library,
    )
    for terms, layout, scales in (([], [], []), ([x], [1], [1.0])):
        torch.library.opcheck(lists, (terms, layout, scales, x.clone().requires_grad_()))
        grad = func.grad(lambda x, *lead: lists(*lead, x).sum())(x, terms, layout, scales)
        assert torch.equal(grad, torch.ones_like(x))
    library._destroy()


def test_trap_register_autograd_loses_tangents(x: Tensor) -> None:
    """The overload in torch.ops, which graphs and other languages see, is as differentiable as the Python callable."""
    raw = torch.ops.kantor_test.axpby
    torch.testing.assert_close(func.jvp(lambda x: raw(x, x, 2.0, 3.0), (x,), (x,))[1], 5 * x)
    torch.testing.assert_close(func.grad(lambda x: raw(x, x, 2.0, 3.0).sum())(x), torch.full_like(x, 5.0))


def test_trap_two_libraries_of_one_name(x: Tensor) -> None:
    """FRAGMENT: others, and a second module of ours, may add to the namespace."""
    library = torch.library.Library("kantor", "FRAGMENT")
    declare("test_twice(Tensor x) -> Tensor", forward=lambda x: 2 * x, fake=torch.empty_like, library=library)
    torch.testing.assert_close(torch.ops.kantor.test_twice(x), 2 * x)
    library._destroy()


@pytest.mark.parametrize("mode", ["reverse", "forward", "func"])
def test_trap_reference_cycles(mode: str) -> None:
    """Results that a rule reads must not keep themselves alive."""
    gc.collect()
    gc.disable()
    try:
        x = torch.randn(8, requires_grad=True)
        if mode == "reverse":
            y = exponential(x, [])[0]
        elif mode == "forward":
            with forward_ad.dual_level():
                y = exponential(forward_ad.make_dual(x, torch.ones(8)), [])[0]
        else:
            y = func.vjp(lambda x: exponential(x, [])[0], x)[0]
        alive = weakref.ref(x), weakref.ref(y)
        del x, y
        assert [reference() for reference in alive] == [None, None]
    finally:
        gc.enable()


# --- cost ---


def test_native_call_overhead() -> None:
    """Three tensors across the boundary cost about 0.5 us; the bound leaves room for a busy machine."""
    x, out = torch.ones(1), torch.empty(1)
    best = min(timed(lambda: _C.multiply_add(x, x, out, 1.0, 1.0, 1), 2000) for _ in range(20))
    assert best < 2e-6, f"{best * 1e6:.2f} us"


def timed(function: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        function()
    return (time.perf_counter() - start) / count


def test_import_is_light() -> None:
    """Importing the recipe loads no compiler and no optional package."""
    program = (
        "import sys, torch; before = set(sys.modules); import kantor._ops; "
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}), 'torch._dynamo' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "True" not in output
    assert not {"scipy", "matplotlib", "sympy", "tqdm"} & set(re.findall(r"'(\w+)'", output)), output
