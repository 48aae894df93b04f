"""Opens the data set of a run again, as the run did: for commands that work on its folder later."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from semisam_o1.data.cohort import Cohort
from semisam_o1.data.datasets import open_cohort
from semisam_o1.data.pseudonyms import Pseudonyms
from semisam_o1.data.reader import ScanReader
from semisam_o1.job.claim import protect_names
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import DatasetError

READER = [field.name for field in fields(ScanReader)]  # settings that say how scans are read
OPENED = ("need_pool", "binary_label", "channel", "find_no_data")  # settings of `open_cohort` that a run keeps


def cohort_of(
    run: RunFolder,
    dataset_dir: str | Path | None = None,
    pseudonyms: str | Path | None = None,
    check: bool = True,
) -> Cohort:
    """The data set of a run.

    Args:
        dataset_dir: its folder, by default where it was during the run. pseudonyms: the key of a run under pseudonyms.
        check: look at the voxels of all files.

    Raises:
        DatasetError: ``run`` is not the folder of a run, its key is missing, or its data set is not there.
    """
    record = run.read_record()
    if not record:
        raise DatasetError(f"{run.path}: no run.json there; expected the folder of a run.")
    settings = record["settings"]
    protect_names(run, pseudonyms)
    root = Path(dataset_dir or settings["dataset_dir"])
    if dataset_dir is None and not root.is_dir():
        raise DatasetError(f"{root}: the data set of {run.path} is not there. Name it: --data DIR.")
    templates = record["template"]
    if settings.get("pseudonyms"):
        templates = [Pseudonyms(pseudonyms).name(template) for template in templates]
    kept = {name: settings[name] for name in OPENED if name in settings}
    kept["reader"] = ScanReader(**{name: settings[name] for name in READER if name in settings})
    kept |= {"class_numbers": [int(number) for number in record["classes"]], "pseudonyms": pseudonyms}
    return open_cohort(root, templates, label_shape="trust", check=check, **kept)  # the run has judged the templates
