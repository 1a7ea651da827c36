"""Every Python block of the documentation runs, and every diff shows code that runs.

The blocks of one file share their names, in the order of the file, as a reader meets them. A ```text block right behind
a Python block is what that one prints. What a ```diff block leads to (its lines without the removed ones) has to stand
in one of the Python blocks, in that order.
"""

import contextlib
import io
import re
import sys
import types
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1``` *$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    line: int
    code: str


def blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [
        Block(
            fence[2],
            line=text.count("\n", 0, fence.start(3)) + 1,
            code="\n".join(line.removeprefix(fence[1]) for line in fence[3].splitlines()),
        )
        for fence in FENCE.finditer(text)
    ]


DOCUMENTS = [
    path
    for pattern in ("*.md", "docs/**/*.md", "examples/*.md", "benchmarks/*.md", "tests/**/*.md")
    for path in sorted(ROOT.glob(pattern))
    if {"python", "diff"} & {block.language for block in blocks(path)}
]


def test_readme_has_snippets() -> None:
    assert {"python", "diff"} <= {block.language for block in blocks(ROOT / "README.md")}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_python_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("__main__")  # torch.compile looks names up there
    monkeypatch.setitem(sys.modules, "__main__", module)
    namespace: dict[str, object] = module.__dict__
    last: Block | None = None
    printed = io.StringIO()
    for block in blocks(path):
        if block.language == "python":
            # The empty lines make a traceback point at the line of the document.
            program = compile("\n" * (block.line - 1) + block.code, str(path), "exec")
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(program, namespace)
        elif block.language == "text" and last and last.language == "python":
            assert printed.getvalue().rstrip() == block.code, f"{path.name}:{block.line} shows another output"
        last = block


def prose(text: str) -> str:
    """What is read: no code blocks, comments, tags and no punctuation of tables."""
    text = re.sub(r"<!--.*?-->|<[^>]+>", " ", FENCE.sub("", text), flags=re.DOTALL)
    return re.sub(r"\|?-{3,}|\|", " ", text)


def test_the_readme_is_short_enough_to_be_read() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    assert len(prose(text).split()) <= 1500
    assert len(rows) <= 35


def test_the_readme_shows_the_figure_the_lines_and_the_effect_first() -> None:
    top = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Install")[0]
    for wanted in ("docs/how-dark.svg", "docs/gains-light.svg", "loss += cmim(model)", "**Cost:**", "**When not"):
        assert wanted in top


def test_diff_leads_to_code_that_runs() -> None:
    for path in DOCUMENTS:
        programs = [block.code for block in blocks(path) if block.language == "python"]
        for block in blocks(path):
            if block.language == "diff":
                after = [line[1:].rstrip() for line in block.code.splitlines() if line[:1] in ("+", " ")]
                assert any(line.startswith("+") for line in block.code.splitlines())
                found = any(occur_in_order(after, program) for program in programs)
                assert found, f"no Python block has the lines of {path.name}:{block.line}, in its order"


def occur_in_order(lines: list[str], program: str) -> bool:
    rest = iter([line.rstrip() for line in program.splitlines()])
    return all(line in rest for line in lines if line)
