"""From folders, lists and files to Cases; no other module reads the layout of a data set.

There are two layouts: ``data/<case>.h5`` with ``image`` and optionally ``label`` inside, or ``images/`` and ``labels/``
with one file per case (NIfTI, NRRD, MHA). Both may have ``train.txt``, ``val.txt`` and ``test.txt``; all three are
optional.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PureWindowsPath

import h5py
import numpy as np

from semisam_o1.data.checks import find_problems
from semisam_o1.data.cohort import LISTS, Cohort
from semisam_o1.data.findings import LABEL_NOT_USED, NOTE, SET_ASIDE, STOPS, CohortError, Problem, table
from semisam_o1.data.formats import SUFFIXES, UNSAID_SPACING, case_name, format_of
from semisam_o1.data.pseudonyms import renamed
from semisam_o1.literals import LONGEST_NAME, is_name, printable
from semisam_o1.types import Case

logger = logging.getLogger("semisam_o1")


def open_cohort(
    dataset_dir: str | Path,
    template: str | Sequence[str] = (),
    labeled_num: int = 1,
    num_classes: int | None = None,
    image_key: str = "image",
    spacing: float | Sequence[float] | None = None,
    check: bool = True,
    need_pool: bool = True,
    binary_label: bool = False,
    pseudonyms: str | Path | None = None,
) -> Cohort:
    """Find the cases of a data set and all its problems in one pass.

    The templates are the cases in ``template``, listed or not; else the first ``labeled_num`` cases of ``train.txt``;
    else, without that list, the labelled cases. The pool is the rest of ``train.txt``, or the rest of all images
    without that list.

    Args:
        dataset_dir: the data set's folder.
        template: names of cases, or of their files.
        labeled_num: the number of templates at the start of ``train.txt``.
        num_classes: including background; by default the classes in the templates.
        image_key: the HDF5 dataset of the image.
        spacing: voxel size in mm of HDF5 scans, one number or three along the stored axes.
        check: check the voxels of all cases and set unusable cases aside; else check only the templates.
        need_pool: whether an empty pool stops the run.
        binary_label: merge all foreground classes, which gives two classes.
        pseudonyms: the file of the key between case names and pseudonyms, see `pseudonyms`; then all names of the
            cohort are pseudonyms.

    Raises:
        DatasetError: lists or templates cannot be used, or the pool is empty; the message is the table of all
            problems.
    """
    root = Path(dataset_dir).expanduser()
    problems: list[Problem] = []
    spacing = _spacing(spacing, problems)
    images, labels = _find_files(root, problems)
    _stop(root, problems)  # without any image there is nothing to check
    lists = {split: _read_list(root / file, images, problems) for split, file in LISTS.items()}
    parts = _deal(lists, images, labels, template, labeled_num, problems)
    _note_leftovers(images, labels, parts, lists, problems)

    cases = [case for name, split in parts.items() if (case := _case(name, split, images, labels, problems))]
    checked = cases if check else [case for case in cases if case.split == "template"]
    num_classes = 2 if binary_label else num_classes
    findings = find_problems(checked, image_key, spacing, num_classes, binary_label)
    problems += findings.problems
    cases, problems = renamed(pseudonyms, {*parts, *images, *labels}, cases, problems)
    broken = {problem.case for problem in problems if problem.severity in (STOPS, SET_ASIDE)}
    unused = {problem.case for problem in problems if problem.severity == LABEL_NOT_USED}
    usable = [replace(case, label=None) if case.name in unused else case for case in cases if case.name not in broken]
    if need_pool and not any(case.split == "pool" for case in usable):
        problems.append(_empty_pool(parts, lists["pool"] is not None))
    _stop(root, problems)  # before a name is built for each class
    num_classes = num_classes or max(findings.classes, default=0) + 1
    named = {0: "background", 1: "foreground"}
    classes = named if binary_label else _class_names(root / "classes.json", num_classes, problems)
    _stop(root, problems)
    reasons: dict[str, str] = {}
    for problem in problems:
        if problem.severity == SET_ASIDE:
            reasons[problem.case] = "; ".join(filter(None, (reasons.get(problem.case), problem.found)))
    split = {part: tuple(c for c in usable if c.split == part) for part in ("template", *LISTS)}
    split["template"] = tuple(sorted(split["template"], key=lambda case: case.name))  # the order given must not matter
    cohort = Cohort(
        root, split["template"], split["pool"], split["val"], split["test"], num_classes, classes,
        reasons, image_key, spacing, tuple(problems),
    )  # fmt: skip
    if problems:
        logger.warning("%s: problems found.\n%s", root, table(problems))
    if cohort.unsaid_spacing:
        logger.warning(UNSAID_SPACING)
    return cohort


def _stop(root: Path, problems: list[Problem]) -> None:
    if any(problem.severity == STOPS for problem in problems):
        raise CohortError(root, problems)


def _spacing(spacing, problems: list[Problem]) -> float | tuple[float, ...] | None:
    if spacing is None:
        return None
    try:
        values = tuple(np.asarray(spacing, float).ravel().tolist())
    except (TypeError, ValueError):
        values = ()
    if len(values) not in (1, 3) or not all(np.isfinite(value) and value > 0 for value in values):
        expected = "one or three positive numbers, mm"
        problems.append(
            Problem("spacing", STOPS, f"spacing is {spacing}", expected, "give the voxel size, or leave it out")
        )
        return None
    return values if len(values) == 3 else values[0]


def _listed_name(text: str, known=()) -> str:
    """The case name of a list entry or a file name."""
    if text in known:
        return text
    suffix = max((s for s in SUFFIXES if text.lower().endswith(s)), key=len, default="")
    return text[: len(text) - len(suffix)]


def _index(root: Path, folder: str, problems: list[Problem], inside: str | None = None) -> dict[str, list[Path]]:
    """The files in ``root``/``inside`` whose format belongs to ``folder``, by case.

    Hidden files are ignored: macOS writes ``._x.nii.gz`` beside ``x.nii.gz``.
    """
    files: dict[str, list[Path]] = {}
    place = root / (inside or folder)
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        format = format_of(path)
        if format is not None and format.folder == folder and not path.name.startswith(".") and path.is_file():
            if is_name(name := case_name(path)):
                files.setdefault(name, []).append(path)
            else:
                found = f"a name in {place.name}/ with control characters or too long"
                remedy = "rename the file; it is ignored"
                problems.append(Problem(printable(name), NOTE, found, "a name that can be printed", remedy))
    return files


def _find_files(root: Path, problems: list[Problem]) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Image and label files by case, for either layout; an HDF5 file with a label is in both."""
    layout = "data/*.h5, or images/*.nii.gz (nii, nrrd, mha ...)"
    if not root.is_dir():
        found = "a file, not a folder" if root.exists() else "no such folder"
        problems.append(Problem("data set", STOPS, found, "a folder", "check the path"))
        return {}, {}
    hdf5 = _index(root, "data", problems)
    images = _index(root, "images", problems)
    if hdf5 and images:
        problems.append(Problem("data set", STOPS, "images in data/ and in images/", "one of them", "move one away"))
    if not hdf5 and not images:
        above = root.name in ("images", "data") and any(format_of(path) for path in root.glob("*"))
        remedy = "name the folder above it" if above else "check the path and the suffixes"
        problems.append(Problem("data set", STOPS, "no image", layout, remedy))
    if images:
        return images, _index(root, "images", problems, "labels")
    return hdf5, {name: paths for name, paths in hdf5.items() if _has_label(paths[0])}


def _has_label(path: Path) -> bool:
    try:
        with h5py.File(path, "r") as file:
            return "label" in file
    except (OSError, RuntimeError, KeyError, ValueError):  # damaged: `find_problems` reports it
        return False


def _read_list(path: Path, images: dict, problems: list[Problem]) -> list[str] | None:
    """The names in a list, in order and without duplicates; None if the list does not exist."""
    if not os.path.lexists(path):
        return None
    if not path.is_file():
        problems.append(Problem(path.name, STOPS, "no regular file", "UTF-8 text, one name per line", "move it away"))
        return []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        found = f"the list cannot be read ({type(error).__name__})"
        problems.append(Problem(path.name, STOPS, found, "UTF-8 text, one name per line", "save it as plain text"))
        return []
    entries = filter(None, (line.split(",")[0].strip() for line in lines))
    counts = Counter(_listed_name(text, images) for text in entries)
    names = [name for name in counts if not _leaves_the_folder(name)]
    problems += [_refusal(name, path.name) for name in counts if _leaves_the_folder(name)]
    for name in names:
        if counts[name] > 1:
            found = f"{counts[name]} times in {path.name}"
            problems.append(Problem(name, NOTE, found, "once", "counted once; delete the other lines"))
    if not names and path.name == LISTS["pool"]:
        problems.append(
            Problem(path.name, STOPS, "an empty list", "one name per line", "fill it, or delete it to use all images")
        )
    return names


def _leaves_the_folder(name: str) -> bool:
    odd = name in (".", "..") or not is_name(name) or any(c in "/\\" for c in name)
    return odd or bool(PureWindowsPath(name).drive)


def _refusal(text: str, where: str) -> Problem:
    shown = printable(text)
    remedy = "write only the case's name, without folders"
    return Problem(shown, STOPS, f"a name in {where} that leaves the data folder", "a case's name", remedy)


def _deal(lists, images, labels, template, labeled_num, problems) -> dict[str, str]:
    """The split of each case, templates first: {name: "template"|"pool"|"val"|"test"}."""
    named = [template] if isinstance(template, str) else list(template or ())
    named = [_listed_name(str(text), images) for text in named if str(text)]
    problems += [_refusal(name, "--template") for name in named if _leaves_the_folder(name)]
    named = [name for name in dict.fromkeys(named) if not _leaves_the_folder(name)]
    held_out = {name for split in ("val", "test") for name in lists[split] or ()}
    train = lists["pool"] if lists["pool"] is not None else [name for name in images if name not in held_out]
    if lists["pool"] is not None:
        templates = named or train[: max(0, labeled_num)]
    else:
        templates = named or [name for name in train if name in labels]
    if not templates:
        remedy = "add the label of one case, or name a labelled case with --template"
        found = f"labeled_num is {labeled_num}" if labeled_num < 1 else "no template"
        problems.append(Problem("template", STOPS, found, "at least one labelled case", remedy))

    parts = dict.fromkeys(templates, "template")
    seen: dict[str, str] = {}
    for split, file in LISTS.items():
        for name in train if split == "pool" else lists[split] or ():
            if name in seen:
                remedy = "delete it from one list: a training case must not be a test case"
                problems.append(Problem(name, STOPS, f"in {seen[name]} and in {file}", "one list", remedy))
            elif parts.get(name) == "template" and split != "pool":
                problems.append(
                    Problem(
                        name,
                        NOTE,
                        f"in {file} and named by --template",
                        "one of the two",
                        f"left out of {split}",
                    )
                )
            seen[name] = file
            parts.setdefault(name, split)
    return parts


def _note_leftovers(images, labels, parts, lists, problems: list[Problem]) -> None:
    """Note the files that no case uses, one line for images and one for labels: often a mistake, never an error."""
    unlisted = [name for name in images if name not in parts]
    orphans = [name for name in labels if name not in images]
    for names, found in ((unlisted, "images in no list"), (orphans, "labels without an image")):
        if names:
            shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
            problems.append(Problem("data set", NOTE, f"{len(names)} {found}: {shown}", "none", "ignored"))


def _case(name: str, split: str, images, labels, problems: list[Problem]) -> Case | None:
    """The case with its files; None, with a problem, if it does not have exactly one image."""
    bad_image, bad_label = (STOPS, STOPS) if split == "template" else (SET_ASIDE, LABEL_NOT_USED)
    files, label_files = images.get(name, []), labels.get(name, [])
    if not files:
        found, remedy = "listed, but there is no image of that name", "add the file or delete the line"
        if split == "template":
            found, remedy = (
                "the template has no image of that name",
                "check the name, upper and lower case too",
            )
        problems.append(Problem(name, bad_image, found, "one image", remedy))
        return None
    if len(files) > 1:
        shown = ", ".join(path.name for path in files)
        problems.append(Problem(name, bad_image, f"{len(files)} images: {shown}", "one image", "move all but one away"))
        return None
    if len(label_files) > 1:
        shown = ", ".join(path.name for path in label_files)
        problems.append(
            Problem(name, bad_label, f"{len(label_files)} labels: {shown}", "one label", "move all but one away")
        )
    return Case(name, files[0], label_files[0] if label_files else None, split)


def _class_names(path: Path, num_classes: int, problems: list[Problem]) -> dict[int, str]:
    """Class names from ``classes.json``: {"1": "anterior"}, or a list that starts at class 1, or 0 for "background"."""
    names = {0: "background"} | {number: f"class {number}" for number in range(1, num_classes)}
    if not os.path.lexists(path):
        return names
    try:
        if not path.is_file():
            raise ValueError
        given = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(given, list):
            start = 0 if given and str(given[0]).lower() == "background" else 1
            given = dict(enumerate(given, start))
        given = {int(number): name for number, name in given.items()}
        if not all(isinstance(name, str) and is_name(name) for name in given.values()):
            raise ValueError
    except (OSError, ValueError, AttributeError, TypeError, OverflowError, RecursionError):
        expected = f'{{"1": "anterior", ...}}, or a list of names of at most {LONGEST_NAME} letters'
        problems.append(Problem(path.name, STOPS, "the file cannot be read", expected, "correct it, or delete it"))
        return names
    if surplus := sorted(set(given) - set(names)):
        found = f"a name for class {', '.join(map(str, surplus[:5]))}"
        problems.append(Problem(path.name, NOTE, found, f"classes 0 to {num_classes - 1}", "ignored"))
    return names | {number: name.strip() for number, name in given.items() if number in names}


def _empty_pool(parts: dict[str, str], listed: bool) -> Problem:
    if "pool" in parts.values():
        return Problem("pool", STOPS, "no usable case is left", "at least one", "repair the cases set aside")
    remedy = "add unlabelled cases to train.txt" if listed else "name one template with --template, or write train.txt"
    return Problem(
        "pool", STOPS, "the pool is empty: all cases are templates, val or test", "at least one case", remedy
    )


def images_alone(dataset_dir: str | Path) -> list[Case]:
    """The scans in a data set's train.txt, or without that list all scans that val.txt and test.txt do not name.

    Labels are not needed and not read.

    Raises:
        DatasetError: there is no image, or a list cannot be used.
    """
    root = Path(dataset_dir).expanduser()
    problems: list[Problem] = []
    images, _ = _find_files(root, problems)
    _stop(root, problems)
    lists = {split: _read_list(root / file, images, problems) for split, file in LISTS.items()}
    _stop(root, problems)
    kept = {name for split in ("val", "test") for name in lists[split] or ()}
    names = lists["pool"] if lists["pool"] is not None else [name for name in images if name not in kept]
    found = [_case(name, "pool", images, {}, problems) for name in names]
    for problem in problems:
        logger.warning("case %s: %s; %s", problem.case, problem.found, problem.remedy)
    return [case for case in found if case is not None]


def listed_cases(dataset_dir: str | Path, list_file: str) -> list[Case]:
    """The cases of a list, each with image and truth.

    Args:
        list_file: a path, or the name of a file in the data set's folder.

    Raises:
        DatasetError: the list is missing or names a case without image or truth; the message is the table of problems.
    """
    root = Path(dataset_dir).expanduser()
    problems: list[Problem] = []
    images, labels = _find_files(root, problems)
    _stop(root, problems)
    path = Path(list_file) if Path(list_file).is_file() else root / list_file
    names = _read_list(path, images, problems)
    if not names:
        found = "no such list" if names is None else "an empty list"
        problems.append(Problem(path.name, STOPS, found, "one case per line", "name one with --test-list"))
    cases = [_case(name, "test", images, labels, problems) for name in names or ()]
    bare = [case for case in cases if case is not None and case.label is None]
    problems += [Problem(case.name, STOPS, "no label", "its truth", "add it, or delete the line") for case in bare]
    if problems:
        _stop(root, [replace(problem, severity=STOPS) for problem in problems if problem.severity != NOTE])
    return [case for case in cases if case is not None]
