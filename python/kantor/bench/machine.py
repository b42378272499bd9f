"""What machine this is and how quiet it is."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "numpy", "scipy", "scikit-learn", "pyamg", "jax", "lineax", "POT", "ott-jax", "geomloss", "regot",
    "faiss-cpu", "torch_geometric", "petsc4py", "cupy-cuda13x", "cupy-cuda12x",
)  # fmt: skip


def cpus() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_bytes() -> dict[int, int]:
    """Bytes of each data or unified cache level as Linux reports it, {} elsewhere."""
    levels: dict[int, int] = {}
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size = ((index / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            levels[int(level)] = int(size[:-1]) * units[size[-1]] if size[-1] in units else int(size)
    return levels


def working_sets(threads: int) -> dict[str, int]:
    """Bytes that sit well inside L2 (of all threads together), in L3 but not in L2, and in memory only."""
    caches = cache_bytes()
    l2 = caches.get(2, 1 << 20) * threads
    l3 = caches.get(3, 32 << 20)
    return {
        "L2": l2 // 2,
        "L3": min(max(l3 // 2, 3 * l2), 48 << 20),
        "DRAM": min(max(8 * l3, 400 << 20), 1600 << 20),
    }


def memory_available() -> int:
    """Bytes a new process can use without swapping."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return 8 << 30


def fits(bytes_each: list[int]) -> bool:
    """Whether workers of these sizes can stay alive together in half of the free memory."""
    return sum(bytes_each) < memory_available() // 2


def _status(field: str) -> float:
    """MB of this process, as Linux counts them; 0 elsewhere."""
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))
    return 0.0


def forget_peak_memory() -> float:
    """Start measuring the peak anew; MB that this process holds now, 0 where nobody knows."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    return 0.0


def peak_memory() -> float:
    """MB that this process held at most since then."""
    return _status("VmHWM")


def load() -> float:
    """Mean number of runnable processes over the last minute, per processor this process may use."""
    return os.getloadavg()[0] / cpus()


def processor() -> str:
    """The processor's name as its maker wrote it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Processor, caches, load and package versions: the header record of a results file."""
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "kind": "environment",
        "processor": processor(),
        "cpus": cpus(),
        "caches": {f"L{level}": size for level, size in cache_bytes().items()},
        "load_per_cpu": round(load(), 2),
        "python": platform.python_version(),
        "versions": versions,
    }
