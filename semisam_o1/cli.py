"""The command line: every command and option, and what a command that fails says."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

# OpenMP threads that spin while they wait slow down a busy machine; threads that sleep at once slow down a free one.
# A short spin suits both. OpenMP reads these variables when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import semisam_o1
from semisam_o1 import commands
from semisam_o1.commands import say, write_the_rest
from semisam_o1.errors import GO_ON, chain, plainly
from semisam_o1.literals import printable, printable_log
from semisam_o1.options import OF_SCANS, count, folder, rounds, seed, side, threads
from semisam_o1.signals import number_of, stoppable
from semisam_o1.types import UserError
from semisam_o1.workflows import CONFIGS, PUBLISHED, PUBLISHED_NAMES, names


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
        write_the_rest(next((part.problems for part in chain(error) if hasattr(part, "problems")), ()))
        return 2


def stopped(stop: KeyboardInterrupt) -> int:
    """Say that the command was stopped, and return its exit status."""
    say(f"semisam-o1: stopped. {GO_ON}", sys.stderr)
    return 128 + number_of(stop)


class Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong with a command."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {printable(message)} (--help lists all options)\n")


def parser() -> argparse.ArgumentParser:
    """Every command and option."""
    top = Parser(prog="semisam-o1", description="Segment a set of 3D scans from one labelled scan.")
    top.add_argument("--version", action="version", version=semisam_o1.__version__)
    choices = top.add_subparsers(required=True, metavar="COMMAND")

    run = choices.add_parser("run", help="all stages: pseudo-labels for the pool and a trained model")
    _shared(run)
    run.add_argument("--method", help=f"semi-supervised method: {', '.join(names('methods'))} (mean_teacher)")
    run.add_argument("--refinement", choices=names("refinements"), help="refinement of labels between rounds (voxel)")
    _rounds(run)
    run.set_defaults(action=commands.run, run_id="training")

    propagate = choices.add_parser("propagate", help="round 0 only: propagate the label, train nothing")
    _shared(propagate)
    propagate.add_argument("--split", choices=("pool", "val", "test"), help="which list to label (pool)")
    propagate.set_defaults(action=commands.run, run_id="propagate", method=None, refinement=None, num_rounds=None)

    predict = choices.add_parser("predict", help="segment new scans with a trained model")
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="scans, or folders of scans, one file a scan")
    source = predict.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, help="folder of a finished run; its bundle is code: use one you trust")
    source.add_argument("--weights", type=Path, metavar="FILE", help="a checkpoint of the published code")
    _published_method(predict)
    predict.add_argument("--output", required=True, type=folder)
    _pseudonyms(predict)
    _setting_options(predict)
    predict.set_defaults(action=commands.predict)

    test = choices.add_parser("test", help="published test: score a checkpoint, or each round of a run, in voxels")
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
    test.set_defaults(action=commands.test)

    evaluate = choices.add_parser("evaluate", help="score a run's labels against the truth")
    evaluate.add_argument("run", type=Path, metavar="RUN")
    evaluate.add_argument("dataset_dir", metavar="DIR")
    evaluate.add_argument("--split", choices=("pool", "val", "test"), default="test")
    _pseudonyms(evaluate)
    _setting_options(evaluate)
    evaluate.set_defaults(action=commands.evaluate)

    review = choices.add_parser("review", help="what people gave back on a run's labels, and who is next")
    review.add_argument("run", type=Path, metavar="RUN")
    review.add_argument("--accept", nargs="+", default=[], metavar="CASE", help="its label is right as it is")
    review.add_argument("--take", nargs="+", default=[], type=Path, metavar="FILE", help="corrected labels")
    review.add_argument("--as", dest="case", metavar="CASE", help="case of the file of --take, if not by its name")
    review.add_argument("--reject", nargs="+", default=[], metavar="CASE", help="the scan is no good: out of the pool")
    review.add_argument("--undo", nargs="+", default=[], metavar="CASE", help="take back its last step")
    review.add_argument("--data", type=Path, metavar="DIR", help="the data set, if it was moved since the run")
    _pseudonyms(review)
    review.set_defaults(action=commands.review)

    export = choices.add_parser("export", help="give a run's labels to MONAI Label, as suggestions")
    export.add_argument("run", type=Path, metavar="RUN")
    export.add_argument("--to", choices=("monailabel",), required=True, help="the program that gets the labels")
    export.add_argument("where", metavar="STUDIES", help="a studies folder, or the address of a server: http://...")
    export.set_defaults(action=commands.export)

    app = choices.add_parser("monailabel-app", help="write an app for a MONAI Label server, with the bundle in it")
    app.add_argument("output", type=folder, metavar="OUT")
    app.add_argument(
        "--bundle", type=Path, default=CONFIGS.parent, help="RUN/bundle of a finished run (one that learns)"
    )
    app.set_defaults(action=commands.monailabel_app)

    validate = choices.add_parser("validate", help="check a data set before a run, and estimate what the run takes")
    validate.add_argument("dataset_dir", metavar="DIR")
    validate.add_argument("--template", nargs="+", default=[], metavar="CASE", help="labelled cases to learn from")
    _preset(validate)
    _rounds(validate)
    _setting_options(validate)
    validate.set_defaults(action=commands.validate)

    suggest = choices.add_parser("suggest-template", help="suggest which scan to outline first, or next")
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
    suggest.set_defaults(action=commands.suggest)

    convert = choices.add_parser("convert-weights", help="save a checkpoint's weights as safetensors")
    convert.add_argument("checkpoint", type=Path, metavar="IN")
    convert.add_argument("output", type=folder, metavar="OUT.safetensors")
    convert.set_defaults(action=commands.convert)

    demo = choices.add_parser("demo-data", help="write a small synthetic data set with truth for every case")
    demo.add_argument("output", type=folder, metavar="OUT")
    demo.add_argument("--cases", type=count, default=12)
    demo.add_argument("--seed", type=seed, default=0)
    demo.set_defaults(action=commands.demo_data)
    return top


def _shared(command: argparse.ArgumentParser) -> None:
    command.add_argument("dataset_dir", metavar="DIR")
    command.add_argument("--output", required=True, dest="output_dir", metavar="RUN")
    command.add_argument("--template", nargs="+", metavar="CASE", help="labelled cases to learn from")
    command.add_argument("--encoder", choices=names("encoders"), help="frozen encoder (mind)")
    _preset(command)
    command.add_argument("--seed", type=seed)
    text = "take what people gave in another run on the same data set, its folder RUN/reviewed"
    command.add_argument("--reviewed", metavar="FOLDER", help=text)
    text = "repeat this step of an earlier start and all later steps: features, propagation, round_1, ..."
    command.add_argument("--restart-from", dest="restart_from", metavar="STEP", help=text)
    _pseudonyms(command)
    _setting_options(command)


def _preset(command: argparse.ArgumentParser) -> None:
    command.add_argument("--preset", choices=names("presets"), help="default: standard with a GPU, quick without")


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


if __name__ == "__main__":
    sys.exit(main())
