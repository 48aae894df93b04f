"""Takes back what people did with the labels of a run: corrections saved in place or anywhere, acceptances, rejections.

A label is read by `Cohort.label_volume` and checked as a template's is. One that does not fit is refused, and its file
stays as it is.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from semisam_o1.data.checks import check_case
from semisam_o1.data.cohort import Cohort
from semisam_o1.data.datastore import segments_beside
from semisam_o1.data.export import write_label
from semisam_o1.data.findings import STOPS, WARNING, Fault
from semisam_o1.data.folders import match
from semisam_o1.data.labels import read_label
from semisam_o1.files import PARTIAL, checksum
from semisam_o1.ledger import State
from semisam_o1.report.overlap import mean_dice
from semisam_o1.reviewed import ACCEPTED, CORRECTED, OUTLINED, REJECTED, Entry, Reviewed
from semisam_o1.runfolder import SUFFIX, RunFolder
from semisam_o1.types import Case, DatasetError

log = logging.getLogger("semisam_o1")


class Corrections:
    """What people do with the labels of ``run``, whose data set is ``cohort``."""

    def __init__(self, run: RunFolder, cohort: Cohort):
        self.run, self.cohort, self.reviewed = run, cohort, Reviewed(run.reviewed)

    def saved_in_place(self) -> list[str]:
        """The cases whose label in ``pseudo_labels/`` a person changed, and which is not taken yet."""
        known, changed = self.reviewed.rows(), []
        for case in (*self.cohort.pool, *self.cohort.val, *self.cohort.test):
            path, entry = self.run.pseudo_label(case.name), known.get(case.name)
            if self.run.ledger.state(path) is not State.CHANGED:
                continue
            rejected = entry is not None and entry.what == REJECTED and self.reviewed.has(case.name, path)
            if not rejected and (entry is None or entry.sha256 != checksum(path)):
                changed.append(case.name)
        return changed

    def take_saved(self, but: Collection[str] = ()) -> tuple[list[Entry], list[str]]:
        """Take every label that was saved in place, but for some cases; returns what was taken, and what was refused.

        A label that does not fit is named in a warning and stays where it is.
        """
        taken, refused = [], []
        for name in self.saved_in_place():
            if name in but:
                continue
            try:
                case, path = self._case(name), self.run.pseudo_label(name)
                taken.append(self._add(case, self._read(case, path), path))
            except DatasetError as error:
                log.warning("%s It is not used, and stays where it is.", error)
                refused.append(name)
        return taken, refused

    def usable(self) -> dict[str, Path]:
        """Case -> label, of all that people gave and that fits its scan, in the order in which they came.

        A label in the folder that was changed there since is taken anew. One that does not fit is named in a warning
        and not used; the other ones count.
        """
        found = {}
        known = {case.name: case for case in self.cohort.cases if case.split != "template"}
        for name, entry in self.reviewed.entries().items():
            if entry.what == REJECTED or name not in known:
                continue
            path = self.reviewed.label(name)
            try:
                values = self._read(known[name], path)
            except DatasetError as error:
                log.warning("%s It is not used, and stays where it is.", error)
                continue
            if entry.sha256 != checksum(path):
                log.info("case %s: its label in %s was changed and is taken anew", name, self.reviewed.folder)
                self._add(known[name], values, path)
                self._show(name)
            found[name] = path
        return found

    def take(self, path: str | Path, name: str | None = None) -> Entry | None:
        """Take a label that a person made; returns None for the label of a template as the data set has it.

        If MONAI Label knows names of the values in it, these tell the classes, see `segments_beside`.

        ``name``: its case; by default the name of the file says it.

        Raises:
            DatasetError: there is no such case, or the label cannot be used; the message says why.
        """
        path = Path(path)
        if not path.is_file():
            raise DatasetError(f"--take {path}: there is no such file.")
        case = self.cohort.case(name) if name else self._whose(path)
        with self._as_kept(case, path) as label:
            values = self._read(case, label)
            if case.split == "template" and torch.equal(values, self.cohort.label(case)):
                return None
            entry = self._add(self._case(case.name), values, label)
        self._show(case.name)
        return entry

    def had(self, path: str | Path) -> bool:
        """Whether a person gave the label at ``path`` before; it may have been taken back since.

        Raises:
            DatasetError: there is no such case, or the label cannot be used; the message says why.
        """
        case = self._whose(Path(path))
        with self._as_kept(case, Path(path)) as label:
            return self.reviewed.has(case.name, label)

    def accept(self, name: str) -> Entry:
        """Take the label that was handed out as it is. One that a person changed is a correction.

        Raises:
            DatasetError: there is no such case, or no label of it.
        """
        case, path = self._case(name), self.run.pseudo_label(name)
        if not path.is_file():
            raise DatasetError(f"--accept {name}: it has no label in {self.run.pseudo_labels}.")
        return self._add(case, self._read(case, path), path)

    def reject(self, name: str) -> Entry:
        """The scan is no good: it leaves the pool. Its files stay.

        Raises:
            DatasetError: there is no such case, or it is none of the pool.
        """
        known = self.reviewed.rows().get(name)
        if known is not None and known.what == REJECTED:
            return known
        if self._case(name).split != "pool":
            raise DatasetError(f"--reject {name}: expected a scan of the pool. Take other scans out of their list.")
        return self.reviewed.add(Entry(name, REJECTED))

    def undo(self, name: str) -> Entry | None:
        """Take back the last step; see `Reviewed.undo`. A label that was saved in place gives way to the one before."""
        undone, path = self.reviewed.rows().get(name), self.run.pseudo_label(name)
        before = self.reviewed.undo(name)
        if undone is not None and undone.sha256 is not None and path.is_file() and checksum(path) == undone.sha256:
            self._show(name)
        return before

    def _show(self, name: str) -> None:
        """Put the label that counts now in place of one in ``pseudo_labels/`` that counted before."""
        path, entry = self.run.pseudo_label(name), self.reviewed.rows().get(name)
        if self.run.ledger.state(path) is not State.CHANGED or not self.reviewed.has(name, path):
            return
        proposal = self._proposal(self.cohort.case(name))
        given = self.reviewed.label(name) if entry is not None and entry.sha256 else None
        label = given or (proposal[1] if proposal else None)
        if label is not None and checksum(label) != checksum(path):
            self.run.ledger.remove(path)  # it is in the folder of what people gave
            with self.run.ledger.writing(path) as aside:
                shutil.copyfile(label, aside)

    def import_from(self, folder: str | Path, known: Mapping[str, str] = MappingProxyType({})) -> list[Entry]:
        """Take what people gave in another run on the same data set, as far as this one does not have it.

        ``known``: case -> `mark` of what was taken before; it may have been taken back since.

        Raises:
            DatasetError: the folder is none of reviewed labels, or a label does not fit.
        """
        other, own, taken = Reviewed(folder), self.reviewed.rows(), []
        if not other.table.is_file():
            raise DatasetError(f"reviewed {folder}: no reviewed.csv there; expected the folder RUN/reviewed of a run.")
        if other.folder.resolve() == self.reviewed.folder.resolve():
            return []
        for name, entry in other.entries().items():
            if name in own or known.get(name) == mark(entry):
                continue
            if entry.what == REJECTED:
                taken.append(self.reviewed.add(entry))
                continue
            case = self._case(name)
            self._read(case, other.label(name))
            taken.append(self.reviewed.add(entry, other.label(name)))
        return taken

    def _whose(self, path: Path) -> Case:
        """The case of a label by the name of its file."""
        try:
            return self.cohort.case(match(path.name, [case.name for case in self.cohort.cases]))
        except DatasetError as error:
            what_to_do = "Say whose it is: --as CASE; a new scan goes into the data set first."
            raise DatasetError(f"--take {path}: {error} {what_to_do}") from error

    @contextmanager
    def _as_kept(self, case: Case, path: Path) -> Iterator[Path]:
        """A label as it is kept: NIfTI whose values are the run's class numbers. ``path`` itself if it is that.

        Raises:
            DatasetError: the label cannot be used.
        """
        cohort = self.cohort
        segments = telling_names(cohort, path)
        if path.name.endswith(SUFFIX) and not segments:
            yield path
            return
        if segments:
            try:
                scan = cohort.reader.open(case.image)
                values = read_label(path, cohort.reader, scan, cohort.classes, segments).values
            except Fault as fault:
                raise refused(case, path, *fault.texts) from fault
        else:
            values = np.asarray(cohort.class_numbers)[self._read(case, path)]
        with tempfile.TemporaryDirectory(prefix=f"{PARTIAL}{os.getpid()}-", dir=self.run.path) as folder:
            written = Path(folder, self.reviewed.label(case.name).name)
            write_label(written, values, case.image, cohort.grid(case))
            yield written

    def _case(self, name: str) -> Case:
        """A case of the pool, or of validation and test; their reviewed labels are truth and never train."""
        case = self.cohort.case(name)
        if case.split == "template":
            raise DatasetError(f"case {name} is a template: its label in the data set counts. Change that one instead.")
        return case

    def _read(self, case: Case, path: Path) -> torch.Tensor:
        """The channel of each voxel, (H, W, D), of a label that is as good as a template's.

        Raises:
            DatasetError: it is not.
        """
        cohort = self.cohort
        allowed = None if cohort.binary else cohort.class_numbers
        seen = check_case(replace(case, label=path, split="template"), cohort.reader, allowed, cohort.named)
        for problem in seen:
            if problem.severity == STOPS:
                raise refused(case, path, problem.found, problem.expected, problem.remedy)
            if problem.severity == WARNING:
                log.warning("case %s: %s: %s; %s.", case.name, path.name, problem.found, problem.remedy)
        return cohort.label(case, path)

    def _add(self, case: Case, values: torch.Tensor, path: Path) -> Entry:
        """Add a label, with what was changed of its proposal; one that is there already changes nothing."""
        known = self.reviewed.rows().get(case.name)
        if known is not None and known.sha256 is not None and known.sha256 == checksum(path):
            return known
        proposal = self._proposal(case)
        if proposal is None:
            entry = Entry(case.name, OUTLINED)
        else:
            number, file = proposal
            before = self.cohort.label(case, file)
            changed, dice = int((before != values).sum()), mean_dice(values, before, self.cohort.num_classes)
            entry = Entry(case.name, CORRECTED if changed else ACCEPTED, number, changed, dice)
        return self.reviewed.add(entry, path)

    def _proposal(self, case: Case) -> tuple[int, Path] | None:
        """The label that was handed out for a case, and its round; None if there is none."""
        record = self.run.read_record()
        number = record.get("labels_round", record.get("best_round", 0))
        path = self.run.round(number).final(case.name)
        return (number, path) if path.is_file() else None


def telling_names(cohort: Cohort, path: Path) -> dict[int, str]:
    """Value -> name of a label in a studies folder of MONAI Label, if names tell its classes.

    They do not where all foreground is one class, or where the data set has one class and no name for it.
    """
    one = cohort.binary or (cohort.named is None and cohort.num_classes == 2)
    return {} if one else segments_beside(path)


def refused(case: Case, path: Path, found: str, expected: str, remedy: str) -> DatasetError:
    """The error for a label that cannot be used."""
    text = f"case {case.name}: {path.name} is refused: {found}; expected {expected}."
    return DatasetError(f"{text} {remedy[:1].upper()}{remedy[1:]}.")


def mark(entry: Entry) -> str:
    """What an entry of another run is told by: its label's checksum, or that the scan was rejected."""
    return entry.sha256 or entry.what
