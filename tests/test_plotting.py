"""Convergence plots."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kantor.linalg import Stencil, cg
from kantor.plotting import new_axes, plot_convergence, save_figure


def history(residuals):
    return SimpleNamespace(iterations=np.arange(len(residuals)), residual_norms=np.asarray(residuals, dtype=float))


def test_log_axis_label_and_tolerance(tmp_path):
    ax = plot_convergence(history([1.0, 0.1, 0.01]), label="cg", tolerance=0.02)
    assert ax.get_yscale() == "log"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("iteration", "residual norm")
    assert [text.get_text() for text in ax.texts] == ["cg", "tolerance"]
    assert ax.texts[0].xy == (2, 0.01)
    save_figure(ax, tmp_path / "p.svg")
    assert (tmp_path / "p.svg").stat().st_size > 1000


def test_draws_into_given_axes():
    ax = new_axes()
    assert plot_convergence(history([1.0, 0.1]), ax) is ax
    assert plot_convergence(history([1.0, 0.2]), ax, color="red") is ax
    assert len(ax.lines) == 2
    assert ax.lines[1].get_color() == "red"


def test_batch_gives_a_line_each():
    assert len(plot_convergence(history(np.full((5, 3), 0.5)), label="cg").lines) == 3


@pytest.mark.parametrize("residuals", [[], [0.0], [np.nan, np.inf], [1.0, 0.0], [[1.0, 0.0], [0.0, 0.0]]])
def test_values_without_a_place_on_the_axis(tmp_path, residuals):
    ax = plot_convergence(history(residuals), label="cg", tolerance=0.0)
    save_figure(ax, tmp_path / "p.png")


def test_mismatch_is_an_error():
    wrong = SimpleNamespace(iterations=np.arange(3), residual_norms=np.ones(4))
    with pytest.raises(ValueError, match=r"plot_convergence: .*\(4,\) for \(3,\)"):
        plot_convergence(wrong)


def test_result_plots_itself():
    result = cg(Stencil((8, 8)), torch.ones(64, dtype=torch.float64))
    assert result.plot().lines[0].get_ydata()[0] == pytest.approx(8.0)


def test_missing_matplotlib_names_the_extra():
    code = (
        "import sys; sys.modules['matplotlib'] = sys.modules['matplotlib.figure'] = None\n"
        "from kantor.plotting import new_axes\n"
        "try:\n    new_axes()\n"
        "except ImportError as error:\n    assert 'kantor[demo]' in str(error)\n"
        "else:\n    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_minimization_is_drawn_against_work_seconds_and_points():
    from kantor.optim import minimize

    result = minimize(lambda x: (x**4).sum(), torch.ones(3, dtype=torch.float64))
    labels = {"work": "gradient equivalents", "seconds": "seconds", "points": "points"}
    for against, label in labels.items():
        ax = result.plot(against=against)
        assert ax.get_xlabel() == label
        norms = ax.get_lines()[0].get_ydata()
        np.testing.assert_array_equal(norms, result.history["grad_norm"])
        assert ax.get_yscale() == "log"
    work = result.plot().get_lines()[0].get_xdata()
    np.testing.assert_array_equal(work, result.history["n_grad"] + 2 * result.history["n_hvp"])
    with pytest.raises(ValueError, match="against"):
        result.plot(against="energy")


def test_minimization_of_a_batch_draws_its_first_problem():
    from kantor.optim import minimize

    result = minimize(lambda X: (X**4).sum(-1), torch.ones(2, 3, dtype=torch.float64), batched=True)
    np.testing.assert_array_equal(result.plot().get_lines()[0].get_ydata(), result.history["grad_norm"][0])
