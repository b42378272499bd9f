"""Fixed costs: a call of a three-tensor function of the extension module, and `import kantor` after `import torch`."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from kantor.bench import tables

PROCESSES = 7
CALLS = 20_000
CALL_LIMIT_NS = 1000
IMPORT_LIMIT_S = 0.15
HEAVY = ("scipy", "matplotlib")  # what `import kantor` must not pull in

_CALL = f"""
import json, time, torch
from kantor import _C
x, y, out = torch.ones(1), torch.ones(1), torch.empty(1)
def per_call(function, *arguments):
    times = []
    for _ in range(7):
        begin = time.perf_counter_ns()
        for _ in range({CALLS}):
            function(*arguments)
        times.append((time.perf_counter_ns() - begin) / {CALLS})
    return min(times)
bare = per_call(lambda *_: None, x, y, out, 2.0, 3.0, 1)
print(json.dumps({{
    "kantor": per_call(_C.multiply_add, x, y, out, 2.0, 3.0, 1),
    "torch": per_call(lambda: torch.add(x, y, out=out)),
    "python": bare,
}}))
"""

_IMPORT = """
import json, sys, time, torch
before = set(sys.modules)
begin = time.perf_counter()
import kantor
seconds = time.perf_counter() - begin
added = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps({"seconds": seconds, "added": sorted(added)}))
"""


def run(add: Callable[[dict[str, Any]], None]) -> tables.Table:
    """Measure both in fresh processes, hand every record to `add`, and return the table."""
    calls = [_fresh(_CALL) for _ in range(3)]
    imports = [_fresh(_IMPORT) for _ in range(PROCESSES)]
    call = {name: statistics.median(entry[name] for entry in calls) for name in ("kantor", "torch", "python")}
    seconds = statistics.median(entry["seconds"] for entry in imports)
    heavy = sorted(set(HEAVY) & set(imports[0]["added"]))
    add({"kind": "overhead", "call_ns": call, "import_seconds": seconds, "heavy_imports": heavy})
    table = tables.Table("Fixed costs", ("what", "measured", "unit", "wanted", "met"))
    in_time, light = call["kantor"] <= CALL_LIMIT_NS, seconds < IMPORT_LIMIT_S
    table.add(
        "_C.multiply_add, three one-element tensors",
        f"{call['kantor']:.0f}",
        "ns",
        f"<= {CALL_LIMIT_NS}",
        _yes(in_time),
    )
    table.add("torch.add(x, y, out=out), the same tensors", f"{call['torch']:.0f}", "ns", "", "")
    table.add("an empty Python function", f"{call['python']:.0f}", "ns", "", "")
    table.add("import kantor beyond import torch", f"{seconds:.3f}", "s", f"< {IMPORT_LIMIT_S}", _yes(light))
    table.add(f"packages among {', '.join(HEAVY)} it imports", ", ".join(heavy) or "none", "", "none", _yes(not heavy))
    table.notes.append(
        f"call: fastest of 7 loops of {CALLS}, median of 3 processes; import: median of {PROCESSES} processes"
    )
    return table


def _yes(met: bool) -> str:
    return "yes" if met else "NO"


def _fresh(code: str) -> dict[str, Any]:
    """Run code in a new interpreter and return the JSON object it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    if done.returncode != 0:
        raise RuntimeError(f"overhead: a process failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result
