"""The station of the demo that moves colours, and its race."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kantor.demo import STATIONS, colour_transfer
from kantor.demo.page import Gallery


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[colour_transfer.StationReport, Path]:
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(colour_transfer, "_others", lambda: [("scaled", _scaled)])
        return colour_transfer.run(folder, "small"), folder


def _scaled(C, weights, iterations):
    """Sinkhorn's iteration in two lines, in place of the programs that may be installed."""
    K, u = np.exp(-C / colour_transfer.RACE), np.ones(len(C))
    for _ in range(iterations):
        v = weights / (K.T @ u)
        u = weights / (K @ v)
    return u[:, None] * K * v


def test_station_is_registered():
    assert [station.run for station in STATIONS if station.name == "colour_transfer"] == [colour_transfer.run]


def test_checks_pass_and_pictures_are_written(report: tuple[colour_transfer.StationReport, Path]) -> None:
    station, folder = report
    assert station.passed, station.checks
    assert len(station.checks) == 4
    pictures = [
        picture
        for section in station.sections
        for block in section.blocks
        if isinstance(block, Gallery)
        for picture in block.pictures
    ]
    named = {picture.path for picture in pictures} | {picture.dark for picture in pictures if picture.dark}
    assert {f"colour_transfer/{path.name}" for path in (folder / "colour_transfer").iterdir()} == named
    assert all(picture.alt and picture.caption for picture in pictures)


def test_table_names_every_program(report: tuple[colour_transfer.StationReport, Path]) -> None:
    station, _ = report
    names = [row[0] for row in station.table.rows]
    assert names == [*(name for name, _ in colour_transfer.METHODS), "scaled"]
    assert all(len(row) == len(station.table.header) for row in station.table.rows)
    assert [row[1] for row in station.table.rows[:3]] == ["converged"] * 3


def test_others_are_those_installed(monkeypatch):
    monkeypatch.setattr(colour_transfer, "find_spec", lambda name: None)
    assert colour_transfer._others() == []
    monkeypatch.setattr(colour_transfer, "find_spec", lambda name: sys)
    assert [name for name, _ in colour_transfer._others()] == ["POT sinkhorn", "regot sinkhorn_ssns"]


@pytest.mark.parametrize(("module", "solver"), [("ot", "_pot"), ("regot", "_regot")])
def test_other_programs_return_plans(module, solver):
    pytest.importorskip(module)
    C = torch.rand(60, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plan = getattr(colour_transfer, solver)(0.01 * C.numpy(), np.full(60, 1 / 60), 1000)
    np.testing.assert_allclose(plan.sum(1), 1 / 60, rtol=1e-4)


def test_a_program_is_stopped_when_it_takes_long_or_is_done():
    C = torch.rand(60, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    calls = []

    def product(C, weights, iterations):
        calls.append(iterations)
        return weights[:, None] * weights

    run = colour_transfer._other("product", product, C, patience=1e9)
    assert run.row[:3] == ("product", "converged", "up to 10")
    assert set(calls) == {10}

    def wrong(C, weights, iterations):
        return np.full_like(C, np.nan)

    assert colour_transfer._other("wrong", wrong, C, patience=1e9).row[1] == "stopped"
    slow = colour_transfer._other("slow", lambda C, w, k: np.ones_like(C), C, patience=0.0)
    assert len(slow.errors) == 1
