"""What each command of the command line does. Heavy imports stay inside, so that --help is quick."""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from semisam_o1.kinds import refuse_wrong
from semisam_o1.literals import as_config, printable
from semisam_o1.options import OF_SCANS, READER_IDS, pairs, read
from semisam_o1.types import DatasetError
from semisam_o1.workflows import CONFIGS, config_files, execute, overrides, preset, workflow

if TYPE_CHECKING:
    from semisam_o1.clinic.studies import DataSet


def say(text: str, file: TextIO | None = None) -> None:
    """Print ``text`` without the control characters that a path or name may have."""
    print(printable(text), file=file or sys.stdout)


def write_the_rest(problems: Sequence) -> None:
    """Write all problems to a new problems.csv in the working directory if the printed table leaves out some."""
    from semisam_o1.data.findings import left_out, write_problems

    if problems and left_out(problems):
        names = (f"problems_{number}.csv" if number else "problems.csv" for number in itertools.count())
        path = write_problems(next(name for name in names if not os.path.lexists(name)), problems)
        say(f"all problems: {path}", sys.stderr)


@contextmanager
def _warnings_last() -> Iterator[None]:
    """Warnings of the body are logged when it is done: a table that it prints does not scroll them away."""
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            held.append(record)
        return record.levelno < logging.WARNING

    logger = logging.getLogger("semisam_o1")
    logger.addFilter(hold)
    try:
        yield
    finally:
        logger.removeFilter(hold)
        sys.stdout.flush()
        for record in held:
            logger.handle(record)


def run(options: argparse.Namespace) -> None:
    from semisam_o1.clinic.studies import is_studies
    from semisam_o1.job import Job

    job = workflow(config_files(options), options.run_id, overrides(options))
    job.initialize()
    config = copy.deepcopy(job.parser.get())
    job.parser["job"] = Job(config) if not is_studies(options.dataset_dir) else _on_studies(config, options)
    job.run()
    job.finalize()


def _on_studies(config: dict, options: argparse.Namespace):
    """The job on a studies folder of MONAI Label; the data set that is made of it lies beside the run."""
    from semisam_o1.clinic.studies import beside
    from semisam_o1.clinic.training import on_studies

    return on_studies(config, Path(options.dataset_dir), beside(options.output_dir), options.output_dir)[1]


def predict(options: argparse.Namespace) -> int:
    from semisam_o1.data.images import cases_of
    from semisam_o1.data.pseudonyms import refuse_key_in
    from semisam_o1.job.bundle import published_model, trained_config
    from semisam_o1.runfolder import PredictionFolder, RunFolder

    if options.pseudonyms is not None:
        refuse_key_in(options.output, options.pseudonyms)
    cases, found = cases_of(options.images, options.pseudonyms), PredictionFolder(options.output)
    found.claim(cases)  # fail before the network is built
    changed = {"output_dir": as_config(options.output), "images": as_config([case.image for case in cases])}
    if options.weights:
        config, changed["bundle_root"] = CONFIGS / "inference.json", as_config(CONFIGS.parent)
        changed |= published_model(options.weights, options.method)
    else:
        run = RunFolder(options.run)
        record = run.read_record()  # raises an error if the folder has an earlier layout
        trained_config(run)  # raises an error if there is none
        last = (record.get("handed_out") or [{}])[-1]  # when the bundle was written; another round may be under way
        if last.get("round", 0) < last.get("rounds", 0):
            worse = (
                f"the labels of its network, of round {last['rounds']}, are expected to be worse than those of round 0"
            )
            say(f"{run.path}: {worse}. Check what it predicts, or train longer.", sys.stderr)
        config, changed["bundle_root"] = run.bundle / "configs" / "inference.json", as_config(run.bundle)
    execute(workflow([config], "run", changed | overrides(options), "infer"))
    say(f"labels: {found.labels}, uncertainty: {found.uncertainty.path}")
    left_out = sorted({case.name for case in cases} - set(found.uncertainty.read()))
    if left_out:
        say(f"left out, {len(left_out)} of {len(cases)}: {', '.join(left_out)}", sys.stderr)
    return int(bool(left_out))


def test(options: argparse.Namespace) -> None:
    import torch

    from semisam_o1.job.final_test import final_test
    from semisam_o1.runtime import set_up

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    set_up(0, options.threads, device)
    inputs = (options.dataset_dir, options.weights, options.run, options.method, options.test_list, options.save_pred)
    say(final_test(*inputs, device, options.pseudonyms))


def evaluate(options: argparse.Namespace) -> None:
    from semisam_o1.job.evaluate import evaluate_run

    changed = {id: value for id, value in overrides(options).items() if id not in ("split", "pseudonyms")}
    say(evaluate_run(options.run, options.dataset_dir, options.split, changed, options.pseudonyms))


def review(options: argparse.Namespace) -> int:
    from semisam_o1.clinic.studies import is_studies, made_for, opened, read_studies
    from semisam_o1.job.review import review

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    data, studies, later, finals = options.data, None, {}, []
    with _warnings_last(), tempfile.TemporaryDirectory() as made:
        if data is not None and is_studies(data):
            folder = made_for(options.run)
            if folder is None:  # the run has a data set of its own
                finals = [final.label for final in read_studies(data)[1]]
            else:
                studies = opened(data, folder, options.run)
                later = studies.write_later(Path(made))
            data = folder
        steps = (options.accept, options.take, options.case, options.reject, options.undo, list(later))
        text, whole = review(options.run, *steps, options.pseudonyms, dataset_dir=data, finals=finals)
        if studies is not None and whole:
            for final in later.values():
                studies.took(final)
        say(text)
    return int(not whole)


def export(options: argparse.Namespace) -> int:
    from semisam_o1.clinic.export import export

    text, whole = export(options.run, options.where)
    say(text)
    return int(not whole)


def monailabel_app(options: argparse.Namespace) -> None:
    from semisam_o1.clinic.make_app import make_app

    app = make_app(options.output, options.bundle)
    say(f"app: {app}")
    start = f"monailabel start_server --app {app} --studies STUDIES --host 127.0.0.1"
    say(f"start it where MONAI Label is installed: {start}")


@contextmanager
def _data_set(folder: str) -> Iterator[tuple[str, DataSet | None]]:
    """A data set, or one that is made of a studies folder for the time of the body; and the latter."""
    from semisam_o1.clinic.studies import is_studies, opened

    if not is_studies(folder):
        yield folder, None
        return
    with tempfile.TemporaryDirectory() as made:
        yield made, opened(folder, Path(made))


def validate(options: argparse.Namespace) -> None:
    with _data_set(options.dataset_dir) as (options.dataset_dir, studies):
        if studies is not None and not options.template:
            options.template = studies.templates
        _say_valid(options)


def _say_valid(options: argparse.Namespace) -> None:
    """Say what is wrong with a data set, and what a run on it takes."""
    from semisam_o1.data.estimate import validate_text
    from semisam_o1.job.config import JobConfig
    from semisam_o1.job.settings import lost_classes, try_out

    job = workflow(config_files(options), "training", overrides(options))
    config = JobConfig(job.parser.get())
    logger = logging.getLogger("semisam_o1")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        problems = [*config.cohort.problems, *lost_classes(config)]  # opened here; the table is printed below, once
        if config.setting("num_rounds"):
            try_out(config)  # what a run refuses
    finally:
        logger.setLevel(level)
    names = ("max_iterations", "first_round_factor", "num_rounds", "feature_spacing", "template_copies")
    settings = {name: config.setting(name) for name in names}
    said = f"preset {preset(options)}"
    if settings["num_rounds"] == "auto":
        settings["num_rounds"] = config.setting("most_rounds")
        said += f", at most {settings['num_rounds']} rounds"
    else:
        said += f", {settings['num_rounds'] or 'no'} round{'' if settings['num_rounds'] == 1 else 's'} of training"
    scans = config.setting("labelled_batch") + config.setting("pool_batch")
    write_the_rest(problems)
    settings["batch_voxels"] = math.prod(config.setting("patch_size")) * scans
    say(validate_text(config.cohort, problems, settings, said))


def suggest(options: argparse.Namespace) -> None:
    from semisam_o1.data import ScanReader
    from semisam_o1.round_0.suggest import suggest_template

    spacing = options.spacing[0] if options.spacing and len(options.spacing) == 1 else options.spacing
    settings = {"spacing": spacing} | {name: read(value) for name, value in pairs(options.settings)}
    if unknown := settings.keys() - OF_SCANS:
        raise DatasetError(f"--set {min(unknown)}: suggest-template knows {', '.join(OF_SCANS)}.")
    refuse_wrong(settings)
    of_reader = {name: settings.pop(name) for name in READER_IDS if name in settings}
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with _data_set(options.dataset_dir) as (data, studies):
        outlined = studies.state["templates"] if studies else []
        found = suggest_template(
            data,
            options.output,
            options.top,
            options.given or outlined,
            reader=ScanReader(**of_reader),
            seed=options.seed,
            **settings,
        )
    say("distance: the mean to the other scans; the scan with the smallest is the best to outline")
    say(f"{'rank':>4}  {'distance':>8}  case")
    for suggestion in found:
        say(f"{suggestion.rank:4}  {suggestion.distance:8.4f}  {suggestion.case}")
    say(f"pictures and reasons: {options.output / 'suggestion.html'}")


def convert(options: argparse.Namespace) -> None:
    from semisam_o1.weights import convert_weights

    if os.path.lexists(options.output):
        raise DatasetError(f"{options.output} exists. Name another file.")
    say(f"{convert_weights(options.checkpoint, options.output)} tensors: {options.output}")


def demo_data(options: argparse.Namespace) -> None:
    from semisam_o1.data.phantoms import write_demo_data

    say(f"data set: {write_demo_data(options.output, options.cases, options.seed)}")
