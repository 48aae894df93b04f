"""The id ``run`` of train.json: one round from the command line, the whole job on a studies folder in MONAI Label."""

from __future__ import annotations

import inspect
import json
import logging
import shutil
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigWorkflow

from semisam_o1 import processes
from semisam_o1.clinic.studies import DataSet, opened, studies_of
from semisam_o1.errors import plainly
from semisam_o1.files import partial_path, read_json
from semisam_o1.job.claim import recover
from semisam_o1.job.job import Job
from semisam_o1.job.resume import StaleError
from semisam_o1.job.together import Helper
from semisam_o1.literals import as_config
from semisam_o1.lock import lock_folder
from semisam_o1.review.corrections import Corrections
from semisam_o1.types import UserError

log = logging.getLogger("semisam_o1")
SHOWN = "displayable_configs"  # settings that MONAI Label shows, and sends along
SERVED = ("configs/metadata.json", "configs/inference.json", "models/model.pt")  # what MONAI Label reads to label


def run(config: dict) -> None:
    """Train as the raw ``config`` says.

    MONAI Label puts the scans with final labels, as dictionaries, in place of ``train#dataset#data`` and
    ``validate#dataset#data``. The job is then run on all scans of their studies folder, and the bundle's model is
    replaced. Otherwise one round is trained, after round 0 if that is missing. Of several processes of torchrun, the
    others help the first to train.

    Raises:
        SystemExit: in MONAI Label, with one line: its page shows the last lines of what a training said.
    """
    if processes.number():
        Helper().run()
        return
    parts = [config.get(part, {}).get("dataset", {}).get("data") for part in ("train", "validate")]
    if not isinstance(parts[0], list):
        job = Job(config)
        job.prepare_round()
        job.alone("training", job.config.setting("round"))
        return
    try:
        train(config, [item for part in parts if isinstance(part, list) for item in part])
    except Exception as error:
        text = plainly(error)
        if text is None:
            traceback.print_exc()
            text = f"{type(error).__name__}: {error}"
        raise SystemExit(" ".join(text.split())) from error


def name_the_run() -> None:
    """Let the workflow whose ``initialize`` calls this function run the id ``run``, if it was started without a name.

    MONAI Label shows the name as an empty field, which 3D Slicer sends back with all others. MONAI would then build the
    whole config.
    """
    for caller in inspect.stack():
        workflow = caller.frame.f_locals.get("self")
        if isinstance(workflow, ConfigWorkflow):
            workflow.run_id = workflow.run_id or "run"
            return


def train(config: Mapping[str, Any], items: Sequence[Mapping[str, str]]) -> None:
    """Run the job on the studies folder of ``items``, and hand its model to the bundle.

    The job's settings are those of the bundle's own train.json and what MONAI Label shows of it.

    Raises:
        UserError: the studies or the settings cannot be used.
    """
    root = Path(config["bundle_root"])
    raw = read_json(root / "configs" / "train.json")
    shown = {name: value for name, value in config.get(SHOWN, {}).items() if name in raw}
    raw |= {name: as_config(number(value)) for name, value in shown.items()}
    device = processes.device() if processes.count() > 1 else str(config["device"])
    raw |= {"bundle_root": as_config(str(root)), "device": as_config(device)}
    raw |= {"output_dir": as_config(str(root / "run"))}
    raw, job, refused = on_studies(raw, studies_of(items), root / "studies", root / "run")
    try:
        job.run()
    except StaleError as stale:
        log.warning("settings, the template or its label changed: done again from step %s on", stale.step)
        job = Job(raw | {"restart_from": stale.step})
        job.run()
    changed = hand_over(job.run_folder.bundle, root)
    used = len(job.cohort.labelled)
    worse = job.record.labels_round < job.record.best_round
    log.info(
        "trained on %d labelled and %d other scans; rounds in all: %d.%s%s%s",
        used, len(job.cohort.untouched), job.record.rounds,
        " Its labels are expected to be worse than those of round 0, which needs no training: train longer." * worse,
        f" Not used: the final labels of {', '.join(refused)}; the lines above say why." if refused else "",
        " Only the app of `semisam-o1 monailabel-app` uses it without a restart of the server." if changed else "",
    )  # fmt: skip


def on_studies(config: dict, studies: Path, folder: Path, run: str | Path) -> tuple[dict, Job, list[str]]:
    """A job in the folder ``run`` on studies, of which a data set is made in ``folder``; later finals are taken in.

    Returns the raw config with that data set, the job, and the cases whose final label cannot be used.

    Raises:
        UserError: a template's label or the settings cannot be used, or the run is being worked on.
    """
    data = opened(studies, folder, run)
    config = config | {"dataset_dir": as_config(str(folder))}
    if not config.get("template"):
        config["template"] = as_config(data.templates)  # a final label counts, whatever a list says
    job = Job(config)
    return config, job, take(data, job)


def take(data: DataSet, job: Job) -> list[str]:
    """Take the later final labels into the run, as corrections, and back what is no longer final.

    Returns the cases whose label cannot be used.
    """
    refused: list[str] = []
    if not data.later and not data.withdrawn:
        return refused
    with lock_folder(job.run_folder.path), tempfile.TemporaryDirectory() as folder:
        recover(job.run_folder)
        failed = job.run_folder.read_record().get("failed", {})
        corrections = Corrections(job.run_folder, job.cohort.without(failed))
        for name in data.withdrawn:
            data.forget(name)
            if name not in corrections.usable():
                continue  # it was rejected or taken back by `review` since
            corrections.undo(name)
            log.info("case %s: its label is no longer final and is taken back", name)
        for final in data.later:
            try:
                data.write(final, path := Path(folder, f"{final.case}.nii.gz"))
                entry = corrections.take(path, final.case)
            except UserError as error:
                log.warning("%s It is not used.", error)
                refused.append(final.case)
            else:
                data.took(final)
                log.info("case %s: its final label is taken as %s", final.case, entry.what)
    return refused


def hand_over(trained: Path, root: Path) -> bool:
    """Replace model and configs of the bundle ``root`` by those of ``trained``, each whole or not at all.

    Returns whether the config of the prediction changed, which MONAI Label reads only when it starts.
    """
    if missing := [name for name in SERVED if not (trained / name).is_file()]:
        raise UserError(f"The run has no {missing[0]}: num_rounds 0 trains no model.")
    before = [path.read_bytes() if (path := root / name).is_file() else b"" for name in SERVED[:2]]
    asides = [(partial_path(root / name), root / name) for name in SERVED]
    try:
        for name, (aside, path) in zip(SERVED, asides):
            path.parent.mkdir(exist_ok=True)
            shutil.copyfile(trained / name, aside)
        for aside, path in asides:
            aside.replace(path)
    finally:
        for aside, _ in asides:
            aside.unlink(missing_ok=True)
    return before != [(root / name).read_bytes() for name in SERVED[:2]]


def number(value: Any) -> Any:
    """What a field of a page holds, a number if it is one."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
