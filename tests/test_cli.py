"""The command line: exit codes, messages, files in and out."""

from __future__ import annotations

import gzip
import json
import os
import pty
import signal
import subprocess
import sys

import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import spsolve
from typer.testing import CliRunner

import kantor
from kantor import _solve_preconditioner, cli
from kantor.datasets import poisson_scenes
from kantor.linalg import PoissonGrid

SIDE = 12
N = SIDE * SIDE


def poisson(side=SIDE):
    line = sp.diags_array([-np.ones(side - 1), 2 * np.ones(side), -np.ones(side - 1)], offsets=[-1, 0, 1])
    return sp.csr_array(sp.kron(line, sp.eye_array(side)) + sp.kron(sp.eye_array(side), line))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a.mtx, the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    scipy.io.mmwrite("a.mtx", poisson(), symmetry="symmetric", precision=17)
    return tmp_path


def run(*words):
    return CliRunner().invoke(cli.build_app(), [str(word) for word in words])


def solve_json(*words):
    result = run("solve", *words, "--json")
    return result.exit_code, json.loads(result.stdout)


def expect_bad_input(result, *words):
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr


# What goes well ----------------------------------------------------------------------------------------------------


def test_info_as_table_and_json():
    result = run("info")
    assert result.exit_code == 0
    for word in ("kantor", "torch", "numpy", "python", "compiler", "simd", "threads", "CUDA built", "CUDA available"):
        assert word in result.stdout
    facts = json.loads(run("info", "--json").stdout)
    assert facts["kantor"] == cli.kantor.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cuda_available"] in (True, False)


def test_version_and_help():
    assert run("--version").stdout.strip() == cli.kantor.__version__
    assert "Exit codes" in run("solve", "--help").stdout


@pytest.mark.parametrize("kind", ["symmetric", "general", "gz", "dense", "integer"])
def test_solve_reads_every_kind_of_matrix(folder, kind):
    path = "m.mtx.gz" if kind == "gz" else "m.mtx"
    matrix = poisson()
    if kind == "gz":
        with gzip.open(path, "wb") as file:
            scipy.io.mmwrite(file, matrix, symmetry="symmetric")
    elif kind == "dense":
        scipy.io.mmwrite(path, matrix.toarray())
    else:
        scipy.io.mmwrite(path, matrix.astype(int) if kind == "integer" else matrix, symmetry="general")
    code, outcome = solve_json(path, "--rtol", 1e-10, "-o", "x.npy")
    assert code == 0
    assert outcome["status"] == "converged"
    assert outcome["unknowns"] == N
    assert outcome["nonzeros"] == matrix.nnz
    assert outcome["rhs"] == "ones"
    np.testing.assert_allclose(np.load("x.npy"), spsolve(matrix.tocsc(), np.ones(N)), rtol=1e-8)


@pytest.mark.parametrize("shape", [(N,), (N, 1), (1, N), (N, 3)])
@pytest.mark.parametrize("suffix", ["npy", "mtx", "txt"])
def test_right_hand_sides_and_outputs(folder, shape, suffix):
    b = np.random.default_rng(0).standard_normal(shape)
    if suffix == "npy":
        np.save("b.npy", b)
    elif suffix == "txt":
        np.savetxt("b.txt", b)
    else:
        scipy.io.mmwrite("b.mtx", np.atleast_2d(b) if b.ndim > 1 else b[:, None], precision=17)
    code, outcome = solve_json("a.mtx", "--rhs", f"b.{suffix}", "--rtol", 1e-11, "-o", f"x.{suffix}")
    assert code == 0
    columns = b if shape == (N, 3) else b.reshape(N, 1)
    assert outcome["right_hand_sides"] == columns.shape[1]
    x = {"npy": np.load, "txt": np.loadtxt, "mtx": scipy.io.mmread}[suffix](f"x.{suffix}")
    if suffix == "npy":
        assert x.shape == shape
    residual = poisson() @ x.reshape(columns.shape) - columns
    assert np.linalg.norm(residual) <= 1e-10 * np.linalg.norm(b)
    assert not list(folder.glob("*.part"))


def test_per_system_figures_of_several_columns(folder):
    b = np.random.default_rng(0).standard_normal((N, 3))
    b[:, 1] = 0
    np.save("b.npy", b)
    _, outcome = solve_json("a.mtx", "--rhs", "b.npy")
    assert len(outcome["per_system"]) == 3
    assert outcome["per_system"][1] == {"status": "converged", "iterations": 0, "residual_norm": 0.0}


def test_table_says_what_was_done(folder):
    result = run("solve", "a.mtx", "-o", "x.npy", "--plot", "p.png")
    assert result.exit_code == 0
    for word in (
        "ones (no --rhs given)",
        "144",
        "672",
        "multigrid (a grid of 14 x 14 cells, constant coefficients)",
        "converged",
        "iterations",
        "|b - Ax|",
        "seconds",
        "x.npy",
    ):
        assert word in " ".join(result.stdout.split())
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")


def test_quiet_prints_nothing(folder):
    result = run("solve", "a.mtx", "--quiet", "-o", "x.npy")
    assert (result.exit_code, result.output) == (0, "")


def test_float32_and_threads(folder):
    before = torch.get_num_threads()
    try:
        code, outcome = solve_json("a.mtx", "--dtype", "float32", "--threads", 1, "-o", "x.npy")
    finally:
        torch.set_num_threads(before)
    assert (code, outcome["dtype"], outcome["threads"]) == (0, "float32", 1)
    assert np.load("x.npy").dtype == np.float32


@pytest.mark.parametrize("name", ["none", "jacobi", "ic0"])
def test_preconditioner_is_used_as_asked(folder, name):
    code, outcome = solve_json("a.mtx", "--preconditioner", name)
    assert (code, outcome["preconditioner"], outcome["preconditioner_note"]) == (0, name, "")


def test_auto_takes_none_for_a_tiny_matrix(folder):
    scipy.io.mmwrite("tiny.mtx", poisson(4))
    _, outcome = solve_json("tiny.mtx")
    assert outcome["preconditioner"] == "none"
    assert "16 unknowns" in outcome["preconditioner_note"]


def test_auto_falls_back_to_jacobi_with_the_reason(folder, monkeypatch):
    def breaks_down(A):
        raise cli.kantor.NumericalBreakdown("ic0: A: the pivot of row 7 is not positive")

    monkeypatch.setattr(_solve_preconditioner, "ic0", breaks_down)
    scipy.io.mmwrite("s.mtx", poisson() + sp.eye_array(N), symmetry="symmetric")
    result = run("solve", "s.mtx")
    assert result.exit_code == 0
    words = " ".join(result.stdout.split())
    assert "jacobi (no multigrid: 1 on the diagonal of a row is more than its links explain" in words
    assert "; no ic0: the pivot of row 7" in words
    expect_bad_input(run("solve", "a.mtx", "--preconditioner", "ic0"), "--preconditioner ic0", "pivot of row 7")


def test_auto_falls_back_to_ic0_with_the_reason(folder):
    scipy.io.mmwrite("s.mtx", poisson() + sp.eye_array(N), symmetry="symmetric")
    _, outcome = solve_json("s.mtx")
    assert outcome["preconditioner"] == "ic0"
    assert outcome["preconditioner_note"].startswith("no multigrid: 1 on the diagonal of a row")
    result = run("solve", "s.mtx", "--preconditioner", "multigrid")
    expect_bad_input(result, "--preconditioner multigrid", "more than its links explain")


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_multigrid_for_grids_with_solids(folder, compressed, dtype):
    """Rows and columns of the file, whatever the cells of the grid behind; several right-hand sides."""
    A = PoissonGrid(poisson_scenes.smoke_balls((40, 33)), spacing=0.5).to_csr(compressed=compressed).to_scipy()
    scipy.io.mmwrite("g.mtx", A, symmetry="symmetric")
    b = np.random.default_rng(0).standard_normal((A.shape[0], 2))
    np.save("b.npy", b)
    rtol = 1e-9 if dtype == "float64" else 1e-4
    words = ("g.mtx", "--rhs", "b.npy", "--rtol", rtol, "--dtype", dtype, "-o", "x.npy")
    code, outcome = solve_json(*words)
    assert code == 0
    assert outcome["preconditioner"] == "multigrid"
    assert outcome["preconditioner_note"] == "a grid of 40 x 33 cells, constant coefficients"
    assert outcome["iterations"] <= 16
    assert outcome["unknowns"] == A.shape[0]
    x = np.load("x.npy")
    assert x.shape == b.shape
    assert np.linalg.norm(A @ x - b) <= 2 * rtol * np.linalg.norm(b)
    _, plain = solve_json(*words, "--preconditioner", "ic0")
    assert plain["iterations"] > outcome["iterations"]


def test_auto_leaves_multigrid_out_where_coefficients_differ_much(folder):
    one = sp.diags_array([-np.ones(SIDE - 1), 2 * np.ones(SIDE), -np.ones(SIDE - 1)], offsets=[-1, 0, 1])
    eye = sp.eye_array(SIDE)
    for factor, name in ((1e3, "multigrid"), (1e5, "ic0")):
        scipy.io.mmwrite("c.mtx", factor * sp.kron(one, eye) + sp.kron(eye, one), symmetry="symmetric")
        code, outcome = solve_json("c.mtx")
        assert (code, outcome["preconditioner"]) == (0, name)
    assert outcome["preconditioner_note"] == "no multigrid: coefficients that differ by a factor of 1.0e+05"
    code, outcome = solve_json("c.mtx", "--preconditioner", "multigrid")
    assert (code, outcome["preconditioner"]) == (0, "multigrid")
    assert outcome["preconditioner_note"] == f"a grid of {SIDE + 2} x {SIDE + 2} cells, variable coefficients"


def test_closed_grid_needs_a_right_hand_side_that_sums_to_zero(folder):
    A = PoissonGrid(torch.full((12, 15), 2)).to_csr().to_scipy()
    scipy.io.mmwrite("n.mtx", A, symmetry="symmetric")
    result = run("solve", "n.mtx")
    expect_bad_input(result, "sums to 180 over the 180 unknowns", "singular", "subtract its mean", "--rhs")
    assert "cg: b" not in result.stderr
    np.save("b.npy", np.stack([np.ones(180) * np.where(np.arange(180) < 90, 1, -1), np.full(180, 2.0)], 1))
    expect_bad_input(run("solve", "n.mtx", "--rhs", "b.npy"), "sums to 360")
    b = np.random.default_rng(0).standard_normal(180)
    np.save("b.npy", b - b.mean())
    code, outcome = solve_json("n.mtx", "--rhs", "b.npy", "--rtol", 1e-10, "-o", "x.npy")
    assert (code, outcome["preconditioner"]) == (0, "multigrid")
    x = np.load("x.npy")
    assert abs(x.mean()) < 1e-12
    assert np.linalg.norm(A @ x - b + b.mean()) <= 1e-9 * np.linalg.norm(b)


# What does not converge --------------------------------------------------------------------------------------------


def test_iteration_limit_exits_1_and_says_what_to_try(folder):
    result = run("solve", "a.mtx", "--maxiter", 3, "--preconditioner", "none", "-o", "x.npy")
    assert result.exit_code == 1
    assert "maxiter" in result.stdout
    for word in ("raise --maxiter", "--preconditioner auto"):
        assert word in result.stderr
    assert (folder / "x.npy").exists()


def test_negative_curvature_exits_1_with_the_curvature(folder):
    scipy.io.mmwrite("i.mtx", sp.csr_array(poisson() - 5 * sp.eye_array(N)), symmetry="symmetric")
    result = run("solve", "i.mtx")
    assert result.exit_code == 1
    assert "negative curvature" in result.stdout
    assert "indefinite" in result.stderr
    code, outcome = solve_json("i.mtx")
    assert (code, outcome["status"]) == (1, "negative_curvature")
    assert outcome["curvature"] < 0
    assert f"{outcome['curvature']:.6g}" in result.stderr


def test_rounding_level_exits_1(folder):
    result = run("solve", "a.mtx", "--dtype", "float32", "--rtol", 1e-13)
    assert result.exit_code == 1
    assert "--dtype float64" in result.stderr


# Bad input ---------------------------------------------------------------------------------------------------------

HEADER = "%%MatrixMarket matrix coordinate real general\n"
BAD_MATRICES = {
    "missing": (None, "no such file"),
    "empty": ("", "not a readable"),
    "not a matrix": ("hello\nworld\n", "not a readable"),
    "truncated": (HEADER + "3 3 4\n1 1 2.0\n2 2 2.0\n", "not a readable"),
    "cut in a number": (HEADER + "2 2 2\n1 1 2.0\n2 2", "not a readable"),
    "bad number": (HEADER + "2 2 2\n1 1 2.0\n2 2 two\n", "not a readable"),
    "index out of range": (HEADER + "2 2 1\n3 1 2.0\n", "not a readable"),
    "absurd size": (HEADER + "10 10 99999999999999\n1 1 1.0\n", "not a readable"),
    "size beyond integers": (HEADER + "99999999999999999999 10 1\n1 1 1.0\n", "not a readable"),
    "not square": (HEADER + "3 4 1\n1 1 2.0\n", "3 x 4"),
    "no rows": (HEADER + "0 0 0\n", "no rows"),
    "nan": (HEADER + "2 2 2\n1 1 nan\n2 2 1.0\n", "nan"),
    "infinite": (HEADER + "2 2 2\n1 1 inf\n2 2 1.0\n", "inf"),
    "complex": (HEADER.replace("real", "complex") + "1 1 1\n1 1 1.0 2.0\n", "complex"),
    "pattern": (HEADER.replace("real", "pattern") + "1 1 1\n1 1\n", "pattern"),
}


@pytest.mark.parametrize("kind", BAD_MATRICES)
def test_bad_matrix_exits_2(folder, kind):
    text, word = BAD_MATRICES[kind]
    if text is not None:
        (folder / "bad.mtx").write_text(text)
    expect_bad_input(run("solve", "bad.mtx", "-o", "x.npy"), "bad.mtx", word)
    assert not (folder / "x.npy").exists()


def test_folder_in_place_of_a_matrix(folder):
    expect_bad_input(run("solve", "."), "folder")


@pytest.mark.parametrize("kind", ["cut", "plain text", "flipped"])
def test_bad_gzip_exits_2(folder, kind):
    raw = (folder / "a.mtx").read_bytes()
    packed = bytearray(gzip.compress(raw))
    packed[len(packed) // 2] ^= 0xFF
    content = {"cut": gzip.compress(raw)[: len(raw) // 20], "plain text": raw, "flipped": bytes(packed)}[kind]
    (folder / "bad.mtx.gz").write_bytes(content)
    expect_bad_input(run("solve", "bad.mtx.gz"), "bad.mtx.gz", "not a readable")


def test_unsymmetric_matrix_exits_2_with_the_largest_difference(folder):
    matrix = poisson().tolil()
    matrix[3, 7], matrix[9, 2] = 5.0, 0.5
    scipy.io.mmwrite("u.mtx", matrix.tocsr())
    expect_bad_input(run("solve", "u.mtx"), "not symmetric", "|a_ij - a_ji| = 5", "(3, 7)", "GMRES")


def test_symmetric_up_to_rounding_is_taken(folder):
    matrix = poisson()
    matrix.data[1] *= 1 + 1e-15
    scipy.io.mmwrite("r.mtx", matrix, precision=17)
    assert run("solve", "r.mtx").exit_code == 0


BAD_RHS = {
    "short.npy": (np.ones(5), "(5,)"),
    "wide.npy": (np.ones((2, N + 1)), "does not fit"),
    "scalar.npy": (np.float64(1.0), "does not fit"),
    "cube.npy": (np.ones((N, 1, 1)), "does not fit"),
    "no_columns.npy": (np.ones((N, 0)), "does not fit"),
    "nan.npy": (np.where(np.arange(N) == 3, np.nan, 1.0), "(3,) is nan"),
    "complex.npy": (np.ones(N, dtype=complex), "complex"),
    "words.npy": (np.array(["a"] * N), "real numbers"),
}


@pytest.mark.parametrize("name", BAD_RHS)
def test_bad_right_hand_side_exits_2(folder, name):
    array, word = BAD_RHS[name]
    np.save(name, array)
    expect_bad_input(run("solve", "a.mtx", "--rhs", name), name, word)


@pytest.mark.parametrize(
    "name", ["no.npy", "text.npy", "cut.npy", "pickle.npy", "words.txt", "empty.txt", "b.csv", "b.mtx"]
)
def test_unreadable_right_hand_side_exits_2(folder, name):
    np.save("whole.npy", np.ones(N))
    contents = {
        "text.npy": b"1 2 3",
        "cut.npy": (folder / "whole.npy").read_bytes()[:200],
        "words.txt": b"one\ntwo\n",
        "empty.txt": b"",
        "b.csv": b"1,2,3",
        "b.mtx": HEADER.encode() + b"3 3",
    }
    if name == "pickle.npy":
        np.save(name, np.array([{}], dtype=object), allow_pickle=True)
    elif name in contents:
        (folder / name).write_bytes(contents[name])
    expect_bad_input(run("solve", "a.mtx", "--rhs", name), name)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("x.foo", ".npy, .mtx, .txt"),
        ("no/x.npy", "does not exist"),
        ("sub.npy", "is a folder"),
        ("/proc/x.npy", "cannot be written"),
    ],
)
def test_unwritable_output_is_found_before_the_solve(folder, monkeypatch, name, word):
    def never(*_):
        pytest.fail("the matrix was read before the output was checked")

    (folder / "sub.npy").mkdir()
    monkeypatch.setattr(cli, "read_system", never)
    expect_bad_input(run("solve", "a.mtx", "-o", name), name, word)
    if name.endswith("npy"):
        expect_bad_input(run("solve", "a.mtx", "--plot", name.replace("npy", "xyz")), ".png, .pdf, .svg")


def test_overflow_in_float32_exits_2(folder):
    scipy.io.mmwrite("big.mtx", 1e60 * poisson(), symmetry="symmetric")
    expect_bad_input(run("solve", "big.mtx", "--dtype", "float32"), "too large for float32")


@pytest.mark.parametrize("words", [("--rtol", "-1"), ("--rtol", "x"), ("--maxiter", "-1"), ("--preconditioner", "ilu")])
def test_bad_option_exits_2(folder, words):
    result = run("solve", "a.mtx", *words)
    assert result.exit_code == 2
    assert words[0] in result.stderr


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_tolerance_that_is_no_number_exits_2(folder, value):
    assert run("solve", "a.mtx", "--rtol", value).exit_code == 2


def test_ctrl_c_while_reading_exits_130(folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "read_system", interrupted)
    result = run("solve", "a.mtx", "-o", "x.npy")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert not (folder / "x.npy").exists()


# The real command, in its own process ------------------------------------------------------------------------------


def command(*words, **options):
    return subprocess.Popen([sys.executable, "-m", "kantor.cli", *map(str, words)], text=True, **options)


def test_outputs_do_not_replace_inputs(folder):
    before = (folder / "a.mtx").read_bytes()
    expect_bad_input(run("solve", "a.mtx", "-o", "./a.mtx"), "would overwrite")
    assert (folder / "a.mtx").read_bytes() == before
    (folder / "kept.npy").symlink_to(folder / "target.npy")
    assert run("solve", "a.mtx", "-o", "kept.npy").exit_code == 0
    assert (folder / "kept.npy").is_symlink()
    assert np.isfinite(np.load(folder / "target.npy")).all()


@pytest.mark.parametrize(("words", "code"), [(("a.mtx",), 0), (("a.mtx", "--maxiter", "1"), 1), (("missing.mtx",), 2)])
def test_exit_codes_of_the_process(folder, words, code):
    process = command("solve", *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert "Warning" not in errors


def test_ctrl_c_in_the_solve_writes_the_iterate_and_exits_130(folder):
    n = 100_000  # a chain: information travels one link an iteration, so the solve takes n / 2 of them
    chain = sp.diags_array([-np.ones(n - 1), 2 * np.ones(n), -np.ones(n - 1)], offsets=[-1, 0, 1])
    scipy.io.mmwrite("chain.mtx", chain, symmetry="symmetric")
    master, slave = pty.openpty()
    words = ("chain.mtx", "--preconditioner", "none", "-o", "x.npy")
    process = command("solve", *words, stdout=subprocess.PIPE, stderr=slave)
    os.close(slave)
    seen = b""
    while b"iteration" not in seen:  # the progress bar tells that the solve is under way
        seen += os.read(master, 4096)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    os.close(master)
    assert process.returncode == 130
    assert "interrupted" in output
    assert np.load("x.npy").shape == (n,)


@pytest.mark.parametrize("name", ["typer", "rich"])
def test_missing_packages_give_one_line(name):
    code = f"import sys; sys.modules['{name}'] = None; from kantor.cli import main; main()"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert 'pip install "kantor[cli]"' in process.stderr
    assert len(process.stderr.strip().splitlines()) == 1


# What a newcomer runs into ------------------------------------------------------------------------------------------


def test_a_singular_matrix_is_explained_in_the_words_of_the_command(folder):
    line = sp.diags_array([[1.0] + [2.0] * 98 + [1.0], [-1.0] * 99, [-1.0] * 99], offsets=[0, 1, -1])
    scipy.io.mmwrite("line.mtx", line, precision=17)
    result = run("solve", "line.mtx", "--preconditioner", "none")
    assert result.exit_code == 1
    assert "--rhs: subtract its mean" in result.stderr
    assert "result." not in result.stderr


def test_a_file_that_is_no_matrix_says_what_would_be_one(folder):
    (folder / "hello.mtx").write_text("hello")
    expect_bad_input(run("solve", "hello.mtx"), "hello.mtx", "%%MatrixMarket", "scipy.io.mmwrite")


def test_processes_that_were_not_asked_to_share_are_told_how(folder, monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    result = run("solve", "a.mtx")
    assert result.exit_code == 0
    assert "warning: each of 2 processes" in result.stderr
    assert "--distributed" in result.stderr
    monkeypatch.setenv("RANK", "1")
    assert run("solve", "a.mtx").stderr == ""


def test_a_laplacian_without_its_minus_sign_is_told_to_change_signs(folder):
    scipy.io.mmwrite("minus.mtx", -poisson(), precision=17)
    result = run("solve", "minus.mtx")
    assert result.exit_code == 1
    assert "change the signs of both" in result.stderr
    assert "M=" not in result.stdout
    scipy.io.mmwrite("shifted.mtx", poisson() - 3 * sp.eye_array(N), precision=17)
    result = run("solve", "shifted.mtx")
    assert result.exit_code == 1
    assert "MINRES" in result.stderr


def test_python_m_kantor_is_the_command():
    ran = subprocess.run([sys.executable, "-m", "kantor", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == kantor.__version__
