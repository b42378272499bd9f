"""Draws the picture at the top of the README from what the gallery script on Poisson editing computes.

python docs/images/make.py        writes docs/images/poisson_editing.png
"""

from __future__ import annotations

import runpy
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from PIL import Image

HERE = Path(__file__).parent
COLOURS = 256  # a palette of this size keeps the file small and the photographs whole


def main() -> None:
    """Run the gallery script and draw pasted, cloned and residuals side by side."""
    run = runpy.run_path(str(HERE.parent / "gallery" / "plot_poisson_editing.py"))
    plt.close("all")
    width = run["target"].shape[1]
    figure, axes = plt.subplots(
        1, 3, figsize=(12, 3.9), dpi=120, layout="constrained", width_ratios=(width, width, 1.3 * width)
    )
    pictures = (("pixels copied", run["pasted"]), ("slopes copied: one linear system", run["insert"](run["result"].x)))
    for ax, (title, picture) in zip(axes[:2], pictures, strict=True):
        ax.imshow(picture, interpolation="bilinear")
        ax.set_title(title)
        ax.axis("off")
    ax = axes[2]
    curves = (
        (range(len(run["scipy_residuals"])), run["scipy_residuals"], "0.8", 6, "scipy.sparse.linalg.cg"),
        (run["plain"].history.iterations, run["plain"].history.residual_norms, "#0b5c8a", 1.6, "kantor.linalg.cg"),
        (
            run["preconditioned"].history.iterations,
            run["preconditioned"].history.residual_norms,
            "#b3541e",
            1.6,
            'with M="ic0"',
        ),
    )
    for iterations, residuals, colour, linewidth, label in curves:
        ax.semilogy(iterations, residuals, color=colour, linewidth=linewidth, label=label)
    ax.set_title(f"residual norm, {run['n']:,} unknowns")
    ax.set_xlabel("iteration")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.92")
    ax.legend(frameon=False)

    path = HERE / "poisson_editing.png"
    figure.savefig(path, facecolor="white")
    Image.open(path).convert("RGB").quantize(COLOURS, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
