"""Tables and picture of the conjugate gradient cases, from the records of a run.

Two ways of counting the bytes an unknown costs one iteration, W bytes a word:
  8 W   (64 B in fp64)  what Kantor's schedule for a stencil moves: read r, read p, write p in the pass that advances
                        the direction and applies the operator; read x, r, p, write x, r in the pass that updates;
                        q = A p is formed again there and never stored
  11 W  (88 B in fp64)  the classic three passes: read p, write q; read x, r, p, q, write x, r; read p, r, write p
A CSR matrix adds (W + 4) bytes a nonzero and 4 a row to the classic count. A peer that makes more passes moves more
than it is credited with, which is the point: the fraction says how far the time is from the attainable one.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kantor.bench import tables
from kantor.bench.linalg.peers import PEERS

import plots

WORD = {"float64": 8, "float32": 4}
ROUNDING = {"float64": 1e-11, "float32": 1e-4}  # below this residual peers differ by rounding
RESIDUAL_AGREEMENT = {"float64": 1e-6, "float32": 0.2}  # relative, after the same number of iterations
MATRIX_FREE_PEERS = ("torch-slices", "torch-slices-graph", "lineax-stencil", "lineax-untested")

Record = dict[str, Any]


@dataclass(frozen=True, order=True)
class Group:
    """What the peers of one comparison share."""

    unknowns: int
    problem: str
    dtype: str
    threads: int
    device: str

    def label(self) -> str:
        """Short name for a table's cell."""
        return self.problem.replace("poisson3d-", "") + ("^3" if self.problem.startswith("poisson3d-") else "")


@dataclass(frozen=True)
class Row:
    """Medians of one peer in one group; None where the goal was not measured."""

    peer: str
    ms: float | None
    marginal_ms: float | None
    residual: float | None
    solve_seconds: float | None
    solve_iterations: int | None
    solve_residual: float | None
    converged: bool
    setup_seconds: float
    nonzeros: int
    repeats: int


def rows_by_group(records: list[Record]) -> dict[Group, list[Row]]:
    """Medians over repetitions, groups in ascending size, peers in the order of PEERS."""
    collected: dict[Group, dict[str, dict[str, list[Record]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for record in records:
        if record["kind"] == "measurement":
            group = Group(*(record[name] for name in ("unknowns", "problem", "dtype", "threads", "device")))
            collected[group][record["peer"]][record["goal"]].append(record)
    order = list(PEERS)
    return {
        group: [_row(peer, peers[peer]) for peer in sorted(peers, key=order.index)]
        for group, peers in sorted(collected.items())
    }


def _row(peer: str, goals: dict[str, list[Record]]) -> Row:
    fixed, solved = goals.get("iterations", []), goals.get("solve", [])

    def median(records: list[Record], name: str) -> float | None:
        return statistics.median(record[name] for record in records) if records else None

    some = (fixed or solved)[0]
    return Row(
        peer=peer,
        ms=median(fixed, "ms_per_iteration"),
        marginal_ms=median(fixed, "marginal_ms_per_iteration"),
        residual=median(fixed, "residual"),
        solve_seconds=median(solved, "seconds"),
        solve_iterations=solved[0]["iterations"] if solved else None,
        solve_residual=median(solved, "residual"),
        converged=all(record["converged"] for record in solved),
        setup_seconds=median(fixed + solved, "setup_seconds") or 0.0,
        nonzeros=some["nonzeros"],
        repeats=max(len(fixed), len(solved)),
    )


def yardsticks(records: list[Record]) -> dict[tuple[str, str, int, str], Record]:
    """The copy bandwidth measured with each group."""
    return {
        (record["problem"], record["dtype"], record["threads"], record["device"]): record
        for record in records
        if record["kind"] == "yardstick"
    }


def table_of_times(groups: dict[Group, list[Row]], iterations: bool) -> tables.Table:
    """Milliseconds per iteration and seconds to the tolerance, with ratios to Kantor."""
    fixed = ("ms/it", "marginal", "ns/unknown", "x stencil", "x csr") if iterations else ()
    columns = ("problem", "dtype", "thr", "peer", *fixed, "solve s", "its", "residual", "setup s")
    if not iterations:
        columns = (*columns[:4], "solve s", "x csr", "its", "residual", "setup s")
    table = tables.Table("Conjugate gradients", columns)
    for group, rows in groups.items():
        table.rule()
        by_name = {row.peer: row for row in rows}
        stencil, csr = by_name.get("kantor-stencil"), by_name.get("kantor-csr")
        for row in rows:
            head = (group.label(), group.dtype, group.threads if group.device == "cpu" else group.device, row.peer)
            mark = "" if row.converged else "*"
            its = "" if row.solve_iterations is None else f"{row.solve_iterations}{mark}"
            tail = (its, _scientific(row.solve_residual or row.residual), f"{row.setup_seconds:.3g}")
            if iterations:
                ns = "" if row.ms is None else f"{1e6 * row.ms / group.unknowns:.2f}"
                ratios = (_ratio(row.ms, stencil.ms if stencil else None), _ratio(row.ms, csr.ms if csr else None))
                table.add(
                    *head, _number(row.ms), _number(row.marginal_ms), ns, *ratios, _number(row.solve_seconds), *tail
                )
            else:
                ratio = _ratio(row.solve_seconds, csr.solve_seconds if csr else None)
                table.add(*head, _number(row.solve_seconds), ratio, *tail)
    if iterations:
        table.notes.append("ms/it: whole call / iterations; marginal: without entering and leaving the solver")
        table.notes.append(
            "x stencil, x csr: times Kantor's time per iteration with Stencil, with CSR (above 1: Kantor is faster)"
        )
    table.notes.append(
        "residual: |b - A x| / |b| in float64, of the solve where there is one; *: above ten times the tolerance"
    )
    return table


def counts(peer: str, dtype: str, unknowns: int, nonzeros: int) -> Iterator[tuple[str, float]]:
    """The ways to count a peer's bytes per unknown and iteration: (name, bytes)."""
    word = WORD[dtype]
    if PEERS[peer].operator == "csr":
        yield "11 words + matrix", 11 * word + 4 + nonzeros / unknowns * (word + 4)
        return
    if peer == "kantor-stencil":
        yield "8 words (its schedule)", 8 * word
    yield "11 words (classic)", 11 * word


def table_of_bandwidth(
    groups: dict[Group, list[Row]], measured: dict[tuple[str, str, int, str], Record]
) -> tables.Table:
    """Bytes per second by state traffic, as fractions of the measured copy bandwidth."""
    columns = ("problem", "dtype", "thr", "peer", "counted", "B/unknown", "GB/s", "copy GB/s", "of copy",
               "marginal", "nt copy", "of nt copy")  # fmt: skip
    table = tables.Table("Fraction of the measured copy bandwidth", columns)
    noisy = False
    for group, rows in groups.items():
        yardstick = measured.get((group.problem, group.dtype, group.threads, group.device))
        if yardstick is None:
            continue
        table.rule()
        flag = "" if yardstick["quiet"] else "*"
        noisy |= not yardstick["quiet"]
        for row in rows:
            if row.ms is None or row.marginal_ms is None or PEERS[row.peer].preconditioned:
                continue
            for name, size in counts(row.peer, group.dtype, group.unknowns, row.nonzeros):
                rate, marginal = (size * group.unknowns / ms / 1e6 for ms in (row.ms, row.marginal_ms))
                copy, streamed = yardstick["copy_gbs"], yardstick["copy_nt_gbs"]
                where = group.threads if group.device == "cpu" else group.device
                head = (group.label(), group.dtype, where, row.peer, name, f"{size:.0f}", f"{rate:.1f}")
                tail = ("", "") if streamed is None else (f"{streamed:.1f}", _percent(rate / streamed))
                table.add(*head, f"{copy:.1f}{flag}", _percent(rate / copy), _percent(marginal / copy), *tail)
    table.notes.append(
        "GB/s: counted bytes per unknown / time; copy: y = x, 2 words counted, on a working set of x, r and p"
    )
    table.notes.append(
        "(on a GPU: 2 GiB); nt copy: the same with non-temporal stores, which have no write-allocate read"
    )
    table.notes.append(
        "8 words: read r, p, write p; read x, r, p, write x, r (q recomputed, never stored); 11: q stored, p on its own"
    )
    if noisy:
        table.notes.append("*: the copy's two timings differ by more than 15 %: the machine was not quiet")
    return table


def disagreements(groups: dict[Group, list[Row]]) -> list[str]:
    """Peers whose residual after the fixed number of iterations is not that of the others."""
    found = []
    for group, rows in groups.items():
        residuals = {row.peer: row.residual for row in rows if row.residual and not PEERS[row.peer].preconditioned}
        middle = statistics.median(residuals.values()) if residuals else 0.0
        if middle < ROUNDING[group.dtype]:
            continue
        found += [
            f"{group.label()} {group.dtype} {group.threads}t: residual of {peer} {value:.3e}, median {middle:.3e}"
            for peer, value in residuals.items()
            if abs(value / middle - 1) > RESIDUAL_AGREEMENT[group.dtype]
        ]
    return found


def table_of_claims(groups: dict[Group, list[Row]], measured: dict[tuple[str, str, int, str], Record]) -> tables.Table:
    """The ratios that the project promises, where the run measured them (fp64, CPU)."""
    table = tables.Table("Promised ratios (fp64, CPU)", ("what", "problem", "thr", "measured", "wanted", "met"))

    def add(what: str, group: Group, value: float | None, wanted: float, unit: str) -> None:
        if value is not None:
            shown, least = (
                (f"{100 * value:.0f} %", f">= {100 * wanted:.0f} %")
                if unit == "%"
                else (f"{value:.2f}x", f">= {wanted}x")
            )
            table.add(what, group.label(), group.threads, shown, least, "yes" if value >= wanted else "NO")

    for group, rows in groups.items():
        large_grid = group.problem.startswith("poisson3d-") and group.unknowns >= 64**3
        if group.dtype != "float64" or group.device != "cpu" or not large_grid:
            continue
        ms = {row.peer: row.ms for row in rows if row.ms is not None}
        stencil, csr, scipy = ms.get("kantor-stencil"), ms.get("kantor-csr"), ms.get("scipy-csr")
        others = [ms[peer] for peer in MATRIX_FREE_PEERS if peer in ms]
        tested = [ms[peer] for peer in MATRIX_FREE_PEERS if peer in ms and peer != "lineax-untested"]
        yardstick = measured.get((group.problem, group.dtype, group.threads, group.device))
        if stencil and group.threads == 2 and group.label() in ("128^3", "256^3"):
            large = group.label() == "256^3"
            add("stencil against scipy's CSR", group, scipy and scipy / stencil, 6 if large else 8, "x")
            least = 2.5 if large else 3.5
            add(
                "stencil against the best matrix-free peer",
                group,
                min(tested) / stencil if tested else None,
                least,
                "x",
            )
            add(
                "the same, lineax without its stopping test too",
                group,
                min(others) / stencil if others else None,
                least,
                "x",
            )
        if stencil and yardstick and group.threads == 2:
            rate = WORD["float64"] * group.unknowns / stencil / 1e6
            for what, copy in (("copy, same working set", "copy_gbs"), ("copy, DRAM", "copy_dram_gbs")):
                for words in (8, 11):
                    add(f"stencil, {words} words, of {what}", group, words * rate / yardstick[copy], 0.7, "%")
        if csr and scipy and group.threads in (1, 2):
            add("CSR against scipy's CSR", group, scipy / csr, 1.5 if group.threads == 1 else 2.5, "x")
    return table


def tables_of(records: list[Record]) -> list[tables.Table]:
    """All tables of a run, ready to print."""
    groups = rows_by_group(records)
    measured = yardsticks(records)
    iterations = any(row.ms is not None for rows in groups.values() for row in rows)
    times = table_of_times(groups, iterations)
    times.notes += [f"disagreement: {text}" for text in disagreements(groups)]
    times.notes += [
        f"failed: {record['peer']} on {record['problem']} {record['dtype']}: {record['reason']}"
        for record in records
        if record["kind"] == "failure"
    ]
    found = [times, table_of_bandwidth(groups, measured), table_of_claims(groups, measured)]
    return [table for table in found if table.rows or table is times]


def picture(records: list[Record], path: Path) -> None:
    """One panel per dtype and thread count: nanoseconds per unknown and iteration, or milliseconds to the tolerance."""
    groups = rows_by_group(records)
    iterations = any(row.ms is not None for rows in groups.values() for row in rows)
    measured = yardsticks(records)
    panels: dict[str, plots.Panel] = {}
    for group, rows in groups.items():
        where = f"{group.threads} threads" if group.device == "cpu" else group.device
        panel = panels.setdefault(f"{group.dtype}, {where}", plots.Panel())
        for row in rows:
            if iterations and row.ms is not None:
                panel.add(row.peer, group.label(), 1e6 * row.ms / group.unknowns)
            elif not iterations and row.solve_seconds is not None:
                panel.add(row.peer, group.label(), 1e3 * row.solve_seconds)
        yardstick = measured.get((group.problem, group.dtype, group.threads, group.device))
        if iterations and yardstick is not None:
            panel.floor(group.label(), 8 * WORD[group.dtype] / yardstick["copy_gbs"])
    label = "ns per unknown and iteration" if iterations else "ms to the tolerance"
    plots.bars(panels, label, "black line: 8 words an unknown at copy bandwidth", path)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _scientific(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _ratio(value: float | None, reference: float | None) -> str:
    return f"{value / reference:.2f}" if value and reference else ""
