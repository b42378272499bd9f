"""Convergence plots."""

from __future__ import annotations

import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib import rcParams

import kantor
from kantor.linalg import Stencil, cg
from kantor.plotting import (
    new_axes,
    plot_convergence,
    plot_displacement,
    plot_displacement_field,
    plot_transport,
    save_figure,
)


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


# Transport ---------------------------------------------------------------------------------------------------------


def transport_history(errors, reg, seconds=None):
    seconds = np.arange(1.0, len(errors) + 1) if seconds is None else seconds
    return {"marginal_error": np.asarray(errors, float), "reg": np.asarray(reg, float), "seconds": seconds}


def test_transport_is_drawn_against_seconds_and_steps_with_marks_where_reg_changes(tmp_path):
    history = transport_history([1.0, 0.1, 0.5, 0.01, 0.4, 1e-9], [1, 1, 0.1, 0.1, 0.01, 0.01], np.linspace(0, 1, 6))
    ax = plot_transport(history, label="newton", tolerance=1e-8, color="red")
    assert ax.get_yscale() == "log"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("seconds", "marginal error; marks: reg changes")
    curve, marks, tolerance = ax.lines
    np.testing.assert_array_equal(curve.get_ydata(), history["marginal_error"])
    np.testing.assert_array_equal(marks.get_ydata(), [0.5, 0.4])
    np.testing.assert_allclose(marks.get_xdata(), [0.4, 0.8])
    assert marks.get_markeredgecolor() == "red"
    assert tolerance.get_ydata()[0] == 1e-8
    assert [text.get_text() for text in ax.texts] == ["newton"]
    save_figure(ax, tmp_path / "p.svg")
    plain = transport_history([1.0, 0.1], [1, 1])
    assert plot_transport(plain, ax=ax, against="steps") is ax
    np.testing.assert_array_equal(ax.lines[-1].get_xdata(), [1, 2])
    assert "marks" in ax.get_ylabel()
    colours = [plot_transport(history, ax=ax).lines[-2].get_color() for _ in range(2)]
    assert colours == rcParams["axes.prop_cycle"].by_key()["color"][1:3]  # marks take none of the cycle


@pytest.mark.parametrize("errors", [[], [0.0], [np.nan, np.inf], [1.0, 0.0]])
def test_transport_values_without_a_place_on_the_axis(tmp_path, errors):
    ax = plot_transport(transport_history(errors, np.ones(len(errors))), label="newton", tolerance=0.0)
    assert ax.get_ylabel() == "marginal error"
    save_figure(ax, tmp_path / "p.png")


def test_transport_errors():
    with pytest.raises(ValueError, match=r"against: expected 'seconds' or 'steps', got 'energy'"):
        plot_transport(transport_history([1.0], [1.0]), against="energy")
    with pytest.raises(ValueError, match=r"expected an entry 'marginal_error'.*torch.compile"):
        plot_transport({})


def test_transport_result_plots_itself():
    C = torch.rand(20, 15, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result = kantor.transport.solve(C, reg=1e-3)
    curve, *others = result.plot().lines
    np.testing.assert_array_equal(curve.get_ydata(), result.history["marginal_error"])
    marks = np.diff(result.history["reg"]).any()
    assert len(others) == 1 + marks  # the tolerance too


def csr(matrix):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.as_tensor(matrix).to_sparse_csr()


@pytest.mark.parametrize("d", [2, 3])
def test_displacement_draws_sources_images_and_the_heaviest_moves(tmp_path, d):
    random = torch.Generator().manual_seed(0)
    X, Y = torch.rand(6, d, dtype=torch.float64, generator=random), torch.rand(5, d, generator=random).double()
    P = torch.rand(6, 5, dtype=torch.float64, generator=random)
    P[2] = 0  # nothing leaves there
    ax = plot_displacement(X, Y, csr(P), lines=7)
    assert (ax.name == "3d") == (d == 3)
    sources, images = (c for c in ax.collections if c.get_label() in ("source", "image"))
    (moves,) = (c for c in ax.collections if c.get_label() not in ("source", "image"))
    expected = ((P @ Y) / P.sum(1, keepdim=True))[[0, 1, 3, 4, 5]]
    if d == 2:
        np.testing.assert_array_equal(sources.get_offsets(), X)
        np.testing.assert_allclose(images.get_offsets(), expected, rtol=1e-12)
        segments = moves.get_segments()
        assert len(segments) == 7
        i, j = divmod(int(P.argmax()), 5)
        np.testing.assert_allclose(segments[0], torch.stack([X[i], Y[j]]), rtol=1e-12)
    save_figure(ax, tmp_path / "p.png")
    # A drawing into given axes, of an empty plan.
    again = plot_displacement(X, Y, csr(torch.zeros(6, 5)), new_axes(projection="3d" if d == 3 else None))
    save_figure(again, tmp_path / "p.pdf")


def test_displacement_errors():
    X, P = torch.rand(3, 2), csr(torch.eye(3))
    with pytest.raises(ValueError, match=r"2 or 3 dimensions, got 4"):
        plot_displacement(torch.rand(3, 4), torch.rand(3, 4), P)
    with pytest.raises(ValueError, match=r"X and Y: .*\(3, 2\) and \(3, 3\)"):
        plot_displacement(X, torch.rand(3, 3), P)
    with pytest.raises(ValueError, match=r"plan_sparse: expected shape \(3, 4\), got \(3, 3\)"):
        plot_displacement(X, torch.rand(4, 2), P)
    with pytest.raises(TypeError, match="sparse CSR matrix, got torch.strided"):
        plot_displacement(X, X, torch.eye(3))
    with pytest.raises(ValueError, match="axes for 2 dimensions"):
        plot_displacement(X, X, P, new_axes(projection="3d"))


def test_displacement_field_has_arrows_from_light_places(tmp_path):
    picture = np.zeros((48, 72))
    picture[:, :36] = 1.0
    positions = np.stack(np.meshgrid(np.arange(48.0), np.arange(72.0), indexing="ij"), -1).reshape(-1, 2)
    images = positions + np.array([2.0, 5.0])
    images[0] = np.nan
    ax = plot_displacement_field(picture, positions, images)
    (arrows,) = ax.collections
    assert 16 * 12 <= len(arrows.U) <= 17 * 13
    assert arrows.X.max() < 36
    np.testing.assert_array_equal(np.unique(arrows.U), [5.0])
    np.testing.assert_array_equal(np.unique(arrows.V), [2.0])
    save_figure(ax, tmp_path / "p.png")
    save_figure(plot_displacement_field(np.zeros((4, 4)), positions[:1], positions[:1]), tmp_path / "p.png")
    with pytest.raises(ValueError, match="plot_displacement_field"):
        plot_displacement_field(picture, positions, images[:-1])


def test_a_name_of_a_file_in_place_of_axes_is_told_how_files_are_written(tmp_path):
    result = cg(Stencil((8, 8)), torch.ones(8, 8, dtype=torch.float64))
    with pytest.raises(
        TypeError, match=r"ax: expected matplotlib axes, got str; .*save_figure\(result\.plot\(\), path\)"
    ):
        result.plot(str(tmp_path / "history.png"))
