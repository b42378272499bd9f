"""Figures of the stations, drawn twice: for light and for dark pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kantor.demo.page import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Ink:
    """Colours of a light or dark page; ``colours`` tell methods apart, the first is for what the others improve on."""

    version: str
    ink: str
    ground: str
    colours: tuple[str, ...]


_INKS = (
    Ink("light", "#1d1f21", "#fdfcfa", ("#6b7075", "#0b5c8a", "#b3541e", "#23683a", "#6b3fa0", "#a3195b", "#7a6a00")),
    Ink("dark", "#e6e4df", "#15171a", ("#7f858c", "#7cc0ea", "#f0a56b", "#7fcf97", "#bd9df0", "#f08fb8", "#d8c55a")),
)


def draw_picture(
    folder: Path, name: str, width: float, height: float, alt: str, caption: str, draw: Callable[[Axes, Ink], None]
) -> Picture:
    """Draw ``name-light.png`` and ``name-dark.png`` (inches) into a station's folder."""
    for ink in _INKS:
        with _figure(folder, name, ink, width, height) as ax:
            draw(ax, ink)
    light, dark = (f"{folder.name}/{name}-{ink.version}.png" for ink in _INKS)
    return Picture(light, alt, caption, round(200 * width), round(200 * height), dark)


@contextmanager
def _figure(folder: Path, name: str, ink: Ink, width: float, height: float) -> Iterator[Axes]:
    """Axes in the colours of a page, written down at the end."""
    import matplotlib

    from kantor.plotting import new_axes, save_figure

    style: dict[Any, Any] = {"figure.facecolor": ink.ground, "axes.facecolor": ink.ground}
    style |= dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink.ink)
    with matplotlib.rc_context(style):
        ax = new_axes(width, height)
        yield ax
        save_figure(ax, folder / f"{name}-{ink.version}.png")
