"""What watching the curvature costs one iteration of conjugate gradients.

Three comparisons by the native program bench_cg, one thread, fp64, 7-point stencil, repetitions interleaved:
the loop with the library's curvature test against the same loop without it (neither the scalar test nor q.q, which only
the test for a singular matrix needs), and the scalar step alone, as a share of one iteration.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import programs
import tables

REPETITIONS = 9
LIMIT = 3.0  # per cent


def run(sizes: list[int], add: Callable[[dict[str, Any]], None]) -> tables.Table:
    """Measure at the given cube sides, hand every record to `add`, and return the table."""
    program = programs.find_or_build("bench_cg")
    sides = "|".join(map(str, sizes))
    entries = programs.run(
        program,
        [
            f"--benchmark_filter=^(loop/(watched|blind)/({sides})/|scalars/)",
            f"--benchmark_repetitions={REPETITIONS}",
            "--benchmark_enable_random_interleaving=true",
            "--benchmark_min_time=0.1",
        ],
    )
    seconds: dict[str, list[float]] = {}
    for entry in entries:
        if entry.get("error_occurred"):
            raise programs.ProgramError(f"curvature: {entry['run_name']}: {entry['error_message']}")
        name = "/".join(part for part in entry["run_name"].split("/") if part in LABELS or part.isdigit())
        seconds.setdefault(name, []).append(entry["seconds_per_iteration"])
    step = statistics.median(seconds["scalars/watched"])
    plain = statistics.median(seconds["scalars/blind"])
    columns = (
        "grid",
        "watched ms/it",
        "blind ms/it",
        "cost",
        "cost of best",
        "scalar step ns",
        "share of an iteration",
    )
    table = tables.Table("Curvature monitoring, fp64 stencil, 1 thread", columns)
    for side in sizes:
        watched, blind = seconds[f"loop/watched/{side}"], seconds[f"loop/blind/{side}"]
        record = {
            "kind": "curvature",
            "side": side,
            "watched_ms": 1e3 * statistics.median(watched),
            "blind_ms": 1e3 * statistics.median(blind),
            "cost_percent": 100 * (statistics.median(watched) / statistics.median(blind) - 1),
            "best_cost_percent": 100 * (min(watched) / min(blind) - 1),
            "scalar_step_ns": 1e9 * (step - plain),
            "scalar_share_percent": 100 * (step - plain) / statistics.median(blind),
        }
        add(record)
        table.add(
            f"{side}^3",
            f"{record['watched_ms']:.4f}",
            f"{record['blind_ms']:.4f}",
            f"{record['cost_percent']:+.2f} %",
            f"{record['best_cost_percent']:+.2f} %",
            f"{record['scalar_step_ns']:.1f}",
            f"{record['scalar_share_percent']:.5f} %",
        )
    table.notes.append(
        f"cost: medians of {REPETITIONS} interleaved repetitions, and of the fastest one; wanted <= {LIMIT} %"
    )
    table.notes.append(
        "blind: no curvature test and no q.q; the scalar step is timed apart from the loop, minus a bare division"
    )
    return table


LABELS = ("loop", "scalars", "watched", "blind")
