"""Sphinx: `make docs` builds these pages into build/docs, with warnings as errors and without the network.

The pages are plain Markdown, which a forge shows as it is. What Sphinx needs beyond that is added here: the navigation,
the docstrings of the API, the findings, pictures by theme, and links to files outside of docs/.
"""

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
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88

# Every reference has to lead somewhere, but for those to torch and to what of this library is not public.
nitpicky = True
nitpick_ignore_regex = [
    ("py:class", r"os\.PathLike"),
    (r"py:.*", r"(torch|nn|collections|typing)\b.*|(Tensor|Module|Any|Mapping|Collection|Callable|Iterable|Iterator)"),
    (r"py:.*", r"(.*\.)?(Site|Layout|parameters|discover)"),
]

# Options of the directive of each name; none: those of a function or exception.
API = {
    "CMIM": ("autoclass", "paper, forward, metrics, scalars, scheduled, report, paused, remove"),
    "PublishedCMIM": ("autoclass", "forward"),
    "Tap()": ("autoclass", ""),
    "find_binary_activations": ("autofunction", ""),
    "BinaryActivation()": ("autoclass", "tapped"),
    "Report()": ("autoclass", "worst, scalars, to_csv, plot"),
    "TapReport()": ("autoclass", "kept"),
    "InfoNCE": ("autoclass", "__call__, bound"),
    "NCE": ("autoclass", "__call__, bound"),
    "count_negatives": ("autofunction", ""),
    "stratified_indices": ("autofunction", ""),
    "CMIMError": ("autoexception", ""),
    "CMIMWarning": ("autoexception", ""),
}
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:)([^)#\s]*)(#[^)\s]*)?\)")
PICTURE = re.compile(r'<picture>.*?srcset="([^"]+)".*?<img alt="([^"]+)" src="([^"]+)"([^>]*)>\s*</picture>', re.DOTALL)
IMAGE = re.compile(r'<img alt="([^"]+)" src="([^"]+)"([^>]*)>')
FENCE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)


def navigation() -> str:
    """The pages that index.md links to, in its order."""
    pages = re.findall(r"^- \[[^\]]+\]\((\w+)\.md\)", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE)
    existing = [page for page in pages if (ROOT / "docs" / f"{page}.md").is_file()]
    return "\n".join(["", "```{toctree}", ":hidden:", "", *existing, "```", ""])


def docstrings() -> str:
    """The docstrings of all public names."""
    lines = ["", "## In full", "", "```{eval-rst}", ".. currentmodule:: cmim_plugin", ""]
    for name, (directive, members) in API.items():
        lines += [f".. {directive}:: {name}", *([f"   :members: {members}"] if members else []), ""]
    return "\n".join([*lines, "```", ""])


def findings() -> str:
    return "\n".join(["", "```{include} ../benchmarks/FINDINGS.md", ":heading-offset: 1", "```", ""])


MORE = {"index": navigation, "api": docstrings, "evidence": findings}


def image(alt: str, source: str, options: str, theme: str = "") -> str:
    width = re.search(r'width="([^"]+)"', options)
    lines = [f"```{{image}} {source}", f":alt: {alt}"]
    lines += [f":width: {width[1]}px"] if width else []
    return "\n".join([*lines, *([f":class: {theme}"] if theme else []), "```", ""])


def by_theme(match: re.Match[str]) -> str:
    """A picture in two directives, of which the theme shows one."""
    dark, alt, light, options = match.groups()
    return f"{image(alt, light, options, 'only-light')}\n{image(alt, dark, options, 'only-dark')}"


def adapted(text: str, folder: Path) -> str:
    """Pictures as directives; links to files outside of docs/ lead to a download of the file. Code stays as it is."""

    def link(match: re.Match[str]) -> str:
        text, target, _ = match.groups()
        file = (folder / target).resolve()
        if not target or file.parent == ROOT / "docs" or not file.is_relative_to(ROOT):
            return match[0]
        if file.is_file():
            return f"{{download}}`{text} </../{file.relative_to(ROOT)}>`"
        return f"{text} (`{file.relative_to(ROOT)}`)"

    parts = FENCE.split(text)
    for i in range(0, len(parts), 2):
        parts[i] = LINK.sub(link, IMAGE.sub(lambda m: image(*m.groups()), PICTURE.sub(by_theme, parts[i])))
    return "".join(parts)


def read(app: Sphinx, docname: str, content: list[str]) -> None:
    content[0] = adapted(content[0], ROOT / "docs")
    if docname in MORE:
        content[0] += MORE[docname]()


def read_included(app: Sphinx, file: Path, docname: str, content: list[str]) -> None:
    content[0] = adapted(content[0], (Path(app.srcdir) / file).resolve().parent)


def setup(app: Sphinx) -> None:
    app.connect("source-read", read)
    app.connect("include-read", read_included)
