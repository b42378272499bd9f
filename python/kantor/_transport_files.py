"""Images, points, costs and weights read from files and outcomes written to files, for ``kantor transport``.

Everything that can be wrong with a file ends in one :class:`BadInputError` whose message names the file, what was
expected, what was found and what to do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from kantor._solve_files import BadInputError, check_is_file, whole_file

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.float64]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
POINT_SUFFIXES = (".npy", ".csv")
PLAN_SUFFIXES = (".npz",)
MAP_SUFFIXES = (".npy", ".csv")


def kind_of(path: Path) -> Literal["image", "points"]:
    """Tell by its suffix what a file holds.

    Raises
    ------
    BadInputError
        Another suffix.
    """
    suffix = path.suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in POINT_SUFFIXES:
        return "points"
    raise BadInputError(
        f"{path}: unknown kind of file; expected an image ({', '.join(IMAGE_SUFFIXES)}) or points "
        f"({', '.join(POINT_SUFFIXES)})"
    )


# --- reading ----------------------------------------------------------------------------------------------------------


def read_image(path: Path) -> Array:
    """Read an image as numbers in [0, 1]: (h, w) for a gray file, (h, w, 3) for one with colours.

    Turned upright as its camera says; transparent pixels are laid on white; of an animation the first picture.

    Raises
    ------
    BadInputError
        Missing, unreadable or corrupt files.
    ImportError
        Pillow is missing.
    """
    check_is_file(path)
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError('images need Pillow: pip install "kantor[cli]"') from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                picture = ImageOps.exif_transpose(file)
                picture.load()
    except Exception as error:  # the decoders of a dozen formats raise many types; all mean an unreadable file
        text = "cannot identify its format" if type(error).__name__ == "UnidentifiedImageError" else str(error)
        raise BadInputError(f"{path}: not a readable image: {text or type(error).__name__}") from error
    if picture.mode.startswith("I;16") or picture.mode == "I":  # 16 bits of gray
        return np.clip(np.asarray(picture, dtype=np.float64) / 65535, 0.0, 1.0)
    if picture.mode == "F":
        raise BadInputError(f"{path}: expected 8 or 16 bits a channel, found floating-point pixels")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    picture = picture.convert("L" if picture.mode in ("1", "L", "LA") else "RGB")
    return np.asarray(picture, dtype=np.float64) / 255


class Rows(NamedTuple):
    """Rows ``begin, begin + 1, ...`` of a file that has `total`."""

    array: Array
    begin: int
    total: int


Share = tuple[int, int]  # which process of how many


def read_points(path: Path, share: Share = (0, 1)) -> Rows:
    """Read points (n, d) from ``.npy``, (n, d) or (n,), or ``.csv``, one point a line, with or without a header.

    Of several processes each reads its share; of ``.npy`` no more than that.

    Raises
    ------
    BadInputError
        Missing, unreadable or corrupt files; complex or non-finite numbers; no points.
    """
    loaded = _load(path, lazily=share[1] > 1)
    if loaded.ndim == 1:
        loaded = loaded[:, None]
    if loaded.ndim != 2 or 0 in loaded.shape:
        raise BadInputError(f"{path}: expected n points of d numbers, shape (n, d), found shape {loaded.shape}")
    own = _own_rows(path, loaded, share)
    _check_values(path, own.array, np.isfinite(own.array), "finite numbers", own.begin)
    return own


def _own_rows(path: Path, loaded: Any, share: Share) -> Rows:
    index, count = share
    total = len(loaded)
    begin, end = total * index // count, total * (index + 1) // count
    return Rows(_real(path, loaded[begin:end]), begin, total)


def read_cost(path: Path, share: Share = (0, 1)) -> Rows:
    """Read a cost matrix (n, m) from ``.npy``, of several processes each its share; +inf forbids a pair.

    Raises
    ------
    BadInputError
        As for :func:`read_points`, but +inf is allowed.
    """
    if path.suffix.lower() != ".npy":
        raise BadInputError(f"{path}: unknown kind of cost matrix; expected .npy")
    loaded = _load(path, lazily=share[1] > 1)
    if loaded.ndim != 2 or 0 in loaded.shape:
        raise BadInputError(f"{path}: expected a cost matrix, shape (n, m), found shape {loaded.shape}")
    own = _own_rows(path, loaded, share)
    _check_values(path, own.array, own.array > -np.inf, "numbers, or +inf for a forbidden pair", own.begin)
    return own


def read_weights(path: Path, count: int, of: str) -> Array:
    """Read ``count`` weights >= 0 from ``.npy``, ``.csv`` or ``.txt``; ``of`` says whose they are.

    Raises
    ------
    BadInputError
        As for :func:`read_points`; a negative weight, another number of weights, only zeros.
    """
    if path.suffix.lower() not in (*POINT_SUFFIXES, ".txt"):
        raise BadInputError(f"{path}: unknown kind of weights; expected .npy, .csv or .txt")
    array = _real(path, _load(path))
    if array.size != count or max(array.shape, default=1) != count:
        raise BadInputError(f"{path}: shape {array.shape} does not fit; expected {count} weights, one for each {of}")
    array = _check_values(path, array, np.isfinite(array) & (array >= 0), "finite weights >= 0").reshape(count)
    if not array.any():
        raise BadInputError(f"{path}: all weights are zero; expected a positive sum")
    return array


def _load(path: Path, *, lazily: bool = False) -> Any:
    check_is_file(path)
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            return np.load(path, mmap_mode="r" if lazily else None, allow_pickle=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty file: its shape is reported by who asked
            delimiter = _separator(path) if suffix == ".csv" else None
            return np.loadtxt(path, delimiter=delimiter, ndmin=2, skiprows=_header_lines(path, delimiter))
    except (ValueError, TypeError, OSError, EOFError, MemoryError) as error:
        text = str(error).rstrip(".") or type(error).__name__
        hint = "" if suffix == ".npy" else "; expected rows of numbers alone, after at most one line of names"
        raise BadInputError(f"{path}: not a readable {suffix} file: {text}{hint}") from error


def _separator(path: Path) -> str:
    """The most frequent of comma, semicolon and tab in the first line."""
    with path.open(encoding="utf-8-sig") as file:
        return max(",;\t", key=file.readline().count)


def _header_lines(path: Path, delimiter: str | None) -> int:
    """1 where no word of the first line is a number, else 0."""
    with path.open(encoding="utf-8-sig") as file:
        words = [word.strip() for word in file.readline().split(delimiter)]

    def is_number(word: str) -> bool:
        try:
            float(word)
        except ValueError:
            return False
        return True

    return int(any(words) and not any(map(is_number, words)))


def _real(path: Path, loaded: Any) -> Array:
    array = np.asarray(loaded)
    if array.dtype.kind not in "biuf":
        kind = "complex numbers" if array.dtype.kind == "c" else f"{array.dtype} entries"
        raise BadInputError(f"{path}: expected real numbers, found {kind}")
    return array.astype(np.float64)


def _check_values(path: Path, array: Array, good: NDArray[np.bool_], expected: str, begin: int = 0) -> Array:
    if not good.all():
        first, *others = (int(i) for i in np.argwhere(~good)[0])
        index = (begin + first, *others) if others else begin + first
        value = array[(first, *others)]
        raise BadInputError(f"{path}: entry {index} is {value}; expected {expected} (positions from 0)")
    return array


# --- writing ----------------------------------------------------------------------------------------------------------


def write_image(path: Path, image: Array) -> None:
    """Write colours (h, w, 3) in [0, 1] with 8 bits a channel; the suffix chooses the format."""
    from PIL import Image

    pixels = np.rint(np.clip(image, 0.0, 1.0) * 255).astype(np.uint8)
    name = {".png": "PNG", ".webp": "WEBP"}.get(path.suffix.lower(), "JPEG")
    options: dict[str, Any] = {} if name == "PNG" else {"quality": 95}
    with whole_file(path) as file:
        Image.fromarray(pixels).save(file, format=name, **options)


def write_map(path: Path, images: Array) -> None:
    """Write images of points as ``.npy`` or, all digits, as ``.csv``."""
    write: Callable[..., None] = np.save
    if path.suffix.lower() == ".csv":
        digits = "%.9g" if images.dtype == np.float32 else "%.17g"
        write = lambda file, array: np.savetxt(file, array, fmt=digits, delimiter=",")  # noqa: E731 (one of two)
    with whole_file(path) as file:
        write(file, images)


def write_plan(path: Path, plan: Tensor) -> None:
    """Write a sparse CSR plan as ``.npz`` for ``scipy.sparse.load_npz``."""
    import scipy.sparse

    n, m = plan.shape
    parts = (plan.values(), plan.col_indices(), plan.crow_indices())
    matrix = scipy.sparse.csr_array(tuple(t.cpu().numpy() for t in parts), shape=(n, m))
    with whole_file(path) as file:
        scipy.sparse.save_npz(file, matrix)
