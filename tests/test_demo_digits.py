"""The station of the demo that reads digits from a few labels: its methods, its figures, its pictures."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from kantor.demo import STATIONS, digits
from kantor.demo.page import Gallery


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[digits.StationReport, Path]:
    folder = tmp_path_factory.mktemp("demo")
    return digits.run(folder, "small"), folder


def test_station_is_registered() -> None:
    assert [station.run for station in STATIONS if station.name == "digits"] == [digits.run]


def test_checks_pass_and_pictures_are_written(report: tuple[digits.StationReport, Path]) -> None:
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
    assert len(pictures) == 4
    named = {picture.path for picture in pictures} | {picture.dark for picture in pictures if picture.dark}
    assert {f"digits/{path.name}" for path in (folder / "digits").iterdir()} == named
    assert all(picture.alt and picture.caption for picture in pictures)


def test_table_has_every_method_and_number_of_labels(report: tuple[digits.StationReport, Path]) -> None:
    station, _ = report
    assert [row[0] for row in station.table.rows] == list(digits.METHODS)
    assert station.table.header[1:-1] == ("1 label", "2 labels", "5 labels")
    for row in station.table.rows:
        assert len(row) == len(station.table.header)
        accuracies = [float(cell) for cell in row[1:-1]]
        assert 40 < min(accuracies) <= max(accuracies) <= 100


def test_labels_are_drawn_per_class_and_repeat_with_the_seed() -> None:
    classes = torch.arange(10).repeat(8)
    seen = digits.draw_labels(classes, 3, 1)
    assert torch.equal(torch.bincount(classes[seen]), torch.full((10,), 3))
    assert len(seen.unique()) == 30
    assert torch.equal(seen, digits.draw_labels(classes, 3, 1))
    assert not torch.equal(seen, digits.draw_labels(classes, 3, 2))


def test_accuracy_leaves_the_labelled_out() -> None:
    data = digits.load(200)
    seen = digits.draw_labels(data.classes, 1, 0)
    for method in digits.METHODS[:3]:
        fit = digits.fit(data, method, seen, epochs=60)
        assert (fit.predicted[seen] == data.classes[seen]).all()  # learned by heart
        wrong = int((fit.predicted != data.classes).sum())
        assert fit.accuracy == pytest.approx(1 - wrong / 190)


def test_separation_grows_as_classes_shrink() -> None:
    classes = torch.arange(10).repeat_interleave(20)
    spread = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    centres = torch.stack([classes.cos(), classes.sin()], 1)
    assert digits.separation(centres + 0.1 * spread, classes) > 50 * digits.separation(centres + spread, classes)


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match="kantor\\[demo\\]"):
        digits.load()
