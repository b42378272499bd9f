"""The pages against the package: names, links, commands, versions. What runs on a page is run by sphinx -b doctest."""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import pkgutil
import re
import tomllib
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kantor
import kantor.sklearn

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
HOSTS = {"arxiv.org", "pynndescent.readthedocs.io", "semver.org"}  # external links that may stand in the texts

PAGES = sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def packages() -> Iterator[ModuleType]:
    """kantor and all below it that is public: not private, and not the commands and what they draw with."""
    yield kantor
    for info in pkgutil.iter_modules(kantor.__path__, "kantor."):
        name = info.name.rpartition(".")[2]
        if not name.startswith("_") and name not in ("bench", "cli", "demo", "plotting"):
            yield importlib.import_module(info.name)
    yield importlib.import_module("kantor.optim.curvature")
    yield importlib.import_module("kantor.datasets.poisson_scenes")


def public() -> Iterator[tuple[str, Any]]:
    """(full name, object) of every public name that is not a module."""
    for package in packages():
        for name in package.__all__:
            value = getattr(package, name)
            if callable(value):
                yield f"{package.__name__}.{name}", value


def entries() -> set[str]:
    """Full names that have an entry on an API page."""
    found = set()
    for page in (DOCS / "api").glob("*.md"):
        module = "kantor"
        for line in page.read_text().splitlines():
            if match := re.match(r"\.\. (?:currentmodule|py:module|automodule):: +([\w.]+)", line):
                module = match[1]
            elif match := re.match(r"\.\. auto(?:function|class|exception):: +([\w.]+)", line):
                found.add(match[1] if match[1].startswith("kantor.") else f"{module}.{match[1]}")
            elif (match := re.match(r" +:members: +(.+)", line)) and module:
                found |= {f"{module}.{name.strip()}" for name in match[1].split(",")}
    return found


def is_made_by_users(value: Any) -> bool:
    """Functions, and classes whose objects a user makes: not results, statuses, exceptions, abstract classes."""
    if not inspect.isclass(value):
        return True
    given_back = is_dataclass(value) or issubclass(value, enum.Enum | Exception | tuple)
    return not given_back and not inspect.isabstract(value)


GIVEN_BACK = {"kantor.linalg.NystromPreconditioner"}  # by nystrom(), whose example it is


def test_every_public_name_has_an_entry() -> None:
    known = {id(value) for name, value in public() if name in entries()}  # a name may be in two packages
    missing = sorted(name for name, value in public() if id(value) not in known)
    assert not missing, f"without an entry in docs/api: {missing}"


@pytest.mark.parametrize(("name", "value"), [pytest.param(*pair, id=pair[0]) for pair in public()])
def test_docstrings(name: str, value: Any) -> None:
    """One for every name; with an example, which sphinx runs, for what users call. Data share one, of their module."""
    text = inspect.getdoc(value)
    assert text, f"{name}: no docstring"
    if not is_made_by_users(value) or name in GIVEN_BACK:
        return
    if name.startswith("kantor.datasets."):
        text = inspect.getdoc(importlib.import_module(name.rpartition(".")[0])) or ""
    assert "Examples\n--------" in text, f"{name}: no section Examples in its docstring"
    assert ">>> " in text.partition("Examples\n--------")[2], f"{name}: an empty section Examples"


# --- coming-from.md ---


def table_rows(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if line.startswith("| ") and not set(line) <= set("|- "):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def resolve(node: ast.expr) -> Any:
    """The Kantor object that a name of the tables stands for, or None where it is a variable or another package's."""
    path = ast.unparse(node).removeprefix("kantor.").split(".")
    for home in (kantor, kantor.linalg, kantor.optim, kantor.transport, kantor.graph, kantor.nn, kantor.sklearn):
        value: Any = home
        try:
            for part in path:
                value = getattr(value, part)
        except AttributeError:
            continue
        return value
    return None


OTHERS = {
    "A",
    "M",
    "callback",
    "info",
    "kneighbors_graph",
    "ml",
    "print",
    "result",
    "torch",
}  # variables, and names of the peers


def check_expression(expression: ast.expr) -> None:
    for call in (node for node in ast.walk(expression) if isinstance(node, ast.Call)):
        function = resolve(call.func)
        if function is None and isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Call):
            continue  # a method of what a call gives: looked at below
        if function is None:
            base = ast.unparse(call.func).split(".")[0]
            assert base in OTHERS, f"{ast.unparse(call.func)} is no name of Kantor"
            continue
        parameters = inspect.signature(function).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        unknown = {word.arg for word in call.keywords} - set(parameters)
        if takes_any and function is not kantor.transport.solve:  # the rest goes to solve
            unknown -= set(inspect.signature(kantor.transport.solve).parameters)
        assert not unknown, f"{ast.unparse(call)} takes no {sorted(map(str, unknown))}"


RESULTS = (
    kantor.linalg.SolveResult,
    kantor.transport.TransportResult,
    kantor.optim.OptimizeResult,
    kantor.graph.ClassifyResult,
)


def test_coming_from_names_exist() -> None:
    """Every call in a column "Kantor" resolves and takes the keywords it is shown with; results have the fields."""
    checked = 0
    for row in table_rows((DOCS / "coming-from.md").read_text()):
        for code in re.findall(r"`([^`]+)`", row[1] if len(row) > 2 else ""):
            text = re.sub(r"=(?=[,)])", "=None", code.replace("\\|", "|")).replace("...", "None")
            try:
                expression = ast.parse(text, mode="eval").body
            except SyntaxError:  # a keyword alone, such as `rtol=1e-5`
                continue
            check_expression(expression)
            for node in (node for node in ast.walk(expression) if isinstance(node, ast.Attribute)):
                made = resolve(node.value.func) if isinstance(node.value, ast.Call) else None
                if inspect.isclass(made):
                    assert hasattr(made, node.attr), f"{text}: no such method"
                elif made is not None or ast.unparse(node.value) == "result":
                    has = [r for r in RESULTS if hasattr(r, node.attr) or node.attr in r.__dataclass_fields__]
                    assert has, f"{text}: no result has {node.attr}"
            names = ast.unparse(expression)
            if re.fullmatch(r"[\w.]+\.\w+", names) and names.split(".")[0] not in OTHERS:
                assert resolve(expression) is not None, f"{text} is no name of Kantor"
            checked += 1
    assert checked > 80, "the tables were not found"


# --- links, commands, versions ---


def texts() -> Iterator[tuple[str, str]]:
    for path in [*PAGES, ROOT / "README.md", ROOT / "bench/README.md", *(ROOT / "python/kantor").rglob("*.py")]:
        yield str(path.relative_to(ROOT)), path.read_text()


def test_external_links() -> None:
    """CI has no network: a link is https, and to a host that somebody looked at."""
    for path, text in texts():
        for scheme, host in re.findall(r"\b(https?)://([\w.-]+)", text):
            assert scheme == "https", f"{path}: {host}: expected https"
            assert host in HOSTS or host.endswith("w3.org"), f"{path}: add {host} to HOSTS after a look at the link"


def test_commands_exist() -> None:
    """Every `python bench/...` in the texts names a script, and options that stand in it or in what it imports."""
    found = 0
    for path, text in texts():
        for script, arguments in re.findall(r"python\s+((?:bench|docs)/[\w/]+\.py)([^`#\n)]*)", text):
            source = ROOT / script
            assert source.exists(), f"{path}: {script} is not there"
            code = source.read_text() + (ROOT / "python/kantor/bench/harness.py").read_text()
            for option in re.findall(r"(?<!\S)(--[a-z][\w-]*)", arguments):
                assert re.search(rf'"{option}"', code), f"{path}: {script} has no option {option}"
            found += 1
    assert found > 40


def test_one_version() -> None:
    version = PROJECT["version"]
    headings = re.findall(r"^## (.+)$", (DOCS / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert all(re.fullmatch(r"\d+\.\d+\.\d+\S* \((\d{4}-\d\d-\d\d|unreleased)\)", line) for line in headings), headings
    assert headings[0].split()[0] == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert kantor.__version__ == version


def test_changelog_sections() -> None:
    sections = re.findall(r"^### (.+)$", (DOCS / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert set(sections) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed"}, sections


@pytest.mark.parametrize("page", sorted((DOCS / "papers").glob("[!i]*.md")), ids=lambda page: page.stem)
def test_paper_pages_have_one_shape(page: Path) -> None:
    """Title, who and where, what the method does, the table of names, then what differs and what is reproduced."""
    text = page.read_text()
    head = text.split("\n## ")[0]
    assert re.search(r"arXiv:\d{4}\.\d{5}", head)
    assert re.search(r"What the methods? do(es)?:\s+\[[^]]+\]\(\.\./algorithms/", head)
    assert "| in the paper | here |" in head
    assert re.findall(r"^## (.+)$", text, re.MULTILINE)[-2:] == ["Where this differs", "What is reproduced"]
    assert re.search(r"python\s+bench/", text), "no command prints what is reproduced"


@pytest.mark.parametrize("page", sorted((DOCS / "algorithms").glob("[!i]*.md")), ids=lambda page: page.stem)
def test_every_method_has_a_picture(page: Path) -> None:
    scripts = re.findall(r"gallery_built/(plot_\w+)\.rst", page.read_text())
    assert scripts, "no gallery script shows this method"
    assert all((DOCS / "gallery" / f"{script}.py").exists() for script in scripts)


@pytest.mark.parametrize("page", sorted((DOCS / "guide").glob("*.md")), ids=lambda page: page.stem)
def test_guide_pages_run(page: Path) -> None:
    """A guide without code that is run would not notice when it becomes wrong."""
    assert page.stem in ("index", "bench") or "{testcode}" in page.read_text()
