"""Tables for the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

# Not numbers like 01: a range would lose their zeros.
_NUMBERS = re.compile(r"(?<!\d)(?:0|[1-9]\d*)(?!\d)")


def table(rows: Sequence[Sequence[str]], right: bool = False) -> str:
    """Rows of cells as aligned text, the first row as the heading. ``right``: right-align all columns but the first."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    justified = str.rjust if right else str.ljust
    lines = ["  ".join([row[0].ljust(widths[0]), *map(justified, row[1:], widths[1:])]) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def folded(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Join rows that differ in consecutive numbers in their first cell only: ``layer3.0-5.conv1-2 (12)``."""
    by_template: dict[tuple[str, ...], list[list[int]]] = {}
    for name, *rest in rows:
        template = _NUMBERS.sub("{}", name.replace("{", "{{").replace("}", "}}"))
        by_template.setdefault((template, *rest), []).append([int(n) for n in _NUMBERS.findall(name)])
    found: list[tuple[str, ...]] = []
    for (template, *rest), of_rows in by_template.items():
        for box in _boxes(of_rows):
            name = template.format(*(f"{a}-{b}" if a < b else f"{a}" for a, b in box))
            count = math.prod(b - a + 1 for a, b in box)
            found.append((f"{name} ({count})" if count > 1 else name, *rest))
    return found


def _boxes(rows: list[list[int]], column: int = 0) -> list[list[tuple[int, int]]]:
    """Split rows of numbers into boxes: (first, last) of each column. The rows in a box are all combinations."""
    ranges = [(min(numbers), max(numbers)) for numbers in zip(*rows, strict=True)]
    if len(rows) == math.prod(last - first + 1 for first, last in ranges):
        return [ranges]
    parts: dict[int, list[list[int]]] = {}
    for row in rows:
        parts.setdefault(row[column], []).append(row)
    return [box for part in parts.values() for box in _boxes(part, column + 1)]
