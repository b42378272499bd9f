"""Pairs of distributions for optimal transport: real images, colours and digits, and synthetic ones.

A problem is ``(C, a, b)``: cost (n, m) of largest entry 1, weights (n,) and (m,) of mass 1, all float64. Where the cost
comes from points, the function that ends in ``_points`` returns them as ``(X, Y, a, b)``, scaled so that their cost
is that C. The same arguments give the same numbers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

Problem = tuple[Tensor, Tensor, Tensor]
Points = tuple[Tensor, Tensor, Tensor, Tensor]

FLOOR = 0.01  # the share of an image's mass that is spread evenly
_FACE_SIZE, _FACES = 25, 100  # of scikit-image's lfw_subset, whose second hundred shows no faces
# What scikit-image ships besides are drawings and textures, whose densities are close to uniform.
_PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "coins", "hubble_deep_field", "moon", "rocket")
_LARGEST_SIZE = 225  # three quarters of the smallest edge among them: the smallest piece that is taken


# --- synthetic ---


def random_assignment(n: int, seed: int = 0) -> Problem:
    """Independent uniform costs between n sources and n sinks of equal weight.

    No structure: the optimum is an assignment, and small regularisation leaves about one large entry in a row.
    """
    _check_count("random_assignment", "n", n)
    C = np.random.default_rng(seed).random((n, n))
    return torch.from_numpy(C / C.max()), _uniform(n), _uniform(n)


def point_cloud_points(n: int, d: int = 3, seed: int = 0) -> Points:
    """Two clouds of n points, uniform in a cube and Gaussian inside it, of equal weights; squared Euclidean cost."""
    _check_count("point_cloud_points", "n", n)
    _check_count("point_cloud_points", "d", d)
    random = np.random.default_rng(seed)
    X, Y = random.random((n, d)), 0.5 + 0.15 * random.standard_normal((n, d))
    return *_scaled(X, Y), _uniform(n), _uniform(n)


def point_clouds(n: int, d: int = 3, seed: int = 0) -> Problem:
    """:func:`point_cloud_points` with their squared distances as cost."""
    _check_count("point_clouds", "n", n)
    _check_count("point_clouds", "d", d)
    return _squared(point_cloud_points(n, d, seed))


def mixture_1d_points(n: int, m: int | None = None, seed: int = 0) -> Points:
    """Densities on grids of [0, 5]: exponential on n points, two Gaussians on m; squared distance.

    Centres and widths of the Gaussians vary with the seed. m defaults to ``0.8 n``, rounded up.
    """
    _check_count("mixture_1d_points", "n", n)
    m = math.ceil(0.8 * n) if m is None else m
    _check_count("mixture_1d_points", "m", m)
    random = np.random.default_rng(seed)
    x, y = np.linspace(0.0, 5.0, n), np.linspace(0.0, 5.0, m)
    centres = np.array([[1.0], [3.0]]) + random.uniform(-0.2, 0.2, (2, 1))
    widths = np.array([[0.2], [0.5]]) * random.uniform(0.8, 1.25, (2, 1))
    peaks = np.exp(-((y - centres) ** 2) / (2 * widths**2)) / widths
    # A floor: weights far below the last digit of the others would say nothing about the plan.
    b = 0.2 * peaks[0] + 0.8 * peaks[1] + 1e-8
    return *_scaled(x[:, None], y[:, None]), _normalised(np.exp(-x)), _normalised(b)


def mixture_1d(n: int, m: int | None = None, seed: int = 0) -> Problem:
    """:func:`mixture_1d_points` with their squared distances as cost."""
    _check_count("mixture_1d", "n", n)
    if m is not None:
        _check_count("mixture_1d", "m", m)
    return _squared(mixture_1d_points(n, m, seed))


# --- images as densities ---


def image_pair_points(size: int, seed: int = 0, cost: str = "sqeuclidean") -> Points:
    """Two real images of size x size pixels as densities on the pixels of a square.

    1 % of the mass is spread evenly, so that no weight is zero. 25 x 25: two faces of scikit-image's ``lfw_subset``;
    every other size: square pieces of two photographs, averaged down.

    Parameters
    ----------
    size : int
        Pixels along an edge, 2 to 225; n = m = size^2.
    seed : int
        Which images, and which pieces.
    cost : "sqeuclidean" or "l1"
        The cost between pixels whose largest value is scaled to 1.

    Returns
    -------
    X, Y : Tensor (n, 2)
        The pixels, the same twice.
    a, b : Tensor (n,)
        The densities.

    Raises
    ------
    ImportError
        scikit-image is missing.
    ValueError
        A size out of range, another cost.

    Examples
    --------
    >>> from kantor.datasets.transport import image_pair_points
    >>> X, Y, a, b = image_pair_points(25, cost="l1")
    >>> X.shape, round(float(a.sum()), 12)
    (torch.Size([625, 2]), 1.0)
    """
    _check_count("image_pair_points", "size", size, least=2)
    if size > _LARGEST_SIZE:
        raise ValueError(f"image_pair_points: size: expected at most {_LARGEST_SIZE}, got {size}")
    if cost not in ("sqeuclidean", "l1"):
        raise ValueError(f'image_pair_points: cost: expected "sqeuclidean" or "l1", got {cost!r}')
    data = _skimage_data("image_pair_points")
    random = np.random.default_rng(seed)
    if size == _FACE_SIZE:
        first, second = data.lfw_subset()[random.choice(_FACES, 2, replace=False)]
    else:
        names = random.choice(_PHOTOGRAPHS, 2, replace=False)
        first, second = (_piece(np.asarray(getattr(data, name)(), dtype=np.float64), size, random) for name in names)
    step = 1.0 / (size - 1)
    edge = torch.arange(size, dtype=torch.float64) * (step / math.sqrt(2) if cost == "sqeuclidean" else step / 2)
    pixels = torch.cartesian_prod(edge, edge)
    return pixels, pixels.clone(), _density(first), _density(second)


def image_pair_l1(size: int, seed: int = 0) -> Problem:
    """:func:`image_pair_points` with the city block distance: many optimal plans, the hardest case for Sinkhorn."""
    _check_count("image_pair_l1", "size", size, least=2)
    X, Y, a, b = image_pair_points(size, seed, "l1")
    return _largest_one(torch.cdist(X, Y, p=1)), a, b


def image_pair_l2(size: int, seed: int = 0) -> Problem:
    """:func:`image_pair_points` with the squared Euclidean distance."""
    _check_count("image_pair_l2", "size", size, least=2)
    return _squared(image_pair_points(size, seed))


# --- clouds from data ---


def colour_cloud_points(n: int, seed: int = 0) -> Points:
    """Colours of n pixels of the photograph of a cup of coffee and n of a cat's; squared Euclidean cost.

    Pixels are drawn without replacement, and still repeat colours; equal weights.

    Raises
    ------
    ImportError
        scikit-image is missing.
    ValueError
        More pixels than the photographs have.
    """
    _check_count("colour_cloud_points", "n", n)
    data = _skimage_data("colour_cloud_points")
    random = np.random.default_rng(seed)
    pixels = [np.asarray(image, dtype=np.float64).reshape(-1, 3) for image in (data.coffee(), data.chelsea())]
    most = min(map(len, pixels))
    if n > most:
        raise ValueError(f"colour_cloud_points: n: expected at most {most} pixels, got {n}")
    clouds = [colours[random.choice(len(colours), n, replace=False)] for colours in pixels]
    return *_scaled(*clouds), _uniform(n), _uniform(n)


def colour_clouds(n: int, seed: int = 0) -> Problem:
    """:func:`colour_cloud_points` with their squared distances as cost."""
    _check_count("colour_clouds", "n", n)
    return _squared(colour_cloud_points(n, seed))


def digit_cloud_points(n: int | None = None, classes: tuple[int, int] = (3, 8), seed: int = 0) -> Points:
    """Images of one handwritten digit against those of another, as points in 64 dimensions, of equal weights.

    Parameters
    ----------
    n : int, optional
        Images of each class, drawn at random. scikit-learn has 174 to 183 of a class; for larger n the rest are those
        images shifted by one pixel and with noise of a twentieth of the range. Default: all there are, which makes
        sizes differ.
    classes : pair of int
        The two digits.
    seed : int
        Which images.

    Raises
    ------
    ImportError
        scikit-learn is missing.
    """
    if n is not None:
        _check_count("digit_cloud_points", "n", n)
    if len(classes) != 2 or not all(isinstance(k, int) and 0 <= k <= 9 for k in classes):
        raise ValueError(f"digit_cloud_points: classes: expected two digits, got {classes!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('digit_cloud_points: scikit-learn is missing: pip install "kantor[demo]"') from error
    digits = load_digits()
    random = np.random.default_rng(seed)
    X, Y = (_draw_digits(digits.images[digits.target == k], n, random) for k in classes)
    return *_scaled(X, Y), _uniform(len(X)), _uniform(len(Y))


def digit_clouds(n: int | None = None, classes: tuple[int, int] = (3, 8), seed: int = 0) -> Problem:
    """:func:`digit_cloud_points` with their squared distances as cost."""
    if n is not None:
        _check_count("digit_clouds", "n", n)
    return _squared(digit_cloud_points(n, classes, seed))


def transport_problems(n: int, seed: int = 0) -> dict[str, Problem]:
    """The whole suite at about n points: images have the nearest square number of pixels, 625 their faces.

    Names: random, images-l1, images-l2, colours, digits, mixture-1d (n against 0.8 n), clouds. What a missing package
    would provide is an ImportError.

    Examples
    --------
    >>> from kantor.datasets import transport_problems
    >>> {name: tuple(C.shape) for name, (C, a, b) in transport_problems(100).items()}["mixture-1d"]
    (100, 80)
    """
    _check_count("transport_problems", "n", n, least=4)
    size = round(math.sqrt(n))
    return {
        "random": random_assignment(n, seed),
        "images-l1": image_pair_l1(size, seed),
        "images-l2": image_pair_l2(size, seed),
        "colours": colour_clouds(n, seed),
        "digits": digit_clouds(n, seed=seed),
        "mixture-1d": mixture_1d(n, seed=seed),
        "clouds": point_clouds(n, 3, seed),
    }


# --- helpers ---


def _check_count(call: str, name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{call}: {name}: expected an integer >= {least}, got {value!r}")


def _skimage_data(call: str) -> Any:
    try:
        import skimage
    except ImportError as error:
        raise ImportError(f'{call}: scikit-image is missing: pip install "kantor[demo]"') from error
    return skimage.data


def _uniform(n: int) -> Tensor:
    return torch.full((n,), 1.0 / n, dtype=torch.float64)


def _normalised(weights: Any) -> Tensor:
    return torch.from_numpy(weights / weights.sum())


def _density(image: Any) -> Tensor:
    flat = np.asarray(image, dtype=np.float64).ravel()
    return _normalised((1 - FLOOR) * flat / flat.sum() + FLOOR / flat.size)


def _piece(photograph: Any, size: int, random: np.random.Generator) -> Any:
    """A square piece of a photograph, gray, averaged down to size x size."""
    gray = photograph.mean(-1) if photograph.ndim == 3 else photograph
    edge = min(gray.shape)
    edge = int(edge * random.uniform(0.75, 1.0))
    top, left = (int(random.integers(0, length - edge + 1)) for length in gray.shape)
    piece = torch.from_numpy(gray[top : top + edge, left : left + edge].copy())
    return torch.nn.functional.adaptive_avg_pool2d(piece[None], size)[0].numpy()


def _draw_digits(images: Any, n: int | None, random: np.random.Generator) -> Any:
    if n is None:
        return images.reshape(len(images), -1)
    order = np.concatenate([random.permutation(len(images)) for _ in range(-(-n // len(images)))])[:n]
    drawn = images[order]
    for k in range(len(images), n):
        shift = random.integers(-1, 2, 2)
        drawn[k] = np.roll(drawn[k], shift, (0, 1)) + 0.05 * 16 * random.random((8, 8))
    return drawn.reshape(n, -1)


def _scaled(X: Any, Y: Any) -> tuple[Tensor, Tensor]:
    """Points with 1 as the largest squared distance."""
    x, y = torch.from_numpy(np.ascontiguousarray(X)), torch.from_numpy(np.ascontiguousarray(Y))
    largest = _largest_distance(x, y)
    scale = 1.0 / largest if largest > 0 else 1.0
    return x * scale, y * scale


def _largest_distance(x: Tensor, y: Tensor) -> float:
    """Between a point of x and one of y, without forming all distances.

    A pair that is farther apart than one already known cannot have both its points near the centre.
    """
    centre = torch.cat([x, y]).mean(0)
    from_x, from_y = (x - centre).norm(dim=1), (y - centre).norm(dim=1)
    known = max(float((y - x[from_x.argmax()]).norm(dim=1).max()), float((x - y[from_y.argmax()]).norm(dim=1).max()))
    outer_x = x[from_x + from_y.max() >= known * (1 - 1e-12)]
    outer_y = y[from_y + from_x.max() >= known * (1 - 1e-12)]
    rows = max(1, (1 << 22) // max(1, len(outer_y)))
    exact = "donot_use_mm_for_euclid_dist"
    return max([known, *(float(torch.cdist(part, outer_y, compute_mode=exact).max()) for part in outer_x.split(rows))])


def _squared(points: Points) -> Problem:
    X, Y, a, b = points
    # Difference by difference: |x|^2 + |y|^2 - 2 x.y would leave rounding where points coincide.
    C = torch.cdist(X, Y, compute_mode="donot_use_mm_for_euclid_dist").square()
    return _largest_one(C), a, b


def _largest_one(C: Tensor) -> Tensor:
    largest = C.max()
    return C / largest if largest > 0 else C
