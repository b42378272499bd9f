"""Where the native benchmark executables are, and how to run one."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
BUILT_HERE = REPOSITORY / "build" / "bench"
FLAGS = ["-std=gnu++20", "-O3", "-fopenmp"]
# What each program needs beside its own source: more flags, and files of csrc/ (the flags of CMakeLists.txt).
_EXACT = ["-Wno-psabi", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
_KRYLOV = ["vector", "operator", "low_rank", "cg", "ic0", "multigrid"]
NEEDS = {
    "bench_roofline": (["-march=native", "-ffp-contract=fast"], []),
    "bench_cg": (_EXACT, ["core/parallel.cpp", *(f"linalg/{stem}_cpu.cpp" for stem in _KRYLOV)]),
    "bench_multigrid": (
        _EXACT,
        [
            "core/parallel.cpp",
            *(f"linalg/{stem}_cpu.cpp" for stem in ("vector", "operator", "low_rank", "multigrid")),
            *(f"linalg/{stem}.cpp" for stem in ("multigrid_graph", "multigrid_setup", "approximate_cholesky_cpu")),
        ],
    ),
}


class ProgramError(RuntimeError):
    """A native benchmark failed to build or to run."""


@functools.cache
def find(name: str) -> Path | None:
    """Path of the executable `name`: in $KANTOR_BENCH_BIN, else the newest one under build/, else None."""
    chosen = os.environ.get("KANTOR_BENCH_BIN")
    folders = [Path(chosen)] if chosen else [REPOSITORY / "build"]
    found = [path for folder in folders if folder.is_dir() for path in folder.rglob(name) if os.access(path, os.X_OK)]
    files = [path for path in found if path.is_file()]
    return max(files, key=lambda path: path.stat().st_mtime) if files else None


def build(name: str, compiler: str | None = None) -> Path:
    """Compile bench/native/<name>.cpp, which needs Google Benchmark, into build/bench, as KANTOR_BENCH=ON would.

    Raises ProgramError without a compiler or when it fails.
    """
    command = compiler or os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if command is None:
        raise ProgramError("build: no C++ compiler on PATH; install one or set CXX")
    BUILT_HERE.mkdir(parents=True, exist_ok=True)
    flags, parts = NEEDS[name]
    csrc, program = REPOSITORY / "csrc", BUILT_HERE / name
    sources = [REPOSITORY / "bench" / "native" / f"{name}.cpp", *(csrc / part for part in parts)]
    include = ["-I", str(csrc)] if parts else []
    call = [command, *FLAGS, *flags, *include, *map(str, sources), "-lbenchmark", "-lpthread", "-o", str(program)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ProgramError(f"build: {' '.join(call)} failed:\n{done.stderr[-2000:]}")
    find.cache_clear()
    return program


def find_or_build(name: str) -> Path:
    """Path of the executable, compiled first if there is none or its sources are newer."""
    program = find(name)
    sources = [REPOSITORY / "bench" / "native" / f"{name}.cpp"]
    if NEEDS[name][1]:
        sources += [path for path in (REPOSITORY / "csrc").rglob("*") if path.suffix in (".h", ".cpp")]
    newest = max(path.stat().st_mtime for path in sources)
    return program if program is not None and program.stat().st_mtime > newest else build(name)


def run(program: Path, arguments: list[str], timeout: float = 300.0) -> list[dict[str, Any]]:
    """Run a Google Benchmark executable and return its benchmarks, one dict a repetition."""
    call = [str(program), "--benchmark_format=json", *arguments]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    try:
        done = subprocess.run(call, capture_output=True, text=True, check=False, timeout=timeout, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProgramError(f"run: {program.name}: {error}") from error
    if done.returncode != 0:
        raise ProgramError(f"run: {' '.join(call)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    entries: list[dict[str, Any]] = json.loads(done.stdout)["benchmarks"]
    return [entry for entry in entries if entry["run_type"] == "iteration"]
