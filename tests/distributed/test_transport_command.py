"""``kantor transport --distributed``, on the session's processes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from typer.testing import CliRunner

from kantor import cli
from kantor._ranks import Ranks
from ranks import run

N, M = 37, 29


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    X, Y = random.random((N, 2)), random.random((M, 2))
    C = ((X[:, None] - Y[None]) ** 2).sum(-1)
    np.save(tmp_path / "x.npy", X)
    np.savetxt(tmp_path / "x.csv", X, delimiter=",", fmt="%.17g")
    np.save(tmp_path / "y.npy", Y)
    np.save(tmp_path / "c.npy", C)
    np.save(tmp_path / "a.npy", random.random(N))
    C[30, 2] = np.nan
    np.save(tmp_path / "nan.npy", C)
    return tmp_path


def _commands(ranks: Ranks, folder: str, commands: list[list[str]]) -> list[tuple[int, str, str]]:
    """Exit code, output and messages of each; the pool's default group takes the place of torchrun's."""
    os.chdir(folder)
    answers = []
    for words in commands:
        result = CliRunner().invoke(cli.build_app(), ["transport", "--distributed", *words])
        answers.append((result.exit_code, result.stdout, result.stderr))
    return answers


def test_every_outcome_on_four_processes(folder: Path) -> None:
    solved = [
        ["x.npy", "y.npy", "--json", "-o", "NAME.npz", "--map", "NAME.npy"],
        ["x.csv", "y.npy", "--a", "a.npy", "--unbalanced", "0.5", "--json", "-o", "NAME.npz", "--plot", "NAME.png"],
        ["--cost-matrix", "c.npy", "--method", "sinkhorn", "--json", "-o", "NAME.npz", "--plot", "NAME.png"],
    ]
    commands = [[word.replace("NAME", f"many{k}") for word in words] for k, words in enumerate(solved)]
    commands += [
        ["x.npy", "y.npy"],
        ["x.npy", "y.npy", "--max-iter", "1", "--tol", "1e-13"],
        ["--cost-matrix", "nan.npy"],
        ["x.npy", "nowhere.npy"],
        ["x.npy", "y.npy", "--max-points", "10"],
        ["x.npy", "y.npy", "--method", "sns"],
        ["x.npy", "y.npy", "-o", "plan.doc"],
    ]
    first, *others = run(4, _commands, str(folder), commands)
    os.chdir(folder)
    for k, words in enumerate(solved):
        alone = CliRunner().invoke(cli.build_app(), ["transport", *(word.replace("NAME", f"one{k}") for word in words)])
        assert (first[k][0], alone.exit_code) == (0, 0), first[k][2]
        one, many = json.loads(alone.stdout), json.loads(first[k][1])
        assert many["processes"] == 4
        for name in ("rows", "columns", "status", "method"):
            assert many[name] == one[name]
        for name in ("value", "linear_value", "reg", "cost_range"):
            assert many[name] == pytest.approx(one[name], rel=1e-8)
        assert many["plan"]["nonzeros"] == one["plan"]["nonzeros"]
        assert many["plan"]["largest_at"] == one["plan"]["largest_at"]
        plans = [scipy.sparse.load_npz(folder / f"{name}{k}.npz").toarray() for name in ("one", "many")]
        np.testing.assert_allclose(plans[1], plans[0], rtol=1e-6, atol=1e-10)
    np.testing.assert_allclose(np.load("many0.npy"), np.load("one0.npy"), rtol=1e-7)
    assert all((folder / f"many{k}.png").stat().st_size > 1000 for k in (1, 2))
    assert "processes" in first[3][1]
    assert (first[4][0], "raise --max-iter" in first[4][2]) == (1, True)
    wrong = ((5, "entry (30, 2) is nan"), (6, "nowhere.npy"), (7, "--max-points"), (8, "'newton'"), (9, "plan.doc"))
    for number, word in wrong:
        assert first[number][0] == 2
        assert word in first[number][2]
        assert len(first[number][2].strip().splitlines()) == 1
    for other in others:
        assert [code for code, _, _ in other] == [code for code, _, _ in first]
        assert all(out == "" and err == "" for _, out, err in other)
