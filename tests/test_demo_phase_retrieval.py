"""The station of the demo that finds a picture from intensities."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kantor.demo import phase_retrieval


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[phase_retrieval.StationReport, Path]:
    folder = tmp_path_factory.mktemp("demo")
    return phase_retrieval.run(folder, "small"), folder


def test_picture_is_found_and_the_maximum_left(report: tuple[phase_retrieval.StationReport, Path]) -> None:
    station, folder = report
    assert station.passed, station.checks
    assert {path.name for path in (folder / "phase_retrieval").iterdir()} == {
        "truth.png", "intensities.png", "found.png", "curves-light.png", "curves-dark.png",
    }  # fmt: skip


def test_table_names_every_method_and_who_leaves(report: tuple[phase_retrieval.StationReport, Path]) -> None:
    station, _ = report
    assert [row[0] for row in station.table.rows] == [name for name, _ in phase_retrieval.METHODS]
    saddle = station.sections[1].blocks[0]
    assert [row[-1] for row in saddle.rows] == ["yes", "no", "no", "no"]


def test_intensities_do_not_know_the_sign() -> None:
    photograph = torch.rand(40, 60, 3, generator=torch.Generator().manual_seed(0)).double().numpy()
    m = phase_retrieval.measure(photograph, 8, torch.Generator().manual_seed(1))
    x = m.picture.reshape(-1)
    assert m.fun(x).item() < 1e-25
    assert m.fun(-x).item() < 1e-25
    assert m.error(-x) == 0
    assert m.error(torch.zeros_like(x)) == 1
