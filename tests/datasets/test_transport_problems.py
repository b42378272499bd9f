"""Shapes, scales, masses and seeds of the transport problems, and that points and costs belong together."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kantor import datasets
from kantor.datasets import transport

Maker = Callable[[int], tuple[Tensor, ...]]

COSTS: dict[str, tuple[Maker, tuple[int, int]]] = {
    "random": (lambda seed: transport.random_assignment(60, seed), (60, 60)),
    "images-l1": (lambda seed: transport.image_pair_l1(9, seed), (81, 81)),
    "images-l2": (lambda seed: transport.image_pair_l2(9, seed), (81, 81)),
    "faces-l1": (lambda seed: transport.image_pair_l1(25, seed), (625, 625)),
    "faces-l2": (lambda seed: transport.image_pair_l2(25, seed), (625, 625)),
    "colours": (lambda seed: transport.colour_clouds(60, seed), (60, 60)),
    "digits": (lambda seed: transport.digit_clouds(60, seed=seed), (60, 60)),
    "many-digits": (lambda seed: transport.digit_clouds(200, (1, 7), seed), (200, 200)),
    "mixture-1d": (lambda seed: transport.mixture_1d(61, seed=seed), (61, 49)),
    "mixture-1d-wide": (lambda seed: transport.mixture_1d(20, 33, seed), (20, 33)),
    "clouds": (lambda seed: transport.point_clouds(60, 3, seed), (60, 60)),
}
POINTS: dict[str, tuple[Maker, Maker, float, float]] = {  # points, problem, norm, power
    "images-l1": (lambda seed: transport.image_pair_points(9, seed, "l1"), COSTS["images-l1"][0], 1, 1),
    "images-l2": (lambda seed: transport.image_pair_points(9, seed), COSTS["images-l2"][0], 2, 2),
    "faces-l1": (lambda seed: transport.image_pair_points(25, seed, "l1"), COSTS["faces-l1"][0], 1, 1),
    "colours": (lambda seed: transport.colour_cloud_points(60, seed), COSTS["colours"][0], 2, 2),
    "digits": (lambda seed: transport.digit_cloud_points(60, seed=seed), COSTS["digits"][0], 2, 2),
    "mixture-1d": (lambda seed: transport.mixture_1d_points(61, seed=seed), COSTS["mixture-1d"][0], 2, 2),
    "clouds": (lambda seed: transport.point_cloud_points(60, 3, seed), COSTS["clouds"][0], 2, 2),
}


@pytest.mark.parametrize("name", COSTS)
def test_a_problem_is_one_of_the_suite(name: str) -> None:
    make, shape = COSTS[name]
    C, a, b = make(0)
    assert C.shape == shape
    assert (a.shape, b.shape) == (shape[:1], shape[1:])
    assert {t.dtype for t in (C, a, b)} == {torch.float64}
    assert C.max() == 1
    assert C.min() >= 0
    for weights in (a, b):
        assert weights.sum().item() == pytest.approx(1, abs=1e-14)
        assert weights.min() > 0


@pytest.mark.parametrize("name", COSTS)
def test_a_seed_says_it_all(name: str) -> None:
    make, _ = COSTS[name]
    first, again, other = make(0), make(0), make(1)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


@pytest.mark.parametrize("name", POINTS)
def test_points_have_the_cost(name: str) -> None:
    make_points, make, norm, power = POINTS[name]
    X, Y, a, b = make_points(2)
    C, a_C, b_C = make(2)
    difference = X.numpy()[:, None] - Y.numpy()[None]
    expected = np.linalg.norm(difference, ord=norm, axis=-1) ** power
    np.testing.assert_allclose(C.numpy(), expected, rtol=0, atol=1e-14)
    assert torch.equal(a, a_C)
    assert torch.equal(b, b_C)


@pytest.mark.parametrize("size", [12, 25])
def test_images_keep_one_percent_everywhere(size: int) -> None:
    _, _, a, b = transport.image_pair_points(size, 3)
    floor = 0.01 / size**2
    for density in (a, b):
        assert density.min() >= floor * (1 - 1e-12)
        assert density.max() > 1.5 / size**2, "a picture, not a constant"
    assert not torch.equal(a, b)


def test_faces_are_those_of_the_data_set() -> None:
    from skimage.data import lfw_subset

    _, _, a, b = transport.image_pair_points(25, 4)
    faces = lfw_subset()[:100].reshape(100, -1)
    shapes = (faces / faces.sum(1, keepdims=True)) * 0.99 + 0.01 / 625
    for density in (a, b):
        assert np.abs(shapes - density.numpy()).max(1).min() < 1e-15


def test_digits_by_default_are_all_there_are() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    X, Y, a, b = transport.digit_cloud_points(classes=(0, 1))
    assert [len(X), len(Y)] == [int((digits.target == k).sum()) for k in (0, 1)]
    assert (len(a), len(b)) == (len(X), len(Y))
    ratio = digits.images[digits.target == 0].reshape(len(X), -1).max() / X.max().item()
    np.testing.assert_allclose(X.numpy() * ratio, digits.images[digits.target == 0].reshape(len(X), -1), atol=1e-13)


def test_digits_beyond_the_data_set_are_new_points() -> None:
    X, *_ = transport.digit_cloud_points(500)
    assert X.shape == (500, 64)
    assert len(torch.unique(X, dim=0)) == 500


def test_mixture_is_exponential_against_two_peaks() -> None:
    x, y, a, b = transport.mixture_1d_points(400, 500, seed=1)
    scale = 5 / float(x[-1, 0])
    slope = (a.log()[1:] - a.log()[:-1]) / ((x[1:] - x[:-1])[:, 0] * scale)
    np.testing.assert_allclose(slope.numpy(), -1, rtol=1e-9)
    inner = b[1:-1]
    tops = (y[1:-1, 0] * scale)[(inner > b[:-2]) & (inner > b[2:])]
    assert len(tops) == 2
    np.testing.assert_allclose(tops.numpy(), [1, 3], atol=0.25)


@pytest.mark.parametrize(("n", "d"), [(1, 1), (7, 2), (3000, 3), (2500, 20)])
def test_clouds_are_scaled_by_their_true_diameter(n: int, d: int) -> None:
    X, Y, *_ = transport.point_cloud_points(n, d, 5)
    distances = (X[:, None, :] - Y[None]).norm(dim=-1) if n < 100 else torch.cdist(X, Y)
    assert distances.max().item() == pytest.approx(1, rel=1e-7)


def test_coincident_points_do_not_divide_by_zero() -> None:
    one = np.ones((4, 2))
    X, Y = transport._scaled(one, one)
    assert torch.equal(X, torch.ones(4, 2, dtype=torch.float64))
    assert torch.equal(X, Y)
    assert transport._largest_one(torch.zeros(3, 3)).eq(0).all()


def test_suite_has_every_problem_at_about_n() -> None:
    suite = datasets.transport_problems(50, seed=3)
    assert list(suite) == ["random", "images-l1", "images-l2", "colours", "digits", "mixture-1d", "clouds"]
    for C, a, b in suite.values():
        assert 40 <= len(a) <= 60
        assert 40 <= len(b) <= 60
        assert C.shape == (len(a), len(b))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: transport.random_assignment(0), "random_assignment: n: expected an integer >= 1, got 0"),
        (lambda: transport.random_assignment(2.0), "random_assignment: n: .*got 2.0"),  # type: ignore[arg-type]
        (lambda: transport.random_assignment(True), "random_assignment: n: .*got True"),
        (lambda: transport.point_clouds(5, 0), "point_clouds: d: expected an integer >= 1, got 0"),
        (lambda: transport.mixture_1d(5, -1), "mixture_1d: m: .*got -1"),
        (lambda: transport.image_pair_l1(1), "image_pair_l1: size: expected an integer >= 2, got 1"),
        (lambda: transport.image_pair_l2(226), "image_pair_points: size: expected at most 225, got 226"),
        (lambda: transport.image_pair_points(5, 0, "cosine"), "image_pair_points: cost: .*got 'cosine'"),
        (lambda: transport.colour_clouds(10**6), "colour_cloud_points: n: expected at most 135300 pixels"),
        (lambda: transport.digit_clouds(5, (3, 10)), "digit_cloud_points: classes: expected two digits"),
        (lambda: transport.digit_clouds(5, (1, 2, 3)), "classes: expected two digits"),  # type: ignore[arg-type]
        (lambda: transport.transport_problems(3), "transport_problems: n: expected an integer >= 4, got 3"),
    ],
)
def test_arguments_that_make_no_problem(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("skimage", lambda: transport.image_pair_l2(5)),
        ("skimage", lambda: transport.colour_clouds(5)),
        ("sklearn.datasets", lambda: transport.digit_clouds(5)),
    ],
)
def test_a_missing_package_is_named(package: str, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r'scikit-\w+ is missing: pip install "kantor\[demo\]"'):
        call()
