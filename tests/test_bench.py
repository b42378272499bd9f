"""``kantor bench``: cases at tiny size, what becomes of peers that fail, the document, comparisons, the command."""

from __future__ import annotations

import copy
import json
import sys
import types

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from kantor import _bench_command as command
from kantor import cli
from kantor.bench import CASES, compare, machine, results, roofline, runner
from kantor.bench.case import OWN, Peer, Problem, load, prepare
from kantor.bench.harness import Spec, WorkerError

LIGHT = (OWN, "torch", "SciPy", "PyAMG", "scikit-learn")  # libraries that are imported quickly


def tiny_tasks(name):
    case = load(name)
    return [(case, problem, case.make(problem.name, "cpu")) for problem in case.problems("tiny", "cpu")]


def peers_of(case, problem):
    for name, peer in case.PEERS.items():
        if (not problem.suits or name in problem.suits) and peer.library in LIGHT and not peer.obstacle("cpu"):
            yield peer


# Cases -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", [name for name in CASES if name != "optimizers"])
def test_every_answer_has_the_accuracy(name):
    for case, problem, task in tiny_tasks(name):
        found = {}
        for peer in peers_of(case, problem):
            found[peer.name] = case.judge(task, peer.prepare(task)())
            assert found[peer.name]["accuracy"] <= problem.tolerance, (problem.name, peer.name)
            assert all(quantity in found[peer.name] for quantity in problem.quantities if quantity != "seconds")
        assert sum(case.PEERS[peer].library == OWN for peer in found) >= 1
        assert sum(case.PEERS[peer].library != OWN for peer in found) >= 1


def test_optimizers_are_trained_from_the_same_start_and_judged_by_their_loss(monkeypatch):
    ((case, problem, task),) = tiny_tasks("optimizers")
    monkeypatch.setattr(case, "RATES", (0.01, 0.1))
    run = case.PEERS["LANTON"].prepare(task)()
    untrained = case.judge(task, case.Training(task.network(), 0, 0.0))
    trained = case.judge(task, run)
    assert trained["accuracy"] < 0.7 * untrained["accuracy"]
    assert trained["steps"] == 2 * 11
    assert untrained["accuracy"] > problem.tolerance


WRONG = {
    "cg": lambda answer: (answer[0], type(answer[1])(answer[1].x * (1 + 1e-6), answer[1].iterations)),
    "multigrid": lambda answer: (answer[0] * (1 + 1e-4), answer[1]),
    "transport": lambda answer: type(answer)(answer.plan * (1 + 1e-8), answer.steps),
    "knn": lambda answer: (torch.as_tensor(answer[0]).roll(1, 0), answer[1]),
    "diffuse": lambda answer: (answer[0], answer[1] * 1.01),
    "classify": lambda answer: [np.roll(found, 1) for found in answer],
}


@pytest.mark.parametrize("name", list(WRONG))
def test_judges_see_a_wrong_answer(name):
    case, problem, task = tiny_tasks(name)[0]
    own = next(peer for peer in peers_of(case, problem) if peer.library == OWN)
    assert case.judge(task, WRONG[name](own.prepare(task)()))["accuracy"] > problem.tolerance


def test_judge_sees_a_point_that_is_not_stationary():
    ((case, problem, task),) = tiny_tasks("minimize")
    answer = case.PEERS["kantor"].prepare(task)()
    answer.x = answer.x + 1e-3
    assert case.judge(task, answer)["accuracy"] > problem.tolerance


@pytest.mark.parametrize("size", ["tiny", "small", "full"])
def test_problems_are_named_once_and_ask_for_known_peers(size):
    for name in CASES:
        case = load(name)
        problems = case.problems(size, "cpu")
        assert problems
        assert len({problem.name for problem in problems}) == len(problems)
        for problem in problems:
            assert set(problem.suits) <= case.PEERS.keys()
            assert any(case.PEERS[peer].library == OWN for peer in problem.suits or case.PEERS)
        assert all(peer.name == key for key, peer in case.PEERS.items())
        assert all(
            {OWN} < {p.library for p in case.PEERS.values() if "cuda" in p.devices} for _ in case.problems(size, "cuda")
        )


def test_roofline_measures_rates():
    rates = [*roofline.torch_bandwidth(1, 1 << 16, ("copy",), "cpu")]
    assert [rate.kernel for rate in rates] == ["copy"]
    assert 0 < rates[0].median <= rates[0].best
    assert rates[0].bytes == 1 << 16
    sets = machine.working_sets(2)
    assert sets["L2"] < sets["L3"] < sets["DRAM"]


# The runner, on a case of its own ----------------------------------------------------------------------------------


def fake_case(monkeypatch, **peers):
    """A case "fake" whose task is a number and whose answers are numbers: their accuracy is the distance."""
    case = types.ModuleType("kantor.bench.cases.fake")
    case.TITLE = "Numbers"
    case.PEERS = {
        name.replace("_", " "): Peer(name.replace("_", " "), library, f"how {name}", lambda task, run=run: run, needs)
        for name, (library, run, needs) in peers.items()
    }
    case.problems = lambda size, device: (Problem("three", "distance", 0.5, ("seconds", "steps")),)
    case.make = lambda problem, device: 3.0
    case.judge = lambda task, answer: {"accuracy": abs(task - answer), "steps": 7, "bytes": 1e6, "working_set": 1000}
    monkeypatch.setitem(sys.modules, "kantor.bench.cases.fake", case)
    monkeypatch.setattr(command, "CASES", ("fake",))
    monkeypatch.setattr("kantor.bench.case.LEAST_SECONDS", 1e-3)
    return case


class Here(runner.Pool):
    """Measures in this process; errors become those of a worker."""

    def measure(self, case, problem, peer, timeout):
        call, _ = prepare(Spec(case, problem, peer.process, "", torch.get_num_threads(), "cpu", 0, 0.0))
        try:
            return call(peer.name)
        except ArithmeticError as error:
            raise WorkerError(f"{type(error).__name__}: {error}") from error

    def limits(self, goal):
        if goal == "copy":
            return {"rate": 10.0}
        rate = {"kernel": "copy", "device": "cpu", "threads": 2, "bytes": 4096, "median": 10.0, "unit": "GB/s"}
        return {"rates": [rate | {"level": "L2"}]}


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(runner, "Pool", Here)
    return fake_case(
        monkeypatch,
        ours=(OWN, lambda: 3.0, ()),
        ours_wrong=(OWN, lambda: 9.0, ()),
        near=("Near", lambda: 3.1, ()),
        far=("Far", lambda: 4.0, ()),
        endless=("Endless", lambda: float("nan"), ()),
        broken=("Broken", lambda: 1 / 0, ()),
        absent=("Absent", lambda: 3.0, ("no_such_package",)),
    )


def run(*words):
    return CliRunner().invoke(cli.build_app(), ["bench", *map(str, words)])


def expect_bad_input(result, *words):
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1
    for word in words:
        assert word in result.stderr


def test_document_tables_and_picture(tmp_path, fake):
    result = run("--out", tmp_path / "new" / "out", "--repeats", 3, "--threads", 2)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "new" / "out"
    data = json.loads((folder / "bench.json").read_text())
    assert data["schema"] == results.SCHEMA
    assert data["options"]["cases"] == ["fake"]
    assert {"processor", "cpus", "versions", "load_per_cpu"} <= data["machine"].keys()
    assert data["interrupted"] is False
    assert data["yardsticks"] == [{"case": "fake", "copies": [10.0, 10.0], "quiet": True}]
    counts = {}
    for entry in data["measurements"]:
        counts[entry["peer"], entry["trial"]] = counts.get((entry["peer"], entry["trial"]), 0) + 1
    # Everyone is tried once; only what is right and the best of its library is repeated.
    assert counts == {
        ("ours", True): 1, ("ours wrong", True): 1, ("near", True): 1, ("far", True): 1, ("endless", True): 1,
        ("ours", False): 3, ("near", False): 3,
    }  # fmt: skip
    found = {(entry["library"], entry["quantity"]): entry for entry in data["results"]}
    assert found[OWN, "seconds"]["status"] == found["Near", "seconds"]["status"] == "met"
    assert found[OWN, "seconds"]["count"] == 3
    assert found[OWN, "seconds"]["share"] == pytest.approx(1e6 / found[OWN, "seconds"]["median"] / 1e10)
    assert found["Near", "steps"]["median"] == 7
    for library in ("Far", "Endless"):
        assert found[library, "seconds"]["status"] == "missed"
        assert "median" not in found[library, "seconds"]
    assert found["Broken", "seconds"]["status"] == "failed"
    assert "ZeroDivisionError" in found["Broken", "seconds"]["reason"]
    assert data["absences"] == [
        {"case": "fake", "problem": "three", "library": "Absent", "reason": "no_such_package not installed"}
    ]
    text = (folder / "bench.txt").read_text()
    assert text.strip() == result.stdout.strip()
    for words in (
        "Far, far: missed, distance 1.0e+00, wanted 5.0e-01", "Endless, endless: missed, distance not finite",
        "Broken, broken: failed, ZeroDivisionError", "without Absent: no_such_package not installed", "copy, L2",
    ):  # fmt: skip
        assert words in text
    assert (folder / "bench.png").stat().st_size > 5000


def test_case_without_its_package_is_left_out(tmp_path, fake):
    fake.problems = lambda size, device: (Problem("three", "distance", 0.5, needs=("no_such_package",)),)
    result = run("--out", tmp_path, "-q")
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "left out, no_such_package not installed" in result.stderr
    assert json.loads((tmp_path / "bench.json").read_text())["measurements"] == []


def test_kantor_missing_its_accuracy_exits_1(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "Pool", Here)
    fake_case(monkeypatch, ours=(OWN, lambda: 9.0, ()), near=("Near", lambda: 3.0, ()))
    result = run("--out", tmp_path)
    assert result.exit_code == 1
    assert "Kantor, ours: missed" in result.stdout


def test_interrupt_keeps_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "Pool", Here)

    def interrupt():
        raise KeyboardInterrupt

    fake_case(monkeypatch, ours=(OWN, lambda: 3.0, ()), near=("Near", interrupt, ()))
    result = run("--out", tmp_path)
    assert result.exit_code == 130
    data = json.loads((tmp_path / "bench.json").read_text())
    assert data["interrupted"] is True
    assert [entry["peer"] for entry in data["measurements"]] == ["ours"]
    assert "three" in result.stdout


def test_slow_answers_are_repeated_less(tmp_path, monkeypatch):
    problem = Problem("three", "distance", 0.5)
    asked = []

    class Slow(Here):
        def measure(self, case, problem, peer, timeout):
            asked.append(timeout)
            return {"seconds": 2.0, "accuracy": 0.0}

    monkeypatch.setattr(runner, "Pool", Slow)
    fake_case(monkeypatch, ours=(OWN, lambda: 3.0, ()))
    options = runner.Options(("fake",), repeats=5, limit=4.0)
    found = results.Results(tmp_path / "r.json", options)
    runner.measure_problem(options, found, Slow(options), "fake", problem, lambda text: None, lambda text: None)
    assert asked == [18.0, 9.0, 9.0]  # a try, and as many as the limit holds


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only", "cg,nonsense"), "--only nonsense: no such case; there are cg, multigrid"),
        (("--compare", "nowhere.json"), "nowhere.json: no such file"),
        (("new.json",), "expected --compare OLD before it"),
        (("--device", "cuda"), "torch sees no CUDA device"),
    ],
)
def test_bad_words(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expect_bad_input(run(*words), message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{", "[1]", '{"schema": 1}', '{"schema": 99, "results": []}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "old.json").write_text(text)
    expect_bad_input(run("--compare", tmp_path / "old.json", tmp_path / "old.json"), "old.json: expected")


def test_unwritable_folder(tmp_path, fake):
    (tmp_path / "file").write_text("")
    expect_bad_input(run("--out", tmp_path / "file" / "out"), "cannot be written")


# Two runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def old(tmp_path, fake):
    """A run whose figures are then set by hand."""
    assert run("--out", tmp_path / "old", "-q").exit_code == 0
    data = json.loads((tmp_path / "old" / "bench.json").read_text())
    for entry in data["results"]:
        if entry["status"] == "met":
            entry |= {"median": 1.0 if entry["quantity"] == "seconds" else 7.0, "spread": 0.02}
    return data


def changed(old, **medians):
    """The same run with other medians, by library: of seconds, or (seconds, steps); None: no longer met."""
    new = copy.deepcopy(old)
    for entry in new["results"]:
        if entry["library"] in medians:
            value = medians[entry["library"]]
            value = value if isinstance(value, tuple) else (value, 7.0)
            if value[0] is None:
                entry |= {"status": "missed", "reason": "wrong"}
                continue
            entry["median"] = value[0] if entry["quantity"] == "seconds" else value[1]
    return new


def verdicts(old, new):
    return {change.quantity: change.verdict for change in compare.changes(old, new)}


def test_changes_are_judged_beyond_the_drift_and_the_noise(old):
    assert verdicts(old, old) == {"seconds": "same", "steps": "same"}
    assert verdicts(old, changed(old, Kantor=1.3))["seconds"] == "WORSE"
    assert verdicts(old, changed(old, Kantor=0.7))["seconds"] == "better"
    assert verdicts(old, changed(old, Kantor=1.05))["seconds"] == "same"  # quiet, but 5 % is nothing
    assert verdicts(old, changed(old, Kantor=1.3, Near=1.3))["seconds"] == "same"  # the machine became slower
    assert verdicts(old, changed(old, Kantor=1.0, Near=0.5))["seconds"] == "WORSE"  # it became faster, Kantor did not
    assert verdicts(old, changed(old, Kantor=(1.0, 8.0)))["steps"] == "WORSE"
    assert verdicts(old, changed(old, Kantor=(None, None)))["seconds"] == "LOST"
    assert verdicts(changed(old, Kantor=(None, None)), old)["seconds"] == "gained"
    noisy = changed(old, Kantor=1.3)
    for entry in noisy["results"]:
        entry["spread"] = 0.5
    assert verdicts(old, noisy)["seconds"] == "same"


def test_compare_two_files(tmp_path, old):
    new = changed(old, Kantor=1.5)
    new["machine"]["versions"]["scipy"] = "99"
    new["options"]["threads"] += 1
    for name, data in (("a", old), ("b", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    result = run("--compare", tmp_path / "a.json", tmp_path / "b.json")
    assert result.exit_code == 1
    for words in ("REGRESSION: fake, three: 1.50 times the old seconds", "different numbers of threads", "-> 99"):
        assert words in result.stdout
    result = run("--compare", tmp_path / "b.json", tmp_path / "a.json")
    assert result.exit_code == 0
    assert "no regression" in result.stdout
    (tmp_path / "c.json").write_text(json.dumps(old | {"results": []}))
    expect_bad_input(run("--compare", tmp_path / "a.json", tmp_path / "c.json"), "problems in common")


def test_compare_with_a_new_run(tmp_path, old):
    before = tmp_path / "old" / "bench.json"  # the folder that the new run writes to: it is read first
    before.write_text(json.dumps(changed(old, Kantor=1e-9)))
    result = run("--out", tmp_path / "old", "--compare", before, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["results"]
    assert json.loads(before.read_text())["results"][0]["median"] > 1e-9


# Real processes ----------------------------------------------------------------------------------------------------


def test_processes(tmp_path, monkeypatch):
    case = load("minimize")
    monkeypatch.setattr(case, "PEERS", {name: case.PEERS[name] for name in ("kantor", "trust-ncg")})
    options = runner.Options(("minimize",), size="tiny", threads=1, repeats=1)
    found = results.Results(tmp_path / "r.json", options)
    pool = runner.Pool(options)
    try:
        (problem,) = case.problems("tiny", "cpu")
        runner.measure_problem(options, found, pool, "minimize", problem, lambda text: None, lambda text: None)
        entries = {entry["library"]: entry for entry in results.summarise(found.data) if entry["quantity"] == "work"}
        assert entries[OWN]["status"] == entries["SciPy"]["status"] == "met"
        assert entries[OWN]["median"] > 0
        # One that dies is reported with its last words, and started anew when it is asked again.
        pool._workers["Kantor"]._process.kill()
        with pytest.raises(WorkerError, match="died"):
            pool.measure("minimize", problem.name, case.PEERS["kantor"], 30.0)
        assert "Kantor" not in pool._workers
        with pytest.raises(WorkerError, match="KeyError"):
            pool.measure("minimize", problem.name, Peer("nobody", "SciPy", "", lambda task: None), 30.0)
        with pytest.raises(WorkerError, match="no answer in 0 s"):
            pool.measure("minimize", problem.name, case.PEERS["trust-ncg"], 0.0)
        assert "arrays" not in pool._workers
    finally:
        pool.close()
    assert pool._workers == {}
