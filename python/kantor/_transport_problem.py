"""What ``kantor transport`` reads, as a problem: points or a cost matrix, and weights."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kantor._colour_transfer import sample_colours
from kantor._solve_files import BadInputError
from kantor._transport_files import Share, kind_of, read_cost, read_image, read_points, read_weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

_COLOURS, _CELLS = 2000, 4096  # --max-points of images: pixels drawn from each, cells of a grid
_LUMINANCE = np.array([0.2126, 0.7152, 0.0722])
_KINDS = {"image": "an image", "points": "a file of points"}


class Mode(StrEnum):
    """Choices of ``--mode``."""

    auto = "auto"
    colour = "colour"
    density = "density"


@dataclass(frozen=True)
class Problem:
    """What the files hold, as a problem: points (n, d), (m, d) or a cost (n, m), and weights.

    Of several processes each has its share of the rows: of X or C, of a and `points`.
    """

    kind: str  # "colour", "density", "points" or "matrix"
    X: Tensor | None = None
    Y: Tensor | None = None
    C: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    note: str = ""
    picture: Array | None = None  # the first image: (h, w, 3) in colour mode, (h, w) of a density
    points: Tensor | None = None  # all points of the first file, where X is a sample
    rows: Tensor | None = None  # which of them X is, sorted, and columns alike
    columns: Tensor | None = None
    full_shape: tuple[int, int] = (0, 0)  # of the plan in terms of the files
    shared: bool = False  # among processes, whole files row by row

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m), of all processes together."""
        if self.shared:
            return self.full_shape
        if self.C is not None:
            return self.C.shape[0], self.C.shape[1]
        assert self.X is not None
        assert self.Y is not None
        return self.X.shape[0], self.Y.shape[0]


@dataclass(frozen=True)
class Files:
    """The arguments that name what is read."""

    source: Path | None
    target: Path | None
    cost_matrix: Path | None
    a: Path | None
    b: Path | None

    def inputs(self) -> list[Path | None]:
        """All of them, to be told apart from outputs."""
        return [self.source, self.target, self.cost_matrix, self.a, self.b]

    def names(self) -> dict[str, str | None]:
        """What the outcome calls them, and their names."""
        names = {"A": self.source, "B": self.target, "cost_matrix": self.cost_matrix, "a": self.a, "b": self.b}
        return {name: None if path is None else str(path) for name, path in names.items()}


def read_problem(
    files: Files,
    mode: Mode,
    max_points: int | None,
    random: np.random.Generator,
    dtype: torch.dtype,
    share: Share = (0, 1),
) -> Problem:
    """Read two images, two clouds of points, or a cost matrix with weights; of several processes each its share.

    Raises
    ------
    BadInputError
        Files that are wrong in themselves or do not go together, and options that are not for their kind.
    """
    shared = share[1] > 1
    if shared and max_points is not None:
        raise BadInputError("--max-points: draws from whole files, not with --distributed")
    if files.cost_matrix is not None:
        if files.source is not None:
            raise BadInputError(f"--cost-matrix: takes the place of A and B, got {files.source} too")
        if max_points is not None or mode is not Mode.auto:
            raise BadInputError("--max-points and --mode: are for images and points, not for --cost-matrix")
        C, begin, n = read_cost(files.cost_matrix, share)
        m = C.shape[1]
        weights = _read_weights(files, (n, m), ("row of the cost", "column of the cost"))
        a, b = (_weights(w, dtype) for w in weights)
        a = None if a is None else a[begin : begin + len(C)]
        tensor = _tensor(str(files.cost_matrix), C, dtype)
        return Problem("matrix", C=tensor, a=a, b=b, full_shape=(n, m), shared=shared)
    if files.source is None or files.target is None:
        raise BadInputError("expected two files A and B, or --cost-matrix; see kantor transport --help")
    kinds = [kind_of(path) for path in (files.source, files.target)]
    if kinds[0] != kinds[1]:
        raise BadInputError(
            f"{files.source} is {_KINDS[kinds[0]]}, {files.target} is {_KINDS[kinds[1]]}; expected the same kind"
        )
    if kinds[0] == "image" and shared:
        raise BadInputError("--distributed: is for points and cost matrices, got images")
    if kinds[0] == "image":
        if files.a is not None or files.b is not None:
            raise BadInputError("--a and --b: are for points and cost matrices; pixels of an image count as they are")
        images = read_image(files.source), read_image(files.target)
        gray = all(image.ndim == 2 for image in images)
        if mode is Mode.density or (mode is Mode.auto and gray):
            return _densities(files, images, max_points or _CELLS, dtype)
        return _colours(images, max_points or _COLOURS, random, dtype)
    if mode is not Mode.auto:
        raise BadInputError(f"--mode {mode.value}: is for images, got points")
    return _points(files, max_points, random, dtype, share)


def _read_weights(files: Files, counts: tuple[int, ...], of: tuple[str, str]) -> list[Array | None]:
    return [
        None if path is None else read_weights(path, count, whose)
        for path, count, whose in zip((files.a, files.b), counts, of, strict=True)
    ]


def _tensor(name: str, array: Array, dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if dtype is not torch.float64:
        narrow = tensor.to(dtype)
        if bool((torch.isfinite(tensor) & ~torch.isfinite(narrow)).any()):  # beyond the range of the smaller type
            raise BadInputError(f"{name}: an entry is too large for float32; use --dtype float64")
        tensor = narrow
    return tensor


def _weights(array: Array | None, dtype: torch.dtype) -> Tensor | None:
    return None if array is None else torch.from_numpy(array).to(dtype)


def _points(
    files: Files, max_points: int | None, random: np.random.Generator, dtype: torch.dtype, share: Share
) -> Problem:
    assert files.source is not None
    assert files.target is not None
    own, begin, total = read_points(files.source, share)
    clouds = [own, read_points(files.target).array]
    if clouds[0].shape[1] != clouds[1].shape[1]:
        raise BadInputError(
            f"{files.source} has points of {clouds[0].shape[1]} numbers, {files.target} of {clouds[1].shape[1]}; "
            "expected the same dimension"
        )
    weights = _read_weights(files, (total, len(clouds[1])), ("point of A", "point of B"))
    weights[0] = None if weights[0] is None else weights[0][begin : begin + len(own)]
    points = [_tensor(str(path), X, dtype) for path, X in zip((files.source, files.target), clouds, strict=True)]
    drawn: list[Tensor | None] = []
    for k, X in enumerate(points):
        if max_points is None or len(X) <= max_points:
            drawn.append(None)
            continue
        drawn.append(torch.from_numpy(np.sort(random.choice(len(X), max_points, replace=False))))
        w = weights[k]
        if w is not None:  # the sample stands for all: its mass is that of the file
            part = w[drawn[k]]
            if not part.any():
                raise BadInputError(f"--max-points {max_points}: all points drawn have zero weight; raise it")
            weights[k] = part * (w.sum() / part.sum())
    X, Y = (t if index is None else t[index] for t, index in zip(points, drawn, strict=True))
    sampled = [f"{len(t):,} of {len(all_):,}" for t, all_ in ((X, points[0]), (Y, points[1])) if len(t) < len(all_)]
    a, b = (_weights(w, dtype) for w in weights)
    note = f"{' and '.join(sampled)} points drawn" if sampled else ""
    return Problem(
        "points", X, Y, a=a, b=b, note=note, points=points[0], rows=drawn[0], columns=drawn[1],
        full_shape=(total, len(points[1])), shared=share[1] > 1,
    )  # fmt: skip


def _colours(images: tuple[Array, Array], count: int, random: np.random.Generator, dtype: torch.dtype) -> Problem:
    first, second = (image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2) for image in images)
    X, Y = (sample_colours(image, count, random).to(dtype) for image in (first, second))
    pixels = " and ".join(
        f"{len(t):,} of {image.shape[0] * image.shape[1]:,}" for t, image in ((X, first), (Y, second))
    )
    return Problem("colour", X, Y, note=f"{pixels} pixels drawn", picture=first, full_shape=(len(X), len(Y)))


def _densities(files: Files, images: tuple[Array, Array], count: int, dtype: torch.dtype) -> Problem:
    grays = [image if image.ndim == 2 else image @ _LUMINANCE for image in images]
    if grays[0].shape != grays[1].shape:
        sizes = " and ".join(f"{image.shape[1]} x {image.shape[0]}" for image in grays)
        raise BadInputError(
            f"{files.source} and {files.target}: densities need images of the same size, found {sizes} pixels; crop or "
            "scale one of them"
        )
    for path, image in zip((files.source, files.target), grays, strict=True):
        if not image.any():
            raise BadInputError(f"{path}: all pixels are black; expected a density with some mass")
    height, width = grays[0].shape
    edge = 1
    while -(-height // edge) * -(-width // edge) > count:
        edge += 1
    cells = [_cell_sums(image, edge) for image in grays]
    rows, columns = cells[0].shape
    # Positions in pixels, so that the distance is one in pixels however the grid was averaged down.
    axes = (torch.arange(size, dtype=torch.float64) * edge + (edge - 1) / 2 for size in (rows, columns))
    X = torch.cartesian_prod(*axes)
    a, b = (_weights((cell / cell.sum()).ravel(), dtype) for cell in cells)
    shrunk = f", averaged over squares of {edge} x {edge} pixels" if edge > 1 else ""
    return Problem(
        "density", X.to(dtype), X.to(dtype), a=a, b=b, note=f"densities on {rows} x {columns} cells{shrunk}",
        picture=grays[0], full_shape=(len(X), len(X)),
    )  # fmt: skip


def _cell_sums(image: Array, edge: int) -> Array:
    """Sums over squares of edge x edge pixels; those at the rim may be cut."""
    height, width = image.shape
    padded = np.pad(image, ((0, -height % edge), (0, -width % edge)))
    squares = padded.reshape(padded.shape[0] // edge, edge, padded.shape[1] // edge, edge)
    return np.asarray(squares.sum(axis=(1, 3)))
