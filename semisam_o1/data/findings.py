"""Problems of a data set, and the table that lists them."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from semisam_o1.literals import printable
from semisam_o1.tables import TEXT, write_rows
from semisam_o1.types import DatasetError

STOPS, SET_ASIDE, LABEL_NOT_USED = "stops the run", "set aside", "label not used"
WARNING, NOTE = "warning", "note"  # results may be wrong; nothing to do


WIDTH = 100  # characters of a line that a command prints
LONGEST = 200  # letters of a cell that a command prints
MOST_LINES = 50  # of a kind of problem that a command prints
COLUMNS = dict.fromkeys(("case", "severity", "found", "expected", "remedy"), TEXT)  # of problems.csv
SEVERITIES = (STOPS, SET_ASIDE, LABEL_NOT_USED, WARNING, NOTE)


@dataclass(frozen=True)
class Problem:
    """One problem of a ``case`` (or a list): its ``severity`` (one of `SEVERITIES`) and what to do."""

    case: str
    severity: str
    found: str
    expected: str
    remedy: str


class Finding(NamedTuple):
    """What a file's reader noticed, `WARNING` or `NOTE`: a `Problem` that has no case yet."""

    severity: str
    found: str
    expected: str
    remedy: str


class Fault(DatasetError):
    """Why a file cannot be used: what was found and expected, and what to do."""

    def __init__(self, found: str, expected: str, remedy: str):
        super().__init__(f"{found}; expected {expected}: {remedy}.")
        self.texts = (found, expected, remedy)


class CohortError(DatasetError):
    """A data set cannot be used, for the reasons in ``problems``."""

    def __init__(self, root: Path, problems: list[Problem]):
        super().__init__(f"{root} cannot be used as it is.\n{table(problems)}")
        self.problems = problems


class Findings(NamedTuple):
    """All problems of a set of cases, and the class numbers in its templates' labels, including 0."""

    problems: list[Problem]
    classes: frozenset[int]


def write_problems(path: str | Path, problems: Iterable[Problem]) -> Path:
    """Write all problems as CSV with `COLUMNS`, the most severe first."""
    rows = sorted(problems, key=lambda problem: SEVERITIES.index(problem.severity))
    return write_rows(path, COLUMNS, map(vars, rows))


def warnings(problems: Iterable[Problem], most: int = MOST_LINES) -> list[str]:
    """The warnings among ``problems`` as sentences, at most ``most``."""
    found = [problem for problem in problems if problem.severity == WARNING]
    return [f"case {problem.case}: {problem.found}; {problem.remedy}." for problem in found[:most]]


def left_out(problems: Iterable[Problem]) -> bool:
    """Whether `table` leaves out problems."""
    return bool(_laid_out(problems, WIDTH)[1])


def table(problems: Iterable[Problem], width: int = WIDTH) -> str:
    """Problems as a plain text table, at most ``width`` characters wide, the most severe first.

    A kind of problem has at most `MOST_LINES` lines; one more line says how many are left out.
    """
    lines, hidden = _laid_out(problems, width)
    more = [f"... and {count} more of: {severity}, expected {what}" for (severity, what), count in hidden.items()]
    return "\n".join([*lines, *more]) or "No problems found."


def _laid_out(problems: Iterable[Problem], width: int) -> tuple[list[str], Counter]:
    """The lines of `table`, and how many problems of each kind (severity, expected) they leave out."""
    rows = sorted(problems, key=lambda problem: SEVERITIES.index(problem.severity))
    if not rows:
        return [], Counter()
    first = min(max(len("case"), *(len(row.case) for row in rows)), 28)
    second = max(len("effect"), *(len(row.severity) for row in rows))
    rest = width - first - second - 2 * 4
    widths = [first, second, rest * 38 // 100, rest * 26 // 100, rest - rest * 38 // 100 - rest * 26 // 100]
    lines = [("case", "effect", "found", "expected", "what to do"), tuple("-" * n for n in widths)]
    used: Counter = Counter()
    hidden: Counter = Counter()
    for row in rows:
        kind = (row.severity, row.expected)
        if used[kind] >= MOST_LINES:
            hidden[kind] += 1
            continue
        texts = [printable(text, LONGEST) for text in (row.case, row.severity, row.found, row.expected, row.remedy)]
        cells = [textwrap.wrap(text, n) or [""] for text, n in zip(texts, widths)]
        height = max(len(cell) for cell in cells)
        used[kind] += height
        lines += zip(*(cell + [""] * (height - len(cell)) for cell in cells))
    return ["  ".join(text.ljust(n) for text, n in zip(line, widths)).rstrip() for line in lines], hidden
