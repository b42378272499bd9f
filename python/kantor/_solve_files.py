"""Linear systems read from files and solutions written to files, for ``kantor solve``.

Everything that can be wrong with a file ends in one :class:`BadInputError` whose message names the file, what was
expected, what was found and what to do.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch

from kantor.linalg import CSR

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

_VECTOR_SUFFIXES = (".npy", ".mtx", ".txt")
_SYMMETRY_TOLERANCE = 1e-12  # relative to the largest entry: rounding in the program that wrote the file


class BadInputError(Exception):
    """What was given cannot be solved; the message is meant for the user."""


@dataclass(frozen=True)
class System:
    """A linear system from files: ``b`` is (n,) or (k, n), ``rhs_shape`` the shape its file has."""

    A: CSR
    b: torch.Tensor
    rhs_shape: tuple[int, ...]

    def in_file_shape(self, x: torch.Tensor) -> Array:
        """Return a solution, shaped like b, in the shape that the right-hand side has in its file."""
        array = x.detach().cpu().numpy()
        return np.asarray(array.T if array.ndim == 2 else array.reshape(self.rhs_shape))


def read_system(matrix: Path, rhs: Path | None, dtype: torch.dtype) -> System:
    """Read a symmetric matrix and its right-hand side; ones where ``rhs`` is None.

    Parameters
    ----------
    matrix : Path
        Matrix Market file, ``.mtx`` or ``.mtx.gz``, real, square, symmetric.
    rhs : Path or None
        ``.npy``, ``.mtx``, ``.mtx.gz`` or ``.txt``; (n,), (n, 1) or (1, n), or (n, k) for k right-hand sides.
    dtype : torch.dtype
        float32 or float64: what the system is solved in. The checks are made in float64.

    Raises
    ------
    BadInputError
        Missing, unreadable or corrupt files; complex or non-finite values; a matrix that is not square or not
        symmetric; a right-hand side of the wrong length.
    ImportError
        scipy is missing.
    """
    A = _read_matrix(matrix)
    n = A.shape[0]
    array = np.ones(n) if rhs is None else _read_rhs(rhs, n)
    b = torch.from_numpy(np.ascontiguousarray(array.reshape(n) if array.size == n else array.T))
    if dtype is not torch.float64:
        # Entries beyond the range of the smaller type turn into infinity there.
        for name, values in ((str(matrix), A.values), (str(rhs), b)):
            if not bool(torch.isfinite(values.to(dtype)).all()):
                raise BadInputError(f"{name}: an entry is too large for {_name(dtype)}; use --dtype float64")
        A, b = A.to(dtype), b.to(dtype)
    return System(A, b, array.shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_is_file(path: Path) -> None:
    """Raise :class:`BadInputError` unless ``path`` is a file that may be read."""
    if path.is_dir():
        raise BadInputError(f"{path}: is a folder; expected a file")
    if not path.is_file():
        raise BadInputError(f"{path}: no such file")
    if not os.access(path, os.R_OK):
        raise BadInputError(f"{path}: no permission to read it")


def _read_matrix(path: Path) -> CSR:
    check_is_file(path)
    try:
        _check_header(path)
        A = CSR.from_mtx(path)
    except (ValueError, TypeError, OSError, MemoryError) as error:
        # The messages of CSR start with the function's name, which means nothing here; some do not name the file.
        text = str(error)
        for prefix in ("CSR.from_mtx: ", f"{path}: ", "CSR: "):
            text = text.removeprefix(prefix)
        raise BadInputError(f"{path}: {text or type(error).__name__}") from error
    relative, where = A.asymmetry()
    if relative > _SYMMETRY_TOLERANCE:
        raise BadInputError(
            f"{path}: the matrix is not symmetric: the largest difference is {where} (counted from 0). Conjugate "
            "gradients need a symmetric matrix. If one triangle is stored, say 'symmetric' in the file's first line; "
            "if the difference is an error, store (A + A') / 2; else use a method for general matrices, such as GMRES."
        )
    return A


def _check_header(path: Path) -> None:
    """Find out from the first lines what would make reading the rest of a large file a waste of time."""
    from scipy.io import mminfo

    try:
        rows, columns, _, _, field, _ = mminfo(path)
    except Exception:  # whatever is wrong, reading the file says it better
        return
    if field == "pattern":
        raise BadInputError(f"{path}: a pattern without values; expected real or integer entries")
    if rows != columns:
        raise BadInputError(
            f"{path}: the matrix is {rows} x {columns}; conjugate gradients need a square, symmetric one: for least "
            "squares store A'A, and A'b as the right-hand side"
        )
    if rows == 0:
        raise BadInputError(f"{path}: the matrix has no rows")


def _read_rhs(path: Path, n: int) -> Array:
    """Return the file's array as float64, of shape (n,), (n, 1), (1, n) or (n, k)."""
    check_is_file(path)
    try:
        array = np.asarray(_load(path))
    except (ValueError, TypeError, OSError, EOFError, MemoryError) as error:
        raise BadInputError(f"{path}: not a readable {path.suffix or 'right-hand side'} file: {error}") from error
    if array.dtype.kind not in "biuf":
        kind = "complex numbers" if array.dtype.kind == "c" else f"{array.dtype} entries"
        raise BadInputError(f"{path}: expected real numbers, found {kind}")
    vector = array.ndim == 1 or (array.ndim == 2 and 1 in array.shape)
    if not (vector and array.size == n) and not (array.ndim == 2 and array.shape[0] == n and array.shape[1] > 0):
        raise BadInputError(
            f"{path}: shape {array.shape} does not fit a matrix with {n} rows; expected ({n},), ({n}, 1), (1, {n}), or "
            f"({n}, k) for k right-hand sides"
        )
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        position = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise BadInputError(
            f"{path}: entry {position} is {array[position]}; expected finite numbers (positions from 0)"
        )
    return array


def _load(path: Path) -> Any:
    name = path.name.lower()
    if name.endswith(".npy"):
        return np.load(path, allow_pickle=False)
    if name.endswith(".txt"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty file: the shape is reported below
            return np.loadtxt(path)
    if name.endswith((".mtx", ".mtx.gz")):
        from scipy.io import mmread

        try:
            matrix: Any = mmread(path)
        except Exception as error:  # scipy's reader raises many types; all of them mean an unreadable file
            raise ValueError(str(error) or type(error).__name__) from error
        return matrix.toarray() if hasattr(matrix, "toarray") else matrix
    raise BadInputError(f"{path}: unknown kind of right-hand side; expected .npy, .mtx, .mtx.gz or .txt")


def check_output(path: Path, suffixes: tuple[str, ...] = _VECTOR_SUFFIXES, inputs: Sequence[Path | None] = ()) -> None:
    """Find out before a long solve whether ``path`` can be written without losing one of the ``inputs``.

    Raises
    ------
    BadInputError
        Unknown suffix, no such folder, no permission, or one of the inputs.
    """
    for other in inputs:
        if other is not None and path.resolve() == other.resolve():
            raise BadInputError(f"{path}: would overwrite {other}; choose another name")
    if path.suffix.lower() not in suffixes:
        raise BadInputError(f"{path}: unknown kind of output; expected a name ending in {', '.join(suffixes)}")
    if path.is_dir():
        raise BadInputError(f"{path}: is a folder; expected a file name")
    if not path.parent.is_dir():
        raise BadInputError(f"{path}: the folder {path.parent} does not exist")
    if path.exists() and not os.access(path, os.W_OK):
        raise BadInputError(f"{path}: exists and may not be overwritten")
    try:
        # Asking for permission is not enough: a read-only file system shows only when one writes.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise BadInputError(f"{path}: cannot be written: {error.strerror}") from error


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears whole or not at all.

    Raises
    ------
    BadInputError
        The file cannot be written.
    """
    path = path.resolve()  # what a link points to is replaced, not the link
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise BadInputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def write_solution(path: Path, x: Array) -> None:
    """Write ``x`` as ``.npy``, ``.mtx`` or ``.txt`` (all digits).

    Raises
    ------
    BadInputError
        The file cannot be written.
    """
    with whole_file(path) as file:
        if path.suffix.lower() == ".npy":
            np.save(file, x)
        elif path.suffix.lower() == ".txt":
            np.savetxt(file, x, fmt="%.9g" if x.dtype == np.float32 else "%.17g")
        else:
            from scipy.io import mmwrite

            mmwrite(file, x.reshape(-1, 1) if x.ndim == 1 else x, precision=9 if x.dtype == np.float32 else 17)
