"""What was written into a folder for people, so that nothing that a person made or changed is ever replaced.

``written.json`` holds the checksums of each file that was handed out. A file without an entry belongs to somebody else.
A file whose voxels or bytes changed since is a person's work: it is moved to ``reviewed/`` before a new one is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from semisam_o1.files import checksum, copy_file, partial_path, read_json, remove_empty, write_json, writing_errors
from semisam_o1.types import UserError

log = logging.getLogger("semisam_o1")
KNOWN = 2  # checksums kept of a file: of the last version, and of the one that a killed process was about to write
HELD = ".held-"  # prefix of a file that is moved aside while its successor is put in place
VOLUME = (".nii.gz", ".nii")
MOST_NAMED = 5  # files listed in a message


class State(Enum):
    """A file compared with what was written there."""

    ABSENT = "absent"
    OURS = "as it was written"
    RESAVED = "saved again with the same voxels and grid"
    CHANGED = "changed by a person"
    FOREIGN = "written by somebody else"


class Ledger:
    """The files that ``command`` handed out in ``folder`` and below.

    Args:
        folder: need not exist yet.
        command: what writes here; files that another command wrote are foreign to it.
    """

    def __init__(self, folder: str | Path, command: str):
        self.folder, self.command = Path(folder), command
        self.path, self.reviewed = self.folder / "written.json", self.folder / "reviewed"

    @property
    def entries(self) -> dict[str, list[dict[str, str]]]:
        """File, relative to the folder -> command and checksums of its last versions."""
        found = read_json(self.path) if self.path.is_file() else {}
        if not all(isinstance(kept, list) and all(isinstance(part, dict) for part in kept) for kept in found.values()):
            raise UserError(f"{self.path} is damaged. Restore it, or name another folder.")
        return found

    def state(self, path: Path) -> State:
        return self._compare(path, path)

    def foreign(self, paths: Iterable[Path]) -> list[Path]:
        """Those of ``paths`` that exist and were not written by this package; a link counts as foreign."""
        there = [path for path in paths if os.path.lexists(path)]
        return [path for path in there if path.is_symlink() or not self._versions(path)]

    def refuse_foreign(self, paths: Iterable[Path]) -> None:
        """Begin to write ``paths``: `recover`, then raise a `UserError` if one of them belongs to somebody else."""
        self.recover()
        if found := self.foreign(paths):
            names = ", ".join(str(path) for path in found[:MOST_NAMED])
            more = f" and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
            raise UserError(
                f"{self.command} would replace files that it did not write: {names}{more}. Nothing was written. "
                "Name another folder, or move these files away."
            )

    @contextlib.contextmanager
    def writing(self, path: Path) -> Iterator[Path]:
        """A temporary path for the new ``path``. If the block succeeds, it takes the place of the old one.

        A person's version of the old one moves to ``reviewed/``, also if it was saved while the block ran. A label
        stays in place, and is copied to ``reviewed/``, if the new version is the one that the person changed.
        """
        aside = partial_path(path)
        with writing_errors(path, aside):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield aside
                label = path.name.endswith(VOLUME)
                if label and self.state(path) is State.CHANGED and self._is_last(path, aside):
                    self._copy(path)
                else:
                    self._expect(path, aside)
                    self._put(aside, path)
            finally:
                with contextlib.suppress(OSError):
                    aside.unlink()

    def remove(self, path: Path) -> None:
        """Remove a file that was written here. A person's version moves to ``reviewed/``; foreign files stay."""
        if self.state(path) not in (State.ABSENT, State.FOREIGN):
            self._hold(path)

    def remove_below(self, folder: Path, changed: bool = True) -> None:
        """`remove` every known file in ``folder`` and below, then the folders that are empty.

        ``changed``: also those that a person changed; without it they stay where they are.
        """
        for path in [self.folder / name for name in self.entries if (self.folder / name).is_relative_to(folder)]:
            if changed or self.state(path) is not State.CHANGED:
                self.remove(path)
        remove_empty(folder)

    def recover(self) -> None:
        """Put right what a killed process left: known files that it had moved aside."""
        for name in self.entries:
            path = self.folder / name
            if os.path.lexists(held_path(path)):
                self._settle(held_path(path), path)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _versions(self, path: Path) -> list[dict[str, str]]:
        """The checksums of the versions of ``path`` that this command wrote, the last one last."""
        return [entry for entry in self.entries.get(self._name(path), []) if entry.get("by") == self.command]

    def _compare(self, path: Path, original: Path) -> State:
        """The state of the file at ``path`` as a version of ``original``."""
        if not os.path.lexists(path):
            return State.ABSENT
        entries = self._versions(original)
        if path.is_symlink() or not path.is_file() or not entries:
            return State.FOREIGN
        found = checksum(path)
        if any(found == entry.get("bytes") for entry in entries):
            return State.OURS
        voxels = [entry["voxels"] for entry in entries if entry.get("voxels")]
        return State.RESAVED if voxels and voxels_checksum(path) in voxels else State.CHANGED

    def _expect(self, path: Path, aside: Path) -> None:
        """Add the checksums of ``aside``, the next version of ``path``; written before it is in place."""
        entry, name, entries = {"by": self.command, "bytes": checksum(aside)}, self._name(path), self.entries
        if path.name.endswith(VOLUME):
            entry["voxels"] = voxels_checksum(aside)
        kept = [known for known in entries.get(name, []) if known != entry]
        write_json(self.path, entries | {name: [*kept, entry][-KNOWN:]})

    def _put(self, aside: Path, path: Path) -> None:
        while True:
            self._hold(path)
            try:
                os.link(aside, path)  # unlike a renaming, it never replaces what was saved just now
                return
            except FileExistsError:
                continue
            except OSError:  # a file system without hard links
                aside.replace(path)
                return

    def _hold(self, path: Path) -> None:
        """Take the present version of ``path`` away: to ``reviewed/`` if it is a person's."""
        with contextlib.suppress(FileNotFoundError):
            path.rename(held_path(path))
            self._settle(held_path(path), path)

    def _is_last(self, path: Path, aside: Path) -> bool:
        """Whether ``aside`` is the version of ``path`` that was written last."""
        entries = self._versions(path)
        return bool(entries) and entries[-1].get("bytes") == checksum(aside)

    def _copies(self, path: Path) -> list[Path]:
        """The versions of a label that were kept earlier."""
        return versions(self.reviewed / path.name)

    def _copy(self, path: Path) -> None:
        """Copy a person's version to ``reviewed/``, unless it is there already."""
        if not any(checksum(kept) == checksum(path) for kept in self._copies(path)):
            kept = self.kept_at(path)
            copy_file(path, kept)
            log.warning("%s was changed after it was written; your version stays, with a copy in %s", path.name, kept)

    def _settle(self, held: Path, original: Path) -> None:
        state = self._compare(held, original)
        if state in (State.OURS, State.RESAVED):
            if state is State.RESAVED:
                log.info("%s was saved again with the same voxels and grid; it counts as unchanged", original.name)
            held.unlink()
            return
        kept = next((copy for copy in self._copies(original) if checksum(copy) == checksum(held)), None)
        if kept is not None:
            held.unlink()
        else:
            kept = self.kept_at(original)
            kept.parent.mkdir(parents=True, exist_ok=True)
            held.rename(kept)
        log.warning(
            "%s was changed after it was written and is replaced; your version is kept in %s", original.name, kept
        )

    def kept_at(self, path: Path) -> Path:
        """Where a person's version of ``path`` is kept, with a date: labels in ``reviewed/``, other files beside it.

        A label in ``reviewed/`` without a date is one that counts, see `reviewed`.
        """
        return dated(self.reviewed / path.name if path.name.endswith(VOLUME) else path)


def held_path(path: Path) -> Path:
    """Where a file is moved while its successor is put in place."""
    return path.with_name(f"{HELD}{path.name}")


def stem(path: Path) -> str:
    """The name without the suffix of a volume or of another file."""
    volume = next((suffix for suffix in VOLUME if path.name.endswith(suffix)), path.suffix)
    return path.name.removesuffix(volume)


def dated(path: Path) -> Path:
    """A name with the present date for an earlier version of ``path``; no file has it."""
    date, name = time.strftime("%Y-%m-%d_%H%M%S"), stem(path)
    return _unused(lambda number: path.with_name(f"{name}_{date}{number}{path.name.removeprefix(name)}"))


def versions(path: Path) -> list[Path]:
    """The file ``path`` and its earlier versions, see `dated`."""
    name, suffix = re.escape(stem(path)), re.escape(path.name.removeprefix(stem(path)))
    kept = re.compile(rf"{name}(_\d{{4}}-\d\d-\d\d_\d{{6}}(_\d+)?)?{suffix}")
    return sorted(file for file in path.parent.glob("*") if kept.fullmatch(file.name) and file.is_file())


def _unused(name: Callable[[str], Path]) -> Path:
    number = 0
    while os.path.lexists(found := name(f"_{number}" if number else "")):
        number += 1
    return found


def voxels_checksum(path: Path) -> str:
    """SHA-256 of a label's class numbers, shape and affine, whatever its number type; "" if it cannot be read."""
    try:
        image: Any = nibabel.load(path)
        array, affine = np.asarray(image.dataobj), np.round(image.affine, 3) + 0.0
    except Exception:  # noqa: BLE001 - readers raise many kinds of errors; such a file is not what was written
        return ""
    values = np.ascontiguousarray(np.round(array.astype(np.float64), 4) + 0.0)
    return hashlib.sha256(str((values.shape, affine.tolist())).encode() + values.tobytes()).hexdigest()
