"""The demo: its systems, its page, and the whole command at small size."""

from __future__ import annotations

from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from kantor import cli
from kantor.demo import STATIONS
from kantor.demo.page import (
    Check,
    Finding,
    Gallery,
    Picture,
    Section,
    StationReport,
    Table,
    between,
    render_page,
)
from kantor.demo.pictures import place, shrink
from kantor.demo.poisson_system import insert, region_system, right_hand_side, tileable
from kantor.linalg import Stencil, cg

# Systems -----------------------------------------------------------------------------------------------------------


def naive_system(mask, target, source, mixed):
    """Equation 7 of Perez et al. by loops over pixels."""
    height, width = mask.shape
    pixels = [(y, x) for y in range(height) for x in range(width) if mask[y, x]]
    number = {pixel: i for i, pixel in enumerate(pixels)}
    A = np.zeros((len(pixels), len(pixels)))
    b = np.zeros((3, len(pixels)))
    for (y, x), i in number.items():
        for q in ((y - 1, x), (y, x - 1), (y, x + 1), (y + 1, x)):
            if not (0 <= q[0] < height and 0 <= q[1] < width):
                continue
            A[i, i] += 1
            if q in number:
                A[i, number[q]] -= 1
            else:
                b[:, i] += target[q]
            if source is not None:
                v = source[y, x] - source[q]
                own = target[y, x] - target[q]
                b[:, i] += np.where(np.abs(own) > np.abs(v), own, v) if mixed else v
    return A, b


@given(seed=st.integers(0, 2**32 - 1), height=st.integers(1, 6), width=st.integers(2, 6), mixed=st.booleans())
@settings(max_examples=60, deadline=None)
def test_system_matches_equation_7(seed, height, width, mixed):
    rng = np.random.default_rng(seed)
    mask = rng.random((height, width)) < 0.6
    if mask.all() or not mask.any():
        mask.flat[0] = not mask.flat[0]
    target, source = rng.random((2, height, width, 3))
    system = region_system(mask)
    for guide in (None, source):
        A, b = naive_system(mask, target, guide, mixed)
        np.testing.assert_array_equal(system.matrix.to_scipy().toarray(), A)
        np.testing.assert_allclose(right_hand_side(system, target, guide, mixed=mixed).numpy(), b, atol=1e-14)


def test_rows_are_sorted():
    mask = np.random.default_rng(0).random((9, 7)) < 0.7
    matrix = region_system(mask).matrix.to_scipy()
    assert matrix.has_sorted_indices
    assert all((np.diff(matrix.indices[a:b]) > 0).all() for a, b in pairwise(matrix.indptr))


def test_rectangle_inside_is_the_stencil():
    mask = np.zeros((9, 8), dtype=bool)
    mask[1:-1, 2:-1] = True
    A = region_system(mask).matrix.to_scipy().toarray()
    np.testing.assert_array_equal(A, Stencil((7, 5)).to_csr().to_scipy().toarray())


@pytest.mark.parametrize("value", [False, True])
def test_region_without_pixels_or_rim_is_an_error(value):
    with pytest.raises(ValueError, match="region_system: mask must select some but not all"):
        region_system(np.full((3, 4), value))


def test_cloning_a_picture_into_itself_changes_nothing():
    rng = np.random.default_rng(0)
    picture = rng.random((12, 15, 3))
    mask = rng.random((12, 15)) < 0.6
    system = region_system(mask)
    for mixed in (False, True):
        x = cg(system.matrix, right_hand_side(system, picture, picture, mixed=mixed), rtol=1e-12).x
        np.testing.assert_allclose(insert(system, picture, x), picture, atol=1e-9)


def test_membrane_reproduces_a_linear_ramp_and_obeys_the_maximum_principle():
    y, x = np.mgrid[:20, :24]
    ramp = np.stack([y / 20, x / 24, (x + y) / 44], axis=-1)
    mask = np.zeros((20, 24), dtype=bool)
    mask[4:15, 3:20] = True
    system = region_system(mask)
    solution = cg(system.matrix, right_hand_side(system, ramp, None), rtol=1e-12).x
    np.testing.assert_allclose(insert(system, ramp, solution), ramp, atol=1e-10)
    noise = np.random.default_rng(0).random(ramp.shape)
    solution = cg(system.matrix, right_hand_side(system, noise, None), rtol=1e-12).x
    rim = noise[~mask]
    assert (rim.min(0) - 1e-9 <= solution.numpy().T).all()
    assert (rim.max(0) + 1e-9 >= solution.numpy().T).all()


def test_tile_has_equal_opposite_edges_and_keeps_the_slopes():
    texture = np.random.default_rng(0).random((10, 13, 3))
    A, b, framed = tileable(texture)
    np.testing.assert_array_equal(framed[0], framed[-1])
    np.testing.assert_array_equal(framed[:, 0], framed[:, -1])
    framed[1:-1, 1:-1] = np.moveaxis(cg(A, b, rtol=1e-12).x.numpy(), 0, -1)

    def laplacian(p):
        return 4 * p[1:-1, 1:-1] - p[:-2, 1:-1] - p[2:, 1:-1] - p[1:-1, :-2] - p[1:-1, 2:]

    np.testing.assert_allclose(laplacian(framed), laplacian(texture), atol=1e-9)


def test_tile_that_already_repeats_is_unchanged():
    y, x = np.mgrid[:17, :17]
    texture = np.repeat((0.5 + 0.25 * np.cos(2 * np.pi * y / 16) * np.cos(2 * np.pi * x / 16))[..., None], 3, axis=2)
    A, b, framed = tileable(texture)
    framed[1:-1, 1:-1] = np.moveaxis(cg(A, b, rtol=1e-12).x.numpy(), 0, -1)
    np.testing.assert_allclose(framed, texture, atol=1e-10)


def test_shrink_and_place():
    picture = np.arange(5 * 7 * 3, dtype=float).reshape(5, 7, 3)
    np.testing.assert_allclose(shrink(picture, 2)[1, 2], picture[2:4, 4:6].mean((0, 1)))
    assert shrink(picture, 2).shape == (2, 3, 3)
    placed = place(picture, (4, 6, 3), -2, 3)
    np.testing.assert_array_equal(placed[:3, 3:], picture[2:, :3])
    assert placed[3:].sum() == placed[:, :3].sum() == 0


# The page ----------------------------------------------------------------------------------------------------------

VOID = {"meta", "img", "source", "br", "link"}


class Page(HTMLParser):
    """Collects what the tests look at, and fails on tags that do not nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def check_page(text):
    """What every page of the demo must be: accessible, self-contained, in order."""
    page = Page(text)
    assert page.attributes("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.attributes("meta")
    for word in ("http:", "https:", "url(", "@import", "<script", "<link"):
        assert word not in text
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert len(page.attributes("main")) == 1
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))
    for attributes in page.attributes("a"):
        assert attributes["href"].removeprefix("#") in names
    for attributes in page.attributes("img"):
        assert len(attributes["alt"]) > 20
    for attributes in page.attributes("th"):
        assert attributes["scope"] in ("row", "col")
    assert len(page.attributes("caption")) == len(page.attributes("table"))
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    return page


def report(name, **changes):
    table = Table("Seconds & more", ("a", "b"), (("<x>", "1"), ("y", "2")), frozenset({1}), "a < b")
    picture = Picture("p.png", 'a "quoted" text that is long enough', "caption <1>", 3, 2, dark="d.png")
    fields = {
        "name": name,
        "title": f"Title of {name}",
        "lead": "The <em>lead</em>.",
        "sections": (Section("Part one", ("text", Gallery((picture,)), Gallery((picture, picture), "both"), table)),),
        "table": table,
        "checks": (Check("holds", True, "1 < 2"), Check("does not", False, "2 < 1")),
        "seconds": 1.0,
        "credits": ("somebody",),
    }
    return StationReport(**(fields | changes))


@pytest.mark.parametrize("names", [("one",), ("one", "two", "three")])
def test_page_is_well_formed_for_one_station_and_several(names):
    text = render_page([report(name) for name in names], command="kantor demo --only <x>", versions="v & w")
    page = check_page(text)
    for piece in ("&lt;x&gt;", "Seconds &amp; more", "a &lt; b", "caption &lt;1&gt;", "v &amp; w", "--only &lt;x&gt;"):
        assert piece in text
    assert len(page.attributes("nav")) == (len(names) > 1)
    assert text.count("(failed)") == len(names)
    assert 'media="screen and (prefers-color-scheme: dark)"' in text


def test_page_sums_up_each_station():
    finding = Finding("A & B.", "SciPy.", "Twice as long.")
    reports = [report("one", finding=finding), report("two")]
    text = render_page(reports, command="kantor demo", versions="", size="small")
    page = check_page(text)
    assert len(page.attributes("dl")) == 2
    for words in ("A &amp; B.", "SciPy.", "Station 1 of 2", "<span>--only</span> <span>two</span> <span>--size</span>"):
        assert words in text
    assert text.count("Twice as long.") == 2  # in the contents too
    assert text.count("<li>somebody</li>") == 1
    assert [a["href"] for a in page.attributes("a")].count("#contents") == 2
    alone = render_page(reports[:1], command="kantor demo", versions="")
    assert "--size" not in alone
    assert "Station" not in alone
    check_page(alone)


def test_a_tall_picture_alone_is_narrow():
    tall = Gallery((Picture("p.png", "a picture that is higher than wide", "", 2, 3),))
    sections = (Section("Part one", (tall,)),)
    assert 'class="single tall"' in render_page([report("one", sections=sections)], command="", versions="")


def test_ratios_in_words():
    assert between([6.83, 1.27, 2.0]) == "1.3 to 6.8"
    assert between([0.123, 1234.5]) == "0.12 to 1,234"
    assert between([3.0, 3.001]) == "3"


def test_report_passes_when_all_checks_do():
    assert not report("one").passed
    assert report("one", checks=()).passed


def test_stations_are_named_once_and_titled():
    names = [station.name for station in STATIONS]
    assert "poisson_editing" in names
    assert len(names) == len(set(names))
    assert all(station.title for station in STATIONS)


# The command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    """The demo at small size: the result of the command and its folder."""
    folder = tmp_path_factory.mktemp("tour") / "new" / "kantor-demo"
    return CliRunner().invoke(cli.build_app(), ["demo", "--size", "small", "--out", str(folder)]), folder


def test_demo_end_to_end(tour):
    result, folder = tour
    assert result.exit_code == 0, result.output
    text = (folder / "index.html").read_text(encoding="utf-8")
    page = check_page(text)
    files = [attributes["src"] for attributes in page.attributes("img")]
    files += [attributes["srcset"] for attributes in page.attributes("source")]
    assert len(files) == len(set(files)) >= 13
    for attributes in page.attributes("img"):
        with Image.open(folder / attributes["src"]) as image:
            assert image.format == ("WEBP" if attributes["src"].endswith(".webp") else "PNG")
            assert image.size == (int(attributes["width"]), int(attributes["height"]))
            assert np.asarray(image.convert("L")).std() > 5, "an empty picture"
    assert {path.relative_to(folder).as_posix() for path in folder.glob("*/*")} == set(files)
    assert "kantor demo --size small" in text
    assert len(page.attributes("dl")) == len(STATIONS)
    assert text.count("<dt>Result</dt>") == len(STATIONS)


def test_demo_prints_figures_beside_scipy(tour):
    result, _ = tour
    for word in ("SciPy", "Kantor", "Ratio", "Holes", "Clone", "Mixed", "Tile", "passed: Every system converged"):
        assert word in result.stdout
    assert "FAILED" not in result.stdout


def test_demo_holes_are_nearer_the_original_than_the_damage(tour):
    _, folder = tour
    from kantor.demo.pictures import damage_mask, load_photographs

    original = load_photographs(3)["cat"]
    mask = damage_mask(original.shape, 3)
    before, after = (
        np.asarray(Image.open(folder / "poisson_editing" / f"holes-{name}.png")) / 255 for name in ("before", "after")
    )
    assert np.abs(after - original)[mask].mean() < 0.15 * np.abs(before - original)[mask].mean()
    assert np.abs(after - original)[~mask].max() <= 0.5 / 255 + 1e-9


def test_demo_refuses_an_unknown_station(tmp_path):
    result = CliRunner().invoke(cli.build_app(), ["demo", "--only", "nonsense", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "poisson_editing" in result.stderr
    assert not (tmp_path / "out").exists()


def test_demo_refuses_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(cli.build_app(), ["demo", "--size", "small", "--out", str(tmp_path / "file" / "out")])
    assert result.exit_code == 2
    assert "cannot be written" in result.stderr


def test_stations_are_chosen_by_repetition_or_commas(tmp_path, monkeypatch):
    import kantor.demo

    ran = []

    def station(name):
        return kantor.demo.Station(name, name, lambda folder, size: ran.append(name) or report(name, checks=()))

    monkeypatch.setattr(kantor.demo, "STATIONS", tuple(map(station, "abcd")))
    words = ["demo", "--only", "d,b", "--only", "a", "--out", str(tmp_path)]
    assert CliRunner().invoke(cli.build_app(), words).exit_code == 0
    assert ran == ["a", "b", "d"]
    assert "Station 3 of 3" in (tmp_path / "index.html").read_text()


def test_failed_check_exits_1(tmp_path, monkeypatch):
    import kantor.demo

    station = kantor.demo.Station("one", "One", lambda folder, size: report("one"))
    monkeypatch.setattr(kantor.demo, "STATIONS", (station,))
    result = CliRunner().invoke(cli.build_app(), ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "FAILED: does not" in result.stdout
    assert (tmp_path / "index.html").exists()


@pytest.mark.parametrize("name", ["skimage", "sklearn"])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, name):
    import sys

    from kantor.demo import pictures

    if name == "skimage":
        monkeypatch.setitem(sys.modules, "skimage", None)
    else:
        monkeypatch.setattr(pictures, "find_spec", lambda _: None)
    result = CliRunner().invoke(cli.build_app(), ["demo", "--size", "small", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert 'pip install "kantor[demo]"' in result.stderr


def test_solution_does_not_depend_on_the_number_of_threads():
    mask = np.random.default_rng(0).random((40, 50)) < 0.8
    picture = np.random.default_rng(1).random((40, 50, 3))
    system = region_system(mask)
    b = right_hand_side(system, picture, None)
    before = torch.get_num_threads()
    try:
        solutions = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            solutions.append(cg(system.matrix, b).x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*solutions)
