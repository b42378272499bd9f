"""The progress bar of iterative solves."""

from __future__ import annotations

import logging
import math
import subprocess
import sys

import pytest
import torch

from kantor import _progress
from kantor._progress import log_fraction, progress_bar
from kantor.linalg import Stencil, cg


@pytest.mark.parametrize(
    ("initial", "residual", "target", "expected"),
    [
        (1.0, 1.0, 1e-8, 0.0),
        (1.0, 1e-4, 1e-8, 0.5),
        (1.0, 1e-8, 1e-8, 1.0),
        (1.0, 1e-12, 1e-8, 1.0),
        (1.0, 10.0, 1e-8, 0.0),  # worse than at the start
        (1.0, 0.5, 0.0, 0.0),  # no tolerance: nothing to be a share of
        (1.0, 0.0, 0.0, 1.0),
        (1.0, math.nan, 1e-8, 0.0),
        (math.inf, 1.0, 1e-8, 0.0),
        (0.0, 0.0, 0.0, 1.0),
    ],
)
def test_log_fraction(initial, residual, target, expected):
    assert log_fraction(initial, residual, target) == pytest.approx(expected)


def run_bar():
    with progress_bar(True, "cg", 1e-8) as update:
        for iteration, residual in enumerate([1.0, 1e-2, 1e-1, 1e-4]):
            update(iteration, residual, 1e-8)


def test_bar_shows_the_share_of_digits_and_never_runs_back(capsys, monkeypatch):
    monkeypatch.setattr(_progress, "_REDRAW_SECONDS", 0.0)
    run_bar()
    shown = capsys.readouterr().err
    assert "cg:" in shown
    assert "iteration 3, residual 1.0e-04, rtol 1e-08" in shown
    shares = [int(part.split("%")[0].split()[-1]) for part in shown.split("\r") if "%" in part]
    assert shares == sorted(shares)
    assert shares[-1] == 50


def test_redraws_are_limited(capsys):
    with progress_bar(True, "cg", 1e-8) as update:
        for iteration in range(1000):
            update(iteration, 1.0, 1e-8)
    assert capsys.readouterr().err.count("\r") < 50


def test_without_tqdm_it_logs(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with caplog.at_level(logging.INFO, logger="kantor"):
        run_bar()
    assert "cg: iteration 3, residual 1.000e-04, target 1.000e-08" in caplog.text


def test_bar_is_closed_when_the_solve_raises(capsys):
    def fail():
        with progress_bar(True, "cg", 1e-8) as update:
            update(0, 1.0, 1e-8)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert capsys.readouterr().err.endswith("\n")


def test_no_update_shows_no_figures(capsys):
    with progress_bar(True, "cg", 1e-8):
        pass
    assert "iteration" not in capsys.readouterr().err


def test_disabled_it_imports_nothing():
    code = (
        "import sys, kantor._progress as p\n"
        "before = set(sys.modules)\n"
        "with p.progress_bar(False, 'cg', 1e-8) as update:\n"
        "    update(1, 1.0, 1e-8)\n"
        "assert set(sys.modules) == before, set(sys.modules) - before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cg_drives_it(capsys):
    A = Stencil((16, 16))
    cg(A, torch.ones(256, dtype=torch.float64), progress=True)
    assert "100%" in capsys.readouterr().err
