"""Problems of a data set, and the table that lists them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

STOPS, SET_ASIDE, LABEL_NOT_USED, NOTE = "stops the run", "set aside", "label not used", "note"


SEVERITIES = (STOPS, SET_ASIDE, LABEL_NOT_USED, NOTE)


@dataclass(frozen=True)
class Problem:
    """One problem of a ``case`` (or a list): its ``severity`` (one of `SEVERITIES`) and what to do."""

    case: str
    severity: str
    found: str
    expected: str
    remedy: str


class Findings(NamedTuple):
    """All problems of a set of cases, and the class numbers in its templates' labels, including 0."""

    problems: list[Problem]
    classes: frozenset[int]


def table(problems: Iterable[Problem], width: int = 100) -> str:
    """All problems as a plain text table, at most ``width`` characters wide, the most severe first."""
    rows = sorted(problems, key=lambda problem: SEVERITIES.index(problem.severity))
    if not rows:
        return "No problems found."
    first = min(max(len("case"), *(len(row.case) for row in rows)), 28)
    second = max(len(row.severity) for row in rows)
    rest = width - first - second - 2 * 4
    widths = [first, second, rest * 38 // 100, rest * 26 // 100, rest - rest * 38 // 100 - rest * 26 // 100]
    lines = [("case", "effect", "found", "expected", "what to do"), tuple("-" * n for n in widths)]
    for row in rows:
        texts = (row.case, row.severity, row.found, row.expected, row.remedy)
        cells = [textwrap.wrap(text, n) or [""] for text, n in zip(texts, widths)]
        height = max(len(cell) for cell in cells)
        lines += zip(*(cell + [""] * (height - len(cell)) for cell in cells))
    return "\n".join("  ".join(text.ljust(n) for text, n in zip(line, widths)).rstrip() for line in lines)
