"""Pseudonyms in place of case names, and the key that connects both."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from semisam_o1.data.findings import Problem
from semisam_o1.lock import locked
from semisam_o1.tables import TEXT, read_rows, write_rows
from semisam_o1.types import Case, DatasetError

COLUMNS = {"case": TEXT, "pseudonym": TEXT}


class Pseudonyms:
    """``case,pseudonym`` in the CSV file ``path``. New cases get ``scan_0001``, ``scan_0002``, ...

    An existing file keeps its pseudonyms, also those that somebody else chose.

    Raises:
        DatasetError: the file is not such a table, or two cases share a pseudonym.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        rows = []
        if self.path.exists():
            try:
                rows = read_rows(self.path, COLUMNS)
            except (ValueError, OSError) as error:
                raise DatasetError(f"pseudonyms {self.path}: no table with columns case,pseudonym ({error})") from error
        self.key: dict[str, str] = {row["case"]: row["pseudonym"] for row in rows}
        given = list(self.key.values())
        if len(set(given)) < len(given) or not all(re.fullmatch(r"\w[\w.-]*", name) for name in given):
            raise DatasetError(f"pseudonyms {self.path}: expected one of its own for each case, of letters and digits.")

    def __call__(self, name: str) -> str:
        if name not in self.key:
            taken, number = set(self.key.values()), len(self.key) + 1
            while (pseudonym := f"scan_{number:04d}") in taken:
                number += 1
            self.key[name] = pseudonym
        return self.key[name]

    def name(self, pseudonym: str) -> str:
        """The case that has a pseudonym; without one, the text itself."""
        return next((case for case, found in self.key.items() if found == pseudonym), pseudonym)

    def write(self) -> None:
        write_rows(self.path, COLUMNS, ({"case": case, "pseudonym": name} for case, name in self.key.items()))

    def case(self, case: Case) -> Case:
        return replace(case, name=self(case.name))

    def text(self, text: str) -> str:
        """``text`` with the names of cases replaced where they stand as whole words, the longest first.

        A name may have the number of a channel behind it, as in ``x_0000.nii.gz`` of the case x.
        """
        names = "|".join(re.escape(name) for name in sorted(self.key, key=len, reverse=True))
        whole = rf"(?<!\w)({names})((?!\w)|(?=_\d{{4}}\.\w))"
        text = unicodedata.normalize("NFC", text)
        return re.sub(whole, lambda found: self.key[found[1]], text) if names else text

    def problem(self, problem: Problem) -> Problem:
        return replace(
            problem, case=self.text(problem.case), found=self.text(problem.found), remedy=self.text(problem.remedy)
        )


def refuse_key_in(folder: Path, key: str | Path) -> None:
    """Refuse a key that lies among the results whose names it knows.

    Raises:
        DatasetError: the file ``key`` is in ``folder``, or below it.
    """
    if Path(key).expanduser().resolve().is_relative_to(folder.resolve()):
        raise DatasetError(f"--pseudonyms {key} lies in {folder}, beside the results. Keep the key elsewhere.")


def renamed(
    path: str | Path | None, names: Iterable[str], cases: Sequence[Case], problems: Sequence[Problem]
) -> tuple[list[Case], list[Problem]]:
    """Cases and problems under the pseudonyms in the file ``path``, which is written; unchanged if it is None.

    ``names``: all that may stand in a problem, those of scans that are no cases too.
    """
    if path is None:
        return list(cases), list(problems)
    path = Path(path).expanduser()
    with locked(path):
        pseudonyms = Pseudonyms(path)
        new = sorted(set(names) - set(pseudonyms.key))
        random.SystemRandom().shuffle(new)  # in order, the numbers would tell the names to whoever has a list of them
        for name in new:
            pseudonyms(name)
        pseudonyms.write()
    return [pseudonyms.case(case) for case in cases], [pseudonyms.problem(problem) for problem in problems]
