"""``kantor demo``: a tour of Kantor on real data that ships with packages of the extra ``demo``.

Each station is one module with a function ``run(folder, size)`` that writes its pictures into ``folder`` and returns
a :class:`~kantor.demo.page.StationReport`. A new station adds one line to :data:`STATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kantor.demo import colour_transfer, digits, optimizers, phase_retrieval, poisson_editing, smoke
from kantor.demo.page import StationReport, write_page

Size = Literal["small", "full"]


@dataclass(frozen=True)
class Station:
    """One stop of the tour: ``name`` selects it on the command line, ``title`` is its heading on the page."""

    name: str
    title: str
    run: Callable[[Path, Size], StationReport]


STATIONS = (
    Station("poisson_editing", poisson_editing.TITLE, poisson_editing.run),
    Station("phase_retrieval", phase_retrieval.TITLE, phase_retrieval.run),
    Station("colour_transfer", colour_transfer.TITLE, colour_transfer.run),
    Station("smoke", smoke.TITLE, smoke.run),
    Station("digits", digits.TITLE, digits.run),
    Station("optimizers", optimizers.TITLE, optimizers.run),
)

__all__ = ["STATIONS", "Size", "Station", "StationReport", "write_page"]
