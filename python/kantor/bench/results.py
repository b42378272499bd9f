"""What a run of the bench found: one JSON document, its tables and its picture.

    {"schema": 1, "kantor": version, "started": ISO time, "options": {...}, "machine": {...}, "interrupted": bool,
     "roofline": [rates], "yardsticks": [copies before and after each case],
     "problems": [...], "measurements": [...], "failures": [...], "absences": [...], "results": [...]}

`measurements` has every single one. `results` sums them up, an entry for each problem, quantity and library: median of
the repetitions of the library's best configuration, their spread (range over median), whether the answer had the
accuracy, and the share of what the machine can do where the case counts bytes or operations.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kantor.bench import machine
from kantor.bench.case import OWN, Peer, Problem, load
from kantor.bench.tables import Table

if TYPE_CHECKING:
    from kantor.bench.runner import Options

SCHEMA = 1
Entry = dict[str, Any]


class Results:
    """The document of a run, written to `path` whenever there is something new; an unwritable one raises OSError."""

    def __init__(self, path: Path, options: Options) -> None:
        import kantor

        self.path = path
        self.data: dict[str, Any] = {
            "schema": SCHEMA,
            "kantor": kantor.__version__,
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "options": asdict(options),
            "machine": machine.environment(),
            "interrupted": False,
        }
        self.data |= {
            name: []
            for name in ("roofline", "yardsticks", "problems", "measurements", "failures", "absences", "results")
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        self.save()

    @property
    def interrupted(self) -> bool:
        """Whether the run was ended by Ctrl-C."""
        return bool(self.data["interrupted"])

    @interrupted.setter
    def interrupted(self, value: bool) -> None:
        self.data["interrupted"] = value

    def save(self) -> None:
        """Write the document, all of it or nothing."""
        self.data["results"] = summarise(self.data)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1, allow_nan=False) + "\n")
        os.replace(part, self.path)

    def add_roofline(self, rates: list[Entry]) -> None:
        """What the machine can do."""
        self.data["roofline"] += rates

    def add_yardstick(self, case: str, copies: tuple[float, float], quiet: bool) -> None:
        """The same copy before and after a case, GB/s."""
        self.data["yardsticks"].append({"case": case, "copies": list(copies), "quiet": quiet})

    def add_problem(self, case: str, problem: Problem) -> None:
        """A problem that is about to be measured."""
        self.data["problems"].append({"case": case} | asdict(problem))

    def add_absence(self, case: str, problem: Problem, library: str, reason: str) -> None:
        """A library that cannot take part."""
        entry = {"case": case, "problem": problem.name, "library": library, "reason": reason}
        if entry not in self.data["absences"]:
            self.data["absences"].append(entry)

    def add_failure(self, case: str, problem: Problem, peer: Peer, reason: str) -> None:
        """A peer that raised an error, died or ran out of time."""
        self.data["failures"].append(_identity(case, problem, peer) | {"reason": reason})

    def add_measurement(self, case: str, problem: Problem, peer: Peer, trial: bool, found: Entry) -> Entry:
        """One measurement; returned with whether the answer had the accuracy."""
        accuracy = found["accuracy"]
        met = accuracy is not None and accuracy <= problem.tolerance
        entry = _identity(case, problem, peer) | {"trial": trial, "met": met} | found
        self.data["measurements"].append(entry)
        return entry


def _identity(case: str, problem: Problem, peer: Peer) -> Entry:
    return {
        "case": case,
        "problem": problem.name,
        "library": peer.library,
        "peer": peer.name,
        "configuration": peer.configuration,
    }


# --- summing up ---


def summarise(data: dict[str, Any]) -> list[Entry]:
    """The entries of "results"."""
    return [
        entry
        for problem in data["problems"]
        for quantity in problem["quantities"]
        for entry in _of_problem(data, problem, quantity)
    ]


def _of_problem(data: dict[str, Any], problem: Entry, quantity: str) -> Iterator[Entry]:
    def of(name: str) -> list[Entry]:
        return [e for e in data[name] if (e["case"], e["problem"]) == (problem["case"], problem["name"])]

    measured, failures = of("measurements"), of("failures")
    for library in dict.fromkeys(entry["library"] for entry in [*measured, *failures]):
        base = {"case": problem["case"], "problem": problem["name"], "quantity": quantity, "library": library}
        runs: dict[str, list[Entry]] = {}
        for entry in measured:
            if entry["library"] == library and entry["met"]:
                runs.setdefault(entry["peer"], []).append(entry)
        if runs:
            yield base | min(
                (_median(data, each, quantity) for each in runs.values()), key=lambda e: float(e["median"])
            )
            continue
        missed = [entry for entry in measured if entry["library"] == library]
        if missed:
            nearest = min(missed, key=lambda e: math.inf if e["accuracy"] is None else e["accuracy"])
            found = "not finite" if nearest["accuracy"] is None else f"{nearest['accuracy']:.1e}"
            reason = f"{problem['measure']} {found}, wanted {problem['tolerance']:.1e}"
            yield base | {"peer": nearest["peer"], "status": "missed", "reason": reason}
        else:
            failure = next(entry for entry in failures if entry["library"] == library)
            yield base | {"peer": failure["peer"], "status": "failed", "reason": failure["reason"]}


def _median(data: dict[str, Any], runs: list[Entry], quantity: str) -> Entry:
    counted = [entry for entry in runs if not entry["trial"]] or runs
    values = [float(entry[quantity]) for entry in counted]
    median = statistics.median(values)
    last = counted[-1]
    return {
        "peer": last["peer"],
        "configuration": last["configuration"],
        "status": "met",
        "median": median,
        "spread": (max(values) - min(values)) / median if len(values) > 1 and median else None,
        "count": len(values),
        "accuracy": last["accuracy"],
    } | (_share(data, last, median) if quantity == "seconds" else {})


def _share(data: dict[str, Any], run: Entry, seconds: float) -> Entry:
    """Bytes or operations a second, as a share of the copy on as large a working set, or of a matrix product."""
    cuda = data["options"]["device"] == "cuda"
    rates = [rate for rate in data["roofline"] if rate["threads"] == (1 if cuda else data["options"]["threads"])]
    if "bytes" in run:
        copies = sorted((rate for rate in rates if rate["kernel"] == "copy"), key=lambda rate: float(rate["bytes"]))
        fits = [rate for rate in copies if rate["bytes"] >= run["working_set"]] or copies[-1:]
        if fits:
            return {"share": run["bytes"] / seconds / 1e9 / fits[0]["median"], "share_of": f"copy, {fits[0]['level']}"}
    if "flops" in run:
        product = next((rate for rate in rates if rate["kernel"] == "gemm_fp32"), None)
        if product is not None:
            return {"share": run["flops"] / seconds / 1e9 / product["median"], "share_of": "matrix product"}
    return {}


# --- tables and picture ---


def by_problem(results: Iterable[Entry]) -> dict[tuple[str, str, str], dict[str, Entry]]:
    """{(case, problem, quantity): {library: entry}}."""
    groups: dict[tuple[str, str, str], dict[str, Entry]] = {}
    for entry in results:
        groups.setdefault((entry["case"], entry["problem"], entry["quantity"]), {})[entry["library"]] = entry
    return groups


def amount(quantity: str, value: float) -> str:
    """A value with three digits and its unit."""
    if quantity != "seconds":
        return f"{value:.3g}%" if "%" in quantity else f"{value:.0f}"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1 or unit == "us":
            return f"{value * scale:.3g} {unit}"
    raise AssertionError


def make_tables(data: dict[str, Any]) -> list[Table]:
    """The roofline, and one table for each case."""
    return [*([_roofline(data)] if data["roofline"] else []), *_cases(data)]


def _roofline(data: dict[str, Any]) -> Table:
    found = data["machine"]
    caches = ", ".join(f"{name} {size >> 10} KiB" for name, size in found["caches"].items())
    table = Table(
        f"This machine: {found['processor']}, {found['cpus']} processor(s) {caches}", ("", "threads", "rate", "unit")
    )
    for rate in data["roofline"]:
        name = {"gemm_fp32": "matrix product, float32", "gemm_fp64": "matrix product, float64"}.get(rate["kernel"])
        name = name or f"copy, {rate['level']} ({rate['bytes'] / 2**20:.3g} MiB)"
        table.add(name, rate["threads"], f"{rate['median']:.1f}", rate["unit"])
    return table


def _cases(data: dict[str, Any]) -> Iterator[Table]:
    groups = by_problem(data["results"])
    for case in dict.fromkeys(key[0] for key in groups):
        table = Table(
            f"{case}: {load(case).TITLE}",
            ("problem", "", "Kantor", "best other", "ratio", "all others", "of the machine"),
        )
        notes: dict[str, None] = {}
        for (_, problem, quantity), entries in ((key, value) for key, value in groups.items() if key[0] == case):
            own = entries.get(OWN)
            met = {name: e for name, e in entries.items() if name != OWN and e["status"] == "met"}
            best = min(met.values(), key=lambda e: float(e["median"]), default=None)
            known = own is not None and own["status"] == "met"
            table.add(
                problem,
                quantity,
                f"{amount(quantity, own['median'])}, {own['peer']}" if known and own else own["status"] if own else "-",
                f"{amount(quantity, best['median'])}, {best['library']} {best['peer']}" if best else "-",
                f"{ratio(best, own):.2f}x" if known and best and own else "-",
                ", ".join(f"{name} {ratio(e, own):.3g}x" for name, e in met.items()) if known and own else "-",
                f"{100 * own['share']:.0f} % ({own['share_of']})" if known and own and "share" in own else "",
            )
            for name, entry in entries.items():
                if entry["status"] != "met":
                    notes[f"{problem}: {name}, {entry['peer']}: {entry['status']}, {entry['reason']}"] = None
        present = {name for key, value in groups.items() if key[0] == case for name in value}
        absent = {
            f"without {e['library']}: {e['reason']}": None
            for e in data["absences"]
            if e["case"] == case and e["library"] not in present
        }
        table.notes += [*notes, *absent]
        table.notes += ["the machine was not quiet" for y in data["yardsticks"] if y["case"] == case and not y["quiet"]]
        yield table


def ratio(other: Entry, own: Entry) -> float:
    """How many times Kantor's value the other's is."""
    return float(other["median"]) / float(own["median"]) if own["median"] else math.inf


def picture(data: dict[str, Any], path: Path) -> None:
    """A dot for each library and problem: how many times as long as Kantor it takes. Needs matplotlib."""
    from kantor.plotting import new_axes, save_figure

    rows = [
        (key, entries)
        for key, entries in by_problem(data["results"]).items()
        if key[2] == "seconds" and entries.get(OWN, {}).get("status") == "met"
    ]
    libraries = list(dict.fromkeys(name for _, entries in rows for name in entries if name != OWN))
    ax = new_axes(8.0, 1.6 + 0.32 * len(rows))
    ax.axvline(1.0, color="#c4501b", linewidth=2, label=OWN)
    for number, library in enumerate(libraries):
        points = [
            (ratio(entries[library], entries[OWN]), -place)
            for place, (_, entries) in enumerate(rows)
            if entries.get(library, {}).get("status") == "met"
        ]
        marker = "osD^vP*X<>hp"[number % 12]
        if points:
            ax.plot(*zip(*points, strict=True), marker, markersize=6, alpha=0.85, label=library)
    ax.set_yticks([-place for place in range(len(rows))], [f"{case}: {problem}" for (case, problem, _), _ in rows])
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}x")
    ax.set_xlabel("time, in multiples of Kantor's (to the right: slower than Kantor)")
    ax.grid(axis="both", alpha=0.25)
    ax.tick_params(labelsize=8)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    save_figure(ax, path)


# --- reading ---


def read(path: Path) -> dict[str, Any]:
    """The document of an earlier run.

    Raises
    ------
    ValueError
        The file is not one, or of another version of the format.
    OSError
        It cannot be read.
    """
    try:
        data = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected the JSON file of a run of kantor bench, got {error}") from error
    if not isinstance(data, dict) or "schema" not in data or not isinstance(data.get("results"), list):
        raise ValueError(f"{path}: expected the JSON file of a run of kantor bench, got other JSON")
    if data["schema"] != SCHEMA:
        raise ValueError(f"{path}: expected format {SCHEMA}, got {data['schema']}; run kantor bench again")
    return data
