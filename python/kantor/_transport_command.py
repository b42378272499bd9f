"""The command ``kantor transport``: what it reads becomes one problem, which is solved, written down and drawn."""

from __future__ import annotations

import json
import sys
import time
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from kantor import KantorError, RankError
from kantor._colour_transfer import extend_map, recolour
from kantor._command_line import (
    INTERRUPTED,
    NOT_SOLVED,
    PLOT_SUFFIXES,
    Precision,
    one_message,
    progress,
    warn_of_lone_processes,
)
from kantor._progress import log_fraction
from kantor._ranks import Ranks
from kantor._solve_distributed import bad_input_of_all
from kantor._solve_files import BadInputError, check_output
from kantor._transport_distributed import gather_plan, gather_problem
from kantor._transport_files import (
    IMAGE_SUFFIXES,
    MAP_SUFFIXES,
    PLAN_SUFFIXES,
    write_image,
    write_map,
    write_plan,
)
from kantor._transport_outcome import SUMMARY_ENTRIES, advice, describe, print_outcome
from kantor._transport_problem import Files, Mode, Problem, read_problem
from kantor.distributed import gather, init
from kantor.plotting import new_axes, plot_displacement, plot_displacement_field, save_figure
from kantor.transport import TransportInfo, TransportResult, TransportStatus, solve, solve_sample
from kantor.transport._cost import Cost

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

_RELATIVE = {"colour": 1e-2, "density": 1e-4, "points": 1e-3, "matrix": 1e-3}
_WITHOUT_PLAN = (TransportStatus.OVERFLOW, TransportStatus.INFEASIBLE)


class CostName(StrEnum):
    """Choices of ``--cost``."""

    sqeuclidean = "sqeuclidean"
    euclidean = "euclidean"
    l1 = "l1"
    lp = "lp"
    cosine = "cosine"


class Method(StrEnum):
    """Choices of ``--method``."""

    auto = "auto"
    newton = "newton"
    sns = "sns"
    sinkhorn = "sinkhorn"


def transport(
    source: Annotated[Path | None, typer.Argument(metavar="A", help="Image, or points: .npy (n, d) or .csv.")] = None,
    target: Annotated[Path | None, typer.Argument(metavar="B", help="The same kind of file.")] = None,
    cost_matrix: Annotated[Path | None, typer.Option(help="Cost (n, m) in .npy, in place of A and B.")] = None,
    a: Annotated[Path | None, typer.Option("--a", help="Weights of A: .npy, .csv or .txt. Default: equal.")] = None,
    b: Annotated[Path | None, typer.Option("--b", help="Weights of B.")] = None,
    mode: Annotated[
        Mode, typer.Option(help="What images are: clouds of colours, or densities. auto: densities if both are gray.")
    ] = Mode.auto,
    reg: Annotated[
        float | None, typer.Option(min=0.0, help="Regularisation in units of the cost; 0: the unregularised problem.")
    ] = None,
    relative_reg: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Regularisation as a share of the range of the cost. Default: 1e-2 for colours, 1e-4 for densities, "
            "1e-3 for points and matrices.",
        ),
    ] = None,
    cost: Annotated[CostName | None, typer.Option(help="Cost of points. Default: sqeuclidean, or lp with --p.")] = None,
    p: Annotated[float | None, typer.Option("--p", help="Exponent of --cost lp, sum |x - y|^p.")] = None,
    tol: Annotated[float, typer.Option(help="L1 error of the marginals, relative to the mass.")] = 1e-9,
    max_iter: Annotated[int | None, typer.Option(min=0, help="Limit of steps.")] = None,
    unbalanced: Annotated[
        float | None, typer.Option(help="Strength of a penalty on the marginals in place of hard ones.")
    ] = None,
    method: Annotated[Method, typer.Option(help="How it is solved.")] = Method.auto,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: all cores.")] = None,
    dtype: Annotated[Precision, typer.Option(help="Precision of points and costs.")] = Precision.float64,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample of pixels or points.")] = 0,
    max_points: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Draw a sample of so many points from each file. Default: 2000 pixels for colours, all points; "
            "densities are averaged over squares down to so many, 4096.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Colours: write A in the colours of B. Else write the plan: .npz of SciPy."
        ),
    ] = None,
    map_file: Annotated[
        Path | None, typer.Option("--map", help="Write where the points of A go on average: .npy or .csv.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the displacement: .png, .pdf or .svg.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Share the rows among the processes that torchrun started.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=1.0, help="Seconds to wait for another process.")] = 30.0,
) -> None:
    """Optimal transport of A to B: colours or densities of two images, two point clouds, or a cost matrix.

    Exit codes: 0 solved, 1 not solved, 2 bad input, 130 interrupted (the plan so far is written where -o is given).
    """
    with one_message("transport"):
        ranks = init(timeout) if distributed else None
        if ranks is None:
            warn_of_lone_processes("transport")
        ranks = None if ranks is None or ranks.size == 1 else ranks
    first = ranks is None or ranks.rank == 0  # writes and speaks
    quiet, json_output = quiet or not first, json_output and first
    with one_message("transport", speaks=first):
        with bad_input_of_all(ranks, patient=True):
            if reg is not None and relative_reg is not None:
                raise BadInputError("--reg and --relative-reg: expected one of them, got both")
            if threads is not None:
                torch.set_num_threads(threads)
            cost_name, power = _cost_choice(cost, p, of_points=cost_matrix is None)
            started = time.perf_counter()
            files = Files(source, target, cost_matrix, a, b)
            random, precision = np.random.default_rng(seed), getattr(torch, dtype.value)
            own = (0, 1) if ranks is None else (ranks.rank, ranks.size)
            problem = read_problem(files, mode, max_points, random, precision, own)
            read_seconds = time.perf_counter() - started
            if first:
                _check_outputs(problem, files, output, map_file, plot)

        span = _cost_range(problem, cost_name, power, ranks)
        if reg is None:
            share = _RELATIVE[problem.kind] if relative_reg is None else relative_reg
            reg = share * span or share  # all costs equal: nothing to compare with
        options: dict[str, Any] = {"reg": reg, "method": method.value, "tol": tol, "max_iter": max_iter}
        if unbalanced is not None:
            options["unbalanced"] = unbalanced
        result = _solve(problem, cost_name, power, options, ranks, show_progress=not quiet)
        with bad_input_of_all(ranks):
            plan = _plan_of(result, None if output is not None and problem.kind != "colour" else SUMMARY_ENTRIES)
            wanted = map_file is not None and problem.kind != "colour" and result.status not in _WITHOUT_PLAN
            images = _map(problem, result, everywhere=True) if wanted else None
        if ranks is not None:
            plan = gather_plan(ranks, plan, problem.full_shape)
            images = None if images is None else gather(images, ranks, dim=0, target=0)
            problem = problem if plot is None else gather_problem(ranks, problem)
            _ = result.value_linear  # a sum over all of them, kept with the result
        with bad_input_of_all(ranks, patient=True):
            if first:
                _write(problem, result, plan, images, output, map_file, plot)
        if first:
            outcome = {
                **files.names(),
                **describe(problem, result, plan, cost_name, power, span, balanced=unbalanced is None),
                "processes": 1 if ranks is None else ranks.size,
                "dtype": dtype.value,
                "seconds_read": read_seconds,
                "output": None if output is None else str(output),
                "map": None if map_file is None else str(map_file),
                "plot": None if plot is None else str(plot),
            }
    if json_output:
        print(json.dumps(outcome, indent=2))
    elif not quiet:
        print_outcome(outcome)
    if result.status is TransportStatus.INTERRUPTED:
        raise typer.Exit(INTERRUPTED)
    if not result.converged:
        if not json_output and first:
            print(f"kantor transport: not solved. {advice(result)}", file=sys.stderr)
        raise typer.Exit(NOT_SOLVED)


# --- what is asked for -----------------------------------------------------------------------------------------------


def _cost_choice(cost: CostName | None, p: float | None, *, of_points: bool) -> tuple[str, float]:
    """Name and exponent of the cost of points."""
    if not of_points and not (cost is None and p is None):
        raise BadInputError("--cost and --p: are for points; the costs of --cost-matrix are given")
    if p is not None and cost not in (None, CostName.lp):
        raise BadInputError(f"--p: is the exponent of --cost lp, got --cost {cost.value}; leave one of them out")
    if cost is None:
        cost = CostName.sqeuclidean if p is None else CostName.lp
    if cost is CostName.lp and p is None:
        raise BadInputError("--cost lp: expected its exponent in --p")
    return cost.value, 2.0 if p is None else p


def _check_outputs(
    problem: Problem, files: Files, output: Path | None, map_file: Path | None, plot: Path | None
) -> None:
    """Find out before a long solve what cannot be written."""
    others = files.inputs()
    if output is not None:
        colour, suffix = problem.kind == "colour", output.suffix.lower()
        if suffix in (PLAN_SUFFIXES if colour else IMAGE_SUFFIXES):
            raise BadInputError(
                f"{output}: -o is the recoloured picture here, {', '.join(IMAGE_SUFFIXES)}; --mode density gives a plan"
                if colour
                else f"{output}: -o is the plan here, .npz; for a picture of the moves pass --plot {output}"
                + ("" if problem.kind != "density" else ", to change the colours of A --mode colour")
            )
        check_output(output, IMAGE_SUFFIXES if colour else PLAN_SUFFIXES, others)
        others.append(output)
    if map_file is not None:
        if problem.kind == "matrix":
            raise BadInputError("--map: needs points; a cost matrix has none")
        check_output(map_file, MAP_SUFFIXES[:1] if problem.kind == "colour" else MAP_SUFFIXES, others)
        others.append(map_file)
    if plot is not None:
        check_output(plot, PLOT_SUFFIXES, others)
        if problem.kind == "points" and problem.X is not None and problem.X.shape[1] not in (2, 3):
            raise BadInputError(f"--plot: draws points in 2 or 3 dimensions, A and B have {problem.X.shape[1]}")
        new_axes()  # a missing matplotlib shows now, not after the solve


# --- the solve --------------------------------------------------------------------------------------------------------


def _cost_range(problem: Problem, cost: str, power: float, ranks: Ranks | None) -> float:
    if problem.C is not None:
        low, high, _ = Cost.dense(problem.C).extent(ranks)
    else:
        assert problem.X is not None
        assert problem.Y is not None
        low, high, _ = Cost.points(problem.X, problem.Y, cost, power).extent(ranks)
    return high - low if high > low else 0.0


def _solve(
    problem: Problem,
    cost: str,
    power: float,
    options: dict[str, Any],
    ranks: Ranks | None,
    *,
    show_progress: bool,
) -> TransportResult:
    options = options | {"a": problem.a, "b": problem.b, "grad": "none", "interrupt": "return", "ranks": ranks}
    with progress("transport", enabled=show_progress) as update, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the outcome is printed below, with what to try
        first: TransportInfo | None = None

        def show(info: TransportInfo) -> None:
            nonlocal first
            began = first = first or info
            assert update is not None
            update(lambda: (_share(began, info, options["reg"], options["tol"]), _words(info)))

        options["callback"] = None if update is None else show
        try:
            result: TransportResult
            if problem.C is not None:
                result = solve(problem.C, **options)
            else:
                assert problem.X is not None
                assert problem.Y is not None
                result = solve_sample(problem.X, problem.Y, cost=cost, p=power, **options)
        except RankError:
            raise
        except (ValueError, KantorError) as error:
            text = str(error).removeprefix("solve_sample: ").removeprefix("solve: ")
            raise BadInputError(text.replace("unbalanced=rho", "--unbalanced RHO")) from error
    return result


def _share(first: TransportInfo, info: TransportInfo, reg: float, tol: float) -> float:
    """How much is done: the way down to the last regularisation, and there the digits of the marginal error."""
    if first.reg <= reg * (1 + 1e-9):
        return log_fraction(first.marginal_error, info.marginal_error, tol)
    if info.reg > reg * (1 + 1e-9):
        return 0.7 * log_fraction(first.reg, info.reg, reg if reg > 0 else 1e-5 * first.reg)
    return 0.7 + 0.3 * log_fraction(1.0, info.marginal_error, tol)


def _words(info: TransportInfo) -> str:
    return f"step {info.iteration:,}, reg {info.reg:.1e}, marginal error {info.marginal_error:.1e}"


def _plan_of(result: TransportResult, limit: int | None) -> Tensor | None:
    """The plan, or None where the solver has none or where it is only wanted for a summary and has too many entries."""
    if result.status in _WITHOUT_PLAN:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's sparse matrices are in beta
        try:
            return result.plan_sparse(limit=limit)
        except ValueError as error:
            if limit is None:
                raise BadInputError(f"-o: {str(error).removeprefix('plan_sparse: ')}") from error
            return None


# --- what comes out ---------------------------------------------------------------------------------------------------


def _write(
    problem: Problem, result: TransportResult, plan: Tensor | None, images: Tensor | None, output: Path | None,
    map_file: Path | None, plot: Path | None,
) -> None:  # fmt: skip
    if plan is None and result.status in _WITHOUT_PLAN:
        return  # there is no plan to write; the status says why
    if problem.kind == "colour":
        assert problem.picture is not None
        assert problem.Y is not None
        if output is not None or map_file is not None:
            mapped = recolour(problem.picture, result, problem.Y)
            if output is not None:
                write_image(output, mapped)
            if map_file is not None:
                write_map(map_file, mapped)
    else:
        if output is not None:
            assert plan is not None
            write_plan(output, _in_files(problem, plan))
        if map_file is not None:
            assert images is not None
            write_map(map_file, images.numpy())
    if plot is not None:
        _draw(problem, result, plan, plot)


def _in_files(problem: Problem, plan: Tensor) -> Tensor:
    """The plan with the rows and columns of the files; those that were not drawn are empty."""
    if problem.rows is None and problem.columns is None:
        return plan
    n, m = problem.full_shape
    rows = torch.arange(n) if problem.rows is None else problem.rows
    columns = torch.arange(m) if problem.columns is None else problem.columns
    counts = torch.zeros(n, dtype=torch.int64).index_copy(0, rows, plan.crow_indices().diff())
    crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.sparse_csr_tensor(crow, columns[plan.col_indices()], plan.values(), (n, m))


def _map(problem: Problem, result: TransportResult, *, everywhere: bool) -> Tensor:
    """Barycentric images of the points of the problem, or of all points of the file."""
    assert problem.Y is not None
    if everywhere and problem.rows is not None:
        assert problem.points is not None
        return extend_map(result, problem.points, problem.Y).to(problem.Y.dtype)
    return result.barycentric_map(problem.Y)


def _draw(problem: Problem, result: TransportResult, plan: Tensor | None, path: Path) -> None:
    if problem.kind == "matrix":
        save_figure(result.plot(), path)
        return
    assert problem.X is not None
    assert problem.Y is not None
    if problem.kind == "density":
        assert problem.picture is not None
        images = _map(problem, result, everywhere=False)
        save_figure(plot_displacement_field(problem.picture, problem.X.numpy(), images.numpy()), path)
        return
    if plan is None:
        raise BadInputError(f"--plot: the plan has more than {SUMMARY_ENTRIES:,} entries; use --max-points")
    save_figure(plot_displacement(problem.X, problem.Y, plan), path)
