"""What testing the curvature costs one iteration of conjugate gradients.

By the native program bench_cg, one thread, fp64, 7-point stencil, repetitions interleaved, processor time. Three
loops: blind (alpha = rz / pq and no test), sign (the library's tests of p.q, a scalar that the iteration forms anyway)
and full (q.q as well, for the test for a singular matrix); and the scalar step alone as a share of one iteration.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from kantor.bench import tables

import programs

REPETITIONS = 15
LIMIT = 3.0  # per cent
LABELS = ("loop", "scalars", "full", "sign", "blind")


def run(sizes: list[int], add: Callable[[dict[str, Any]], None]) -> tables.Table:
    """Measure at the given cube sides, hand every record to `add`, and return the table."""
    seconds = _measure(sizes)
    step = statistics.median(seconds["scalars/full"]) - statistics.median(seconds["scalars/blind"])
    columns = ("grid", "blind ms/it", "sign test", "of best", "with q.q", "of best", "scalar step ns", "its share")
    table = tables.Table("Curvature test, fp64 stencil, 1 thread: time added to an iteration", columns)
    for side in sizes:
        blind = seconds[f"loop/blind/{side}"]
        costs: dict[str, float] = {}
        for test in ("sign", "full"):
            times = seconds[f"loop/{test}/{side}"]
            costs[test] = 100 * (statistics.median(times) / statistics.median(blind) - 1)
            costs[f"{test}_best"] = 100 * (min(times) / min(blind) - 1)
        share = 100 * step / statistics.median(blind)
        milliseconds = 1e3 * statistics.median(blind)
        record = {"kind": "curvature", "side": side, "blind_ms": milliseconds, "percent": costs}
        add(record | {"scalar_step_ns": 1e9 * step, "scalar_share_percent": share})
        added = [f"{costs[name]:+.2f} %" for name in ("sign", "sign_best", "full", "full_best")]
        table.add(f"{side}^3", f"{milliseconds:.4f}", *added, f"{1e9 * step:.1f}", f"{share:.5f} %")
    table.notes.append(
        f"medians of {REPETITIONS} interleaved repetitions, and the fastest of them; wanted <= {LIMIT} %"
    )
    table.notes.append(
        "sign test: p.q is formed anyway; q.q is only for telling a singular matrix from an indefinite one"
    )
    table.notes.append("scalar step: all tests of one iteration, timed apart from the loop, minus a bare division")
    return table


def _measure(sizes: list[int]) -> dict[str, list[float]]:
    """Seconds per iteration of every repetition, by "loop/<test>/<side>" and "scalars/<test>"."""
    entries = programs.run(
        programs.find_or_build("bench_cg"),
        [
            f"--benchmark_filter=^(loop/(full|sign|blind)/({'|'.join(map(str, sizes))})$|scalars/)",
            f"--benchmark_repetitions={REPETITIONS}",
            "--benchmark_enable_random_interleaving=true",
            "--benchmark_min_time=0.05",
        ],
    )
    seconds: dict[str, list[float]] = {}
    for entry in entries:
        if entry.get("error_occurred"):
            raise programs.ProgramError(f"curvature: {entry['run_name']}: {entry['error_message']}")
        name = "/".join(part for part in entry["run_name"].split("/") if part in LABELS or part.isdigit())
        seconds.setdefault(name, []).append(entry["seconds_per_iteration"])
    return seconds
