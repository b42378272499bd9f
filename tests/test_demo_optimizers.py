"""The station of the demo that trains networks with and without curvature."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from kantor.demo import STATIONS, optimizers
from kantor.demo.page import Gallery


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[optimizers.StationReport, Path]:
    folder = tmp_path_factory.mktemp("demo")
    return optimizers.run(folder, "small"), folder


def test_station_is_registered() -> None:
    assert [station.run for station in STATIONS if station.name == "optimizers"] == [optimizers.run]


def test_checks_pass_and_pictures_are_written(report: tuple[optimizers.StationReport, Path]) -> None:
    station, folder = report
    assert station.passed, station.checks
    assert len(station.checks) == 4
    blocks = [block for section in station.sections for block in section.blocks]
    pictures = [picture for block in blocks if isinstance(block, Gallery) for picture in block.pictures]
    assert len(pictures) == 2
    named = {picture.path for picture in pictures} | {picture.dark for picture in pictures if picture.dark}
    assert {f"optimizers/{path.name}" for path in (folder / "optimizers").iterdir()} == named
    assert all(picture.alt and picture.caption for picture in pictures)


def test_table_has_a_row_for_every_optimiser(report: tuple[optimizers.StationReport, Path]) -> None:
    station, _ = report
    assert [row[0] for row in station.table.rows] == list(optimizers.METHODS)
    assert {"SGD", "Adam", "AdaHessian"} <= set(optimizers.METHODS)
    for row in station.table.rows:
        assert len(row) == len(station.table.header)
        assert all(float(cell) >= 0 for cell in row[1:])


def test_training_repeats() -> None:
    task = optimizers.text_task(3)
    first, second = (optimizers.train(task, optimizers.METHODS["AdaHessian"]) for _ in range(2))
    assert first.losses == second.losses


def test_the_next_byte_is_not_seen() -> None:
    torch.manual_seed(0)
    net = optimizers.NextByte()
    text = torch.randint(128, (1, 20))
    changed = text.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 128
    before, after = net(text), net(changed)
    assert torch.equal(before[..., :12], after[..., :12])
    assert not torch.equal(before[..., 12:], after[..., 12:])


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="kantor\\[demo\\]"):
        optimizers.digits_task(1)
