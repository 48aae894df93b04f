"""Tables as CSV: typed columns, written whole or not at all, safe to open in a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from semisam_o1.files import write_text

TEXT, COUNT = "", "d"  # formats of columns; a number's is that of `format`, e.g. ".4f"
# A spreadsheet takes a cell that begins so for a formula. An apostrophe before it makes it text again; a text that
# begins with an apostrophe gets another, so that reading takes back exactly what writing put there.
FORMULAS = ("=", "+", "-", "@", "\t", "\r", "\n", "'")


def write_rows(path: str | Path, columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write ``rows`` with ``columns``: name -> format. None becomes an empty cell, as does a key that is missing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_cell(row.get(name), kind) for name, kind in columns.items()])
    write_text(path, text.getvalue())
    return Path(path)


def read_rows(path: str | Path, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows of a table with at least ``columns``: text, int or float by their formats, None where a cell is empty.

    Raises:
        ValueError: a column is missing; the message names it.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
            raise ValueError(f"{path}: no column {', '.join(missing)}; expected {','.join(columns)}")
        return [{name: _value(row[name], kind) for name, kind in columns.items()} for row in reader]


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
    """One row of numbers a case: ``{case: {column: number}}`` in a CSV whose first column is ``case``.

    Args:
        path: of the file.
        columns: name -> format of each number.
        order: of the rows when written, a key over (case, numbers).
    """

    def __init__(self, path: str | Path, columns: Mapping[str, str], order=lambda row: row[0]):
        self.path, self.columns, self.order = Path(path), {"case": TEXT, **columns}, order

    def write(self, values: Mapping[str, Mapping[str, float]]) -> None:
        rows = sorted(values.items(), key=self.order)
        write_rows(self.path, self.columns, ({"case": name, **numbers} for name, numbers in rows))

    def read(self) -> dict[str, dict[str, float]]:
        """Empty where none has been written."""
        rows = read_rows(self.path, self.columns) if self.path.exists() else []
        return {row.pop("case"): row for row in rows}
