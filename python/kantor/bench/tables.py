"""A table that rich draws where it is installed, and plain text otherwise (and whenever it is written to a file)."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TextIO


@dataclass
class Table:
    """Title, column names and rows of strings; a row given as None is a rule."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...] | None] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: object) -> None:
        """Append a row, one cell per column."""
        if len(cells) != len(self.columns):
            raise ValueError(f"add: expected {len(self.columns)} cells, got {len(cells)}")
        self.rows.append(tuple(str(cell) for cell in cells))

    def rule(self) -> None:
        """Separate the rows above from those below."""
        if self.rows and self.rows[-1] is not None:
            self.rows.append(None)

    def text(self) -> str:
        """The table in plain characters; a column whose cells are all numbers is aligned to the right."""
        rows = [row for row in self.rows if row is not None]
        widths = [max(len(text) for text in column) for column in zip(self.columns, *rows, strict=True)]
        right = [all(_is_number(row[k]) for row in rows) and bool(rows) for k in range(len(self.columns))]

        def line(cells: tuple[str, ...]) -> str:
            aligned = (
                cell.rjust(width) if flush else cell.ljust(width)
                for cell, width, flush in zip(cells, widths, right, strict=True)
            )
            return "  ".join(aligned).rstrip()

        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        body = [rule if row is None else line(row) for row in self.rows]
        return "\n".join([self.title, rule, line(self.columns), rule, *body, rule, *self.notes])

    def print(self, file: TextIO | None = None) -> None:
        """Draw it on standard output, or elsewhere, with rich when that is a terminal."""
        file = sys.stdout if file is None else file
        if file.isatty():
            try:
                self._draw(file)
                return
            except ImportError:
                pass
        print(self.text(), file=file, flush=True)

    def _draw(self, file: TextIO) -> None:
        import rich.box
        import rich.console
        import rich.table

        drawn = rich.table.Table(title=self.title, box=rich.box.SIMPLE_HEAD, title_justify="left")
        rows = [row for row in self.rows if row is not None]
        for k, name in enumerate(self.columns):
            drawn.add_column(name, justify="right" if all(_is_number(row[k]) for row in rows) else "left")
        for row in self.rows:
            if row is None:
                drawn.add_section()
            else:
                drawn.add_row(*row)
        console = rich.console.Console(file=file)
        console.print(drawn)
        for note in self.notes:
            console.print(note, style="dim", markup=False)


def _is_number(cell: str) -> bool:
    text = cell.replace("%", "").replace("x", "").replace("*", "").strip()
    if text in ("", "-"):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True
