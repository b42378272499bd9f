"""The wheel: what is in it, and that it works beside the torch of this environment with nothing else installed.

Run with ``pytest -m wheel``: it builds the wheel, which takes minutes (needs the package ``build`` and a compiler), or
takes the file that KANTOR_WHEEL names. For other versions of torch: ``.ci/check-torch-versions 2.13.0 2.14.1``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

import kantor

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [pytest.mark.wheel, pytest.mark.timeout(1200)]


def run(*command: str | Path, cwd: Path, status: int = 0) -> str:
    """Run a command outside of the source tree and of this environment; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == status, f"{command} ended with status {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this source tree."""
    if given := os.environ.get("KANTOR_WHEEL"):
        return Path(given).resolve()
    pytest.importorskip("build", reason="the package `build` makes the wheel (extra dev); or set KANTOR_WHEEL")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", folder, ROOT, cwd=folder)
    (file,) = folder.glob("kantor-*.whl")
    return file


def requirements(names: list[str]) -> Iterator[str]:
    """The named distributions of this environment and all that they require here, each once."""
    seen = set()
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            wanted = distribution(name).requires or []
        except PackageNotFoundError:  # not for this platform, or of an extra
            continue
        yield name
        names += [match[0] for line in wanted if "extra ==" not in line and (match := re.match(r"[\w.-]+", line))]


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment: the wheel, and links to the torch and numpy of this one and their needs."""
    folder = tmp_path_factory.mktemp("clean")
    links = folder / "links"
    links.mkdir()
    for name in requirements(["torch", "numpy"]):
        files = distribution(name)
        for top in {Path(file).parts[0] for file in files.files or []} - {"..", "__pycache__"}:
            target = links / top
            if not target.exists():
                target.symlink_to(Path(str(files.locate_file(top))))
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip())
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", wheel, cwd=folder)
    (site / "links.pth").write_text(f"{links}\n")
    return python


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"kantor-{kantor.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"kantor", info}
    native = [name for name in names if name.endswith(".so")]
    assert len(native) == 1, f"expected the extension module and no test module, got {native}"
    assert native[0].startswith("kantor/_C.")
    assert {"kantor/py.typed", "kantor/_C.pyi", f"{info}/licenses/LICENSE"} <= set(names)
    sources = {f"kantor/{path.relative_to(ROOT / 'python/kantor')}" for path in (ROOT / "python/kantor").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_requirements(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        metadata = file.read(f"kantor-{kantor.__version__}.dist-info/METADATA").decode()
    required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", metadata, re.MULTILINE)
    assert sorted(required) == ["numpy", "torch"]


def test_works_with_torch_alone(clean_python: Path, tmp_path: Path) -> None:
    said = run(clean_python, ROOT / ".ci" / "smoke.py", cwd=tmp_path)
    assert f"kantor {kantor.__version__} " in said
    where = run(clean_python, "-c", "import kantor; print(kantor.__file__)", cwd=tmp_path)
    assert where.startswith(str(clean_python.parent.parent))


def test_command_line_names_its_extra(clean_python: Path, tmp_path: Path) -> None:
    said = run(clean_python.parent / "kantor", "info", cwd=tmp_path, status=2)
    assert 'pip install "kantor[cli]"' in said
    assert "Traceback" not in said


def test_mixed_versions_are_refused(clean_python: Path, tmp_path: Path) -> None:
    pretend = "import importlib.metadata as m; m.version = lambda name: '0.0.1'; import kantor"
    said = run(clean_python, "-c", pretend, cwd=tmp_path, status=1)
    assert "ImportError: kantor 0.0.1 is installed, but its native module was built as" in said


def test_torch_without_the_exchange_api_is_refused(clean_python: Path, tmp_path: Path) -> None:
    pretend = "import torch; del torch.Tensor.__dlpack_c_exchange_api__; import kantor"
    said = run(clean_python, "-c", pretend, cwd=tmp_path, status=1)
    assert "ImportError: kantor needs torch 2.11 or newer" in said
