"""The command line: a thin layer that builds the bundle's workflow from the bundle's JSON and runs it."""

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
from typing import TYPE_CHECKING, NoReturn, TextIO

# OpenMP threads that spin while they wait slow down a busy machine; threads that sleep at once slow down a free one.
# A short spin suits both. OpenMP reads these variables when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import semisam_o1
from semisam_o1.errors import GO_ON, chain, plainly
from semisam_o1.kinds import refuse_wrong
from semisam_o1.literals import as_config, printable, printable_log
from semisam_o1.options import OF_SCANS, READER_IDS, count, folder, pairs, read, rounds, seed, side, threads
from semisam_o1.signals import number_of, stoppable
from semisam_o1.types import DatasetError, UserError

if TYPE_CHECKING:
    from monai.bundle import ConfigWorkflow

CONFIGS = Path(semisam_o1.BUNDLE_ROOT) / "configs"
PUBLISHED = ("mt", "uamt", "dan", "dtc")  # methods of the published code
PUBLISHED_NAMES = {"mt": "mean_teacher", "uamt": "ua_mt"}  # published name of a method -> ours


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: done. 1: `predict` left out some images. 2: the command or the data cannot be used; this prints one line instead
    of a traceback. 130, 143: stopped by Ctrl-C or SIGTERM.
    """
    options = parser().parse_args(arguments)
    printable_log()
    try:
        with stoppable():
            return options.action(options) or 0
    except KeyboardInterrupt as stop:
        return stopped(stop)
    except Exception as error:
        if stops := next((part for part in chain(error) if isinstance(part, KeyboardInterrupt)), None):
            return stopped(stops)  # the signal came during an import, for which pydoc raises an error of its own
        known = isinstance(error, (UserError, OSError, RuntimeError, MemoryError))  # MONAI wraps errors in RuntimeError
        text = plainly(error) if known else None
        if text is None:
            raise
        say(f"semisam-o1: {text}", sys.stderr)
        _write_the_rest(next((part.problems for part in chain(error) if hasattr(part, "problems")), ()))
        return 2


def stopped(stop: KeyboardInterrupt) -> int:
    """Say that the command was stopped, and return its exit status."""
    say(f"semisam-o1: stopped. {GO_ON}", sys.stderr)
    return 128 + number_of(stop)


def say(text: str, file: TextIO | None = None) -> None:
    """Print ``text`` without the control characters that a path or name may have."""
    print(printable(text), file=file or sys.stdout)


def _write_the_rest(problems: Sequence) -> None:
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


class Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong with a command."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)} (--help lists all options)\n")


def parser() -> argparse.ArgumentParser:
    """Every command and option."""
    top = Parser(prog="semisam-o1", description="Segment a set of 3D scans from one labelled scan.")
    top.add_argument("--version", action="version", version=semisam_o1.__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="all stages: pseudo-labels for the pool and a trained model")
    _shared(run)
    run.add_argument("--method", help=f"semi-supervised method: {', '.join(_names('methods'))} (mean_teacher)")
    run.add_argument("--refinement", choices=_names("refinements"), help="refinement of labels between rounds (voxel)")
    _rounds(run)
    run.set_defaults(action=_run, run_id="training")

    propagate = commands.add_parser("propagate", help="round 0 only: propagate the label, train nothing")
    _shared(propagate)
    propagate.add_argument("--split", choices=("pool", "val", "test"), help="which list to label (pool)")
    propagate.set_defaults(action=_run, run_id="propagate", method=None, refinement=None, num_rounds=None)

    predict = commands.add_parser("predict", help="segment new scans with a trained model")
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="scans, or folders of scans, one file a scan")
    source = predict.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder of a finished run; its bundle is code: use one you trust")
    source.add_argument("--weights", type=Path, metavar="FILE", help="a checkpoint of the published code")
    _published_method(predict)
    predict.add_argument("--output", required=True, type=folder)
    _pseudonyms(predict)
    _setting_options(predict)
    predict.set_defaults(action=_predict)

    test = commands.add_parser("test", help="published test: score a checkpoint, or each round of a run, in voxels")
    test.add_argument("dataset_dir", metavar="DIR")
    source = test.add_mutually_exclusive_group(required=True)
    source.add_argument("--weights", type=Path, metavar="FILE", help="a checkpoint of the published code")
    source.add_argument("--run", type=Path, metavar="RUN", help="folder of a finished run: score each round")
    _published_method(test)
    test.add_argument(
        "--test-list", default="test.txt", metavar="FILE", help="list of cases, a file in DIR or a path (test.txt)"
    )
    test.add_argument("--save-pred", type=folder, metavar="OUT", help="folder for images, labels and test.csv")
    test.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    test.add_argument("--threads", type=threads, metavar="N", help="of the CPU (all)")
    _pseudonyms(test)
    test.set_defaults(action=_test)

    evaluate = commands.add_parser("evaluate", help="score a run's labels against the truth")
    evaluate.add_argument("run", type=Path, metavar="RUN")
    evaluate.add_argument("dataset_dir", metavar="DIR")
    evaluate.add_argument("--split", choices=("pool", "val", "test"), default="test")
    _pseudonyms(evaluate)
    _setting_options(evaluate)
    evaluate.set_defaults(action=_evaluate)

    review = commands.add_parser("review", help="what people gave back on a run's labels, and who is next")
    review.add_argument("run", type=Path, metavar="RUN")
    review.add_argument("--accept", nargs="+", default=[], metavar="CASE", help="its label is right as it is")
    review.add_argument("--take", nargs="+", default=[], type=Path, metavar="FILE", help="corrected labels")
    review.add_argument("--as", dest="case", metavar="CASE", help="case of the file of --take, if not by its name")
    review.add_argument("--reject", nargs="+", default=[], metavar="CASE", help="the scan is no good: out of the pool")
    review.add_argument("--undo", nargs="+", default=[], metavar="CASE", help="take back its last step")
    review.add_argument("--data", type=Path, metavar="DIR", help="the data set, if it was moved since the run")
    _pseudonyms(review)
    review.set_defaults(action=_review)

    export = commands.add_parser("export", help="give a run's labels to MONAI Label, as suggestions")
    export.add_argument("run", type=Path, metavar="RUN")
    export.add_argument("--to", choices=("monailabel",), required=True, help="the program that gets the labels")
    export.add_argument("where", metavar="STUDIES", help="a studies folder, or the address of a server: http://...")
    export.set_defaults(action=_export)

    app = commands.add_parser("monailabel-app", help="write an app for a MONAI Label server, with the bundle in it")
    app.add_argument("output", type=folder, metavar="OUT")
    app.add_argument(
        "--bundle", type=Path, default=CONFIGS.parent, help="RUN/bundle of a finished run (one that learns)"
    )
    app.set_defaults(action=_monailabel_app)

    validate = commands.add_parser("validate", help="check a data set before a run, and estimate what the run takes")
    validate.add_argument("dataset_dir", metavar="DIR")
    validate.add_argument("--template", nargs="+", default=[], metavar="CASE", help="labelled cases to learn from")
    _preset(validate)
    _rounds(validate)
    _setting_options(validate)
    validate.set_defaults(action=_validate)

    suggest = commands.add_parser("suggest-template", help="suggest which scan to outline first, or next")
    suggest.add_argument("dataset_dir", metavar="DIR")
    suggest.add_argument("--top", type=count, default=5, help="number of suggestions (5)")
    suggest.add_argument("--given", nargs="+", default=[], metavar="CASE", help="scans already outlined")
    suggest.add_argument(
        "--output",
        type=folder,
        default=Path("suggestion"),
        help="folder for the page with pictures (suggestion, in the working directory)",
    )
    suggest.add_argument("--spacing", type=side, nargs="+", help="voxel size of HDF5 scans, mm")
    suggest.add_argument(
        "--set", nargs="+", default=[], metavar="ID=VALUE", dest="settings", action="extend",
        help=f"override a setting of scans and features: {', '.join(OF_SCANS)}",
    )  # fmt: skip
    suggest.add_argument("--seed", type=seed, default=0)
    suggest.set_defaults(action=_suggest)

    convert = commands.add_parser("convert-weights", help="save a checkpoint's weights as safetensors")
    convert.add_argument("checkpoint", type=Path, metavar="IN")
    convert.add_argument("output", type=folder, metavar="OUT.safetensors")
    convert.set_defaults(action=_convert)

    demo = commands.add_parser("demo-data", help="write a small synthetic data set with truth for every case")
    demo.add_argument("output", type=folder, metavar="OUT")
    demo.add_argument("--cases", type=count, default=12)
    demo.add_argument("--seed", type=seed, default=0)
    demo.set_defaults(action=_demo_data)
    return top


def _names(folder: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.json"))


def _shared(command: argparse.ArgumentParser) -> None:
    command.add_argument("dataset_dir", metavar="DIR")
    command.add_argument("--output", required=True, dest="output_dir", metavar="RUN")
    command.add_argument("--template", nargs="+", metavar="CASE", help="labelled cases to learn from")
    command.add_argument("--encoder", choices=_names("encoders"), help="frozen encoder (mind)")
    _preset(command)
    command.add_argument("--seed", type=seed)
    text = "take what people gave in another run on the same data set, its folder RUN/reviewed"
    command.add_argument("--reviewed", metavar="FOLDER", help=text)
    text = "repeat this step of an earlier start and all later steps: features, propagation, round_1, ..."
    command.add_argument("--restart-from", dest="restart_from", metavar="STEP", help=text)
    _pseudonyms(command)
    _setting_options(command)


def _preset(command: argparse.ArgumentParser) -> None:
    command.add_argument("--preset", choices=_names("presets"), help="default: standard with a GPU, quick without")


def _rounds(command: argparse.ArgumentParser) -> None:
    text = "training rounds (6; standard, paper: 3); auto: train until labels settle and use the best round"
    command.add_argument("--rounds", type=rounds, dest="num_rounds", help=text)


def _published_method(command: argparse.ArgumentParser) -> None:
    ours = {name: published for published, name in PUBLISHED_NAMES.items()}
    text = "with --weights (mt): the method that it was trained with; dtc has another network"
    command.add_argument("--method", default="mt", type=lambda name: ours.get(name, name), choices=PUBLISHED, help=text)


def _pseudonyms(command: argparse.ArgumentParser) -> None:
    text = "replace case names in everything that is written; FILE, a CSV of case,pseudonym, is the key"
    command.add_argument("--pseudonyms", metavar="FILE", help=text)


def _setting_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    text = "override any id of the config, e.g. max_iterations=2000; a value that begins with $ is run as Python, "
    text += "one with @ or %% refers to another id"
    command.add_argument(
        "--set", nargs="+", default=[], metavar="ID=VALUE", dest="settings", action="extend", help=text
    )


def overrides(options: argparse.Namespace) -> dict:
    """The config ids that the command line overrides, as config.

    Options are data. The values of ``--set`` are config, i.e. code: JSON if they parse as JSON, else text.

    Raises:
        DatasetError: a setting is not of the form ID=VALUE.
    """
    ids = ["dataset_dir", "output_dir", "pseudonyms", "template", "num_rounds", "seed", "split", "restart_from"]
    ids.append("reviewed")
    changed = {name: as_config(value) for name in ids if (value := getattr(options, name, None)) not in (None, [])}
    if options.device != "auto":
        changed["device"] = as_config(options.device)
    return changed | {name: read(value) for name, value in pairs(options.settings)}


def workflow(files: list[Path], run_id: str, changed: dict, workflow_type: str = "train") -> ConfigWorkflow:
    """MONAI's workflow of config ``files`` with the ids ``changed``.

    Raises:
        DatasetError: the config has no such id, or a value has the wrong kind.
    """
    from monai.bundle import ConfigWorkflow

    from semisam_o1.job.config import Config, override

    logging.getLogger("monai.bundle.workflows").setLevel(logging.ERROR)  # it warns about overlays in folders
    log_file = str(CONFIGS / "logging.conf")
    made = ConfigWorkflow([str(f) for f in files], logging_file=log_file, run_id=run_id, workflow_type=workflow_type)
    if (name := changed.get("preset")) is not None:
        raise DatasetError(f"--set preset={name}: a preset is a file of settings; use --preset {name}.")
    override(made.parser, changed)
    Config(made.parser.get())
    return made


def _execute(workflow) -> None:
    workflow.initialize()
    workflow.run()
    workflow.finalize()


def preset(options: argparse.Namespace) -> str:
    """The preset that the options name; else `standard` if CUDA will be used, `quick` if not."""
    import torch

    if options.preset:
        return options.preset
    cuda = torch.cuda.is_available() if options.device == "auto" else options.device.startswith("cuda")
    return "standard" if cuda else "quick"


def config_files(options: argparse.Namespace) -> list[Path]:
    """``train.json`` and the overlays that the options name; later files override earlier ones.

    Raises:
        DatasetError: there is no such method.
    """
    files = [CONFIGS / "train.json"]
    for kind in ("presets", "methods", "encoders", "refinements"):
        name = preset(options) if kind == "presets" else getattr(options, kind[:-1], None)
        if name is None:
            continue
        name = PUBLISHED_NAMES.get(name, name) if kind == "methods" else name
        if name not in _names(kind):
            raise DatasetError(f"There is no {kind[:-1]} '{name}': choose one of {', '.join(_names(kind))}.")
        files.append(CONFIGS / kind / f"{name}.json")
    return files


def _run(options) -> None:
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

    return on_studies(config, Path(options.dataset_dir), beside(options.output_dir))[1]


def _predict(options) -> int:
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
        best = record.get("best_round", 0)
        if record.get("labels_round", best) < best:
            say(f"{run.path}: its network, of round {best}, is expected to be worse than round 0", sys.stderr)
        config, changed["bundle_root"] = run.bundle / "configs" / "inference.json", as_config(run.bundle)
    _execute(workflow([config], "run", changed | overrides(options), "infer"))
    say(f"labels: {found.labels}, uncertainty: {found.uncertainty.path}")
    left_out = sorted({case.name for case in cases} - set(found.uncertainty.read()))
    if left_out:
        say(f"left out, {len(left_out)} of {len(cases)}: {', '.join(left_out)}", sys.stderr)
    return int(bool(left_out))


def _test(options) -> None:
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


def _evaluate(options) -> None:
    from semisam_o1.job.evaluate import evaluate_run

    changed = {id: value for id, value in overrides(options).items() if id not in ("split", "pseudonyms")}
    say(evaluate_run(options.run, options.dataset_dir, options.split, changed, options.pseudonyms))


def _review(options) -> int:
    from semisam_o1.clinic.studies import beside, is_studies, opened
    from semisam_o1.job.review import review

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    data, studies, later = options.data, None, {}
    with _warnings_last(), tempfile.TemporaryDirectory() as made:
        if data is not None and is_studies(data):
            studies = opened(data, data := beside(options.run))
            later = studies.write_later(Path(made))
        steps = (options.accept, options.take, options.case, options.reject, options.undo, list(later))
        text, whole = review(options.run, *steps, options.pseudonyms, dataset_dir=data)
        if studies is not None and whole:
            for final in later.values():
                studies.took(final)
        say(text)
    return int(not whole)


def _export(options) -> int:
    from semisam_o1.clinic.export import export

    text, whole = export(options.run, options.where)
    say(text)
    return int(not whole)


def _monailabel_app(options) -> None:
    from semisam_o1.clinic.make_app import make_app

    app = make_app(options.output, options.bundle)
    say(f"app: {app}")
    say(f"start it where MONAI Label is installed: monailabel start_server --app {app} --studies STUDIES")


def _validate(options) -> None:
    from semisam_o1.clinic.studies import is_studies, opened

    with tempfile.TemporaryDirectory() as made:
        if is_studies(options.dataset_dir):
            data = opened(options.dataset_dir, Path(made))
            options.dataset_dir, options.template = made, options.template or data.state["templates"]
        _say_valid(options)


def _say_valid(options) -> None:
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
    names = ("max_iterations", "first_round_factor", "num_rounds", "feature_voxels", "template_copies")
    settings = {name: config.setting(name) for name in names}
    said = f"preset {preset(options)}"
    if settings["num_rounds"] == "auto":
        settings["num_rounds"] = config.setting("most_rounds")
        said += f", at most {settings['num_rounds']} rounds"
    else:
        said += f", {settings['num_rounds'] or 'no'} round{'' if settings['num_rounds'] == 1 else 's'} of training"
    scans = config.setting("labelled_batch") + config.setting("pool_batch")
    _write_the_rest(problems)
    settings["batch_voxels"] = math.prod(config.setting("patch_size")) * scans
    say(validate_text(config.cohort, problems, settings, said))


def _suggest(options) -> None:
    from semisam_o1.data import ScanReader
    from semisam_o1.round_0.suggest import suggest_template

    spacing = options.spacing[0] if options.spacing and len(options.spacing) == 1 else options.spacing
    settings = {"spacing": spacing} | {name: read(value) for name, value in pairs(options.settings)}
    if unknown := settings.keys() - OF_SCANS:
        raise DatasetError(f"--set {min(unknown)}: suggest-template knows {', '.join(OF_SCANS)}.")
    refuse_wrong(settings)
    of_reader = {name: settings.pop(name) for name in READER_IDS if name in settings}
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = suggest_template(
        options.dataset_dir,
        options.output,
        options.top,
        options.given,
        reader=ScanReader(**of_reader),
        seed=options.seed,
        **settings,
    )
    say("distance: the mean to the other scans; the scan with the smallest is the best to outline")
    say(f"{'rank':>4}  {'distance':>8}  case")
    for suggestion in found:
        say(f"{suggestion.rank:4}  {suggestion.distance:8.4f}  {suggestion.case}")
    say(f"pictures and reasons: {options.output / 'suggestion.html'}")


def _convert(options) -> None:
    from semisam_o1.weights import convert_weights

    if os.path.lexists(options.output):
        raise DatasetError(f"{options.output} exists. Name another file.")
    say(f"{convert_weights(options.checkpoint, options.output)} tensors: {options.output}")


def _demo_data(options) -> None:
    from semisam_o1.data.phantoms import write_demo_data

    say(f"data set: {write_demo_data(options.output, options.cases, options.seed)}")


if __name__ == "__main__":
    sys.exit(main())
