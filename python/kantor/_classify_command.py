"""The command ``kantor classify``: a table and a few labels in, a label and a confidence for every row out."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
import time
import warnings
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from kantor import KantorError, StabilityError
from kantor._classify_files import Problem, read_problem
from kantor._command_line import NOT_SOLVED, PLOT_SUFFIXES, one_message, print_rows
from kantor._solve_files import BadInputError, check_output, whole_file
from kantor.graph import ClassifyResult
from kantor.graph import classify as classify_rows
from kantor.plotting import new_axes, save_figure

_LISTED = 20  # classes in the table
_LIKELY_UNKNOWN = {"?", "-", "unknown", "unlabelled", "unlabeled", "none", "null", "nan", "na", "n/a"}


class Method(StrEnum):
    """Choices of ``--method``."""

    diffusion = "diffusion"
    coin = "coin"
    label_spreading = "label_spreading"
    no_diffusion = "no_diffusion"


def classify(
    features: Annotated[Path, typer.Argument(metavar="FEATURES", help="Table of numbers: .csv, .npy or .parquet.")],
    labels: Annotated[
        str,
        typer.Option(
            metavar="COLUMN|FILE", help="Column of FEATURES, or a file: .csv, .txt, .npy, .parquet. Empty: unknown."
        ),
    ],
    method: Annotated[
        Method,
        typer.Option(help="What diffuses: features of a network, its probabilities (coin), the labels, or nothing."),
    ] = Method.diffusion,
    k: Annotated[
        int | None, typer.Option("--k", min=1, help="Nearest rows that each is joined with. Default: 10.")
    ] = None,
    step: Annotated[
        float | None, typer.Option(help="Length of a diffusion step. Default: 0.7 of the largest stable one.")
    ] = None,
    num_steps: Annotated[int | None, typer.Option(min=0, help="Number of diffusion steps. Default: about 20.")] = None,
    id_column: Annotated[
        str | None, typer.Option("--id", metavar="COLUMN", help="Column that tells rows apart, and is no feature.")
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Column to leave out; may be repeated.")
    ] = None,
    unknown: Annotated[str, typer.Option(help="How an unknown label is written, besides an empty cell.")] = "-1",
    folds: Annotated[int, typer.Option(min=0, help="Folds of the cross-validation; 0: none.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the network and of the folds.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: all cores.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write label and confidence of every row: .csv.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the graph in the plane: .png, .pdf or .svg.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")] = False,
) -> None:
    """Classify the rows of a table from the labels of a few, by diffusion on a graph of nearest neighbours.

    Exit codes: 0 done, 1 the training broke down, 2 bad input, 130 interrupted.
    """
    with one_message("classify"):
        if folds == 1:
            raise BadInputError("--folds: expected 2 or more, or 0 for no cross-validation, got 1")
        inputs = [features, Path(labels)]
        if output is not None:
            check_output(output, (".csv",), inputs)
        if plot is not None:
            check_output(plot, PLOT_SUFFIXES, [*inputs, output])
            new_axes()  # a missing matplotlib shows now, not after the training
        if threads is not None:
            torch.set_num_threads(threads)
        started = time.perf_counter()
        problem = read_problem(features, labels, id_column, drop or (), unknown)
        _check_labels(labels, problem.labels, unknown)
        read_seconds = time.perf_counter() - started
        options = {"method": method.value, "k": k, "step": step, "num_steps": num_steps, "seed": seed}
        show_progress = not quiet and sys.stderr.isatty()
        result = _classify(problem, options, show_progress)
        accuracy = _cross_validate(result, folds, show_progress)
        if output is not None:
            _write_predictions(output, problem, result)
        if plot is not None:
            save_figure(result.plot(), plot)
        outcome = {
            "features": str(features),
            "labels": labels,
            **_outcome(problem, result),
            "k": k,
            "accuracy": accuracy,
            "notes": _notes(problem, result),
            "seconds_read": read_seconds,
            "output": None if output is None else str(output),
            "plot": None if plot is None else str(plot),
        }
    if json_output:
        print(json.dumps(outcome, indent=2))
    elif not quiet:
        _print_outcome(outcome)
    if not result.converged:
        if not json_output:
            print(f"kantor classify: {result.message}", file=sys.stderr)
        raise typer.Exit(NOT_SOLVED)


# --- the work ---------------------------------------------------------------------------------------------------------


def _check_labels(name: str, labels: list[str | None], unknown: str) -> None:
    given = [label for label in labels if label is not None]
    if len(set(given)) < 2:
        found = f"{len(given):,} times {given[0]} and nothing else" if given else "no label at all"
        raise BadInputError(
            f"--labels {name}: expected rows of at least two classes, found {found}; an empty cell and {unknown!r} "
            "mean that a label is unknown (--unknown)"
        )


def _classify(problem: Problem, options: dict[str, Any], show_progress: bool) -> ClassifyResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the outcome is printed below, with what to try
        try:
            return classify_rows(problem.features, problem.labels, progress=show_progress, **options)
        except (ValueError, KantorError) as error:
            raise BadInputError(_in_words_of_the_command(error)) from error


def _option(argument: re.Match[str]) -> str:
    return "" if argument[1] == "x" else f"--{argument[1].replace('_', '-')}: "


def _in_words_of_the_command(error: Exception) -> str:
    """Name options where the message names functions and arguments."""
    text = re.sub(r"^\w+: (\w+): ", _option, str(error))
    if isinstance(error, StabilityError):
        return text.split("; take")[0] + "; take a smaller --step and a larger --num-steps"
    return text


def _in_words_of_the_table(message: str) -> str:
    return message.replace(
        "cross_validate() tells how well they can be", "the cross-validation tells how well rows can be"
    )


def _cross_validate(result: ClassifyResult, folds: int, show_progress: bool) -> dict[str, Any] | None:
    """Accuracy over the given labels; a note where it cannot be estimated."""
    if folds == 0:
        return None
    label, count = min(Counter(result.labels[result.given].tolist()).items(), key=lambda item: item[1])
    if count < 2:
        return {"value": None, "note": f"not estimated: {label} has one label; a second would tell"}
    found = result.cross_validate(folds, progress=show_progress)
    return {"value": found.accuracy, "standard_error": found.standard_error, "folds": len(found.fold_accuracies)}


# --- what comes out ---------------------------------------------------------------------------------------------------


def _write_predictions(path: Path, problem: Problem, result: ClassifyResult) -> None:
    """A row each: id, label (the given one, or the most probable), its probability, and whether it was given."""
    import pandas

    column = {name: number for number, name in enumerate(result.classes)}
    confidence = [shares[column[name]] for shares, name in zip(result.probabilities, result.labels, strict=True)]
    ids = {problem.id_name: problem.ids}
    table = pandas.DataFrame({**ids, "label": result.labels, "confidence": confidence, "given": result.given})
    with whole_file(path) as file:
        table.to_csv(file, index=False, float_format="%.4f")


def _outcome(problem: Problem, result: ClassifyResult) -> dict[str, Any]:
    """Return what the table and the JSON output tell about a classification."""
    rows, columns = problem.features.shape
    given, predicted = (Counter(result.labels[mask].tolist()) for mask in (result.given, ~result.given))
    return {
        "rows": rows,
        "columns": columns,
        "labelled": given.total(),
        "classes": [
            {"class": name, "given": given[name], "predicted": predicted[name]}
            for name in sorted(result.classes, key=_natural_order)
        ],
        "method": result.method,
        "step": result.step,
        "num_steps": result.num_steps,
        "edges": result.graph.num_edges,
        "components": result.graph.components()[0],
        "threads": torch.get_num_threads(),
        "converged": result.converged,
        "message": _in_words_of_the_table(result.message),
        "seconds": result.seconds,
    }


def _notes(problem: Problem, result: ClassifyResult) -> list[str]:
    """What may have been read in another way than it was meant."""
    notes = [
        f"{name!r} counts as a class; if it means that a label is unknown, pass --unknown {shlex.quote(name)}"
        for name in result.classes
        if name.strip().lower() in _LIKELY_UNKNOWN
    ]
    if problem.nameless:
        notes.append(
            f"the column without a name, {problem.nameless!r} here, counts as a feature; if it numbers the rows, pass "
            f"--id {shlex.quote(problem.nameless)}"
        )
    return notes


def _natural_order(name: str) -> tuple[float, str]:
    """2 before 10, numbers before words."""
    try:
        return float(name), name
    except ValueError:
        return math.inf, name


def _print_outcome(outcome: dict[str, Any]) -> None:
    steps = f", {outcome['num_steps']} steps of {outcome['step']:.3g}" if outcome["num_steps"] else ""
    parts = outcome["components"]
    accuracy = outcome["accuracy"]
    rows: dict[str, Any] = {
        "features": f"{outcome['features']}, {outcome['rows']:,} rows of {outcome['columns']:,} columns",
        "labels": f"{outcome['labels']}, {outcome['labelled']:,} of {outcome['rows']:,} rows",
        "method": outcome["method"].replace("_", " ") + steps,
        "graph": f"{outcome['edges']:,} entries, in {parts:,} part{'s' * (parts > 1)}",
    }
    if accuracy is not None and accuracy["value"] is None:
        rows["accuracy"] = accuracy["note"]
    elif accuracy is not None:
        share, error = 100 * accuracy["value"], 100 * accuracy["standard_error"]
        rows["accuracy"] = (
            f"{share:.1f} % +- {error:.1f}, {accuracy['folds']}-fold cross-validation of the given labels"
        )
    rows["class"] = "given + predicted"
    for count in outcome["classes"][:_LISTED]:
        rows[f"  {count['class']}"] = f"{count['given']:,} + {count['predicted']:,}"
    if len(outcome["classes"]) > _LISTED:
        rows["  ..."] = f"{len(outcome['classes']) - _LISTED:,} more"
    if outcome["notes"]:
        rows["note"] = "; ".join(outcome["notes"])
    rows |= {
        "outcome": outcome["message"],
        "seconds": f"{outcome['seconds']:.3f} (reading {outcome['seconds_read']:.3f})",
    }
    print_rows(rows | {name: outcome[name] for name in ("output", "plot") if outcome[name] is not None})
