"""Photographs for the stations of the demo, masks drawn on them, and the album of pictures a station writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kantor.demo.page import Picture

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.ImageDraw import ImageDraw

    Image = NDArray[np.float64]  # (height, width, 3), values in [0, 1]
    Mask = NDArray[np.bool_]  # (height, width)


def load_photographs(scale: int = 1) -> dict[str, Image]:
    """Photographs, shrunk ``scale`` times; every file ships inside its package.

    Raises
    ------
    ImportError
        scikit-image or scikit-learn is missing; the message names the extra to install.
    """
    try:
        import skimage
        from PIL import Image as Pillow
    except ImportError as error:
        raise ImportError(f'the demo needs {error.name}: pip install "kantor[demo]"') from error
    # The file is found without importing scikit-learn, which would take longer than the small demo's solves.
    sklearn = find_spec("sklearn")
    if sklearn is None or sklearn.origin is None:
        raise ImportError('the demo needs scikit-learn: pip install "kantor[demo]"')
    lake = Path(sklearn.origin).parent / "datasets" / "images" / "china.jpg"
    data: Any = skimage.data  # loaded on first use; it has no type hints
    photographs = {
        "cat": data.chelsea(),
        "astronaut": data.astronaut(),
        "launch": data.rocket(),
        "galaxies": data.hubble_deep_field(),
        "coffee": data.coffee(),
        "lake": np.asarray(Pillow.open(lake)),
    }
    return {name: shrink(np.asarray(pixels, dtype=np.float64) / 255, scale) for name, pixels in photographs.items()}


def shrink(image: Image, scale: int) -> Image:
    """Mean over blocks of ``scale`` x ``scale`` pixels; rows and columns that fill no block are dropped."""
    height, width = (size // scale for size in image.shape[:2])
    blocks = image[: height * scale, : width * scale].reshape(height, scale, width, scale, 3)
    return np.asarray(blocks.mean(axis=(1, 3)))


def draw_mask(shape: tuple[int, ...], draw: Callable[[ImageDraw], None]) -> Mask:
    """Mask (height, width) of what ``draw(ImageDraw)`` paints."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    canvas = Pillow.new("L", (shape[1], shape[0]))
    draw(ImageDraw.Draw(canvas))
    return np.asarray(canvas) > 127


def damage_mask(shape: tuple[int, ...], scale: int) -> Mask:
    """Scratches and a line of lettering over a picture of 300 x 451 pixels, shrunk ``scale`` times."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    font = ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf")), 34 // scale)
    scratches = (
        [(20, 40), (90, 70), (170, 64), (260, 120)],
        [(330, 20), (300, 90), (318, 170), (290, 280)],
        [(60, 290), (150, 230), (215, 236)],
        [(420, 60), (400, 130), (436, 210)],
        [(0, 190), (70, 176), (120, 120)],
    )

    def draw(canvas: ImageDraw) -> None:
        for points in scratches:
            canvas.line(
                [(x // scale, y // scale) for x, y in points], fill=255, width=max(2, 6 // scale), joint="curve"
            )
        for y, words in ((128, "the quick brown fox"), (208, "jumps over the cat")):
            canvas.text((28 // scale, y // scale), words, fill=255, font=font)

    return draw_mask(shape, draw)


def place(source: Image, shape: tuple[int, ...], y: int, x: int) -> Image:
    """``source`` shifted to row y and column x of a black picture of ``shape``, cut where it sticks out."""
    out = np.zeros(shape)
    part = source[max(0, -y) : shape[0] - y, max(0, -x) : shape[1] - x]
    out[max(0, y) : max(0, y) + part.shape[0], max(0, x) : max(0, x) + part.shape[1]] = part
    return out


def tint(image: Image, mask: Mask) -> Image:
    """``image`` with the region shown in magenta, a colour that none of the photographs has."""
    return np.where(mask[..., None], 0.45 * image + 0.55 * np.array([0.85, 0.1, 0.65]), image)


class Album:
    """Writes pictures into the station's folder and describes them for the page."""

    def __init__(self, folder: Path, station: str) -> None:
        self.folder = folder / station
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, image: Image, caption: str, alt: str) -> Picture:
        """Write ``image`` as ``name``.png."""
        from PIL import Image as Pillow

        pixels = np.rint(np.clip(image, 0.0, 1.0) * 255).astype(np.uint8)
        Pillow.fromarray(pixels).save(self.folder / f"{name}.png")
        return Picture(f"{self.folder.name}/{name}.png", alt, caption, image.shape[1], image.shape[0])

    def animate(self, name: str, frames: Sequence[Image], seconds: float, caption: str, alt: str) -> Picture:
        """Write ``frames`` as ``name``.webp, played once: what moves on a page without end keeps from reading it."""
        from PIL import Image as Pillow

        first, *others = (
            Pillow.fromarray(np.rint(np.clip(frame, 0.0, 1.0) * 255).astype(np.uint8)) for frame in frames
        )
        milliseconds = round(1000 * seconds / len(frames))
        path = self.folder / f"{name}.webp"
        first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=1, quality=80, method=2)
        return Picture(f"{self.folder.name}/{name}.webp", alt, caption, first.width, first.height)
