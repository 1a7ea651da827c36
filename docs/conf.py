"""Sphinx: `make docs` builds these pages into build/docs, with warnings as errors and without the network."""

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the checkout's package, whatever is installed

import cmim_plugin  # noqa: E402

project = "cmim-plugin"
release = cmim_plugin.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"{project} {release}"
html_show_copyright = False

myst_heading_anchors = 3
napoleon_use_ivar = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True  # info_nce, not <function info_nce>
python_maximum_signature_line_length = 88

# Every reference has to lead somewhere, but for those to torch and to what of this library is not public.
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"os\.PathLike"),
    (r"py:.*", r"(torch|nn|collections|typing)\b.*|(Tensor|Module|Any|Mapping|Collection|Callable|Iterator)"),
    (r"py:.*", r"(.*\.)?(Site|Layout)"),
]

# Pages that hold what files of the repository link to.
PAGES = {
    "README.md#what-it-has-shown-so-far": "evidence.md",
    "benchmarks/FINDINGS.md": "evidence.md",
    "benchmarks/README.md": "measured.md",
}
LINK = re.compile(r"\[([^\]]+)\]\((?!\w+:)([^)\s]+)\)")


def relink(app: Sphinx, file: Path, docname: str, content: list[str]) -> None:
    """Links in an included file are relative to it: make them lead to a page, or else to a download of the file."""
    path = (Path(app.srcdir) / file).resolve().relative_to(ROOT)

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        name, _, anchor = target.partition("#")
        found = str((ROOT / path.parent / name).resolve().relative_to(ROOT)) if name else str(path)
        if f"{found}#{anchor}" in PAGES:
            return f"[{text}]({PAGES[f'{found}#{anchor}']})"
        if not name:
            return match[0]
        if found in PAGES:
            return f"[{text}]({PAGES[found]}{'#' + anchor if anchor else ''})"
        return f"{{download}}`{text} <../{found}>`"

    content[0] = LINK.sub(link, content[0])


def setup(app: Sphinx) -> None:
    app.connect("include-read", relink)
