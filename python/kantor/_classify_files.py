"""Tables of features and a few labels read from files, for ``kantor classify``.

Everything that can be wrong with a file ends in one :class:`BadInputError` whose message names the file, the column and
the row, what was expected, what was found and what to do. Rows are counted from 1, without the header.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kantor._solve_files import BadInputError, check_is_file

if TYPE_CHECKING:
    import pandas
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

TABLE_SUFFIXES = (".csv", ".npy", ".parquet")

_SEPARATORS = ",;\t"
_LISTED = 12  # names in a message


@dataclass(frozen=True)
class Problem:
    """Rows to be classified.

    Attributes
    ----------
    features : array (n, d)
        Finite numbers.
    labels : list of n
        The class of each row as text; None where it is unknown.
    ids : list of n
        What tells the rows apart: the values of the column ``id_name``, else 1 to n.
    nameless : str or None
        The feature whose header is empty, as that of the index in a table that pandas wrote, as it is called here.
    """

    features: Array
    labels: list[str | None]
    ids: list[Any]
    id_name: str
    nameless: str | None = None


def read_problem(
    features: Path, labels: str, id_column: str | None = None, drop: Sequence[str] = (), unknown: str = "-1"
) -> Problem:
    """Read a table and the labels of its rows.

    Parameters
    ----------
    features : Path
        ``.csv`` (with or without a header; separated by commas, semicolons or tabs), ``.parquet``, or ``.npy`` (n, d).
        Columns without names are called 0, 1, ...
    labels : str
        A column of ``features``, else a file with n labels in the order of the rows: ``.csv``, ``.parquet`` or
        ``.npy`` with one column, or ``.txt`` with a label a line. A table with the column ``id_column`` and one other
        gives the labels of those rows that it names.
    id_column : str, optional
        Column of ``features`` that is no feature but tells the rows apart.
    drop : sequence of str
        Columns that are left out.
    unknown : str
        How an unknown label is written, besides an empty cell.

    Raises
    ------
    BadInputError
        Missing, unreadable or empty files; columns that are absent, hold text or miss values; labels that do not fit.
    ImportError
        pandas, or pyarrow for ``.parquet``, is missing.
    """
    table = _read_table(features)
    for option, name in (("--id", id_column), *(("--drop", name) for name in drop)):
        if name is not None and name not in table.columns:
            raise BadInputError(f"{option} {name}: {_no_such_column(features, table, name)}")
    given = _labels(features, table, labels, id_column)
    left_out = {labels, id_column, *drop}
    names = [name for name in table.columns if name not in left_out]
    numbers = _numbers(features, table[names])
    nameless = next((name for name in names if re.fullmatch(r"Unnamed: \d+", name)), None)
    ids = list(range(1, len(table) + 1)) if id_column is None else table[id_column].tolist()
    return Problem(numbers, _as_text(labels, given, unknown), ids, id_column or "row", nameless)


# --- tables -----------------------------------------------------------------------------------------------------------


def _read_table(path: Path) -> pandas.DataFrame:
    """A table with columns named by text, of at least one row and one column."""
    try:
        import pandas
    except ImportError as error:
        raise ImportError('tables need pandas: pip install "kantor[cli]"') from error
    suffix = path.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise BadInputError(f"{path}: unknown kind of file; expected {', '.join(TABLE_SUFFIXES)}")
    check_is_file(path)
    try:
        if suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            if array.ndim not in (1, 2) or array.dtype.kind not in "biufUS":
                raise BadInputError(
                    f"{path}: expected an array of numbers, one row a point, shape (n, d), found {array.dtype} of "
                    f"shape {array.shape}"
                )
            table = pandas.DataFrame(array.astype(str) if array.dtype.kind == "S" else array)
        elif suffix == ".parquet":
            table = pandas.read_parquet(path)
        else:
            separator, columns, named = _first_line(path)
            table = pandas.read_csv(
                path, sep=separator, header=0 if named else None, skip_blank_lines=columns > 1, skipinitialspace=True,
                encoding="utf-8-sig",
            )  # fmt: skip
    except ImportError as error:
        raise ImportError(f'{path}: .parquet needs pyarrow: pip install "kantor[graph]"') from error
    except BadInputError:
        raise
    except Exception as error:  # the readers of the formats raise many types; all mean an unreadable file
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInputError(f"{path}: not a readable {suffix} file: {text}") from error
    table.columns = table.columns.map(str)
    if 0 in table.shape:
        raise BadInputError(f"{path}: expected rows and columns, found a table of shape {table.shape}")
    if repeated := sorted(set(table.columns[table.columns.duplicated()])):
        raise BadInputError(f"{path}: two columns are called {repeated[0]!r}; rename one")
    return table


def _first_line(path: Path) -> tuple[str, int, bool]:
    """Separator of a ``.csv`` file, the most frequent of its first line, its columns, and whether they have names."""
    with path.open(encoding="utf-8-sig") as file:
        line = file.readline()
    separator = max(_SEPARATORS, key=line.count)
    words = [word.strip() for word in line.split(separator)]
    return separator, len(words), not all(_is_number(word) for word in words if word)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _no_such_column(path: Path, table: pandas.DataFrame, name: str) -> str:
    close = difflib.get_close_matches(name, table.columns, 1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return f"{path} has no such column{hint} Its columns: {_listed(list(table.columns))}"


def _listed(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


# --- features ---------------------------------------------------------------------------------------------------------


def _numbers(path: Path, table: pandas.DataFrame) -> Array:
    """The columns as finite numbers."""
    import pandas

    if not len(table.columns):
        raise BadInputError(f"{path}: no column is left to be a feature")
    words = [name for name in table.columns if not _is_numeric(table[name])]
    for name in words:
        column = table[name].dropna()
        wrong = column[pandas.to_numeric(column, errors="coerce").isna()]
        if len(wrong) < 0.5 * len(column):  # numbers but for a few cells
            raise BadInputError(
                f"{path}: column {name}, row {wrong.index[0] + 1}: {str(wrong.iloc[0])!r} is no number; correct it, "
                f"or leave out the column with --drop {shlex.quote(name)}"
            )
    if words:
        example = table[words[0]].dropna()
        raise BadInputError(
            f"{path}: {'columns hold' if len(words) > 1 else 'a column holds'} no numbers: {_listed(words)} "
            f"(such as {str(example.iloc[0])!r}); leave it out with --drop NAME, one --drop each, or name it with "
            "--id, or turn it into numbers"
        )
    numbers = table.to_numpy(dtype=np.float64, na_value=np.nan)
    bad = ~np.isfinite(numbers)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        name = table.columns[column]
        what = "is missing" if np.isnan(numbers[row, column]) else "is infinite"
        affected = [name for name, any_bad in zip(table.columns, bad.any(0), strict=True) if any_bad]
        count = f"; {bad.any(1).sum():,} of {len(table):,} rows have such cells, in {_listed(affected)}"
        raise BadInputError(
            f"{path}: column {name}, row {row + 1}: the value {what}{count if bad.sum() > 1 else ''}. Fill it in, take "
            f"the row out, or leave out the column with --drop {shlex.quote(name)}"
        )
    return np.ascontiguousarray(numbers)


def _is_numeric(column: pandas.Series[Any]) -> bool:
    """Whether a column holds real numbers or truth values; one without any value does."""
    return bool(column.isna().all() or (column.dtype.kind in "biuf"))


# --- labels -----------------------------------------------------------------------------------------------------------


def _labels(path: Path, table: pandas.DataFrame, labels: str, id_column: str | None) -> pandas.Series[Any]:
    """The labels of the rows of ``table``, from one of its columns or from a file."""
    import pandas

    if labels in table.columns:
        if labels == id_column:
            raise BadInputError(f"--labels and --id: expected two columns, got {labels} for both")
        return table[labels]
    file = Path(labels)
    if not file.is_file():
        raise BadInputError(f"--labels {labels}: no such file, and {_no_such_column(path, table, labels)}")
    given = _read_label_file(file, len(table))
    if id_column in given.columns and len(given.columns) == 2:
        by_id = given.set_index(id_column).iloc[:, 0].dropna()
        if by_id.index.has_duplicates:
            twice = by_id.index[by_id.index.duplicated()][0]
            raise BadInputError(f"{file}: {id_column} {twice} has two labels; expected one")
        strangers = by_id.index[~by_id.index.isin(table[id_column])]
        if len(strangers):
            raise BadInputError(f"{file}: {id_column} {strangers[0]} is not in {path} ({len(strangers):,} such rows)")
        # By hand: Series.map would turn whole numbers into decimal ones where a label is unknown.
        return pandas.Series([by_id.get(key) for key in table[id_column]], dtype=object).convert_dtypes()
    if len(given.columns) != 1:
        hint = "; name a column of both files with --id" if id_column is None else f", or {id_column} and one other"
        raise BadInputError(f"{file}: expected one column of labels{hint}, found {_listed(list(given.columns))}")
    if len(given) != len(table):
        hint = "; name a column of both files with --id to give the labels of some rows" if id_column is None else ""
        raise BadInputError(f"{file}: {len(given):,} labels do not fit the {len(table):,} rows of {path}{hint}")
    return given.iloc[:, 0]


def _read_label_file(path: Path, count: int) -> pandas.DataFrame:
    """A table, or the lines of a text without columns; one line more than ``count`` is a heading."""
    import pandas

    check_is_file(path)
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".txt") or (suffix == ".csv" and _first_line(path)[1] > 1):
        return _read_table(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path}: not a readable {suffix} file: {error}") from error
    lines = [line.strip().strip('"') for line in text.splitlines()]
    if len(lines) == count + 1:
        lines = lines[1:]
    elif len(lines) == count - 1 and text.endswith("\n"):
        lines.append("")  # an empty label in the last row, its line not ended
    column = pandas.Series(lines, dtype=object).replace("", None)
    with suppress(ValueError):
        column = pandas.to_numeric(column)
    return column.to_frame("label")


def _as_text(name: str, given: pandas.Series[Any], unknown: str) -> list[str | None]:
    """Labels as text, whole numbers without decimals; None where they are unknown."""
    column = given.convert_dtypes()
    labels = [None if missing else value for value, missing in zip(column, column.isna(), strict=True)]
    for row, label in enumerate(labels, start=1):
        if isinstance(label, float):
            raise BadInputError(
                f"--labels {name}: row {row} is {label:g}; expected classes, text or whole numbers. This looks like a "
                "quantity: cut it into classes first"
            )
    return [None if label is None or str(label) == unknown else str(label) for label in labels]
