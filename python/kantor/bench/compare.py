"""Two runs of the bench side by side: what became slower, beyond the noise.

Times of two runs differ by what else the machine did. The other libraries measure that: the median of what became of
their times on a problem is the drift, and Kantor's change is judged after it is divided out. Noise is the spread of the
repetitions in both runs and the disagreement of the libraries about the drift, added as squares.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kantor.bench.case import OWN
from kantor.bench.results import Entry, amount, by_problem
from kantor.bench.tables import Table

LEAST_CHANGE = 0.10  # of a time, however quiet the machine
LEAST_COUNT_CHANGE = 0.02  # of steps, products, errors: the same seeds give the same ones but for rounding


@dataclass(frozen=True)
class Change:
    """What became of one figure of Kantor's; `ratio` is new over old, less than one being better."""

    case: str
    problem: str
    quantity: str
    old: float | None
    new: float | None
    drift: float
    noise: float

    @property
    def ratio(self) -> float:
        """New over old, what the machine did left out; NaN where a run has no figure."""
        return self.new / self.old / self.drift if self.old and self.new is not None else math.nan

    @property
    def verdict(self) -> str:
        """In a word."""
        if self.new is None:
            return "LOST" if self.old is not None else "not solved"
        if self.old is None:
            return "gained"
        limit = 1 + max(LEAST_CHANGE if self.quantity == "seconds" else LEAST_COUNT_CHANGE, self.noise)
        return "WORSE" if self.ratio > limit else "better" if self.ratio < 1 / limit else "same"

    @property
    def regression(self) -> bool:
        """Whether it is worse beyond the noise, or no longer solved."""
        return self.verdict in ("LOST", "WORSE")


def changes(old: dict[str, Any], new: dict[str, Any]) -> Iterator[Change]:
    """Of every figure that both runs asked for."""
    before, after = by_problem(old["results"]), by_problem(new["results"])
    for key in [key for key in before if key in after]:
        yield _change(key, before[key], after[key])


def _change(key: tuple[str, str, str], before: dict[str, Entry], after: dict[str, Entry]) -> Change:
    def figure(entries: dict[str, Entry]) -> float | None:
        return float(entries[OWN]["median"]) if entries.get(OWN, {}).get("status") == "met" else None

    drift, spreads = 1.0, [0.0]
    if key[2] == "seconds":
        others = [
            math.log(after[name]["median"] / before[name]["median"])
            for name in before
            if name != OWN and _same(before[name], after.get(name))
        ]
        drift = math.exp(statistics.median(others)) if others else 1.0
        spreads = [entries[OWN].get("spread") or 0.0 for entries in (before, after) if OWN in entries]
        spreads += [statistics.stdev(others)] if len(others) > 1 else []
    return Change(*key, figure(before), figure(after), drift, math.hypot(*spreads))


def _same(before: Entry, after: Entry | None) -> bool:
    """Whether the same configuration of a library was measured in both."""
    return after is not None and before["status"] == after["status"] == "met" and before["peer"] == after["peer"]


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What makes two runs hard to compare."""
    notes = []
    for what, group, name in (
        ("processors", "machine", "processor"),
        ("numbers of processors", "machine", "cpus"),
        ("sizes", "options", "size"),
        ("devices", "options", "device"),
        ("numbers of threads", "options", "threads"),
    ):
        values = old[group].get(name), new[group].get(name)
        if values[0] != values[1]:
            notes.append(f"different {what}: {values[0]} and {values[1]}")
    packages = old["machine"]["versions"], new["machine"]["versions"]
    moved = [
        f"{name} {packages[0].get(name, 'none')} -> {packages[1].get(name, 'none')}"
        for name in sorted(packages[0].keys() | packages[1].keys())
        if packages[0].get(name) != packages[1].get(name)
    ]
    notes += [f"other versions: {', '.join(moved)}"] if moved else []
    for name, data in (("old", old), ("new", new)):
        noisy = [yardstick["case"] for yardstick in data["yardsticks"] if not yardstick["quiet"]]
        notes += [f"the {name} run met a busy machine in {', '.join(noisy)}"] if noisy else []
    return notes


def make_table(old: dict[str, Any], new: dict[str, Any], found: list[Change]) -> Table:
    """A row for each figure; regressions are named below."""
    table = Table(
        f"Kantor {old['kantor']} of {old['started']} -> Kantor {new['kantor']} of {new['started']}",
        ("case", "problem", "", "old", "new", "drift", "new/old", "noise", ""),
    )
    for each in found:
        figures = (amount(each.quantity, v) if v is not None else "-" for v in (each.old, each.new))
        ratio = "-" if math.isnan(each.ratio) else f"{each.ratio:.2f}x"
        table.add(
            each.case, each.problem, each.quantity, *figures, f"{each.drift:.2f}x", ratio, f"{100 * each.noise:.0f}%",
            each.verdict,
        )  # fmt: skip
    table.notes.append("new/old has the drift divided out: what became of the other libraries' times meanwhile")
    table.notes += differences(old, new)
    worse = [each for each in found if each.regression]
    for each in worse:
        change = "no longer solved" if each.verdict == "LOST" else f"{each.ratio:.2f} times the old {each.quantity}"
        table.notes.append(f"REGRESSION: {each.case}, {each.problem}: {change}")
    if not worse:
        table.notes.append("no regression")
    return table
