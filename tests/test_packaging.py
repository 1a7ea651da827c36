"""What a user installs: torch is all it needs, it is typed, and all of its code is in the packages."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.version import Version

import cmim_plugin

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cmim_plugin"
ALLOWED = {"torch", "cmim_plugin"}
# Imported where it is used, by who has it: (file, function) to what it may import.
EXTRAS = {("report.py", "plot"): {"matplotlib"}}


def run_python(code: str, python: str = sys.executable, cwd: Path = ROOT) -> str:
    result = subprocess.run([python, "-c", textwrap.dedent(code)], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def imported_packages(code: ast.AST) -> set[str]:
    """Top-level names of everything that the code imports, at whatever depth."""
    names = set()
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
            names.add(node.module.partition(".")[0])
    return names


def test_source_imports_only_torch() -> None:
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        code = ast.parse(path.read_text())
        for node in ast.walk(code):
            place = path.name, getattr(node, "name", "")
            if place in EXTRAS:
                assert imported_packages(node) - ALLOWED - sys.stdlib_module_names == EXTRAS[place]
                node.body = []  # looked at
                seen.add(place)
        foreign = imported_packages(code) - ALLOWED - sys.stdlib_module_names
        assert not foreign, f"{path.name} imports {sorted(foreign)}, which the library does not depend on"
    assert seen == EXTRAS.keys()


def test_import_loads_no_extra() -> None:
    # Against torch alone, because torch loads numpy (and what it finds useful) itself.
    loaded = run_python(
        """
        import sys
        import torch
        before = set(sys.modules)
        import cmim_plugin
        print(*{name.partition(".")[0] for name in set(sys.modules) - before})
        """
    ).split()
    extras = {"torchvision", "timm", "tqdm", "matplotlib", "sklearn", "scipy", "numpy", "PIL", "torchmetrics"}
    assert "cmim_plugin" in loaded
    assert not extras & set(loaded)


def test_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_version() -> None:
    assert str(Version(cmim_plugin.__version__)) == cmim_plugin.__version__
    try:
        installed = importlib.metadata.version("cmim-plugin")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("cmim-plugin is not installed here, only importable")
    assert installed == cmim_plugin.__version__, "the version changed since the install: run `make clean`"


def test_metadata() -> None:
    tomllib = pytest.importorskip("tomllib")  # since Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = Version(project["requires-python"].removeprefix(">="))
    listed = [
        c.rpartition(" ")[2] for c in project["classifiers"] if c.startswith("Programming Language :: Python :: 3.")
    ]
    assert Version(listed[0]) == oldest and listed == sorted(listed, key=Version)
    assert {re.split("[>=<]", requirement)[0] for requirement in project["dependencies"]} == ALLOWED - {"cmim_plugin"}
    for path in (project["readme"], *project["license-files"]):
        assert (ROOT / path).is_file()


@pytest.mark.slow
def test_wheel_and_sdist_hold_what_they_should(tmp_path: Path) -> None:
    pytest.importorskip("build")
    command = [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=280)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    code = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")} | {"cmim_plugin/py.typed"}
    assert {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name} == code
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert code | {"README.md", "CHANGELOG.md", "LICENSE", "docs/index.md", "tests/conftest.py", "Makefile"} <= names
    left_out = ("benchmarks/results/", ".git/", ".github/", ".ci/", ".venv", "build/", "data/", "runs/")
    assert not [name for name in names if name.startswith(left_out)]


@pytest.mark.slow
def test_installs_beside_torch_alone(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    site = Path(run_python("import sysconfig; print(sysconfig.get_path('purelib'))", python, tmp_path))
    # The torch of this environment stands in for a second download of it; --no-deps keeps pip from one.
    (site / "torch.pth").write_text(str(Path(torch.__file__).parent.parent))
    subprocess.run([python, "-m", "pip", "install", "--no-deps", str(ROOT)], check=True, cwd=tmp_path, timeout=280)

    location, version = run_python(
        """
        import importlib.metadata, cmim_plugin
        print(cmim_plugin.__file__, importlib.metadata.version("cmim-plugin"))
        """,
        python,
        tmp_path,
    ).split()
    assert Path(location).is_relative_to(tmp_path), "imported from the checkout, not from the install"
    assert version == cmim_plugin.__version__
    for file in [*PACKAGE.rglob("*.py"), PACKAGE / "py.typed"]:
        assert (Path(location).parent / file.relative_to(PACKAGE)).is_file(), f"{file.name} is not shipped"
