"""The documentation: its pages and what they include exist, its API is complete, and it builds without a warning.

That the Python blocks of the pages run is tested in test_readme.py.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import cmim_plugin

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
DIRECTIVE = re.compile(r"^```\{(include|literalinclude|toctree)\}(.*)\n([^`]*)^```", re.MULTILINE)
MARK = re.compile(r"^:(?:start-after|end-before|start-at|end-at): (.*)$", re.MULTILINE)


def directives(page: Path) -> list[tuple[str, str, str]]:
    """(name, argument, body) of each."""
    return [(d[1], d[2].strip(), d[3]) for d in DIRECTIVE.finditer(page.read_text(encoding="utf-8"))]


def test_the_navigation_names_every_page_and_nothing_else() -> None:
    named = [
        line
        for name, _, body in directives(DOCS / "index.md")
        if name == "toctree"
        for line in body.split()
        if not line.startswith(":")
    ]
    assert sorted(named) == [str(page.relative_to(DOCS).with_suffix("")) for page in PAGES if page.stem != "index"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_includes_exists(page: Path) -> None:
    for name, argument, body in directives(page):
        if name != "toctree":
            text = (page.parent / argument).read_text(encoding="utf-8")
            for mark in MARK.findall(body):
                assert mark.strip('"') in text, f"{page.name} cuts {argument} at a text that is not in it: {mark}"


def test_the_api_has_every_public_name() -> None:
    documented = re.findall(r"^\.\. auto\w+:: (\w+)", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(documented) == sorted(cmim_plugin.__all__)


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-E",
        "-q",
        "-d",
        tmp_path / "trees",
        DOCS,
        tmp_path,
    ]
    built = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert built.returncode == 0, built.stderr
    for page in PAGES:
        assert (tmp_path / page.relative_to(DOCS).with_suffix(".html")).is_file()
