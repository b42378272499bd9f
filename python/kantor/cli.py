"""The command ``kantor``: ``info``, ``solve``, ``transport``, ``classify``, ``demo`` and ``bench`` (extra ``cli``).

Exit codes: 0 solved, 1 not solved, 2 bad input (one message on stderr, no traceback), 130 interrupted.
"""

from __future__ import annotations

import json
import math
import platform
import shlex
import sys
import time
import warnings
import webbrowser
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

import kantor
from kantor import _C, KantorError, RankError
from kantor._command_line import (
    BAD_INPUT,
    INTERRUPTED,
    NOT_SOLVED,
    PLOT_SUFFIXES,
    Precision,
    finite,
    one_message,
    print_rows,
    progress,
    scientific,
    warn_of_lone_processes,
)
from kantor._progress import log_fraction
from kantor._solve_distributed import bad_input_of_all, share_system
from kantor._solve_files import BadInputError, System, check_output, read_system, write_solution
from kantor._solve_preconditioner import Chosen, Preconditioner, choose
from kantor.distributed import ShardedCSR, init
from kantor.linalg import SolveResult, SolveStatus, cg
from kantor.plotting import new_axes, save_figure

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from kantor._bench_command import bench
    from kantor._classify_command import classify
    from kantor._transport_command import transport
except ImportError as error:
    _missing: str | None = error.name
else:
    _missing = None


class Size(StrEnum):
    """Choices of ``--size``."""

    small = "small"
    full = "full"


def main() -> None:
    """Entry point of the command ``kantor``."""
    if _missing is not None:
        print(f'kantor: the command line needs {_missing}: pip install "kantor[cli]"', file=sys.stderr)
        raise SystemExit(BAD_INPUT)
    build_app()()


def build_app() -> typer.Typer:
    """Return the command line as a Typer application."""
    app = typer.Typer(
        name="kantor",
        help="Solvers, transport, diffusion and curvature for PyTorch: the command line.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(_version)
    for command in (info, solve, transport, classify, demo, bench):
        app.command()(command)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        print(kantor.__version__)
        raise typer.Exit


def _version(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Declare the options of ``kantor`` itself; the work is done in their callbacks."""


# kantor info -------------------------------------------------------------------------------------------------------


def info(json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, how the native code was built, and what it finds on this machine."""
    build = _C.build_info()
    facts: dict[str, Any] = {
        "kantor": kantor.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "compiler": build["compiler"],
        "simd": build["simd"],
        "openmp": build["openmp"],
        "threads": torch.get_num_threads(),
        "cuda_built": build["cuda_built"],
        "cuda_architectures": build["cuda_architectures"],
        "cuda_available": kantor.cuda.is_available(),
    }
    if json_output:
        print(json.dumps(facts, indent=2))
        return
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        text = ("yes" if value else "no") if isinstance(value, bool) else str(value) or "none"
        table.add_row(name.replace("_", " ").replace("cuda", "CUDA"), escape(text))
    Console().print(table)


# kantor solve ------------------------------------------------------------------------------------------------------


def solve(
    matrix: Annotated[Path, typer.Argument(help="Symmetric matrix, Matrix Market (.mtx or .mtx.gz).")],
    rhs: Annotated[
        Path | None, typer.Option(help="Right-hand side: .npy, .mtx or .txt with n or n x k numbers. Default: ones.")
    ] = None,
    preconditioner: Annotated[
        Preconditioner, typer.Option(help="auto: multigrid for Poisson grids, else ic0, else jacobi, else none.")
    ] = Preconditioner.auto,
    rtol: Annotated[float, typer.Option(min=0.0, help="Stop at |b - Ax| <= max(rtol |b|, atol).")] = 1e-5,
    atol: Annotated[float, typer.Option(min=0.0, help="See --rtol.")] = 0.0,
    maxiter: Annotated[int | None, typer.Option(min=0, help="Iteration limit. Default: 10 n.")] = None,
    dtype: Annotated[Precision, typer.Option(help="Precision of the solve.")] = Precision.float64,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: all cores.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write x: .npy, .mtx or .txt.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw residuals against iterations: .png, .pdf or .svg.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Share the rows among the processes that torchrun started.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds to wait for another process.")] = 30.0,
) -> None:
    """Solve A x = b for a symmetric positive definite A by conjugate gradients.

    Exit codes: 0 solved, 1 not solved, 2 bad input, 130 interrupted (x so far is written where -o is given).
    """
    with one_message("solve"):
        ranks = init(timeout) if distributed else None
        if ranks is None:
            warn_of_lone_processes("solve")
    first = ranks is None or ranks.rank == 0  # reads, writes and speaks
    quiet, json_output = quiet or not first, json_output and first
    with one_message("solve", speaks=first):
        started = time.perf_counter()
        system: System | None = None
        with bad_input_of_all(ranks, patient=True):
            if output is not None and first:
                check_output(output, inputs=[matrix, rhs])
            if plot is not None and first:
                check_output(plot, PLOT_SUFFIXES, inputs=[matrix, rhs, output])
                new_axes()  # a missing matplotlib shows now, not after the solve
            if threads is not None:
                torch.set_num_threads(threads)
            if first:
                system = read_system(matrix, rhs, getattr(torch, dtype.value))
        read_seconds = time.perf_counter() - started
        if ranks is not None:
            chosen, b = share_system(ranks, system, preconditioner)
        else:
            assert system is not None
            chosen, b = choose(preconditioner, system.A), system.b
        setup_seconds = time.perf_counter() - started - read_seconds
        result = _run_cg(b, chosen, rtol, atol, maxiter, show_progress=not quiet)
        x = chosen.A.gather(result.x, target=0) if isinstance(chosen.A, ShardedCSR) else result.x
        with bad_input_of_all(ranks, patient=True):
            if output is not None and system is not None and x is not None:
                write_solution(output, system.in_file_shape(x))
            if plot is not None and first:
                save_figure(result.plot(), plot)
        outcome = (
            {}
            if system is None
            else _outcome(system, result)
            | {
                "processes": 1 if ranks is None else ranks.size,
                "matrix": str(matrix),
                "rhs": "ones" if rhs is None else str(rhs),
                "preconditioner": chosen.name,
                "preconditioner_note": chosen.note,
                "seconds_read": read_seconds,
                "seconds_preconditioner": setup_seconds,
                "output": None if output is None else str(output),
                "plot": None if plot is None else str(plot),
            }
        )
    if json_output:
        print(json.dumps(outcome, indent=2))
    elif not quiet:
        _print_outcome(outcome)
    if result.status is SolveStatus.INTERRUPTED:
        raise typer.Exit(INTERRUPTED)
    if not result.converged:
        if not json_output and first:
            print(f"kantor solve: not solved. {_advice(result, preconditioner, system)}", file=sys.stderr)
        raise typer.Exit(NOT_SOLVED)


def _run_cg(
    b: torch.Tensor, chosen: Chosen, rtol: float, atol: float, maxiter: int | None, *, show_progress: bool
) -> SolveResult:
    with progress("cg", enabled=show_progress) as update, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the outcome is printed below, with what to try
        squares = b.double().square().sum(-1)
        if chosen.A.ranks is not None:
            chosen.A.ranks.all_reduce_(squares)
        initial = math.sqrt(float(squares.max()))
        target = max(rtol * initial, atol)

        def show(step: Any) -> None:
            assert update is not None
            update(
                lambda: (
                    log_fraction(initial, step.residual_norm, target),
                    f"iteration {step.iteration:,}, residual {step.residual_norm:.1e}",
                )
            )

        callback = None if update is None else show
        try:
            posed = chosen.posed(b)
            options: dict[str, Any] = {"rtol": rtol, "atol": atol, "maxiter": maxiter, "interrupt": "return"}
            result = cg(chosen.A, posed, M=chosen.M, callback=callback, **options)
            return chosen.answered(result, b)
        except RankError:
            raise
        except (ValueError, KantorError) as error:
            raise BadInputError(str(error)) from error


def _outcome(system: System, result: SolveResult) -> dict[str, Any]:
    """Return what the table and the JSON output tell about a solve."""
    outcome: dict[str, Any] = {
        "unknowns": system.A.shape[0],
        "nonzeros": system.A.nnz,
        "right_hand_sides": len(result.per_system_status),
        "dtype": str(system.b.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "status": str(result.status),
        "converged": result.converged,
        "message": result.message,
        "iterations": result.iterations,
        "residual_norm": finite(result.residual_norm),
        "relative_residual": finite(result.relative_residual),
        "curvature": result.curvature,
        "seconds": result.seconds,
    }
    if len(result.per_system_status) > 1:
        outcome["per_system"] = [
            {"status": str(status), "iterations": int(count), "residual_norm": finite(float(norm))}
            for status, count, norm in zip(
                result.per_system_status, result.per_system_iterations, result.per_system_residual_norm, strict=True
            )
        ]
    return outcome


def _print_outcome(outcome: dict[str, Any]) -> None:
    note = f" ({outcome['preconditioner_note']})" if outcome["preconditioner_note"] else ""
    rows = {
        "matrix": outcome["matrix"],
        "right-hand side": "ones (no --rhs given)" if outcome["rhs"] == "ones" else outcome["rhs"],
        "unknowns": f"{outcome['unknowns']:,}",
        "nonzeros": f"{outcome['nonzeros']:,}",
        "preconditioner": outcome["preconditioner"] + note,
        "status": outcome["status"].replace("_", " "),
        "iterations": f"{outcome['iterations']:,}",
        "|b - Ax|": scientific(outcome["residual_norm"]),
        "|b - Ax| / |b|": scientific(outcome["relative_residual"]),
        "seconds": f"{outcome['seconds']:.3f} (reading {outcome['seconds_read']:.3f}, "
        f"preconditioner {outcome['seconds_preconditioner']:.3f})",
    }
    if outcome["processes"] > 1:
        rows["processes"] = f"{outcome['processes']}"
    if outcome["right_hand_sides"] > 1:
        rows["right-hand side"] += f", {outcome['right_hand_sides']} columns; figures of the worst"
    if outcome["curvature"] is not None:
        rows["curvature d'Ad / d'd"] = f"{outcome['curvature']:.6g}"
    rows |= {name: outcome[name] for name in ("output", "plot") if outcome[name] is not None}
    print_rows(rows)


def _advice(result: SolveResult, preconditioner: Preconditioner, system: System | None) -> str:
    """Return what happened and what to try, in the words of the command line."""
    if result.status is SolveStatus.MAXITER:
        weak = preconditioner in (Preconditioner.none, Preconditioner.jacobi)
        better = ", or --preconditioner auto" if weak else ""
        return f"The iteration limit was reached before the tolerance: raise --maxiter or --rtol{better}."
    if result.status is SolveStatus.NEGATIVE_CURVATURE:
        if system is not None and bool((system.A.diagonal() < 0).all()):
            return (
                f"A direction d with curvature d'Ad / d'd = {result.curvature:.6g} was met, and the whole diagonal is "
                "negative: the matrix is negative definite or indefinite. If the former, as a Laplacian without its "
                "minus sign is, solve -A x = -b: change the signs of both. Else use a method such as MINRES."
            )
        return (
            f"A direction d with curvature d'Ad / d'd = {result.curvature:.6g} was met: the matrix is indefinite, and "
            "conjugate gradients need a positive definite one. Use a method for indefinite matrices, such as MINRES."
        )
    if result.status is SolveStatus.SINGULAR:
        return (
            "A direction of zero curvature was met: the matrix is singular to working precision and the right-hand "
            "side is not in its range, or it is indefinite, or conditioned worse than 1 / eps. If it has a null space, "
            "such as the constants (rows that sum to zero), remove that from the right-hand side in --rhs: subtract "
            "its mean. Else add a small multiple of the identity to the matrix."
        )
    if result.status is SolveStatus.STAGNATED:
        return "The residual stopped falling at the rounding level: use --dtype float64 or a larger --rtol."
    return result.message


# kantor demo -------------------------------------------------------------------------------------------------------


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the page and its pictures.")] = Path("kantor-demo"),
    size: Annotated[Size, typer.Option(help="small: shrunk pictures, a few seconds.")] = Size.full,
    only: Annotated[
        list[str] | None, typer.Option(help="Run only this station; may be repeated, or joined by commas.")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = False,
) -> None:
    """Take a tour of Kantor on real data and write it down as a page, index.html."""
    from kantor.demo import STATIONS, write_page

    console = Console()
    with one_message("demo"):
        names = [station.name for station in STATIONS]
        wanted = [name.strip() for part in only or [] for name in part.split(",")]
        if unknown := sorted(set(wanted) - set(names)):
            raise BadInputError(f"--only {unknown[0]}: no such station; there are {', '.join(names)}")
        chosen = [station for station in STATIONS if not wanted or station.name in wanted]
        try:
            out.mkdir(parents=True, exist_ok=True)
            reports = []
            with progress("demo", enabled=True) as update:
                for number, station in enumerate(chosen):
                    if update is not None:
                        update(_shown(number, len(chosen), station.title))
                    console.print(f"[bold]{escape(station.title)}[/bold] ({station.name}, {size.value})")
                    reports.append(station.run(out, size.value))
                    _print_report(console, reports[-1])
            words = [
                "kantor",
                "demo",
                "--size",
                size.value,
                *(word for name in only or [] for word in ("--only", name)),
            ]
            words += [] if out == Path("kantor-demo") else ["--out", str(out)]
            page = write_page(out, reports, command=shlex.join(words), versions=_versions(), size=size.value)
        except OSError as error:
            raise BadInputError(f"--out {out}: cannot be written: {error.strerror or error}") from error
    console.print(f"The page: {escape(str(page))}", soft_wrap=True)
    if open_page:
        webbrowser.open(page.resolve().as_uri())
    if not all(report.passed for report in reports):
        print("kantor demo: a check failed; see above", file=sys.stderr)
        raise typer.Exit(NOT_SOLVED)


def _shown(number: int, count: int, title: str) -> Callable[[], tuple[float, str]]:
    """What the progress bar says while a station runs."""
    return lambda: (number / count, f"{number + 1} of {count}: {title}")


def _print_report(console: Console, report: Any) -> None:
    table = Table(box=None, padding=(0, 1, 0, 0))
    for column, name in enumerate(report.table.header):
        table.add_column(escape(name), justify="right" if column in report.table.numeric else "left")
    for row in report.table.rows:
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
    for check in report.checks:
        console.print(f"{'passed' if check.passed else 'FAILED'}: {escape(check.name)}, {escape(check.detail)}")
    console.print(f"{report.seconds:.1f} s\n")


def _versions() -> str:
    build = _C.build_info()
    return (
        f"Kantor {kantor.__version__}, torch {torch.__version__}, NumPy {np.__version__}, Python "
        f"{platform.python_version()}; {build['compiler']}, {build['simd']}, {torch.get_num_threads()} CPU thread(s)."
    )


if __name__ == "__main__":
    main()
