"""The station of the demo that lets smoke rise: its flow, its programs, its pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kantor.datasets.poisson_scenes import AIR, FLUID, SOLID
from kantor.demo import STATIONS, smoke
from kantor.demo.page import Gallery
from kantor.demo.smoke_flow import Flow, _interpolated
from kantor.linalg import PoissonGrid, cg


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[smoke.StationReport, Path]:
    folder = tmp_path_factory.mktemp("demo")
    return smoke.run(folder, "small"), folder


def test_station_is_registered() -> None:
    assert [station.run for station in STATIONS if station.name == "smoke"] == [smoke.run]


def test_checks_pass_and_pictures_are_written(report: tuple[smoke.StationReport, Path]) -> None:
    station, folder = report
    assert station.passed, station.checks
    assert len(station.checks) == 3
    pictures = [
        picture
        for section in station.sections
        for block in section.blocks
        if isinstance(block, Gallery)
        for picture in block.pictures
    ]
    named = {picture.path for picture in pictures} | {picture.dark for picture in pictures if picture.dark}
    assert {f"smoke/{path.name}" for path in (folder / "smoke").iterdir()} == named
    assert all(picture.alt and picture.caption for picture in pictures)


def test_animation_plays_once_and_ends_within_five_seconds(report: tuple[smoke.StationReport, Path]) -> None:
    _, folder = report
    with Image.open(folder / "smoke" / "moving.webp") as image:
        assert image.n_frames == 18
        assert image.info["loop"] == 1
        seconds = 0.0
        first = np.asarray(image.convert("L"), dtype=float)
        for frame in range(image.n_frames):
            image.seek(frame)
            image.load()
            seconds += image.info["duration"] / 1000
        assert 4 < seconds <= 5
        assert np.abs(np.asarray(image.convert("L")) - first).max() > 50


def test_table_names_every_program(report: tuple[smoke.StationReport, Path]) -> None:
    station, _ = report
    names = [row[0] for row in station.table.rows]
    assert names == [*(name for name, _ in smoke.KANTOR), *(name for name, _ in smoke._others())]
    assert all(len(row) == len(station.table.header) for row in station.table.rows)
    iterations = [float(row[1]) for row in station.table.rows]
    assert iterations[0] < iterations[1] < iterations[2]


def test_works_without_pyamg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "find_spec", lambda _: None)
    film = smoke.make_film((24, 20), 3, 1)
    assert list(film.runs) == [name for name, _ in smoke.KANTOR]
    assert [len(runs) for runs in film.runs.values()] == [1, 1, 1]
    assert len(film.frames) == len(film.iterations) == 3


@pytest.mark.parametrize("shape", [(24, 20), (21, 33)])
def test_projection_leaves_no_divergence_and_the_walls_alone(shape: tuple[int, int]) -> None:
    flow = Flow(shape, 10)
    for _ in range(10):
        b = flow.move()
        A = PoissonGrid(flow.flags)
        closed_v, closed_u = flow._closed()
        before = flow.v[closed_v].clone(), flow.u[closed_u].clone()
        flow.project(cg(A, b, rtol=1e-12).x)
        assert flow.divergence().abs().max() <= 1e-10 * b.abs().max()
        assert torch.equal(flow.v[closed_v], before[0])
        assert torch.equal(flow.u[closed_u], before[1])
        assert not flow.v[0].any()
        assert not flow.u[:, [0, -1]].any()
        assert not flow.smoke[flow.flags == SOLID].any()
        assert 0 <= flow.smoke.min() <= flow.smoke.max() <= 1


def test_ball_of_the_pictures_is_the_ball_of_the_grid() -> None:
    flow = Flow((40, 32), 7)
    for _ in range(7):
        flow.move()
        y, x = (torch.arange(n) + 0.5 for n in flow.shape)
        distance = torch.hypot(y[:, None] - flow.centre[0], x - flow.centre[1])
        assert torch.equal(flow.flags == SOLID, distance < smoke.RADIUS * 32)
        assert set(flow.flags.unique().tolist()) == {SOLID, FLUID, AIR}


def test_interpolation_is_exact_for_bilinear_fields_and_constant_outside() -> None:
    y, x = torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij")
    field = 1 + 2 * y - x + 0.5 * x * y
    at_y, at_x = torch.tensor([0.3, 3.9, 4.0, 1.0]), torch.tensor([5.5, 0.2, 6.0, 2.0])
    torch.testing.assert_close(_interpolated(field, at_y, at_x), 1 + 2 * at_y - at_x + 0.5 * at_x * at_y)
    assert _interpolated(field, torch.tensor([-3.0]), torch.tensor([9.0])) == field[0, 6]


def test_still_air_stays_still() -> None:
    flow = Flow((20, 18), 10)
    flow.smoke[4:8, 4:8] = 1.0
    before = flow.smoke.clone()
    carried = flow._carried(
        flow.smoke, *torch.meshgrid(torch.arange(20) + 0.5, torch.arange(18) + 0.5, indexing="ij"), 0.5, 0.5
    )
    torch.testing.assert_close(carried, before)
