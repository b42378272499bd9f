"""Samples against a dense eigendecomposition; trainings that learn, repeat, stop and go on, and refuse bad input."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kantor.linalg.direction_training as module
from kantor import NumericalBreakdown
from kantor.datasets import poisson_scenes
from kantor.linalg import (
    Dense,
    DirectionNet,
    PoissonGrid,
    TrainingResult,
    VariableStencilNet,
    cg,
    dcdm,
    ritz_dataset,
    train_direction_net,
)
from kantor.linalg._training import TrainingInfo
from kantor.linalg.lanczos_samples import ritz_values
from op_checks import same_bits, threads
from systems import F32, F64, random, spd


def box(size: int = 16, dim: int = 2) -> PoissonGrid:
    return PoissonGrid(poisson_scenes.open_box((size,) * dim))


def small_net(seed: int = 0) -> DirectionNet:
    torch.manual_seed(seed)
    return DirectionNet(2, channels=4)


def weights(net: nn.Module) -> list[Tensor]:
    return [p.detach() for p in net.parameters()]


# --- samples ---


def test_lanczos_finds_the_spectrum() -> None:
    matrix = spd(40, 1e3)
    values, vectors, basis = ritz_values(Dense(matrix), 40)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix), rtol=1e-9, atol=1e-12)
    ritz = vectors.mT @ basis
    torch.testing.assert_close(ritz @ ritz.mT, torch.eye(40, dtype=F64), rtol=0, atol=1e-12)
    assert float((ritz @ matrix - values[:, None] * ritz).norm()) <= 1e-10


def test_the_ends_of_the_spectrum_come_first() -> None:
    A = box(12)
    exact = torch.linalg.eigvalsh(A.to_csr().dense())
    values, _, basis = ritz_values(A, 60)
    assert float((values[0] - exact[0]).abs()) <= 1e-8 * float(exact[0])
    assert float((values[-1] - exact[-1]).abs()) <= 1e-8 * float(exact[-1])
    torch.testing.assert_close(basis @ basis.mT, torch.eye(60, dtype=F64), rtol=0, atol=1e-13)


def test_an_exhausted_krylov_space_ends_early() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=F64).repeat(10))
    values, _, _ = ritz_values(Dense(matrix), 30)
    torch.testing.assert_close(values, torch.tensor([1.0, 2.0, 3.0], dtype=F64))


def test_samples_are_normed_rich_in_low_modes_and_repeat() -> None:
    A = box(12)
    samples = ritz_dataset(A, 100, 300, dtype=F64, seed=3)
    assert samples.shape == (300, 12, 12)
    torch.testing.assert_close(samples.flatten(1).norm(dim=1), torch.ones(300, dtype=F64))
    assert bool((samples[:, ~A.mask] == 0).all())
    values, vectors, basis = ritz_values(A, 100, seed=3)
    shares = (samples.flatten(1) @ (vectors.mT @ basis).mT).square().mean(0)
    # of the energy, 55 parts times 81 against 45 parts
    assert float(shares[:55].sum()) == pytest.approx(55 * 81 / (55 * 81 + 45), abs=0.002)
    assert values[54] < values[55]
    assert same_bits(samples, ritz_dataset(A, 100, 300, dtype=F64, seed=3))
    assert not torch.equal(samples, ritz_dataset(A, 100, 300, dtype=F64, seed=4))


def test_samples_leave_the_null_space_out() -> None:
    closed = PoissonGrid(torch.full((6, 6), 2))
    samples = ritz_dataset(closed, 36, 50, dtype=F64)
    assert float(samples.flatten(1).sum(1).abs().max()) <= 1e-7


def test_samples_of_a_matrix_are_flat_and_float32() -> None:
    samples = ritz_dataset(spd(20), 10, 2000)
    assert samples.shape == (2000, 20)
    assert samples.dtype == F32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 5), "m: expected an integer from 1 to 256"),
        ((300, 5), "m: expected an integer from 1 to 256"),
        ((5, 0), "n_samples"),
        ((5, 5, 1.5), "low_fraction"),
        ((5, 5, 0.5, 0.0), "low_gain"),
    ],
)
def test_bad_sampling(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"ritz_dataset: {message}"):
        ritz_dataset(box(), *arguments)


def test_zero_matrix() -> None:
    with pytest.raises(ValueError, match="finite and not zero"):
        ritz_dataset(torch.zeros(4, 4), 2, 2)


# --- training ---


def test_a_small_training_beats_conjugate_gradients() -> None:
    """The whole way: samples, training, inference, conjugate directions, on obstacles that were not trained on."""
    torch.manual_seed(0)
    net = DirectionNet(2, channels=8)
    data = (box(), ritz_dataset(box(), 200, 1500))
    with threads(1):  # small convolutions: faster than with two
        result = train_direction_net(net, data, steps=400, batch=8, lr=5e-3)
    assert result.losses[-20:].mean() < 0.2 * result.losses[:5].mean()
    assert result.validation_loss == pytest.approx(result.losses[-20:].mean(), rel=0.5)
    A = PoissonGrid(poisson_scenes.smoke_sphere((16, 16)))
    b = random(16, 16) * A.mask
    learned = dcdm(A, b, net.bind(A), rtol=1e-6)
    assert learned.converged
    assert learned.iterations < 0.7 * cg(A, b, rtol=1e-6).iterations


def test_the_linear_network_learns_several_geometries() -> None:
    torch.manual_seed(0)
    net = VariableStencilNet(2, 3)
    grids = [box(), *(PoissonGrid(poisson_scenes.smoke_balls((16, 16), seed)) for seed in (1, 2))]
    train_direction_net(net, grids, loss="residual", steps=200)
    A = PoissonGrid(poisson_scenes.smoke_sphere((16, 16)))
    b = random(16, 16) * A.mask
    learned = dcdm(A, b, net.bind(A), rtol=1e-6)
    assert learned.converged
    assert learned.iterations < 0.5 * cg(A, b, rtol=1e-6).iterations


@pytest.mark.parametrize("kind", ["scaled", "residual"])
def test_losses_are_those_of_the_papers(kind: Any) -> None:
    net, A = small_net().double(), box(8)
    b = random(3, 8, 8) * A.mask
    b = b / b.flatten(1).norm(dim=1)[:, None, None]
    expected = []
    for one in b:
        q = net(one, A.mask).reshape(-1)
        one, Aq = one.reshape(-1), A.matvec(q)
        a = (q @ one) / (q @ Aq)
        expected.append((one - a * Aq) @ (one - a * Aq) if kind == "scaled" else (one - Aq).norm())
    torch.testing.assert_close(module._loss(kind, net, A, b), torch.stack(expected).mean())


def test_the_scaled_loss_of_no_direction_is_one_and_has_no_gradient() -> None:
    net, A = small_net(), box(8).to(F32)
    with torch.no_grad():
        net.convolutions[-1].weight.zero_()
    b = (random(2, 8, 8, dtype=F32) * A.mask).flatten(1)
    b = (b / b.norm(dim=1, keepdim=True)).unflatten(1, (8, 8))
    value = module._loss("scaled", net, A, b)
    value.backward()
    assert float(value.detach()) == pytest.approx(1)
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)


def test_validation_is_disjoint_and_everything_is_used() -> None:
    A = box(8)
    samples = random(50, 8, 8, dtype=F32) * A.mask
    chosen = module._split((A, samples), 0, 0.2, 0, next(small_net().parameters()))
    parts = torch.cat([chosen.train, chosen.held_out]).flatten(1)
    assert len(chosen.held_out) == 10
    assert len(parts.unique(dim=0)) == 50
    torch.testing.assert_close(parts.norm(dim=1), torch.ones(50))


def test_equal_seeds_equal_weights() -> None:
    nets = [small_net() for _ in range(3)]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        train_direction_net(net, box(8), steps=6, seed=seed)
    assert same_bits(weights(nets[0]), weights(nets[1]))
    assert not torch.equal(weights(nets[0])[0], weights(nets[2])[0])


def test_flat_samples_several_grids_and_white_noise() -> None:
    A, B = box(8), box(12)
    data = [(A, random(20, 64)), (B, ritz_dataset(B, 10, 20))]
    result = train_direction_net(small_net(), data, steps=6, white=0.5)
    assert np.isfinite(result.losses).all()
    only_noise = train_direction_net(small_net(), A, steps=3, white=1.0, validation=0.0)
    assert np.isnan(only_noise.validation_loss)


# --- interruption ---


def stop_at(step: int) -> Any:
    return lambda info: info.step == step


def test_stopped_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    data = (box(8), ritz_dataset(box(8), 30, 60))
    whole, parts = small_net(), small_net()
    uninterrupted = train_direction_net(whole, data, steps=60, batch=4)
    first = train_direction_net(parts, data, steps=60, batch=4, checkpoint=tmp_path / "c.pt", callback=stop_at(23))
    assert first.stopped
    assert first.steps == 23
    fresh = small_net(seed=5)  # the file has the weights
    second = train_direction_net(fresh, data, steps=60, batch=4, checkpoint=str(tmp_path / "c.pt"))
    assert same_bits(weights(whole), weights(fresh))
    assert np.array_equal(second.losses, uninterrupted.losses)
    assert np.array_equal(second.validation_losses, uninterrupted.validation_losses)
    assert second.validation_steps.tolist() == [50, 60]
    assert second.seconds > first.seconds
    again = train_direction_net(small_net(), data, steps=60, batch=4, checkpoint=tmp_path / "c.pt")
    assert np.array_equal(again.losses, uninterrupted.losses)  # nothing left to do
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.pt"]


def test_ctrl_c_completes_the_step_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    data = (box(8), ritz_dataset(box(8), 30, 60))
    whole, net = small_net(), small_net()
    train_direction_net(whole, data, steps=20, batch=4)

    def interrupt(info: TrainingInfo) -> None:
        if info.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train_direction_net(net, data, steps=20, batch=4, checkpoint=tmp_path / "c.pt", callback=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    result = train_direction_net(net, data, steps=20, batch=4, checkpoint=tmp_path / "c.pt")
    assert result.steps == 20
    assert same_bits(weights(whole), weights(net))


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    train_direction_net(small_net(), box(8), steps=3, checkpoint=path)
    with pytest.raises(ValueError, match=r"is of another training: steps, lr differ"):
        train_direction_net(small_net(), box(8), steps=4, lr=1e-3, checkpoint=path)
    with pytest.raises(ValueError, match=r"another training: net differ"):
        train_direction_net(DirectionNet(2), box(8), steps=3, checkpoint=path)


def test_callback_result_and_plot(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[TrainingInfo] = []
    result = train_direction_net(small_net(), box(8), steps=100, batch=2, lr=1e-3, callback=seen.append)
    assert isinstance(result, TrainingResult)
    assert [info.step for info in seen] == list(range(1, 101))
    assert [info.loss for info in seen] == result.losses.tolist()
    assert np.isnan(seen[48].validation)
    assert seen[-1].validation == result.validation_loss
    rates = [info.lr for info in seen]
    assert max(rates) == rates[9] == 1e-3
    assert rates[-1] == pytest.approx(0, abs=1e-8)
    text = repr(result)
    for expected in ("training of DirectionNet(2-D", "steps       100", "validation", "seconds"):
        assert expected in text
    pytest.importorskip("matplotlib")
    ax = result.plot()
    assert ax.get_xlabel() == "step"
    assert ax.get_ylabel() == "loss"
    assert len(ax.lines) == 2


def test_progress_without_tqdm_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    monkeypatch.setattr("kantor._progress._LOG_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "kantor"):
        train_direction_net(small_net(), box(8), steps=2, progress=True)
    assert "train_direction_net: step 2 of 2, loss" in caplog.text


def test_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    train_direction_net(small_net(), box(8), steps=2, progress=True)
    captured = capfd.readouterr()
    assert "train_direction_net" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "l2"}, "loss: expected 'scaled' or 'residual'"),
        ({"steps": 0}, "steps"),
        ({"batch": 1.5}, "batch"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"white": 1.5}, "white"),
        ({"validation": 1.0}, "validation"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"train_direction_net: {message}"):
        train_direction_net(small_net(), box(8), **options)


def test_bad_data() -> None:
    net, A = small_net(), box(8)
    with pytest.raises(TypeError, match="data: expected a PoissonGrid"):
        train_direction_net(net, torch.ones(3))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="at 1, got int"):
        train_direction_net(net, [A, 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"expected shape \(count, 8, 8\)"):
        train_direction_net(net, (A, torch.ones(5, 9, 9)))
    with pytest.raises(TypeError, match="samples: expected dtype float32 or float64"):
        train_direction_net(net, (A, torch.ones(5, 8, 8, dtype=torch.int64)))
    with pytest.raises(ValueError, match="expected finite values, got nan"):
        train_direction_net(net, (A, torch.full((5, 8, 8), torch.nan)))
    with pytest.raises(ValueError, match="no samples"):
        train_direction_net(net, (A, torch.ones(0, 8, 8)))
    with pytest.raises(ValueError, match="2-D network"):
        train_direction_net(net, box(4, dim=3), steps=1)


def test_a_diverging_training_says_so() -> None:
    with pytest.raises(NumericalBreakdown, match="lower lr"):
        train_direction_net(small_net(), box(8), loss="residual", steps=200, lr=1e12)
