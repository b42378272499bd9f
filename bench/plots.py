"""Grouped horizontal bars with matplotlib, one panel per configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Panel:
    """values[series][group], and the attainable value of each group."""

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)

    def add(self, series: str, group: str, value: float) -> None:
        """Set one bar."""
        self.values.setdefault(series, {})[group] = value

    def floor(self, group: str, value: float) -> None:
        """Set the line that marks what the hardware allows."""
        self.floors[group] = value

    def groups(self) -> list[str]:
        """Groups in the order in which they were added."""
        return list(dict.fromkeys(group for bars in self.values.values() for group in bars))


def bars(panels: dict[str, Panel], label: str, floor_label: str, path: Path) -> None:
    """Draw and save; Kantor's bars stand out by colour. Raises ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    if not panels:
        return
    rows = max(len(panel.values) * len(panel.groups()) for panel in panels.values())
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.0 * len(panels), 1.5 + 0.16 * rows), squeeze=False, layout="constrained"
    )
    for axis, (title, panel) in zip(axes[0], panels.items(), strict=True):
        place, ticks, names = 0.0, [], []
        for group in panel.groups():
            top = place
            for series, values in panel.values.items():
                if group not in values:
                    continue
                own = series.startswith("kantor")
                axis.barh(place, values[group], height=0.85, color="#c4501b" if own else "#8fa3b8")
                axis.text(values[group], place, f" {values[group]:.3g}", va="center", fontsize=7)
                ticks.append(place)
                names.append(f"{group}  {series}")
                place += 1
            if group in panel.floors:
                axis.plot([panel.floors[group]] * 2, [top - 0.5, place - 0.5], color="black", linewidth=1.2)
            place += 0.7
        axis.set_yticks(ticks, names, fontsize=7)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlabel(label)
        axis.set_title(title, fontsize=10)
        axis.grid(axis="x", which="both", alpha=0.25)
        axis.set_axisbelow(True)
        axis.margins(x=0.12)
    if any(panel.floors for panel in panels.values()):
        figure.supxlabel(floor_label, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
