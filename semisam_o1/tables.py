"""Tables as CSV: typed columns, atomic writes, safe to open in a spreadsheet."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from semisam_o1.files import write_text
from semisam_o1.ledger import Ledger, State
from semisam_o1.literals import printable
from semisam_o1.types import UserError

TEXT, COUNT = "", "d"  # formats of columns; numbers use those of `format`, e.g. ".4f"
# A spreadsheet reads a cell that starts with one of these as a formula. A leading apostrophe marks it as text. A text
# that starts with an apostrophe gets another one, so that reading restores exactly what was written.
FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "'")


def write_rows(path: str | Path, columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write ``rows`` with ``columns``: name -> format. None and missing keys become empty cells."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(name), kind) for name, kind in columns.items()])
    write_text(path, text.getvalue())
    return Path(path)


def read_rows(path: str | Path, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows of a table with at least ``columns``: text, int or float by format, None for an empty cell.

    Raises:
        ValueError: a column is missing; the message names it.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, restval="")
        try:
            if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
                raise ValueError(f"{path}: no column {', '.join(missing)}; expected {','.join(columns)}")
            return [{name: _value(row[name], kind) for name, kind in columns.items()} for row in reader]
        except csv.Error as error:
            raise ValueError(f"{path} is no table: {error}") from error


def header(path: str | Path) -> list[str]:
    """The names of a table's columns; none if the file is empty or no table."""
    with Path(path).open(newline="", encoding="utf-8", errors="replace") as file:
        try:
            return next(csv.reader(file), [])
        except csv.Error:
            return []


def _cell(value: Any, kind: str) -> str:
    if value is None:
        return ""
    if kind != TEXT:
        return format(value, kind)
    text = str(value)
    return f"'{text}" if text.startswith(FORMULAS) else text


def _value(cell: str, kind: str) -> Any:
    if kind == TEXT:
        return cell.removeprefix("'")
    if not cell:
        return None
    return int(cell) if kind == COUNT else float(cell)


class CaseTable:
    """One row of values per case: ``{case: {column: value}}`` in a CSV whose first column is ``case``.

    Args:
        path: the file.
        columns: name -> format of each number.
        order: sort key of the rows, called with (case, numbers).
        more: start of the names of further columns, which differ between tables, and their format.
        later: further columns, with formats, that tables of earlier versions do not have.
        ledger: if given, the table is written through it, and one that a person changed is not read.
    """

    def __init__(
        self,
        path: str | Path,
        columns: Mapping[str, str],
        order=lambda row: row[0],
        ledger: Ledger | None = None,
        more: tuple[str, str] | None = None,
        later: Mapping[str, str] | None = None,
    ):
        self.path, self.columns, self.order = Path(path), {"case": TEXT, **columns}, order
        self.ledger, self.more, self.later = ledger, more, dict(later or {})

    def write(self, values: Mapping[str, Mapping[str, Any]]) -> None:
        rows = sorted(values.items(), key=self.order)
        names = {name: None for numbers in values.values() for name in numbers}
        columns = self._columns([*self.later, *names])
        with contextlib.nullcontext(self.path) if self.ledger is None else self.ledger.writing(self.path) as path:
            write_rows(path, columns, ({"case": name, **numbers} for name, numbers in rows))

    def read(self) -> dict[str, dict[str, Any]]:
        """All rows; empty if the file does not exist."""
        trusted = self.path.is_file() and (self.ledger is None or self.ledger.state(self.path) is State.OURS)
        try:
            rows = read_rows(self.path, self._columns(header(self.path))) if trusted else []
        except ValueError as error:
            remedy = "Restore it, or remove it: the same command makes it again."
            raise UserError(f"{self.path} is damaged ({printable(str(error), 200)}). {remedy}") from error
        return {row.pop("case"): row for row in rows}

    def _columns(self, names: Iterable[str]) -> dict[str, str]:
        """The columns, with those of ``names`` that are further ones."""
        names = list(names)
        columns = self.columns | {name: kind for name, kind in self.later.items() if name in names}
        if self.more is None:
            return columns
        start, kind = self.more
        return columns | {name: kind for name in names if name.startswith(start)}
