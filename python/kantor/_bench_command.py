"""The command ``kantor bench``: measure, keep, tabulate, draw, compare."""

from __future__ import annotations

import contextlib
import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kantor._command_line import INTERRUPTED, NOT_SOLVED, one_message, progress
from kantor._solve_files import BadInputError
from kantor.bench import CASES, compare, machine, results, roofline, runner
from kantor.bench.case import OWN
from kantor.bench.harness import WorkerError
from kantor.bench.tables import Table

LIMITS = {"small": 5.0, "full": 30.0}  # seconds of a run


class Size(StrEnum):
    """Choices of ``--size``."""

    small = "small"
    full = "full"


class Device(StrEnum):
    """Choices of ``--device``."""

    cpu = "cpu"
    cuda = "cuda"


def bench(
    second: Annotated[
        Path | None, typer.Argument(metavar="NEW", help="With --compare: another run, in place of measuring.")
    ] = None,
    size: Annotated[
        Size, typer.Option(help="small: one or two minutes. full: sizes that matter, many minutes.")
    ] = Size.small,
    only: Annotated[
        list[str] | None, typer.Option(help=f"Cases: {', '.join(CASES)}; may be repeated, or joined by commas.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where everything runs.")] = Device.cpu,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: all cores.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repetitions, of which the median counts.")] = 5,
    limit: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds that one run may take. Default: 5, with --size full 30.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.json, bench.txt and bench.png.")] = Path("kantor-bench"),
    old: Annotated[
        Path | None, typer.Option("--compare", metavar="OLD", help="The bench.json of an earlier run, to compare with.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure this machine, and Kantor on it beside whichever other libraries are installed.

    Exit codes: 0 measured, 1 Kantor missed an accuracy or became slower, 2 bad input, 130 interrupted.
    """
    tables: list[Table] = []
    worse = False
    with one_message("bench"):
        earlier = _read(old) if old is not None else None
        if second is not None:
            if earlier is None:
                raise BadInputError(f"{second}: expected --compare OLD before it; cases are chosen with --only")
            data = _read(second)
        else:
            data = _measure(
                runner.Options(
                    cases=_cases(only),
                    size=size.value,
                    device=device.value,
                    threads=threads or machine.cpus(),
                    repeats=repeats,
                    limit=limit or LIMITS[size.value],
                ),
                out,
                show_progress=not quiet,
            )
            tables += results.make_tables(data)
        if earlier is not None:
            found = list(compare.changes(earlier, data))
            if not found:
                raise BadInputError(f"{old}: expected a run with problems in common, got none")
            worse = any(change.regression for change in found)
            tables.append(compare.make_table(earlier, data, found))
    if json_output:
        print(json.dumps(data, indent=1))
    elif not quiet:
        for table in tables:
            table.print()
            print()
    if data["interrupted"] and second is None:
        raise typer.Exit(INTERRUPTED)
    missed = [entry for entry in data["results"] if entry["library"] == OWN and entry["status"] != "met"]
    if worse or (missed and second is None):
        raise typer.Exit(NOT_SOLVED)


def _cases(only: list[str] | None) -> tuple[str, ...]:
    """The chosen cases, in the order of the tour."""
    wanted = [name.strip() for words in only or [] for name in words.split(",") if name.strip()]
    if unknown := sorted(set(wanted) - set(CASES)):
        raise BadInputError(f"--only {unknown[0]}: no such case; there are {', '.join(CASES)}")
    return tuple(name for name in CASES if not wanted or name in wanted)


def _read(path: Path) -> dict[str, Any]:
    try:
        return results.read(path)
    except ValueError as error:
        raise BadInputError(str(error)) from error
    except FileNotFoundError as error:
        raise BadInputError(f"{path}: no such file") from error


def _measure(options: runner.Options, out: Path, *, show_progress: bool) -> dict[str, Any]:
    if not roofline.device_is_there(options.device):
        raise BadInputError("--device cuda: torch sees no CUDA device; see `kantor info`")
    try:
        found = results.Results(out / "bench.json", options)
    except OSError as error:
        raise BadInputError(f"--out {out}: cannot be written: {error.strerror or error}") from error

    def say(text: str) -> None:
        print(f"kantor bench: {text}", file=sys.stderr)

    with progress("bench", enabled=show_progress) as update:

        def tell(share: float, text: str) -> None:
            if update is not None:
                update(lambda: (share, text))

        try:
            runner.run(options, found, tell, say)
        except WorkerError as error:
            raise BadInputError(f"the limits of the machine cannot be measured: {error}") from error
    (out / "bench.txt").write_text("\n\n".join(table.text() for table in results.make_tables(found.data)) + "\n")
    with contextlib.suppress(ImportError):
        results.picture(found.data, out / "bench.png")
    return found.data
