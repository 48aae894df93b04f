"""``RUN/reviewed``: the labels that people gave, one a case, and ``reviewed.csv`` that says what they did.

Nothing here is ever overwritten: an earlier label of a case keeps its file under a name with a date, and an earlier row
moves to ``earlier.csv``.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from semisam_o1.files import atomic_write, checksum
from semisam_o1.ledger import dated, versions
from semisam_o1.runfolder import volume
from semisam_o1.tables import COUNT, TEXT, read_rows, write_rows
from semisam_o1.types import UserError

CORRECTED, ACCEPTED, OUTLINED, REJECTED = "corrected", "accepted", "outlined", "rejected"
KINDS = (CORRECTED, ACCEPTED, OUTLINED, REJECTED)
COLUMNS = {
    "case": TEXT, "what": TEXT, "round": COUNT, "voxels_changed": COUNT, "dice": ".4f", "when": TEXT, "sha256": TEXT,
}  # fmt: skip


class Entry(NamedTuple):
    """What a person did with a case.

    what: one of `KINDS`; "outlined" is a label of a scan for which there was no proposal. round: whose label was the
    proposal. voxels_changed, dice: of the label against the proposal, mean over classes. when: local time. sha256: of
    the label's file. None where it does not apply.
    """

    case: str
    what: str
    round: int | None = None
    voxels_changed: int | None = None
    dice: float | None = None
    when: str = ""
    sha256: str | None = None


class Reviewed:
    """The folder of what people gave; it need not exist yet."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.table, self.earlier = self.folder / "reviewed.csv", self.folder / "earlier.csv"

    def label(self, case: str) -> Path:
        return volume(self.folder, case)

    def entries(self) -> dict[str, Entry]:
        """Case -> what was done last, in the order in which it came.

        Raises:
            UserError: the table is damaged, or a label is not there.
        """
        found = self.rows()
        for entry in found.values():
            if entry.what != REJECTED and not self.label(entry.case).is_file():
                raise UserError(
                    f"case {entry.case}: {self.table} says {entry.what}, but {self.label(entry.case)} is not there. "
                    f"Restore it, or take the step back: semisam-o1 review RUN --undo {entry.case}."
                )
        return found

    def rows(self) -> dict[str, Entry]:
        """As `entries`, also if a label is not there."""
        return {entry.case: entry for entry in self._read(self.table)}

    def recover(self) -> None:
        """Put back labels that a killed process left under an earlier name."""
        for entry in self.rows().values():
            if entry.sha256 and not self.label(entry.case).is_file() and (kept := self._kept(entry)) is not None:
                kept.rename(self.label(entry.case))

    def has(self, case: str, path: Path) -> bool:
        """Whether a person gave the file at ``path`` as the label of a case, now or earlier."""
        return any(checksum(kept) == checksum(path) for kept in versions(self.label(case)))

    def _kept(self, entry: Entry) -> Path | None:
        """The file that holds the label of an entry, whatever its name."""
        return next((path for path in versions(self.label(entry.case)) if checksum(path) == entry.sha256), None)

    def labels(self) -> dict[str, Path]:
        """Case -> label, in the order in which they came."""
        return {name: self.label(name) for name, entry in self.entries().items() if entry.what != REJECTED}

    def rejected(self) -> list[str]:
        return [name for name, entry in self.entries().items() if entry.what == REJECTED]

    def add(self, entry: Entry, label: Path | None = None) -> Entry:
        """Add what was done with a case, and a copy of its ``label``; returns the entry with time and checksum."""
        rows = self.rows()
        before = rows.pop(entry.case, None)
        sha256 = None if label is None else checksum(label)
        own = self.label(entry.case)
        if label is None:
            self._set_aside(entry.case)
        elif not own.is_file() or checksum(own) != sha256:
            with atomic_write(own) as aside:
                shutil.copyfile(label, aside)
                self._set_aside(entry.case)  # when the new one is whole
        entry = entry._replace(when=entry.when or time.strftime("%Y-%m-%d %H:%M:%S"), sha256=sha256)
        if before is not None:
            self._write(self.earlier, [*self._read(self.earlier), before])
        self._write(self.table, [*rows.values(), entry])
        return entry

    def undo(self, case: str) -> Entry | None:
        """Take back the last step of a case; returns the step before, which counts again.

        Raises:
            UserError: nothing was done with the case.
        """
        rows = self.rows()
        if rows.pop(case, None) is None:
            raise UserError(f"--undo {case}: nothing was given for it; reviewed are {', '.join(rows) or 'none'}.")
        earlier = self._read(self.earlier)
        before = next((entry for entry in reversed(earlier) if entry.case == case), None)
        kept = None if before is None or not before.sha256 else self._kept(before)
        if before is not None and before.sha256 and kept is None:
            raise UserError(f"--undo {case}: its earlier label is no longer in {self.folder}. Restore it.")
        if kept != self.label(case):
            self._set_aside(case)
        if before is not None:
            if kept is not None:
                kept.rename(self.label(case))
            rows[case] = before
            place = len(earlier) - 1 - earlier[::-1].index(before)
            self._write(self.earlier, earlier[:place] + earlier[place + 1 :])
        self._write(self.table, rows.values())
        return before

    def _set_aside(self, case: str) -> None:
        """Give the present label of a case a name with a date."""
        label = self.label(case)
        if label.is_file():
            label.rename(dated(label))

    def _read(self, path: Path) -> list[Entry]:
        if not path.is_file():
            return []
        try:
            rows = [Entry(**{**row, "sha256": row["sha256"] or None}) for row in read_rows(path, COLUMNS)]
        except (ValueError, OSError) as error:
            raise UserError(f"{path} is damaged: {error}. Restore it; the labels beside it are whole.") from error
        if wrong := [row.what for row in rows if row.what not in KINDS]:
            raise UserError(f"{path} is damaged: found '{wrong[0]}', expected one of {', '.join(KINDS)}. Restore it.")
        return rows

    def _write(self, path: Path, entries: Iterable[Entry]) -> None:
        entries = list(entries)
        if entries or os.path.lexists(path):
            write_rows(path, COLUMNS, (entry._asdict() for entry in entries))
