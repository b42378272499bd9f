"""``kantor classify``: a table and a few labels in, predictions and a picture out, exit codes and messages."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import numpy as np
import pandas
import pytest
import torch
from typer.testing import CliRunner

from kantor import _classify_command as command
from kantor import cli
from kantor._classify_files import read_problem

ROWS = 60


def run(*words):
    return CliRunner().invoke(cli.build_app(), ["classify", *map(str, words)])


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


def make_table():
    """Three well separated clusters in three columns; every fourth row has its label."""
    random = np.random.default_rng(0)
    kind = np.repeat(["ash", "beech", "oak"], ROWS // 3)
    centre = np.repeat([[0.0, 0.0, 0.0], [6.0, 0.0, 0.0], [0.0, 6.0, 6.0]], ROWS // 3, axis=0)
    table = pandas.DataFrame(centre + random.normal(size=(ROWS, 3)), columns=["height", "girth", "age"])
    table.insert(0, "tree", [f"t{i}" for i in range(ROWS)])
    table["kind"] = np.where(np.arange(ROWS) % 4 == 0, kind, None)
    return table, kind


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The table as t.csv, its numbers as x.npy, its labels as l.npy."""
    monkeypatch.chdir(tmp_path)
    table, kind = make_table()
    table.to_csv("t.csv", index=False)
    np.save("x.npy", table[["height", "girth", "age"]].to_numpy())
    np.save("l.npy", np.where(np.arange(ROWS) % 4 == 0, np.unique(kind, return_inverse=True)[1], -1))
    return tmp_path


# What comes out ----------------------------------------------------------------------------------------------------


def test_predictions_table_and_picture(folder):
    result = run("t.csv", "--labels", "kind", "--id", "tree", "-o", "p.csv", "--plot", "g.png")
    assert result.exit_code == 0, result.output
    table, kind = make_table()
    predictions = pandas.read_csv("p.csv")
    assert list(predictions.columns) == ["tree", "label", "confidence", "given"]
    assert list(predictions["tree"]) == list(table["tree"])
    assert (predictions["label"] == kind).mean() > 0.95
    assert predictions["confidence"].between(1 / 3, 1).all()
    assert (predictions["given"] == table["kind"].notna()).all()
    assert (folder / "g.png").read_bytes().startswith(b"\x89PNG")
    for word in ("t.csv", "15 of 60 rows", "accuracy", "5-fold", "ash", "beech", "oak", "p.csv", "g.png"):
        assert word in result.stdout
    assert not list(folder.glob("*.part"))


def test_json_has_what_the_table_says(folder):
    code, outcome = run_json("t.csv", "--labels", "kind", "--id", "tree", "--seed", 3, "--folds", 2)
    assert code == 0
    assert (outcome["rows"], outcome["columns"], outcome["labelled"], outcome["method"]) == (60, 3, 15, "diffusion")
    assert outcome["classes"] == [
        {"class": name, "given": 5, "predicted": pytest.approx(15, abs=1)} for name in ("ash", "beech", "oak")
    ]
    assert outcome["accuracy"]["value"] > 0.9
    assert outcome["accuracy"]["folds"] == 2
    assert outcome["converged"] is True


@pytest.mark.parametrize("method", list(command.Method))
def test_every_method_finds_the_clusters(folder, method):
    code, _ = run_json("x.npy", "--labels", "l.npy", "--method", method.value, "-o", "p.csv", "--folds", 0)
    assert code == 0
    predictions = pandas.read_csv("p.csv")
    assert list(predictions["row"]) == list(range(1, ROWS + 1))
    assert (predictions["label"] == np.repeat([0, 1, 2], ROWS // 3)).mean() > 0.95


def test_options_reach_the_graph_and_the_diffusion(folder):
    code, outcome = run_json("x.npy", "--labels", "l.npy", "--k", 5, "--step", 0.25, "--num-steps", 7, "--folds", 0)
    assert (code, outcome["k"], outcome["step"], outcome["num_steps"]) == (0, 5, 0.25, 7)
    assert outcome["accuracy"] is None


def test_quiet_prints_nothing(folder):
    result = run("x.npy", "--labels", "l.npy", "--quiet", "--folds", 0, "-o", "p.csv")
    assert (result.exit_code, result.output) == (0, "")


def test_same_seed_same_file(folder):
    for name in ("a.csv", "b.csv"):
        assert run("x.npy", "--labels", "l.npy", "--folds", 0, "-o", name).exit_code == 0
    assert (folder / "a.csv").read_bytes() == (folder / "b.csv").read_bytes()


def test_threads_are_set(folder):
    before = torch.get_num_threads()
    try:
        _, outcome = run_json("x.npy", "--labels", "l.npy", "--threads", 1, "--folds", 0)
    finally:
        torch.set_num_threads(before)
    assert outcome["threads"] == 1


def test_a_class_with_one_label_is_left_out_of_the_estimate(folder):
    labels = np.load("l.npy")
    labels[np.flatnonzero(labels == 2)[1:]] = -1
    np.save("l.npy", labels)
    result = run("x.npy", "--labels", "l.npy")
    assert result.exit_code == 0, result.output
    assert "not estimated: 2 has one label" in result.stdout


def test_everything_labelled_still_gives_an_estimate(folder):
    np.save("l.npy", np.repeat([0, 1, 2], ROWS // 3))
    code, outcome = run_json("x.npy", "--labels", "l.npy", "--folds", 2)
    assert code == 0
    assert outcome["labelled"] == ROWS
    assert outcome["accuracy"]["value"] > 0.9


# Files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t.csv", "t.parquet", "semicolons.csv", "tabs.csv"])
def test_kinds_of_tables_are_the_same(folder, name):
    table, _ = make_table()
    table.to_parquet("t.parquet")
    table.to_csv("semicolons.csv", sep=";", index=False)
    table.to_csv("tabs.csv", sep="\t", index=False)
    problem = read_problem(folder / name, "kind", "tree")
    np.testing.assert_allclose(problem.features, np.load("x.npy"))
    assert problem.labels == [None if label is None else label for label in table["kind"].replace({np.nan: None})]
    assert (problem.ids[:2], problem.id_name) == (["t0", "t1"], "tree")


LABEL_FILES = {
    "lines.txt": "a\n\nb\n",
    "heading.csv": "kind\na\n\nb\n",
    "no heading.csv": "a\n\nb\n",
    "quoted.csv": '"a"\n""\n"b"\n',
    "by number.csv": "row,kind\n2,b\n0,a\n",
}


def test_a_last_label_may_be_empty(folder):
    np.save("r.npy", np.zeros((3, 1)))
    for text in ("a\nb\n", "a\nb\n\n"):
        (folder / "l.txt").write_text(text)
        assert read_problem(folder / "r.npy", "l.txt").labels == ["a", "b", None]


@pytest.mark.parametrize("name", LABEL_FILES)
def test_files_of_labels(folder, name):
    (folder / name).write_text(LABEL_FILES[name])
    pandas.DataFrame({"row": [0, 1, 2], "v": [1.0, 2.0, 3.0]}).to_csv("r.csv", index=False)
    assert read_problem(folder / "r.csv", str(folder / name), "row").labels == ["a", None, "b"]


def test_labels_are_text_whole_numbers_or_truth_values(folder):
    table = pandas.DataFrame({"v": [1.0, 2.0, 3.0, 4.0], "n": [1, None, 2, -1], "t": [True, None, False, True]})
    table.to_csv("r.csv", index=False)
    assert read_problem(folder / "r.csv", "n", drop=["t"]).labels == ["1", None, "2", None]
    assert read_problem(folder / "r.csv", "n", drop=["t"], unknown="2").labels == ["1", None, None, "-1"]
    assert read_problem(folder / "r.csv", "t", drop=["n"]).labels == ["True", None, "False", "True"]
    np.save("n.npy", np.array([1.0, np.nan, 2.0, -1.0]))
    assert read_problem(folder / "r.csv", "n.npy", drop=["n", "t"]).labels == ["1", None, "2", None]


def test_columns_without_names_are_numbered_and_truth_values_are_numbers(folder):
    (folder / "r.csv").write_text("1,2,0\n3,4,1\n")
    assert read_problem(folder / "r.csv", "2").features.tolist() == [[1, 2], [3, 4]]
    pandas.DataFrame({"v": [True, False], "k": ["a", "b"]}).to_csv("s.csv", index=False)
    assert read_problem(folder / "s.csv", "k").features.tolist() == [[1.0], [0.0]]


# Bad input ---------------------------------------------------------------------------------------------------------


BAD_ARGUMENTS = {
    "no such file": (("no.csv", "--labels", "kind"), "no.csv: no such file"),
    "unknown kind": (("t.xlsx", "--labels", "kind"), "t.xlsx: unknown kind"),
    "no such column": (("t.csv", "--labels", "kinds", "--id", "tree"), "did you mean kind?"),
    "columns are listed": (("t.csv", "--labels", "zzz", "--id", "tree"), "tree, height, girth, age, kind"),
    "no such label file": (("x.npy", "--labels", "no.npy"), "no.npy: no such file"),
    "no such id": (("t.csv", "--labels", "kind", "--id", "name"), "--id name"),
    "no such drop": (("t.csv", "--labels", "kind", "--drop", "name"), "--drop name"),
    "text column": (("t.csv", "--labels", "kind"), "tree"),
    "text column says what to do": (("t.csv", "--labels", "kind"), "--drop"),
    "quantity": (("t.csv", "--labels", "girth", "--id", "tree", "--drop", "kind"), "quantity"),
    "same column twice": (("t.csv", "--labels", "kind", "--id", "kind"), "two columns"),
    "nothing left": (
        ("t.csv", "--labels", "kind", "--id", "tree", "--drop", "height", "--drop", "girth", "--drop", "age"),
        "no column is left",
    ),
    "output kind": (("x.npy", "--labels", "l.npy", "-o", "p.txt"), ".csv"),
    "output folder": (("x.npy", "--labels", "l.npy", "-o", "no/p.csv"), "does not exist"),
    "output is input": (("t.csv", "--labels", "kind", "-o", "t.csv"), "would overwrite"),
    "plot kind": (("x.npy", "--labels", "l.npy", "--plot", "p.gif"), ".png, .pdf, .svg"),
    "k too large": (("x.npy", "--labels", "l.npy", "--k", 60), "--k"),
    "one fold": (("x.npy", "--labels", "l.npy", "--folds", 1), "--folds"),
    "step below zero": (("x.npy", "--labels", "l.npy", "--step", -1), "--step"),
    "unstable step": (("x.npy", "--labels", "l.npy", "--step", 50, "--num-steps", 40), "largest safe step"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_ARGUMENTS)
def test_bad_arguments_exit_2(folder, kind):
    words, text = BAD_ARGUMENTS[kind]
    before = (folder / "t.csv").read_bytes()
    expect_bad_input(run(*words), "kantor classify: ", text)
    assert (folder / "t.csv").read_bytes() == before
    assert not list(folder.glob("p.*"))


@pytest.mark.parametrize("words", [("--method", "magic"), ("--k", "0"), ("--num-steps", "-1"), ("--threads", "0")])
def test_bad_option_exits_2(folder, words):
    result = run("x.npy", "--labels", "l.npy", *words)
    assert result.exit_code == 2
    assert words[0] in result.stderr


CELLS = {
    "missing": ("age", lambda age: age.where(age.index != 6), ("column age, row 7", "missing")),
    "infinite": ("age", lambda age: age.where(age.index % 9 != 6, np.inf), ("row 7", "infinite", "6 of 60")),
    "no number": ("age", lambda age: age.astype(object).where(age.index != 6, "?"), ("row 7", "'?'")),
    "one class": ("kind", lambda kind: kind.where(kind == "ash"), ("two classes", "5 times ash and nothing else")),
    "no labels": ("kind", lambda kind: kind.where(kind == "elm"), ("no label at all",)),
}


@pytest.mark.parametrize("kind", CELLS)
def test_what_is_wrong_in_a_table_is_named(folder, kind):
    column, change, words = CELLS[kind]
    table, _ = make_table()
    table[column] = change(table[column])
    table.to_csv("bad.csv", index=False)
    expect_bad_input(run("bad.csv", "--labels", "kind", "--id", "tree"), *words)


BAD_FILES = {
    "empty.csv": (b"", "not a readable"),
    "header.csv": (b"a,b\n", "rows and columns"),
    "ragged.csv": (b"a,b\n1,2\n1,2,3\n", "not a readable"),
    "bytes.csv": (b"\xff\xfe\x00", "not a readable"),
    "text.npy": (b"1 2 3", "not a readable"),
    "text.parquet": (b"1 2 3", "not a readable"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_exit_2(folder, name):
    content, text = BAD_FILES[name]
    (folder / name).write_bytes(content)
    expect_bad_input(run(name, "--labels", "l.npy"), name, text)


@pytest.mark.parametrize(
    ("array", "text"),
    [
        (np.zeros((2, 3, 4)), "(2, 3, 4)"),
        (np.zeros((ROWS, 2), dtype=complex), "complex"),
        (np.array(1.0), "shape ()"),
        (np.zeros((0, 2)), "(0, 2)"),
        (np.full((ROWS, 2), np.nan), "missing"),
    ],
)
def test_arrays_that_are_no_tables_exit_2(folder, array, text):
    np.save("bad.npy", array)
    expect_bad_input(run("bad.npy", "--labels", "l.npy"), "bad.npy", text)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ("a\nb\n", ("2 labels", "60 rows", "--id")),
        ("tree,kind\nt3,a\nzz,b\n", ("tree zz is not in",)),
        ("tree,kind\nt3,a\nt3,b\n", ("tree t3 has two labels",)),
        ("tree,kind,more\nt3,a,1\n", ("one column of labels",)),
    ],
)
def test_labels_that_do_not_fit_exit_2(folder, labels, words):
    (folder / "l.csv").write_text(labels)
    extra = () if labels.startswith("a") else ("--id", "tree")
    drop = ("--drop", "tree") if labels.startswith("a") else ()
    expect_bad_input(run("t.csv", "--labels", "l.csv", "--drop", "kind", *extra, *drop), "l.csv", *words)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_may_not_be_written_exits_2(folder):
    (folder / "p.csv").touch(stat.S_IRUSR)
    expect_bad_input(run("x.npy", "--labels", "l.npy", "-o", "p.csv"), "p.csv")


@pytest.mark.parametrize(("module", "extra"), [("pandas", "cli"), ("pyarrow", "graph")])
def test_missing_packages_name_the_extra(folder, monkeypatch, module, extra):
    make_table()[0].to_parquet("t.parquet")
    monkeypatch.setitem(sys.modules, module, None)
    result = run("t.parquet", "--labels", "kind", "--id", "tree")
    assert result.exit_code == 2
    assert f'pip install "kantor[{extra}]"' in result.stderr


def test_ctrl_c_exits_130(folder, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "classify_rows", interrupted)
    result = run("x.npy", "--labels", "l.npy", "-o", "p.csv")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert not (folder / "p.csv").exists()


def test_exit_code_and_streams_of_the_process(folder):
    line = [sys.executable, "-m", "kantor.cli", "classify", "x.npy", "--labels", "l.npy", "--folds", "0"]
    process = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""


def test_help_says_the_exit_codes():
    assert "Exit codes" in run("--help").stdout


# What is read in another way than it was meant ----------------------------------------------------------------------


def test_a_class_that_looks_unknown_and_a_column_without_a_name_are_noted(folder):
    table, _ = make_table()
    table.fillna({"kind": "?"}).drop(columns="tree").to_csv("index.csv")
    code, outcome = run_json("index.csv", "--labels", "kind", "--folds", 0)
    assert code == 0
    assert len(outcome["notes"]) == 2
    text = " ".join(run("index.csv", "--labels", "kind", "--folds", 0).stdout.split())
    assert "--unknown '?'" in text
    assert "--id 'Unnamed: 0'" in text
    words = ("--labels", "kind", "--unknown", "?", "--id", "Unnamed: 0", "--folds", 0)
    code, outcome = run_json("index.csv", *words)
    assert (code, outcome["notes"], outcome["columns"]) == (0, [], 3)


def test_columns_to_leave_out_are_named_as_a_shell_takes_them(folder):
    table, _ = make_table()
    table = table.rename(columns={"girth": "girth (cm)"})
    table.loc[4, "girth (cm)"] = np.nan
    table.to_csv("bad.csv", index=False)
    expect_bad_input(run("bad.csv", "--labels", "kind", "--id", "tree"), "--drop 'girth (cm)'")


def test_labels_of_all_rows_are_explained_in_the_words_of_the_command(folder):
    table, kind = make_table()
    table.assign(kind=kind).to_csv("all.csv", index=False)
    _, outcome = run_json("all.csv", "--labels", "kind", "--id", "tree", "--folds", 0)
    assert "nothing was predicted; the cross-validation tells" in outcome["message"]


def test_a_table_of_two_rows_is_no_option(folder):
    (folder / "two.csv").write_text("u,v,kind\n1,2,a\n3,4,b\n")
    result = run("two.csv", "--labels", "kind")
    expect_bad_input(result, "expected at least 3 rows")
    assert "--x" not in result.stderr
