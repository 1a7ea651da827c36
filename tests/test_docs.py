"""The documentation: it reads as plain Markdown, its links and pictures exist, its API is complete, and it builds.

That the Python blocks of the pages run is tested in test_readme.py; that the numbers are those of the results, in
test_benchmarks.py.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import cmim_plugin

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
FENCE = re.compile(r"^ *```.*?^ *``` *$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]*)\)")
SOURCE = re.compile(r'\b(?:src|srcset)="([^"]+)"')


def anchors(path: Path) -> set[str]:
    """Of the headings, as a forge and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_and_pictures_lead_somewhere() -> None:
    for path in DOCUMENTS:
        text = FENCE.sub("", path.read_text(encoding="utf-8"))
        for label, target in LINK.findall(text):
            assert label and target, f"an empty link in {path.name}: [{label}]({target})"
            if "://" not in target:
                name, _, anchor = target.partition("#")
                file = (path.parent / name).resolve() if name else path
                assert file.exists(), f"{path.name} links to {target}"
                assert not anchor or anchor in anchors(file), f"{path.name} links to {target}"
        for source in SOURCE.findall(text):
            assert (path.parent / source).is_file(), f"{path.name} shows {source}"


def test_a_forge_can_show_every_page() -> None:
    for path in DOCUMENTS:
        directive = re.search(r"^ *```\{|^:::|\{\w[\w:-]*\}`", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not directive, f"{path.name} has a directive of Sphinx"


def test_pictures_come_in_both_themes() -> None:
    for light in DOCS.glob("*-light.svg"):
        assert light.with_name(light.name.replace("-light", "-dark")).is_file()
    drawings = [(DOCS / f"how-{theme}.svg").read_text() for theme in ("light", "dark")]
    uncoloured = {re.sub(r"#[0-9a-f]{6}", "#", drawing) for drawing in drawings}
    assert len(uncoloured) == 1, "docs/how-light.svg and how-dark.svg are one drawing in two palettes"


def test_the_index_links_to_every_page() -> None:
    linked = re.findall(r"^- \[[^\]]+\]\((\w+\.md)\)", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(linked) == sorted(page.name for page in PAGES if page.name != "index.md")


def configuration() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_conf", DOCS / "conf.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_api_has_every_public_name() -> None:
    listed = re.findall(r"^- (`.*?`):", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(listed))) == sorted(cmim_plugin.__all__)
    pytest.importorskip("sphinx")
    assert sorted(name.removesuffix("()") for name in configuration().API) == sorted(cmim_plugin.__all__)


def test_the_changelog_starts_with_this_version() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first and first[1] == cmim_plugin.__version__


def test_the_map_names_every_file() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    package = ROOT / "cmim_plugin"
    files = {str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py"}
    assert set(re.findall(r"^\| `([\w/]+\.py)` \|", text, re.MULTILINE)) == files


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    options = ["-W", "--keep-going", "-E", "-q", "-d", tmp_path / "trees"]
    command = [sys.executable, "-m", "sphinx", *options, DOCS, tmp_path / "html"]
    built = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert built.returncode == 0, built.stderr
    for page in PAGES:
        assert (tmp_path / "html" / page.relative_to(DOCS).with_suffix(".html")).is_file()
