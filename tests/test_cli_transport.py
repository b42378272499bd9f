"""``kantor transport``: images, points and costs in, values, plans and pictures out, exit codes and messages."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import scipy.sparse
import torch
from PIL import Image
from typer.testing import CliRunner

import kantor
from kantor import _transport_command as command
from kantor import cli
from kantor._colour_transfer import extend_map, recolour, sample_colours
from kantor._solve_files import BadInputError
from kantor._transport_files import read_image, read_points, write_map
from kantor.transport import TransportInfo, solve, solve_sample

PNG = b"\x89PNG"


def run(*words):
    return CliRunner().invoke(cli.build_app(), ["transport", *map(str, words)])


def run_json(*words):
    result = run(*words, "--json")
    assert result.stdout, result.stderr
    return result.exit_code, json.loads(result.stdout)


def expect_bad_input(result, *words):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr


def save_image(path, pixels, **options):
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path, **options)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Points x.npy and y.csv, colours a.png and b.png, gray u.png and v.png, a cost C.npy."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    np.save("x.npy", random.random((30, 2)))
    np.savetxt("y.csv", random.normal(1.5, 0.3, (25, 2)), delimiter=",", header="u,v", comments="", fmt="%.17g")
    np.save("C.npy", random.random((12, 9)))
    save_image("a.png", random.integers(0, 120, (20, 30, 3)))
    save_image("b.png", random.integers(100, 256, (16, 24, 3)))
    for name, column in (("u.png", 2), ("v.png", 8)):
        pixels = np.zeros((9, 12))
        pixels[2:7, column : column + 3] = 200
        save_image(name, pixels)
    return tmp_path


def points(folder):
    X = torch.from_numpy(np.load(folder / "x.npy"))
    Y = torch.from_numpy(np.loadtxt(folder / "y.csv", delimiter=",", skiprows=1))
    return X, Y


# Points ------------------------------------------------------------------------------------------------------------


def test_points_give_value_distance_plan_and_map(folder):
    code, outcome = run_json("x.npy", "y.csv", "--reg", 0.01, "-o", "p.npz", "--map", "m.npy", "--plot", "d.png")
    assert code == 0
    X, Y = points(folder)
    result = solve_sample(X, Y, reg=0.01)
    assert outcome["status"] == "converged"
    assert (outcome["kind"], outcome["rows"], outcome["columns"], outcome["dimension"]) == ("points", 30, 25, 2)
    assert outcome["value"] == pytest.approx(float(result.value), rel=1e-9)
    assert outcome["linear_value"] == pytest.approx(float(result.value_linear), rel=1e-9)
    assert outcome["wasserstein"]["order"] == 2
    assert outcome["wasserstein"]["value"] == pytest.approx(float(result.value_linear) ** 0.5, rel=1e-9)
    assert outcome["marginal_error"] <= 1e-9
    P = scipy.sparse.load_npz("p.npz").toarray()
    np.testing.assert_allclose(P, result.plan.numpy(), atol=1e-8)  # what is small is left out
    summary = outcome["plan"]
    assert summary["nonzeros"] == np.count_nonzero(P)
    assert summary["largest"] == P.max()
    assert P[tuple(summary["largest_at"])] == P.max()
    assert summary["entropy"] == pytest.approx(-(P[P > 0] * np.log(P[P > 0])).sum(), rel=1e-9)
    np.testing.assert_allclose(np.load("m.npy"), result.barycentric_map().numpy(), atol=1e-8)
    assert (folder / "d.png").read_bytes().startswith(PNG)
    assert not list(folder.glob("*.part"))


def test_table_says_what_was_done(folder):
    result = run("x.npy", "y.csv", "-o", "p.npz")
    assert result.exit_code == 0
    words = ("x.npy", "30 x 25 points in 2 dimensions", "sqeuclidean", "1.0e-03 of the range", "converged", "W_2")
    for word in (*words, "<P, C>", "entropy", "largest", "newton", "seconds", "p.npz"):
        assert word in result.stdout


def test_quiet_prints_nothing(folder):
    result = run("x.npy", "y.csv", "--quiet", "--map", "m.csv")
    assert (result.exit_code, result.output) == (0, "")
    assert np.loadtxt("m.csv", delimiter=",").shape == (30, 2)


@pytest.mark.parametrize(
    ("words", "order"),
    [
        (("--cost", "euclidean"), 1.0),
        (("--cost", "l1"), 1.0),
        (("--cost", "lp", "--p", "3"), 3.0),
        (("--p", "0.5"), 1.0),
        (("--cost", "cosine"), None),
    ],
)
def test_costs_and_the_distance_they_stand_for(folder, words, order):
    code, outcome = run_json("x.npy", "y.csv", "--relative-reg", 1e-2, *words)
    assert code == 0
    X, Y = points(folder)
    p = outcome["p"] or 2.0
    expected = solve_sample(X, Y, cost=outcome["cost"], p=p, reg=outcome["reg"])
    assert outcome["linear_value"] == pytest.approx(float(expected.value_linear), rel=1e-8)
    assert outcome["relative_reg"] == pytest.approx(1e-2)
    if order is None:
        assert outcome["wasserstein"] is None
    else:
        assert outcome["wasserstein"]["order"] == order
        assert outcome["wasserstein"]["value"] == pytest.approx(outcome["linear_value"] ** (1 / order))


@pytest.mark.parametrize("suffix", ["npy", "csv", "txt"])
def test_weights_and_float32(folder, suffix):
    a = np.random.default_rng(1).random(30)
    a /= a.sum()
    np.save("a.npy", a) if suffix == "npy" else np.savetxt(f"a.{suffix}", a, fmt="%.17g")
    code, outcome = run_json("x.npy", "y.csv", "--a", f"a.{suffix}", "--dtype", "float32", "-o", "p.npz", "--reg", 0.02)
    assert (code, outcome["dtype"]) == (0, "float32")
    np.testing.assert_allclose(scipy.sparse.load_npz("p.npz").sum(1), a, atol=1e-6)


def test_threads_are_set(folder):
    before = torch.get_num_threads()
    try:
        _, outcome = run_json("x.npy", "y.csv", "--threads", 1)
    finally:
        torch.set_num_threads(before)
    assert outcome["threads"] == 1


@pytest.mark.parametrize("method", ["auto", "newton", "sns", "sinkhorn"])
def test_methods_agree(folder, method):
    code, outcome = run_json("x.npy", "y.csv", "--reg", 0.1, "--method", method)
    assert code == 0
    X, Y = points(folder)
    assert outcome["value"] == pytest.approx(float(solve_sample(X, Y, reg=0.1).value), rel=1e-8)
    assert outcome["method"] == ("newton" if method == "auto" else method)


def test_a_sample_has_the_rows_and_columns_of_the_files(folder):
    w = np.random.default_rng(2).random(30)
    np.save("a.npy", w)
    np.save("b.npy", np.full(25, w.sum() / 25))
    words = ("x.npy", "y.csv", "--a", "a.npy", "--b", "b.npy", "--max-points", 10, "-o", "p.npz", "--map", "m.npy")
    code, outcome = run_json(*words)
    assert code == 0
    assert (outcome["rows"], outcome["columns"]) == (10, 10)
    assert "10 of 30 and 10 of 25 points drawn" in outcome["note"]
    P = scipy.sparse.load_npz("p.npz").toarray()
    assert P.shape == (30, 25)
    assert P.sum() == pytest.approx(w.sum())
    rows = np.flatnonzero(P.sum(1))
    assert len(rows) == 10
    assert P[tuple(outcome["plan"]["largest_at"])] == P.max()
    # The map is extended to points that were not drawn, and that of the plan where they were.
    images = np.load("m.npy")
    Y = points(folder)[1].numpy()
    np.testing.assert_allclose(images[rows], (P @ Y)[rows] / P.sum(1)[rows, None], atol=1e-5)
    assert np.isfinite(images).all()
    assert json.dumps(run_json(*words, "--seed", 1)[1]["value"]) != json.dumps(outcome["value"])
    assert run_json(*words)[1]["value"] == outcome["value"]


def test_one_dimension_and_a_vector_file(folder):
    np.save("s.npy", np.arange(5.0))
    np.save("t.npy", np.arange(5.0) + 3)
    code, outcome = run_json("s.npy", "t.npy", "--cost", "euclidean", "--reg", 0)
    assert code == 0
    assert outcome["wasserstein"]["value"] == pytest.approx(3.0, abs=1e-4)
    assert outcome["duality_gap"] < 1e-3
    assert outcome["lower_bound"] <= 3.0


def test_all_points_equal(folder):
    np.save("s.npy", np.ones((4, 2)))
    code, outcome = run_json("s.npy", "s.npy")
    assert (code, outcome["relative_reg"], outcome["wasserstein"]["value"]) == (0, None, 0.0)


# Cost matrices -----------------------------------------------------------------------------------------------------


def test_cost_matrix_with_weights(folder):
    a, b = np.full(12, 2 / 12), np.full(9, 2 / 9)
    np.save("a.npy", a)
    np.savetxt("b.txt", b, fmt="%.17g")
    words = ("--cost-matrix", "C.npy", "--a", "a.npy", "--b", "b.txt", "--reg", 0.05)
    code, outcome = run_json(*words, "-o", "p.npz", "--plot", "c.svg")
    assert code == 0
    expected = solve(*(torch.from_numpy(t) for t in (np.load("C.npy"), a, b)), reg=0.05)
    assert outcome["value"] == pytest.approx(float(expected.value), rel=1e-9)
    assert (outcome["cost"], outcome["wasserstein"]) == ("matrix", None)
    assert scipy.sparse.load_npz("p.npz").sum() == pytest.approx(2.0)
    assert (folder / "c.svg").exists()


def test_forbidden_pairs_are_kept_out(folder):
    C = np.load("C.npy")
    C[0, :8] = np.inf
    C[5, 3] = np.inf
    np.save("F.npy", C)
    code, _ = run_json("--cost-matrix", "F.npy", "-o", "p.npz")
    assert code == 0
    P = scipy.sparse.load_npz("p.npz").toarray()
    assert (P[np.isinf(C)] == 0).all()


def test_unbalanced_has_no_distance(folder):
    np.save("a.npy", np.full(30, 1.0))
    code, outcome = run_json("x.npy", "y.csv", "--a", "a.npy", "--unbalanced", 0.5, "--reg", 0.05)
    assert code == 0
    assert outcome["wasserstein"] is None
    assert 0 < outcome["plan"]["mass"] < 30


def test_reg_zero_says_how_far_it_may_be_off(folder):
    result = run("--cost-matrix", "C.npy", "--reg", 0)
    assert result.exit_code == 0
    assert "duality gap" in result.stdout


# Images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out.png", "out.jpg", "out.webp"])
def test_colours_move_to_those_of_the_target(folder, name):
    code, outcome = run_json("a.png", "b.png", "-o", name, "--max-points", 200)
    assert (code, outcome["kind"]) == (0, "colour")
    assert "200 of 600 and 200 of 384 pixels drawn" in outcome["note"]
    assert outcome["relative_reg"] == pytest.approx(1e-2)
    a, b, out = (np.asarray(Image.open(path).convert("RGB"), dtype=float) for path in ("a.png", "b.png", name))
    assert out.shape == a.shape
    assert np.abs(out.mean((0, 1)) - b.mean((0, 1))).max() < 8
    assert np.abs(a.mean((0, 1)) - b.mean((0, 1))).min() > 80


def test_colours_map_and_picture(folder):
    assert run("a.png", "b.png", "--map", "m.npy", "--plot", "rgb.pdf").exit_code == 0
    assert np.load("m.npy").shape == (20, 30, 3)
    assert (folder / "rgb.pdf").read_bytes().startswith(b"%PDF")
    expect_bad_input(run("a.png", "b.png", "--map", "m.csv"), "m.csv", ".npy")


def test_all_pixels_are_used_where_there_are_few(folder):
    _, outcome = run_json("a.png", "b.png", "--reg", 0.05)
    assert (outcome["rows"], outcome["columns"]) == (600, 384)


def test_gray_images_are_densities(folder):
    code, outcome = run_json("u.png", "v.png", "--plot", "f.png", "--map", "m.npy", "-o", "p.npz")
    assert (code, outcome["kind"]) == (0, "density")
    assert outcome["wasserstein"]["value"] == pytest.approx(6.0, abs=0.05)  # six pixels to the right
    images = np.load("m.npy").reshape(9, 12, 2)
    assert np.isnan(images[0, 0]).all()  # no mass there
    np.testing.assert_allclose(images[4, 3], [4, 9], atol=0.2)
    assert scipy.sparse.load_npz("p.npz").shape == (108, 108)
    assert (folder / "f.png").read_bytes().startswith(PNG)


def test_densities_are_averaged_down_with_their_mass_and_positions(folder):
    code, outcome = run_json("u.png", "v.png", "--max-points", 30)
    assert code == 0
    assert "densities on 5 x 6 cells, averaged over squares of 2 x 2 pixels" in outcome["note"]
    assert outcome["wasserstein"]["value"] == pytest.approx(6.0, abs=0.2)


def test_mode_is_chosen_or_given(folder):
    assert run_json("a.png", "v.png")[1]["kind"] == "colour"
    assert run_json("u.png", "v.png", "--mode", "colour", "-o", "out.png")[1]["kind"] == "colour"
    save_image("c.png", np.full((9, 12, 3), 50))
    assert run_json("c.png", "v.png", "--mode", "density")[1]["kind"] == "density"


def test_every_kind_of_image_is_read_in_the_unit_interval(folder):
    random = np.random.default_rng(0)
    gray = random.integers(0, 256, (5, 7), dtype=np.uint8)
    Image.fromarray(gray.astype(np.uint16) * 257).save("deep.png")
    Image.fromarray(gray).convert("P").save("palette.png")
    Image.fromarray(gray > 127).save("bits.png")
    np.testing.assert_allclose(read_image(folder / "deep.png"), gray / 255, atol=1e-12)
    assert read_image(folder / "palette.png").shape == (5, 7, 3)
    np.testing.assert_array_equal(read_image(folder / "bits.png"), (gray > 127).astype(float))
    clear = np.zeros((5, 7, 4), dtype=np.uint8)
    clear[0, 0] = (10, 20, 30, 255)
    Image.fromarray(clear).save("clear.png")
    laid = read_image(folder / "clear.png")
    np.testing.assert_allclose(laid[0, 0] * 255, [10, 20, 30])
    np.testing.assert_array_equal(laid[1:], 1.0)  # on white
    turned = Image.fromarray(gray)
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was turned
    turned.save("turned.jpg", exif=exif)
    assert read_image(folder / "turned.jpg").shape == (7, 5)


# The map that recolours --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine"])
def test_extended_map_is_the_barycentric_map_at_the_points_of_the_problem(cost):
    random = torch.Generator().manual_seed(0)
    X, Y = torch.rand(40, 3, dtype=torch.float64, generator=random), torch.rand(30, 3, generator=random).double()
    result = solve_sample(X, Y, reg=0.02, cost=cost)
    expected = result.plan @ Y / result.plan.sum(1, keepdim=True)
    torch.testing.assert_close(extend_map(result, X, Y), expected, rtol=1e-10, atol=1e-10)
    between = extend_map(result, torch.rand(9, 3, generator=random), Y)
    assert bool((between >= Y.amin(0)).all() & (between <= Y.amax(0)).all())


def test_recolouring_is_the_map_of_every_pixel():
    random = np.random.default_rng(0)
    image, other = random.integers(0, 4, (8, 9, 3)) / 3, random.random((6, 5, 3))
    X, Y = sample_colours(image, 10_000, random), sample_colours(other, 12, random)
    assert X.shape == (72, 3)
    assert Y.shape == (12, 3)
    result = solve_sample(X, Y, reg=0.05)
    expected = extend_map(result, torch.from_numpy(image.reshape(-1, 3)), Y).numpy().reshape(image.shape)
    np.testing.assert_allclose(recolour(image, result, Y), expected, atol=1e-4)


# What does not converge --------------------------------------------------------------------------------------------


def test_iteration_limit_exits_1_and_says_what_to_try(folder):
    result = run("x.npy", "y.csv", "--method", "sinkhorn", "--max-iter", 2, "-o", "p.npz")
    assert result.exit_code == 1
    assert "max iter" in result.stdout
    for word in ("raise --max-iter", "--method newton"):
        assert word in result.stderr
    assert (folder / "p.npz").exists()
    code, outcome = run_json("x.npy", "y.csv", "--method", "sinkhorn", "--max-iter", 2)
    assert (code, outcome["converged"], outcome["status"]) == (1, False, "max_iter")


def test_infeasible_exits_1_and_writes_no_plan(folder):
    C = np.ones((3, 3))
    C[:2, 1:] = np.inf  # two rows that may only go to one column
    np.save("I.npy", C)
    result = run("--cost-matrix", "I.npy", "-o", "p.npz")
    assert result.exit_code == 1
    assert "infeasible" in result.stdout
    assert "--unbalanced" in result.stderr
    assert not (folder / "p.npz").exists()


# Bad input ---------------------------------------------------------------------------------------------------------


BAD_ARGUMENTS = {
    "nothing": ((), "expected two files"),
    "one file": (("x.npy",), "expected two files"),
    "both kinds": (("x.npy", "y.csv", "--cost-matrix", "C.npy"), "takes the place"),
    "image and points": (("a.png", "x.npy"), "a.png is an image, x.npy is a file of points"),
    "unknown kind": (("x.npy", "y.tiff"), "y.tiff: unknown kind"),
    "missing": (("x.npy", "no.npy"), "no.npy: no such file"),
    "missing image": (("a.png", "no.png"), "no.png: no such file"),
    "both regs": (("x.npy", "y.csv", "--reg", 1, "--relative-reg", 1), "--reg and --relative-reg"),
    "p of another cost": (("x.npy", "y.csv", "--cost", "l1", "--p", 3), "--p"),
    "lp without p": (("x.npy", "y.csv", "--cost", "lp"), "--p"),
    "p not positive": (("x.npy", "y.csv", "--p", 0), "p: expected"),
    "cost of a matrix": (("--cost-matrix", "C.npy", "--cost", "l1"), "--cost and --p"),
    "sample of a matrix": (("--cost-matrix", "C.npy", "--max-points", 3), "--max-points"),
    "map of a matrix": (("--cost-matrix", "C.npy", "--map", "m.npy"), "--map"),
    "mode of points": (("x.npy", "y.csv", "--mode", "colour"), "--mode colour"),
    "weights of images": (("a.png", "b.png", "--a", "x.npy"), "--a and --b"),
    "sizes of densities": (("a.png", "b.png", "--mode", "density"), "30 x 20 and 24 x 16"),
    "weights that do not fit": (("x.npy", "y.csv", "--a", "C.npy"), "expected 30 weights"),
    "nan tolerance": (("x.npy", "y.csv", "--tol", "nan"), "tol: expected"),
    "unbalanced at reg 0": (("x.npy", "y.csv", "--reg", 0, "--unbalanced", 1), "reg: expected"),
    "unbalanced below 0": (("x.npy", "y.csv", "--unbalanced", -1), "unbalanced: expected"),
    "plan as picture": (("x.npy", "y.csv", "-o", "p.png"), ".npz"),
    "picture as plan": (("a.png", "b.png", "-o", "p.npz"), ".png"),
    "no folder": (("x.npy", "y.csv", "-o", "no/p.npz"), "does not exist"),
    "overwrites": (("x.npy", "x.npy", "--map", "x.npy"), "would overwrite"),
    "plot kind": (("x.npy", "y.csv", "--plot", "p.gif"), ".png, .pdf, .svg"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_ARGUMENTS)
def test_bad_arguments_exit_2(folder, kind):
    words, text = BAD_ARGUMENTS[kind]
    before = (folder / "x.npy").read_bytes()
    expect_bad_input(run(*words), "kantor transport: ", text)
    assert (folder / "x.npy").read_bytes() == before
    assert not list(folder.glob("p.*"))


@pytest.mark.parametrize(
    "words", [("--method", "lp"), ("--reg", "-1"), ("--reg", "nan"), ("--max-points", "0"), ("--dtype", "float16")]
)
def test_bad_option_exits_2(folder, words):
    result = run("x.npy", "y.csv", *words)
    assert result.exit_code == 2
    assert words[0] in result.stderr


BAD_POINTS = {
    "text.npy": (b"1 2 3", "not a readable"),
    "empty.npy": (b"", "not a readable"),
    "words.csv": (b"u,v\n1,two\n", "not a readable"),
    "ragged.csv": (b"1,2\n3\n", "not a readable"),
    "empty.csv": (b"", "shape"),
    "header.csv": (b"u,v\n", "shape"),
    "nan.csv": (b"1,2\nnan,3\n", "(1, 0) is nan"),
    "bytes.csv": (b"\xff\xfe\x00", "not a readable"),
}


@pytest.mark.parametrize("name", BAD_POINTS)
def test_bad_points_exit_2(folder, name):
    content, text = BAD_POINTS[name]
    (folder / name).write_bytes(content)
    expect_bad_input(run(name, "x.npy"), name, text)


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.ones((3, 2), dtype=complex), "complex"),
        (np.array(["a", "b"]), "real numbers"),
        (np.ones((2, 2, 2)), "(2, 2, 2)"),
        (np.ones((0, 2)), "(0, 2)"),
        (np.array(1.0), "shape ()"),
        (np.array([[1.0, np.inf]]), "(0, 1) is inf"),
        (np.ones((3, 5)), "points of 5 numbers, x.npy of 2"),
    ],
)
def test_arrays_that_are_no_points_exit_2(folder, array, text):
    np.save("bad.npy", array)
    expect_bad_input(run("bad.npy", "x.npy"), "bad.npy", text)


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.array([[1.0, np.nan]]), "(0, 1) is nan"),
        (np.array([[1.0, -np.inf]]), "(0, 1) is -inf"),
        (np.ones(3), "expected a cost matrix"),
        (np.full((2, 2), np.inf), "C: row 0"),
    ],
)
def test_bad_costs_exit_2(folder, array, text):
    np.save("bad.npy", array)
    expect_bad_input(run("--cost-matrix", "bad.npy"), text)


@pytest.mark.parametrize(
    ("weights", "text"),
    [
        (np.zeros(30), "all weights are zero"),
        (np.r_[np.ones(29), -1], "entry 29 is -1"),
        (np.r_[np.ones(29), np.nan], "entry 29 is nan"),
        (np.ones(30), "equal masses"),
        (np.ones((15, 2)), "shape (15, 2)"),
    ],
)
def test_bad_weights_exit_2(folder, weights, text):
    np.save("a.npy", weights)
    result = run("x.npy", "y.csv", "--a", "a.npy")
    expect_bad_input(result, text)
    if text == "equal masses":
        assert "--unbalanced" in result.stderr


def test_points_in_five_dimensions_cannot_be_drawn(folder):
    np.save("s.npy", np.ones((3, 5)))
    expect_bad_input(run("s.npy", "s.npy", "--plot", "p.png"), "--plot", "2 or 3 dimensions")


@pytest.mark.parametrize("kind", ["cut", "text", "empty"])
def test_bad_image_exits_2(folder, kind):
    whole = (folder / "a.png").read_bytes()
    (folder / "bad.png").write_bytes({"cut": whole[: len(whole) // 2], "text": b"hello", "empty": b""}[kind])
    expect_bad_input(run("bad.png", "b.png"), "bad.png", "not a readable image")


def test_a_black_image_has_no_density(folder):
    save_image("black.png", np.zeros((9, 12)))
    expect_bad_input(run("black.png", "u.png"), "black.png", "black")


def test_a_file_too_large_for_float32_exits_2(folder):
    np.save("big.npy", np.full((3, 2), 1e60))
    expect_bad_input(run("big.npy", "x.npy", "--dtype", "float32"), "too large for float32")


def test_unwritable_files_are_one_error(folder):
    with pytest.raises(BadInputError, match="cannot be written"):
        write_map(folder / "no" / "m.npy", np.ones((2, 2)))
    (folder / "locked.csv").mkdir()
    with pytest.raises(BadInputError, match="is a folder"):
        read_points(folder / "locked.csv")


# Progress and interrupts -------------------------------------------------------------------------------------------


def test_share_of_the_work_grows_with_reg_and_digits():
    first = TransportInfo(1, 1.0, 1.0)
    steps = [(1.0, 1.0), (0.1, 0.5), (0.01, 0.5), (1e-3, 0.5), (1e-3, 1e-4), (1e-3, 1e-9)]
    shares = [command._share(first, TransportInfo(2, reg, error), 1e-3, 1e-9) for reg, error in steps]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert command._share(first, TransportInfo(2, 1.0, 1e-3), 1.0, 1e-6) == pytest.approx(0.5)
    assert 0 < command._share(first, TransportInfo(2, 1e-2, 0.5), 0.0, 1e-9) < 0.7


def test_ctrl_c_while_reading_exits_130(folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "read_problem", interrupted)
    result = run("x.npy", "y.csv", "-o", "p.npz")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert not (folder / "p.npz").exists()


def test_ctrl_c_in_the_solve_writes_the_plan_so_far_and_exits_130(folder):
    random = np.random.default_rng(0)
    np.save("C.npy", random.random((400, 400)))
    master, slave = pty.openpty()
    words = ("--cost-matrix", "C.npy", "--method", "sinkhorn", "--max-iter", "100000000", "--tol", "1e-300")
    process = subprocess.Popen(
        [sys.executable, "-m", "kantor.cli", "transport", *words, "--relative-reg", "1e-7", "-o", "p.npz"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=slave,
    )
    os.close(slave)
    seen = b""
    while b"marginal error" not in seen:  # the progress bar tells that the solve is under way
        seen += os.read(master, 4096)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    os.close(master)
    assert process.returncode == 130
    assert "interrupted" in output
    assert scipy.sparse.load_npz("p.npz").shape == (400, 400)


@pytest.mark.parametrize(
    ("words", "code"),
    [(("x.npy", "y.csv", "--plot", "d.png"), 0), (("x.npy", "y.csv", "--max-iter", "0"), 1), (("x.npy", "no.npy"), 2)],
)
def test_exit_codes_of_the_process(folder, words, code):
    line = [sys.executable, "-m", "kantor.cli", "transport", *words]
    process = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == code, process.stderr
    for word in ("Traceback", "Warning"):
        assert word not in process.stderr


def test_help_and_import():
    assert "Exit codes" in run("--help").stdout
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = "import sys, kantor; assert not {'scipy', 'matplotlib', 'PIL', 'typer'} & set(sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)
    assert kantor.transport is not None


def test_outputs_of_the_other_kind_say_which_option_writes_them(folder):
    expect_bad_input(run("a.png", "b.png", "-o", "plan.npz"), "plan.npz", "recoloured picture", "--mode density")
    expect_bad_input(run("u.png", "v.png", "-o", "moved.png"), "is the plan", "--plot moved.png", "--mode colour")
    expect_bad_input(run("x.npy", "y.csv", "-o", "moved.png"), "is the plan", "--plot moved.png")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_tables_of_points_may_have_other_separators(folder, separator):
    np.savetxt("z.csv", np.load("x.npy"), delimiter=separator, header=f"u{separator}v", comments="", fmt="%.17g")
    code, outcome = run_json("x.npy", "z.csv")
    assert code == 0
    assert outcome["linear_value"] < 1e-3


def test_words_among_points_say_what_was_expected(folder):
    (folder / "names.csv").write_text("name,u,v\na,1,2\n")
    expect_bad_input(run("x.npy", "names.csv"), "names.csv", "rows of numbers alone")
