"""The one table that bench/on_gpu.sh prints: what the GPU can do, and what conjugate gradients reached of it.

python bench/gpu_table.py FOLDER     (reads roofline.jsonl and cg.jsonl there; either may be missing)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kantor.bench import tables
from kantor.bench.linalg.peers import PEERS

from linalg import cg_report


def read(path: Path) -> list[cg_report.Record]:
    """Records of a results file, [] if there is none."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def table(folder: Path) -> tables.Table:
    """Roofline first, then one line per problem, dtype, peer and way of counting."""
    columns = ("what", "dtype", "peer", "ms/it", "marginal", "counted", "GB/s", "of copy", "x kantor", "solve s", "its")
    result = tables.Table("Measured on this GPU", columns)
    roofline = read(folder / "roofline.jsonl")
    for record in roofline:
        unit = "" if record["unit"] == "GB/s" else record["unit"]
        result.add(record["kernel"], "", record["source"], "", "", unit, f"{record['median']:.0f}", "", "", "", "")
    copy = next((record["median"] for record in roofline if record["kernel"] == "copy"), None)
    cg = read(folder / "cg.jsonl")
    copies = [record["copy_gbs"] for record in cg if record["kind"] == "yardstick"]
    copy = max([*copies, copy or 0.0]) or None
    for group, rows in cg_report.rows_by_group(cg).items():
        result.rule()
        reference = {row.peer: row.ms for row in rows if row.ms is not None}
        for row in rows:
            own = reference.get("kantor-stencil" if PEERS[row.peer].operator == "stencil" else "kantor-csr")
            ratio = f"{row.ms / own:.2f}" if row.ms and own else ""
            solve = "" if row.solve_seconds is None else f"{row.solve_seconds:.4g}"
            its = "" if row.solve_iterations is None else f"{row.solve_iterations}{'' if row.converged else '*'}"
            head = (group.label(), group.dtype, row.peer)
            if row.ms is None or row.marginal_ms is None or PEERS[row.peer].preconditioned:
                ms = "" if row.ms is None else f"{row.ms:.4f}"
                result.add(*head, ms, "", "", "", "", ratio, solve, its)
                continue
            for name, size in cg_report.counts(row.peer, group.dtype, group.unknowns, row.nonzeros):
                rate = size * group.unknowns / row.ms / 1e6
                share = f"{100 * rate / copy:.0f} %" if copy else ""
                times = (f"{row.ms:.4f}", f"{row.marginal_ms:.4f}", f"{name}: {size:.0f} B", f"{rate:.0f}")
                result.add(*head, *times, share, ratio, solve, its)
    result.notes.append(
        "of copy: counted bytes per second / device copy bandwidth (2 words counted, 2 GiB); above 100 % in L2"
    )
    result.notes.append("x kantor: times Kantor's time per iteration with the same kind of operator; *: not converged")
    result.notes += [f"disagreement: {text}" for text in cg_report.disagreements(cg_report.rows_by_group(cg))]
    result.notes += [
        f"failed: {record['peer']} on {record['problem']} {record['dtype']}: {record['reason']}"
        for record in cg
        if record["kind"] == "failure"
    ]
    return result


if __name__ == "__main__":
    print(table(Path(sys.argv[1])).text())
