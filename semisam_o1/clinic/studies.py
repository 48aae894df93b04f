"""A studies folder of MONAI Label as a data set: images by links, final labels with the class numbers of their names.

MONAI Label keeps images flat in the folder, labels in ``labels/final`` and ``labels/original``, and what it knows of
them in ``datastore_v2.json``. 3D Slicer numbers the values of a label by the order of its segments and says their
names beside it, so the same name may have another value in the next label.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from semisam_o1.data.cohort import LISTS
from semisam_o1.data.datastore import STORE, segments_in
from semisam_o1.data.export import write_label
from semisam_o1.data.findings import Fault
from semisam_o1.data.folders import composed, leaves_the_folder
from semisam_o1.data.formats import case_name, format_of
from semisam_o1.data.labels import class_key, read_label
from semisam_o1.data.reader import ScanReader
from semisam_o1.files import checksum, read_json, remove, write_json
from semisam_o1.lock import lock_folder
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import UserError

log = logging.getLogger("semisam_o1")
STATE = "finals.json"  # in the data set that is made of a studies folder
FINAL = "final"
NO_FINAL = "No scan has a final label yet. Submit the label of one scan, then train."


class Final(NamedTuple):
    """A label that a person submitted as final.

    case: its name, composed. segments: value -> name, as 3D Slicer says; empty if nobody says it.
    """

    case: str
    image: Path
    label: Path
    segments: dict[int, str]

    @property
    def fingerprint(self) -> str:
        return f"{checksum(self.label)} {json.dumps(self.segments, sort_keys=True)}"


def studies_of(items: Sequence[Mapping[str, str]]) -> Path:
    """The studies folder of what MONAI Label trains with: dictionaries with the paths ``image`` and ``label``.

    Raises:
        UserError: there is no item, or none from such a folder.
    """
    if not items:
        raise UserError(NO_FINAL)
    for path in (Path(items[0]["label"]).parent.parent, Path(items[0]["image"])):  # an image may be a link
        if (path.parent / STORE).is_file():
            return path.parent
    raise UserError(f"{items[0]['label']} lies in no studies folder of MONAI Label: no {STORE} above it.")


def read_studies(folder: Path) -> tuple[dict[str, Path], list[Final]]:
    """All images by name, those that no server has seen too, and the final labels in the order in which they came.

    Names of cases are composed, as those of a data set are; paths are as they are on disk.
    """
    objects = read_json(folder / STORE).get("objects", {})
    images: dict[str, Path] = {}
    finals: list[tuple[float, Final]] = []
    for name, known in objects.items():
        image = folder / f"{name}{known['image'].get('ext', '')}"
        if leaves_the_folder(name) or not image.is_file():
            continue
        images[composed(name)] = image
        if (given := known.get("labels", {}).get(FINAL)) is not None:
            label = folder / "labels" / FINAL / f"{name}{given.get('ext', '')}"
            if label.is_file():
                info = given.get("info") or {}
                finals.append((float(info.get("ts", 0)), Final(composed(name), image, label, segments_in(info))))
    for path in sorted(folder.iterdir()):
        if path.is_file() and format_of(path) and path not in images.values():
            images.setdefault(composed(case_name(path)), path)
    return images, [final for _, final in sorted(finals, key=lambda pair: (pair[0], pair[1].case))]


def is_studies(folder: str | Path) -> bool:
    """Whether a folder is a studies folder of MONAI Label and no data set."""
    return Path(folder, STORE).is_file() and not Path(folder, "images").is_dir()


def beside(run: str | Path) -> Path:
    """Where the data set that is made of a studies folder for a run lies: a run folder may not contain its scans."""
    run = Path(run)
    return run.with_name(f"{run.name}-studies")


def made_for(run: str | Path) -> Path | None:
    """Where the data set lies, or is to be made again, that a run had made of a studies folder.

    None if the run works on another data set, which stays its data set.
    """
    recorded, own = RunFolder(run).read_record().get("settings", {}).get("dataset_dir"), beside(run)
    if not recorded:
        return own
    folder = Path(recorded)
    if (folder / STATE).is_file():
        return folder
    moved_or_removed = not folder.is_dir() and (folder.name == own.name or (own / STATE).is_file())
    return own if moved_or_removed else None


def opened(studies: str | Path, folder: Path, run: str | Path | None = None) -> DataSet:
    """The data set of a studies folder in ``folder``, brought up to date. ``run``: whose data set it is.

    Raises:
        UserError: the run is being worked on; its data set stays as it is.
    """
    data = DataSet(folder)
    with contextlib.nullcontext() if run is None or not Path(run).is_dir() else lock_folder(run):
        data.update(Path(studies))
    return data


class DataSet:
    """The data set that is made of a studies folder, in a folder of its own. Lists of the studies folder count there.

    A folder with other files is refused.

    The finals of the first training are its templates and stay so; later ones are for the caller, see `later`. Class
    numbers and names are those of the templates; a name keeps its number, also when no template has it any more.
    """

    def __init__(self, folder: Path):
        self.folder, self.state_file = folder, folder / STATE
        if not self.state_file.is_file() and folder.is_dir() and any(folder.iterdir()):
            raise UserError(
                f"{folder} has files, but no {self.state_file.name}: it is no data set of a studies folder. Nothing "
                "was written. Move it away, or name another folder for the run."
            )
        self.state: dict[str, Any] = {"templates": [], "classes": {}, "taken": {}}
        if self.state_file.is_file():
            self.state |= read_json(self.state_file)
            self.state["templates"] = [composed(name) for name in self.state["templates"]]
            self.state["taken"] = {composed(name): taken for name, taken in self.state["taken"].items()}
        self.finals: dict[str, Final] = {}

    def update(self, studies: Path) -> None:
        """Bring the folder up to date with the studies.

        Raises:
            UserError: a template's label cannot be used.
        """
        images, finals = read_studies(studies)
        self.finals = {final.case: final for final in finals}
        templates = [self.finals[name] for name in self.state["templates"] if name in self.finals] or list(finals)
        if [final.case for final in templates] != self.state["templates"]:
            self.state |= {
                "templates": [final.case for final in templates],
                "classes": classes_of(map(held_segments, templates), self.state["classes"]),
            }
        self.save()  # first: it says whose the folder is
        links = self.folder / "images"
        links.mkdir(parents=True, exist_ok=True)
        for path in links.iterdir():
            remove(path)
        for image in images.values():
            place(image, links / image.name)
        for name in LISTS.values():
            remove(self.folder / name)
            if (studies / name).is_file():
                shutil.copyfile(studies / name, self.folder / name)
        shutil.rmtree(self.folder / "labels", ignore_errors=True)
        for final in templates:
            self.write(final, self.folder / "labels" / f"{final.case}.nii.gz")
        if self.state["classes"]:
            write_json(self.folder / "classes.json", self.state["classes"])
        else:
            remove(self.folder / "classes.json")
        self.save()

    def write(self, final: Final, path: Path) -> None:
        """Write a final label with the data set's class numbers, on its scan's grid.

        Raises:
            UserError: it cannot be used.
        """
        reader = ScanReader()
        classes = {0: "background"} | {int(number): name for number, name in self.state["classes"].items()}
        named = classes if self.state["classes"] else None
        try:
            scan = reader.open(final.image)
            values = read_label(final.label, reader, scan, named, final.segments or None).values
        except Fault as fault:
            raise UserError(f"The final label of {final.case} cannot be used: {fault}") from fault
        path.parent.mkdir(parents=True, exist_ok=True)
        write_label(path, values, final.image, scan.grid)

    def write_later(self, folder: Path) -> dict[Path, Final]:
        """Write the `later` finals as CASE.nii.gz; one that cannot be used is named in a warning and left out."""
        written = {}
        for final in self.later:
            path = folder / f"{final.case}.nii.gz"
            try:
                self.write(final, path)
            except UserError as error:
                log.warning("%s It is not used.", error)
            else:
                written[path] = final
        return written

    @property
    def templates(self) -> list[str]:
        """The cases that are templates.

        Raises:
            UserError: no scan has a final label.
        """
        if not self.state["templates"]:
            raise UserError(NO_FINAL)
        return self.state["templates"]

    @property
    def later(self) -> list[Final]:
        """The finals of scans that are no templates, as far as they are new or changed."""
        taken = self.state["taken"]
        others = [final for name, final in self.finals.items() if name not in self.state["templates"]]
        return [final for final in others if taken.get(final.case) != final.fingerprint]

    @property
    def withdrawn(self) -> list[str]:
        """The cases whose taken label is no longer final."""
        return [name for name in self.state["taken"] if name not in self.finals]

    def forget(self, name: str) -> None:
        del self.state["taken"][name]
        self.save()

    def took(self, final: Final) -> None:
        self.state["taken"][final.case] = final.fingerprint
        self.save()

    def save(self) -> None:
        write_json(self.state_file, self.state)


def held_segments(final: Final) -> dict[int, str]:
    """The segments of a label that have voxels.

    Raises:
        UserError: the label cannot be read.
    """
    if not final.segments:
        return {}
    try:
        held = set(np.unique(read_label(final.label, ScanReader(), segments={}).values).tolist())
    except Fault as fault:
        raise UserError(f"The final label of {final.case} cannot be used: {fault}") from fault
    return {value: name for value, name in final.segments.items() if value in held}


def classes_of(labels: Iterable[Mapping[int, str]], known: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Class number -> name: those ``known``, which stay as they are, then the names in the labels that are new.

    New ones get the next numbers, in the order of the values in the first label, then of those in the next; no number
    is left out. Names are told apart by `class_key`, as in `read_label`.
    """
    classes, keys = dict(known), {class_key(name) for name in known.values()}
    for segments in labels:
        for _, name in sorted(segments.items()):
            if class_key(name) not in keys:
                keys.add(class_key(name))
                classes[str(len(classes) + 1)] = name.strip()
    return classes


def place(image: Path, link: Path) -> None:
    """A link to an image; a copy where the file system has no links."""
    try:
        link.symlink_to(image.resolve())
    except OSError:
        shutil.copyfile(image, link)
