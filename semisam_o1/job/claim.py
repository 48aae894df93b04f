"""Whose a run folder is: what a run may remove there, and where it may not write at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from semisam_o1.data.cohort import Cohort
from semisam_o1.data.pseudonyms import refuse_key_in
from semisam_o1.files import PARTIAL, PARTIAL_NAME, hdf5_names, remove
from semisam_o1.job.stages import ROUND_0, round_stages
from semisam_o1.reviewed import Reviewed
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import DatasetError

log = logging.getLogger("semisam_o1")


def claim(run: RunFolder, cohort: Cohort) -> None:
    """Refuse a folder in which a run could harm what is not its own.

    Raises:
        DatasetError: the folder contains the data set, the working directory, the home directory or the root; or it
            has files with names that a run uses, but none that says that a run was begun there.
    """
    place = run.path.resolve()
    kept = {"the data set": cohort.root, "the working directory": Path.cwd(), "the home directory": Path.home()}
    kept |= {f"the scan {case.name}": case.image for case in cohort.cases}
    for name in ("images", "labels", "data"):
        if place.is_relative_to((cohort.root / name).resolve()):
            raise DatasetError(f"{run.path} lies in the data set's folder {name}. Name a folder outside of it.")
    for what, path in kept.items():
        if path.resolve().is_relative_to(place):
            raise DatasetError(f"{run.path} contains {what}; expected a folder of its own for the run. Name another.")
    if run.path.exists() and not run.path.is_dir():
        raise DatasetError(f"{run.path} is a file; expected a folder for the run. Name another.")
    present = run.present()
    if present and not run.ours() and not (present == [run.features] and is_store(run.features)):
        names = ", ".join(path.name for path in present)
        raise DatasetError(
            f"{run.path} was not begun by a run, but has {names}, which a run would replace. Nothing was written. "
            "Name another folder, or move these away."
        )
    links = sorted(str(path.relative_to(run.path)) for path in links_in(present))
    if links:
        raise DatasetError(
            f"{run.path} has symbolic links in place of {', '.join(links[:5])}: a run writes into no other folder. "
            "Name another folder, or remove the links."
        )


def protect_names(run: RunFolder, pseudonyms: str | Path | None) -> None:
    """Refuse to write real names into a run under pseudonyms, or its key beside its results.

    Raises:
        DatasetError: the run has pseudonyms and no key is given, or the file of the key, ``pseudonyms``, is in the
            folder.
    """
    if pseudonyms is not None:
        refuse_key_in(run.path, pseudonyms)
    elif run.read_record().get("settings", {}).get("pseudonyms"):
        raise DatasetError(f"{run.path} has pseudonyms in place of names. Give the key: --pseudonyms FILE.")


def links_in(paths: Iterable[Path]) -> Iterator[Path]:
    """The symbolic links among ``paths`` and below them, but for those that `recover` removes."""
    for path in paths:
        if path.is_symlink():
            yield path
        elif path.is_dir():
            for folder, folders, files in os.walk(path):
                names = (name for name in (*folders, *files) if not PARTIAL_NAME.fullmatch(name))
                yield from (found for name in names if (found := Path(folder, name)).is_symlink())


def is_store(folder: Path) -> bool:
    """Whether a folder has features alone: those of another run may be copied here before the first start."""
    files = [path for path in folder.rglob("*") if not path.is_dir()]
    return not folder.is_symlink() and all(path.suffix == ".h5" and "tokens" in hdf5_names(path) for path in files)


def remove_handed_out(run: RunFolder) -> None:
    """Remove what an earlier start handed out.

    Labels that a person changed stay, other files that were changed are kept, see `ledger`.
    """
    for path in (run.report, run.review, run.metrics):
        run.ledger.remove(path)
    run.ledger.remove_below(run.pseudo_labels, changed=False)
    run.ledger.remove_below(run.bundle)


def remove_stale(run: RunFolder, done: Sequence[str], half_done_fits: bool, names: Collection[str]) -> None:
    """Remove results of steps that are not ``done``, so that they cannot be taken for results of this run.

    The partial results of an interrupted step stay if they fit the settings; what a run does not write stays.

    Args:
        names: the cases of this start and of the one before.
    """
    for number in run.rounds():
        folder = run.round(number)
        steps = [stage.name for stage in (round_stages(number) if number else ROUND_0[1:])]
        unfinished = [step.split("/")[1] for step in steps if step not in done]
        not_begun = steps[0] not in done and number > 0 and not folder.training_state.exists()
        if (not_begun or not half_done_fits) and (removed := folder.remove(unfinished, names)):
            log.info("%s: removed what an earlier start left of %s", folder.path, ", ".join(removed))


def recover(run: RunFolder) -> None:
    """Remove what a killed process was writing, and put back or keep what it had moved aside."""
    run.ledger.recover()
    Reviewed(run.reviewed).recover()
    for partial in run.path.rglob(f"{PARTIAL}*"):
        if PARTIAL_NAME.fullmatch(partial.name):
            remove(partial)
