"""Tables for the terminal."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

_NUMBERS = re.compile(r"\d+")


def table(rows: Sequence[Sequence[str]], right: bool = False) -> str:
    """Rows of cells as aligned text, the first row as the heading. ``right``: all columns but the first."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if right and column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, rows))


def folded(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows that differ in counting numbers of their first cell alone become one: ``layer3.0-5.conv1-2``."""
    groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for name, *rest in rows:
        numbers = tuple(map(int, _NUMBERS.findall(name)))
        groups.setdefault((_NUMBERS.sub("{}", name), *rest), []).append(numbers)
    found = []
    for (template, *rest), numbers in groups.items():
        ranges = [(min(column), max(column)) for column in zip(*numbers, strict=True)]
        if len(numbers) == math.prod(last - first + 1 for first, last in ranges):
            texts = [[f"{first}" if first == last else f"{first}-{last}" for first, last in ranges]]
        else:
            texts = [list(map(str, each)) for each in numbers]
        found += [
            ("".join(itertools.chain(*zip(template.split("{}"), [*each, ""], strict=True))), *rest) for each in texts
        ]
    return found
