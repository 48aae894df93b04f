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
from pathlib import Path

from semisam_o1.data.checks import find_problems
from semisam_o1.data.cohort import LISTS, Cohort
from semisam_o1.data.findings import LABEL_NOT_USED, NOTE, SET_ASIDE, STOPS, WARNING, CohortError, Problem, table
from semisam_o1.data.folders import Index, find_files, leaves_the_folder, match, without_folder
from semisam_o1.data.formats import UNSAID_SPACING
from semisam_o1.data.labels import some
from semisam_o1.data.pseudonyms import renamed
from semisam_o1.data.reader import ScanReader
from semisam_o1.literals import LONGEST_NAME, is_name, printable
from semisam_o1.types import Case

logger = logging.getLogger("semisam_o1")


def open_cohort(
    dataset_dir: str | Path,
    template: str | Sequence[str] = (),
    labeled_num: int = 1,
    num_classes: int | None = None,
    reader: ScanReader | None = None,
    channel: int | None = None,
    label_shape: str = "check",
    check: bool = True,
    need_pool: bool = True,
    binary_label: bool = False,
    renumber: bool = True,
    class_numbers: Sequence[int] | None = None,
    pseudonyms: str | Path | None = None,
    find_no_data: bool = True,
) -> Cohort:
    """Find the cases of a data set and all its problems in one pass.

    The templates are the cases in ``template``, listed or not; else the first ``labeled_num`` cases of ``train.txt``;
    else, without that list, the labelled cases. The pool is the rest of ``train.txt``, or the rest of all images
    without that list.

    Args:
        dataset_dir: the data set's folder.
        template: names of cases, or of their files.
        labeled_num: the number of templates at the start of ``train.txt``.
        num_classes: including background, numbered 0, 1, 2, ...; by default the classes in the templates.
        reader: how files are read.
        channel: of scans in several files ``x_0000``, ``x_0001``, ... (nnU-Net) the one to take.
        label_shape: "check" stops at a template that looks as if it was outlined in part, "trust" does not look.
        check: check the voxels of all cases and set unusable cases aside; else check only the templates.
        need_pool: whether an empty pool stops the run.
        binary_label: merge all foreground classes, which gives two classes.
        renumber: classes are the numbers that the templates hold; else all numbers up to the highest, as published.
        class_numbers: the class numbers, 0 included, in place of those of the templates.
        pseudonyms: the file of the key between case names and pseudonyms, see `pseudonyms`; then all names of the
            cohort are pseudonyms.
        find_no_data: see `Cohort`.

    Raises:
        DatasetError: lists or templates cannot be used, or the pool is empty; the message is the table of all
            problems.
    """
    root = Path(dataset_dir).expanduser()
    problems: list[Problem] = []
    reader = reader or ScanReader()
    entries = {split: _entries(root / file, root, problems) for split, file in LISTS.items()}
    named = [template] if isinstance(template, str) else [str(text) for text in template or ()]
    listed = [*named, *(text for found in entries.values() for text in found or ())]
    images, labels = find_files(root, listed, channel, problems, name_ignored=pseudonyms is None)
    if not images:
        _stop(root, problems)  # there is nothing to check
    lists = {split: _names(entries[split], file, images, problems) for split, file in LISTS.items()}
    parts = _deal(lists, images, labels, named, labeled_num, problems)
    _note_leftovers(images, labels, parts, lists, problems)

    cases = [case for name, split in parts.items() if (case := _case(name, split, images, labels, problems))]
    checked = cases if check else [case for case in cases if case.split == "template"]
    num_classes = 2 if binary_label else num_classes
    class_list = None if binary_label else _class_list(root / "classes.json", problems)
    findings = find_problems(checked, reader, num_classes, binary_label, class_list, label_shape, find_no_data)
    by_label = {name for name, split in parts.items() if split == "template"}
    if named or lists["pool"] is not None or len(by_label) < 2:
        by_label = set()
    problems += [_of_template_by_label(one) if one.case in by_label else one for one in findings.problems]
    cases, problems = renamed(pseudonyms, {*parts, *images, *labels}, cases, problems)
    broken = {problem.case for problem in problems if problem.severity in (STOPS, SET_ASIDE)}
    unused = {problem.case for problem in problems if problem.severity == LABEL_NOT_USED}
    usable = [replace(case, label=None) if case.name in unused else case for case in cases if case.name not in broken]
    if need_pool and not any(case.split == "pool" for case in usable):
        problems.append(_empty_pool(parts, lists["pool"] is not None))
    _stop(root, problems)  # before anything is built for each class
    numbers = sorted(class_numbers or findings.classes | {0})
    if num_classes or not renumber:
        numbers = list(range(num_classes or max(numbers) + 1))
    classes = {0: "background", 1: "foreground"} if binary_label else _class_names(numbers, class_list, problems)
    reasons: dict[str, str] = {}
    for problem in problems:
        if problem.severity == SET_ASIDE:
            reasons[problem.case] = "; ".join(filter(None, (reasons.get(problem.case), problem.found)))
    split = {part: tuple(c for c in usable if c.split == part) for part in ("template", *LISTS)}
    split["template"] = tuple(sorted(split["template"], key=lambda case: case.name))  # the order given must not matter
    cohort = Cohort(
        root, split["template"], split["pool"], split["val"], split["test"], classes,
        reasons, reader, tuple(problems), binary_label, class_list, find_no_data,
    )  # fmt: skip
    if problems:
        logger.warning("%s: problems found.\n%s", root, table(problems))
    if cohort.unsaid_spacing:
        logger.warning(UNSAID_SPACING)
    return cohort


def _stop(root: Path, problems: list[Problem]) -> None:
    if any(problem.severity == STOPS for problem in problems):
        raise CohortError(root, problems)


def _entries(path: Path, root: Path, problems: list[Problem]) -> list[str] | None:
    """The lines of a list, in order, without folders of the data set; None if the list does not exist."""
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
    entries = [without_folder(text, root) for line in lines if (text := line.split(",")[0].strip())]
    if not entries and path.name == LISTS["pool"]:
        remedy = "fill it, or delete it to use all images"
        problems.append(Problem(path.name, STOPS, "an empty list", "one name per line", remedy))
    return entries


def _names(entries: list[str] | None, where: str, images: Index, problems: list[Problem]) -> list[str] | None:
    """The cases that the entries of a list stand for, in order and without duplicates."""
    if entries is None:
        return None
    counts = Counter(match(text, images) for text in entries)
    names = [name for name in counts if not leaves_the_folder(name)]
    problems += [_refusal(name, where) for name in counts if leaves_the_folder(name)]
    for name in names:
        if counts[name] > 1:
            found = f"{counts[name]} times in {where}"
            problems.append(Problem(name, NOTE, found, "once", "counted once; delete the other lines"))
    return names


def _refusal(text: str, where: str) -> Problem:
    shown = printable(text)
    remedy = "write only the case's name, without folders"
    return Problem(shown, STOPS, f"a name in {where} that leaves the data folder", "a case's name", remedy)


def _deal(lists, images, labels, named, labeled_num, problems) -> dict[str, str]:
    """The split of each case, templates first: {name: "template"|"pool"|"val"|"test"}."""
    named = [match(text, images) for text in named if text]
    problems += [_refusal(name, "--template") for name in named if leaves_the_folder(name)]
    named = [name for name in dict.fromkeys(named) if not leaves_the_folder(name)]
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
    for names, what, where in ((unlisted, "image", "in no list"), (orphans, "label", "without an image")):
        if names:
            found = f"{what if len(names) == 1 else f'{what}s'} {where}"
            shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
            remedy = "nothing, if not needed"
            like = [name for name in images if name not in labels and names[0].startswith(name)]
            if what == "label" and like:
                remedy += f"; if {names[0]} is of {max(like, key=len)}, rename it so"
            problems.append(Problem("data set", NOTE, f"{len(names)} {found}: {shown}", "none", remedy))


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


def _class_list(path: Path, problems: list[Problem]) -> dict[int, str] | None:
    """Class number -> name from ``classes.json``: {"1": "anterior"}, or a list that starts at class 1, or at 0 with
    "background". None if there is no such file."""
    if not os.path.lexists(path):
        return None
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
        expected = f'{{"1": "anterior", ...}}, or a list of names of at most {LONGEST_NAME} bytes'
        problems.append(Problem(path.name, STOPS, "the file cannot be read", expected, "correct it, or delete it"))
        return None
    return {0: "background"} | {number: name.strip() for number, name in given.items()}


def _class_names(numbers: list[int], named: dict[int, str] | None, problems: list[Problem]) -> dict[int, str]:
    """A name for each class number; warns of classes that the data set names and no template holds."""
    named = named or {0: "background"}
    if missing := sorted(set(named) - set(numbers)):
        found = f"no template holds class {some([f'{n} ({printable(named[n], LONGEST_NAME)})' for n in missing])}"
        remedy = "these get no labels; add a template that holds them"
        problems.append(Problem("classes.json", WARNING, found, "every class in a template", remedy))
    return {number: named.get(number, f"class {number}") for number in numbers}


def _of_template_by_label(problem: Problem) -> Problem:
    """A problem of a scan that is a template only because it has a label: says so, and what else to do."""
    if problem.severity != STOPS:
        return problem
    found = f"{problem.found}; the scan counts as a template because it has a label"
    if "--template" in problem.remedy:
        return replace(problem, found=found)
    return replace(problem, found=found, remedy=f"{problem.remedy}, or name the templates: --template, or train.txt")


def _empty_pool(parts: dict[str, str], listed: bool) -> Problem:
    if "pool" in parts.values():
        return Problem("pool", STOPS, "no usable case is left", "at least one", "repair the cases set aside")
    remedy = "add unlabelled cases to train.txt" if listed else "name one template with --template, or write train.txt"
    return Problem(
        "pool", STOPS, "the pool is empty: all cases are templates, val or test", "at least one case", remedy
    )


def images_alone(dataset_dir: str | Path, channel: int | None = None) -> list[Case]:
    """The scans in a data set's train.txt, or without that list all scans that val.txt and test.txt do not name.

    Labels are not needed and not read. ``channel``: see `open_cohort`.

    Raises:
        DatasetError: there is no image, or a list cannot be used.
    """
    root = Path(dataset_dir).expanduser()
    problems: list[Problem] = []
    entries = {split: _entries(root / file, root, problems) for split, file in LISTS.items()}
    images, _ = find_files(root, [text for found in entries.values() for text in found or ()], channel, problems)
    lists = {split: _names(entries[split], file, images, problems) for split, file in LISTS.items()}
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
    path = Path(list_file) if Path(list_file).is_file() else root / list_file
    entries = _entries(path, root, problems)
    images, labels = find_files(root, entries or (), None, problems)
    _stop(root, problems)
    names = _names(entries, path.name, images, problems)
    if not names:
        found = "no such list" if names is None else "an empty list"
        problems.append(Problem(path.name, STOPS, found, "one case per line", "name one with --test-list"))
    cases = [_case(name, "test", images, labels, problems) for name in names or ()]
    bare = [case for case in cases if case is not None and case.label is None]
    problems += [Problem(case.name, STOPS, "no label", "its truth", "add it, or delete the line") for case in bare]
    if problems:
        grave = [problem for problem in problems if problem.severity not in (NOTE, WARNING)]
        _stop(root, [replace(problem, severity=STOPS) for problem in grave])
    return [case for case in cases if case is not None]
