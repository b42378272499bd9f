"""``kantor solve --distributed``: on the session's processes, and once under torchrun itself."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp
from scipy.sparse.linalg import spsolve
from typer.testing import CliRunner

from kantor import cli
from kantor._ranks import Ranks
from ranks import run

SIDE = 12


def _poisson(shift: float = 0.0) -> sp.csr_array:
    line = sp.diags_array([-np.ones(SIDE - 1), 2 * np.ones(SIDE), -np.ones(SIDE - 1)], offsets=[-1, 0, 1])
    square = sp.kron(line, sp.eye_array(SIDE)) + sp.kron(sp.eye_array(SIDE), line)
    return sp.csr_array(square + shift * sp.diags_array(np.arange(SIDE * SIDE, dtype=float) % 3))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    scipy.io.mmwrite(tmp_path / "grid.mtx", _poisson(), symmetry="symmetric", precision=17)
    scipy.io.mmwrite(tmp_path / "a.mtx", _poisson(0.1), symmetry="symmetric", precision=17)
    scipy.io.mmwrite(tmp_path / "minus.mtx", -_poisson(), symmetry="symmetric", precision=17)
    np.save(tmp_path / "b.npy", np.random.default_rng(0).standard_normal((SIDE * SIDE, 2)))
    np.save(tmp_path / "short.npy", np.ones(7))
    return tmp_path


def _commands(ranks: Ranks, folder: str, commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """Exit code, output and messages of each; the pool's default group takes the place of torchrun's."""
    os.chdir(folder)
    answers = []
    for words in commands:
        result = CliRunner().invoke(cli.build_app(), ["solve", "--distributed", *words])
        answers.append((result.exit_code, result.stdout, result.stderr))
    return answers


def test_every_outcome_on_four_processes(folder: Path) -> None:
    commands = [
        ["a.mtx", "--rhs", "b.npy", "--rtol", "1e-10", "-o", "x.npy", "--json"],
        ["grid.mtx", "--rhs", "b.npy", "--rtol", "1e-10", "--preconditioner", "jacobi", "-o", "y.npy"],
        ["grid.mtx", "--json", "--dtype", "float32"],
        ["grid.mtx", "--maxiter", "2", "--preconditioner", "none"],
        ["minus.mtx"],
        ["grid.mtx", "--preconditioner", "multigrid"],
        ["nowhere.mtx"],
        ["a.mtx", "--rhs", "short.npy"],
        ["a.mtx", "-o", "x.doc"],
    ]
    first, *others = run(4, _commands, str(folder), commands)
    b = np.load(folder / "b.npy")
    code, out, _ = first[0]
    outcome = json.loads(out)
    assert code == 0
    assert (outcome["processes"], outcome["unknowns"], outcome["nonzeros"]) == (4, 144, _poisson(0.1).nnz)
    assert outcome["preconditioner"] == "ic0"
    assert "each process's block" in outcome["preconditioner_note"]
    np.testing.assert_allclose(np.load(folder / "x.npy"), spsolve(_poisson(0.1), b), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(np.load(folder / "y.npy"), spsolve(_poisson(), b), rtol=1e-7, atol=1e-9)
    assert "processes" in first[1][1]
    assert "no multigrid: a grid's needs one process" in json.loads(first[2][1])["preconditioner_note"]
    assert (first[3][0], "raise --maxiter" in first[3][2]) == (1, True)
    assert (first[4][0], "negative curvature" in first[4][1]) == (1, True)
    for number, word in ((5, "ShardedPoissonGrid"), (6, "no such file"), (7, "shape (7,)"), (8, "x.doc")):
        assert first[number][0] == 2
        assert word in first[number][2]
        assert len(first[number][2].strip().splitlines()) == 1
    for other in others:
        assert [code for code, _, _ in other] == [code for code, _, _ in first]
        assert all(out == "" and err == "" for _, out, err in other)


def _outcomes_of_processes(folder: Path, *words: str) -> list[tuple[int, str, str]]:
    """Exit code and output of two processes with the environment that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "kantor.cli", "solve", "--distributed", *words],
            cwd=folder, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    answers = [process.communicate(timeout=120) for process in processes]
    return [(process.returncode, *answer) for process, answer in zip(processes, answers, strict=True)]


def test_processes_of_their_own(folder: Path) -> None:
    words = ["a.mtx", "--rhs", "b.npy", "--rtol", "1e-10", "-o", "z.npy", "--json"]
    (code, out, err), other = _outcomes_of_processes(folder, *words)
    assert (code, *other) == (0, 0, "", ""), err
    assert json.loads(out)["processes"] == 2
    expected = spsolve(_poisson(0.1), np.load(folder / "b.npy"))
    np.testing.assert_allclose(np.load(folder / "z.npy"), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_under_torchrun(folder: Path, size: str) -> None:
    if size != "full":
        pytest.skip("three processes to start; run with --size full")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kantor.cli"]
    environment: dict[str, Any] = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    answer = subprocess.run(
        [*words, "solve", "--distributed", "a.mtx", "--json"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["processes"] == 2
