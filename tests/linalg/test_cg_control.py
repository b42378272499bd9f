"""Callbacks, progress and Ctrl-C: who may stop a solve, when it takes effect, and what is left."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from devices import home
from kantor.linalg import Dense, SolveStatus, Stencil, cg, ic0
from systems import F32, F64, error, example_operators, expect, random, solve

# --- callbacks ---


@pytest.mark.parametrize("kind", ["stencil", "callable"])
def test_callback_sees_every_iteration(kind: str, device: str) -> None:
    A = example_operators(device=home(device))[kind]
    b = random(20, device=home(device))
    seen: list[Any] = []
    result = solve(A, b, rtol=1e-8, callback=seen.append)
    assert [info.iteration for info in seen] == list(range(1, result.iterations + 1))
    assert [info.residual_norm for info in seen] == result.history.residual_norms[1:].tolist()
    plain = solve(A, b, rtol=1e-8)
    assert torch.equal(plain.x, result.x)


@pytest.mark.parametrize("kind", ["stencil", "callable"])
def test_callback_stops(kind: str, device: str) -> None:
    A = example_operators(device=home(device))[kind]
    b = random(2, 20, device=home(device))
    result = cg(A, b, rtol=0, callback=lambda info: info.iteration == 4)  # no warning: it was asked for
    assert result.status is SolveStatus.STOPPED
    assert result.iterations == 4
    assert torch.equal(result.x, expect("maxiter", lambda: cg(A, b, rtol=0, maxiter=4)).x)
    true = (b - A.matvec(result.x)).norm(dim=-1).max()
    assert result.residual_norm == pytest.approx(float(true), rel=1e-9)
    again = solve(A, b, rtol=1e-9, **result.state)
    assert error(A.matvec(again.x), b) < 1e-8


def test_only_true_stops() -> None:
    for answer in (None, False, 0, 1, "yes"):
        assert solve(Stencil((5, 5)), random(25), callback=lambda info, answer=answer: answer).converged  # type: ignore[arg-type]


def test_callback_in_the_last_iteration_does_not_hide_convergence() -> None:
    A = Stencil((5, 5))
    b = random(25)
    last = solve(A, b, rtol=1e-6).iterations
    assert solve(A, b, rtol=1e-6, callback=lambda info: info.iteration == last).converged


def test_callback_of_a_batch_sees_the_largest_norm() -> None:
    A = Stencil((5, 5))
    b = random(3, 25) * torch.tensor([[1.0], [1e-6], [10.0]], dtype=F64)
    seen: list[Any] = []
    solve(A, b, rtol=1e-8, callback=seen.append)
    alone: list[Any] = []
    solve(A, b[2], rtol=1e-8, callback=alone.append)
    assert seen[0].residual_norm == pytest.approx(alone[0].residual_norm, rel=1e-12)


@pytest.mark.parametrize("where", ["callback", "operator", "preconditioner"])
def test_exceptions_pass_through(where: str, device: str) -> None:
    """An exception in Python code leaves through the native loop, and the next solve is none the worse."""
    A = Stencil((5, 5), device=home(device))
    b = random(25, device=home(device))
    calls: list[int] = []

    def failing(value: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise ZeroDivisionError("on purpose")
        return value

    options: dict[str, Any] = {
        "callback": {"A": A, "callback": lambda info: failing(None)},
        "operator": {"A": lambda x: failing(A.matvec(x))},
        "preconditioner": {"A": A, "M": lambda r: failing(r.clone())},
    }[where]
    with torch.no_grad(), pytest.raises(ZeroDivisionError, match="on purpose"):
        cg(b=b, rtol=1e-10, **options)
    assert len(calls) == 3
    assert solve(A, b).converged


def test_solves_inside_a_solve() -> None:
    """A callable operator may itself call the solver: (A^-1)^-1."""
    A = Stencil((4, 4), shift=1.0)
    b = random(16)
    inner_seen: list[Any] = []
    outer_seen: list[Any] = []
    with torch.no_grad():
        result = solve(
            lambda x: solve(A, x, rtol=1e-14, callback=inner_seen.append).x, b, rtol=1e-10, callback=outer_seen.append
        )
    assert error(result.x, A.matvec(b)) < 1e-8
    assert len(outer_seen) == result.iterations < len(inner_seen)


def test_solves_in_several_threads() -> None:
    A = Stencil((40, 40))
    rows = random(4, 1600)
    results: dict[int, Any] = {}
    counts: dict[int, list[int]] = {k: [] for k in range(4)}

    def work(k: int) -> None:
        results[k] = cg(A, rows[k], rtol=1e-8, callback=lambda info: counts[k].append(info.iteration))

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for k in range(4):
        assert torch.equal(results[k].x, solve(A, rows[k], rtol=1e-8).x)
        assert counts[k] == list(range(1, results[k].iterations + 1))


# --- progress ---


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    result = solve(Stencil((30, 30)), random(900), rtol=1e-8, progress=True)
    shown = capsys.readouterr()
    assert "cg: 100%" in shown.err
    assert f"iteration {result.iterations}" in shown.err
    assert not shown.out
    solve(Stencil((30, 30)), random(900), rtol=1e-8)
    assert capsys.readouterr() == ("", "")


def test_progress_without_tqdm(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with caplog.at_level(logging.INFO, logger="kantor"):
        result = solve(Stencil((30, 30)), random(900), rtol=1e-8, progress=True)
    assert f"cg: iteration {result.iterations}" in caplog.text


def test_progress_with_a_callback_and_in_single_precision(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    seen: list[Any] = []
    result = solve(Stencil((20, 20)), random(400), rtol=1e-11, storage=F32, progress=True, callback=seen.append)
    assert len(seen) == result.iterations
    assert "cg: 100%" in capsys.readouterr().err


# --- Ctrl-C ---


@contextmanager
def interrupt_after(seconds: float) -> Iterator[list[float]]:
    """Ctrl-C from another thread; yields a list that gets the time when it was sent."""
    sent: list[float] = []

    def send() -> None:
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(seconds, send)
    timer.start()
    try:
        yield sent
    finally:
        timer.cancel()
        timer.join()


def long_problem(kind: str) -> dict[str, Any]:
    """Runs for seconds if nobody stops it; an iteration takes about a millisecond."""
    A = Stencil((200, 200) if kind == "storage" else (200, 2000), weights=(1.0, 1e-3))
    problems: dict[str, dict[str, Any]] = {
        "batch": {"b": random(3, A.shape[0])},
        "ic0": {"M": ic0(A) if kind == "ic0" else None},
        "callable": {"A": lambda x: A.matvec(x)},
        "slow callable": {"A": lambda x: (time.sleep(0.01), A.matvec(x))[1]},
        "callable preconditioner": {"M": lambda r: r.clone()},
        "callback": {"callback": lambda info: None},
        "storage": {"storage": F32, "callback": lambda info: time.sleep(1e-3)},
    }
    return {"A": A, "b": random(A.shape[0]), "rtol": 0.0, "maxiter": 10**7, **problems.get(kind, {})}


LONG = ("stencil", "batch", "ic0", "callable", "slow callable", "callable preconditioner", "callback", "storage")


def assert_lands_soon(interrupted: Callable[[float], float]) -> None:
    """Within 0.1 s, beyond the iteration under way. The best of a few: the machine may be busy with something else."""
    delays: list[float] = []
    while len(delays) < 5 and min(delays, default=1.0) > 0.1:
        delays.append(interrupted(0.25 + 0.037 * len(delays)))
    assert min(delays) <= 0.1, delays


@pytest.mark.parametrize("kind", LONG)
def test_ctrl_c_returns_the_last_iterate(kind: str) -> None:
    options = long_problem(kind)
    b = options["b"]
    A = options["A"] if isinstance(options["A"], Stencil) else long_problem("stencil")["A"]

    def interrupted(after: float) -> float:
        with torch.no_grad(), interrupt_after(after) as sent:
            result = expect("interrupted", lambda: cg(**options, interrupt="return"))
            landed = time.perf_counter()
        assert sent, "the solve ended by itself"
        assert result.iterations > 0
        true = (b - A.matvec(result.x)).norm(dim=-1).max()
        assert result.residual_norm == pytest.approx(float(true), rel=1e-6)
        assert result.residual_norm < 100 * float(b.norm(dim=-1).max())
        assert result.state["x0"].equal(result.x)
        return landed - sent[0] - result.seconds / result.iterations

    assert_lands_soon(interrupted)


@pytest.mark.parametrize("kind", LONG)
def test_ctrl_c_raises(kind: str) -> None:
    options = long_problem(kind)

    def interrupted(after: float) -> float:
        with torch.no_grad(), interrupt_after(after) as sent:
            with pytest.raises(KeyboardInterrupt):
                cg(**options)
            landed = time.perf_counter()
        assert sent
        return landed - sent[0]

    assert_lands_soon(interrupted)
    assert solve(Stencil((5, 5)), random(25)).converged


@pytest.mark.parametrize("answer", ["return", "raise"])
def test_ctrl_c_from_outside(answer: str) -> None:
    """In a process of its own, as from a terminal."""
    program = textwrap.dedent(
        f"""
        import os, signal, threading, time, warnings
        import torch
        from kantor.linalg import Stencil, cg

        warnings.simplefilter("ignore")
        b = torch.ones(300, 300, dtype=torch.float64)
        ready = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
        ready.start()
        try:
            result = cg(Stencil((300, 300)), b, rtol=0, maxiter=10**8, interrupt={answer!r})
            print("returned", result.status, result.iterations > 0)
        except KeyboardInterrupt:
            print("raised")
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ("returned interrupted True" if answer == "return" else "raised")


def test_own_signal_handlers_are_served() -> None:
    """Python's handlers run during a solve, and what they raise comes out."""

    class Alarm(Exception):
        pass

    def handler(number: int, frame: Any) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        started = time.perf_counter()
        with pytest.raises(Alarm):
            cg(**long_problem("stencil"))
        assert time.perf_counter() - started < 2
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_solve_in_another_thread_leaves_signals_alone() -> None:
    """Only the main thread takes signals; others go on."""
    done: list[Any] = []
    worker = threading.Thread(target=lambda: done.append(cg(Stencil((150, 150)), random(22_500), rtol=1e-9)))
    worker.start()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    worker.join()
    assert done[0].converged


def test_gradients_after_an_interruption() -> None:
    """The iterate of an interrupted solve still has the implicit derivative."""
    matrix = random(5, 5)
    matrix = (matrix @ matrix.T + torch.eye(5, dtype=F64)).requires_grad_()
    result = cg(Dense(matrix), random(5), rtol=1e-12, callback=lambda info: info.iteration == 2)
    assert result.status is SolveStatus.STOPPED
    result.x.sum().backward()
    expected = -torch.outer(torch.linalg.solve(matrix.detach(), torch.ones(5, dtype=F64)), result.x.detach())
    grad: Tensor | None = matrix.grad
    assert grad is not None
    assert error(grad, expected) < 1e-9
