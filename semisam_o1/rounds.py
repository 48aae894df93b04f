"""The order of the stages. A round is a folder; nothing passes between stages but files.

Each stage builds what it needs afresh from the bundle's config (with ``round`` set), and lets go of it after: so a
stage can be run again alone, and nothing of one round lingers in the next.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import faiss
import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism

from semisam_o1 import results, settings, settling
from semisam_o1.alignment import is_turned, turn_between
from semisam_o1.datasets import Cohort
from semisam_o1.files import write_json
from semisam_o1.metrics import read_csv, summary_text, write_csv
from semisam_o1.refining import switched_off_before
from semisam_o1.reports import write_report
from semisam_o1.resume import Journal, held
from semisam_o1.round_0 import QualityList
from semisam_o1.stopwatch import Stopwatch
from semisam_o1.trained import write_bundle
from semisam_o1.types import Case, DatasetError

log = logging.getLogger("semisam_o1")


def set_up(seed: int, threads: int | None, device: str) -> None:
    """Seed everything, bind the number of threads (None: as it is) and check that ``device`` is there.

    Raises:
        DatasetError: there is no such device, or a CUDA device is asked for and none can be used.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise DatasetError(f"device {device}: expected cpu, cuda or cuda:0, cuda:1, ...") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise DatasetError(f"device {device}: this machine has no CUDA device that torch can use; say --device cpu.")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise DatasetError(f"threads is {threads}: expected a whole number from 1 on, or nothing for all.")
    if threads:
        torch.set_num_threads(int(threads))
        faiss.omp_set_num_threads(int(threads))
    set_determinism(int(seed))


def image_items(cases: Sequence[Case]) -> list[dict]:
    """``case`` and ``image`` of each case, for a dataset that is to see no label."""
    return [{"case": case.name, "image": str(case.image)} for case in cases]


def training_items(cohort: Cohort, output_dir: str | Path, round: int, min_predicted_dice: float = 0.0) -> list[dict]:
    """What round ``round`` learns from: templates with their labels, the pool with those of the round before.

    A pool scan without a label of that round (its propagation failed) is left out, and so is one whose label is
    judged to be worth less than ``min_predicted_dice``; where none is worth more, all are taken.
    """
    folder = Path(output_dir) / f"round_{round - 1}"
    quality = QualityList(folder / "quality.csv").read()
    items = [case.item() | {"labelled": True} for case in cohort.templates]
    pool = [case for case in cohort.pool if (folder / "labels" / f"{case.name}.nii.gz").exists()]
    poor = [case for case in pool if case.name in quality and quality[case.name].predicted_dice < min_predicted_dice]
    if poor and len(poor) < len(pool):
        names = ", ".join(case.name for case in poor)
        log.info("labels left out of training, judged below a Dice of %g: %s", min_predicted_dice, names)
        pool = [case for case in pool if case not in poor]
    return items + [case.item(folder / "labels" / f"{case.name}.nii.gz") | {"labelled": False} for case in pool]


class Job:
    """The whole job on one data set and one RUN folder.

    Args:
        config: the raw bundle config, as `config.config_in_use` gives it.

    Raises:
        DatasetError: the data set cannot be worked on; nothing has been written then.
    """

    def __init__(self, config: dict):
        self.source = config
        self.config = copy.deepcopy(config)
        parser = ConfigParser(self.config)
        self.cohort: Cohort = parser.get_parsed_content("cohort")
        self.config["cohort"] = self.cohort
        self.output = Path(parser.get_parsed_content("output_dir"))
        self.seed, wanted = int(parser.get_parsed_content("seed")), parser.get_parsed_content("num_rounds")
        self.auto = wanted == "auto"
        self.rounds = self.best = 0 if self.auto else int(wanted)
        self.stages: list[dict] = []
        self.set_aside = dict(self.cohort.set_aside)
        if (self.output / "run.json").is_file():  # a stage run again alone: what the others took stays on record
            record = json.loads((self.output / "run.json").read_text(encoding="utf-8"))
            self.stages = record["stages"]
            if self.auto:
                self.rounds, self.best = record["rounds"], record["best_round"]

    # What a user can ask for.

    def run(self) -> None:
        """Every stage, from scans to pseudo-labels, trained bundle and report; those that are done already are kept."""
        self._all_steps()

    def _all_steps(self) -> None:
        if self.auto or self.rounds:
            settings.try_out(self._get)
        with held(self.output):
            self._begin()
            self._step("features", self.features)
            self._step("propagation/first", self._first_pass)
            self._step("propagation/second", self._second_pass)
            self._step("propagation/quality", self.judge, 0)
            last = int(self._get("most_rounds")) if self.auto else self.rounds
            for number in range(1, last + 1):
                self._step(f"round_{number}/training", self._train, number)
                self._step(f"round_{number}/prediction", self.predict, number)
                if self.auto or number < last or self._get("refine_last"):
                    self._step(f"round_{number}/refinement", self.refine, number)
                self._step(f"round_{number}/quality", self.judge, number)
                if self.auto:
                    self.rounds = number
                    if self._settled(number):
                        break
            self.best = self._best_round() if self.auto else self.rounds
            if self.auto:
                log.info("the labels of round %d of %d are handed out", self.best, self.rounds)
            self.finish()

    def alone(self, stage: str, *arguments) -> None:
        """One stage by itself, by the name of its method."""
        with held(self.output):
            getattr(self, stage)(*arguments)

    def propagate_alone(self) -> None:
        """Round 0 on the cases of ``split``, and everything a run writes but the rounds and the bundle."""
        if (self.output / "round_1").is_dir():
            raise DatasetError(f"{self.output} holds a run with trained rounds; name another folder for round 0 alone.")
        self.rounds, self.best, self.auto = 0, 0, False
        self._all_steps()

    def prepare_round(self) -> None:
        """Round 0 where it is missing, so that one round's trainer can start (MONAI Label calls ``run``)."""
        folder = self.output / "round_0" / "labels"
        if all((folder / f"{case.name}.nii.gz").exists() for case in self.cohort.pool):
            return
        self.features()
        self.propagate()
        self.judge(0)

    # The stages.

    def features(self) -> None:
        with self._stage("features"):
            evaluators = [self._get("features#evaluator")]
            template = self.cohort.grid(self.cohort.templates[0]).affine
            cases = self.cohort.split(self._get("split"))
            oblique = [case for case in cases if is_turned(turn_between(self.cohort.grid(case).affine, template))]
            if oblique and self._get("feature_spacing"):
                changed = {"frame": "stored", "feature_cases": oblique}
                evaluators.append(self._get("features#evaluator", changed=changed))
            for evaluator in evaluators:
                if len(evaluator.data_loader.dataset):
                    evaluator.run()

    def propagate(self) -> None:
        """Both passes of round 0, from the beginning."""
        shutil.rmtree(self.output / "round_0" / "work", ignore_errors=True)  # of other features, perhaps
        self._first_pass()
        self._second_pass()

    def _first_pass(self) -> None:
        with self._stage("propagation"):
            self.set_aside |= self._over_cases("propagation#engine")

    def _second_pass(self) -> None:
        if self._get("second_pass"):
            with self._stage("second pass"):
                self._over_cases("propagation#second_pass")

    def judge(self, number: int) -> None:
        """What the labels of round ``number`` are worth, without truth; see `quality`."""
        if self._get("quality_estimate"):
            with self._stage(f"round {number}: quality", number):
                labels = settling.labels_dir(self._folder(number))
                self._over_cases("propagation#quality", number, {"judged_dir": str(labels)})

    def _over_cases(self, id: str, number: int | None = None, changed: dict | None = None) -> dict[str, str]:
        """Run an engine over the split's cases that are not set aside; gives those that failed, with reasons."""
        engine = self._get(id, number, changed)
        cases = [case for case in self.cohort.split(self._get("split")) if case.name not in self.set_aside]
        if not cases:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(self.set_aside.items())[:3])
            raise DatasetError(f"No scan is left to work on ({reasons}).")
        engine.run(cases, max_epochs=1, epoch_length=len(cases))
        return engine.state.failed

    def train(self, number: int) -> None:
        """One round's training, from its beginning."""
        (self._folder(number) / "training.pt").unlink(missing_ok=True)  # of other settings, perhaps
        self._train(number)

    def _train(self, number: int) -> None:
        with self._stage(f"round {number}: training", number):
            train = self._get("train", number)
            if begun := train["state"].resume(train["trainer"]):
                log.info("training goes on from iteration %d", begun)
            train["trainer"].run()

    def predict(self, number: int, cases: Sequence[Case] | None = None) -> None:
        """``cases``: all of the pool and of validation and test where unsaid."""
        with self._stage(f"round {number}: prediction", number):
            changed = {} if cases is None else {"predict#cases": list(cases)}
            self._get("predict#evaluator", number, changed).run()

    def refine(self, number: int) -> None:
        with self._stage(f"round {number}: refinement", number):
            if off := switched_off_before(self.output, number):
                log.info("refinement stays switched off")
            engine = self._get("refinement#engine", number, {"refinement#propose": "$refining.no_votes"} if off else {})
            cases = [case for case in self.cohort.pool if case.name not in self.set_aside]
            engine.run(cases, max_epochs=1, epoch_length=len(cases))
            log.info("refinement replaced %d of %d labels", len(engine.state.replaced), len(cases))

    def _settled(self, number: int) -> bool:
        """Whether another round is not worth its time: labels hardly change, or are getting worse."""
        names, folders = [case.name for case in self.cohort.pool], [self._folder(n) for n in (number - 1, number)]
        change, worth = settling.change(*folders, names, self.cohort.num_classes), settling.worth(folders[1])
        log.info("round %d: labels changed by %.4f (1 - mean Dice), predicted Dice %.4f", number, change, worth)
        return change < self._get("least_change") or self._best_round() != number

    def _best_round(self) -> int:
        worth = {number: settling.worth(self._folder(number)) for number in range(1, self.rounds + 1)}
        return settling.best_round(worth, self._get("worth_tolerance"))

    def finish(self) -> None:
        """Final labels, figures, the list for review, the trained bundle, the report."""
        for doubt in settling.doubts(self.output, self.best):
            log.warning(doubt)
        with self._stage("evaluation"):
            cases = self.cohort.split(self._get("split"))
            results.hand_out(self._folder(self.best), self.output / "pseudo_labels", cases)
            results.write_review(self._folder(self.best), self.output / "review.csv", cases)
            rows = self.evaluate()
            write_csv(rows, self.output / "metrics.csv")
        if self.rounds:
            write_bundle(self.output, self.config, self.settings, self.cohort, self.best)
        self._write_run_json()
        report = write_report(self.output, self.cohort)
        if rows:
            log.info("\n%s", summary_text(rows))
        log.info("labels: %s", self.output / "pseudo_labels")
        log.info("report: %s", report)

    def evaluate(self, splits: Sequence[str] = ("pool", "val", "test")) -> list[dict]:
        """Rows of metrics.csv for whatever labels the run folder holds and truth exists for."""
        return results.scores(self.output, self.cohort, splits, self.rounds, self._get("metric_definition"))

    @functools.cached_property
    def settings(self) -> dict:
        """Every setting as resolved."""
        return settings.resolved(self.config)

    # How.

    def _folder(self, number: int) -> Path:
        return self.output / f"round_{number}"

    def _get(self, id: str, number: int | None = None, changed: dict | None = None):
        """The resolved ``id`` of a config of its own, with ``round`` set and other ids ``changed``."""
        parser = ConfigParser(copy.deepcopy(self.config))
        parser.update((changed or {}) | ({} if number is None else {"round": number}))
        return parser.get_parsed_content(id)

    def _stage(self, name: str, number: int = 0) -> Stopwatch:
        set_determinism(self.seed + number)
        log.info("%s", name)
        return Stopwatch(name, self._stage_done)

    def _stage_done(self, name: str, seconds: float, peak_mib: float) -> None:
        self.stages = [stage for stage in self.stages if stage["stage"] != name]
        self.stages.append({"stage": name, "seconds": round(seconds, 1), "peak_memory_mib": round(peak_mib)})
        log.info("%s: %.0f s, peak %.0f MiB", name, seconds, peak_mib)
        self._write_run_json()

    def _begin(self) -> None:
        """Go on where an earlier start with the same settings and data ended; else from the beginning.

        Raises:
            DatasetError: the folder was begun with other settings.
        """
        data = [(c.name, c.split, c.image.stat().st_size, c.image.stat().st_mtime_ns) for c in self.cohort.cases]
        data += [(c.name, c.label.stat().st_size, c.label.stat().st_mtime_ns) for c in self.cohort.templates]
        self.journal = Journal(self.output / "progress.json", self.source | self.settings | {"data": data})
        if self.journal.open(self._get("restart_from")):
            if self.journal.done:
                log.info("going on after: %s", ", ".join(self.journal.done))
            if (self.output / "run.json").is_file():
                kept = json.loads((self.output / "run.json").read_text(encoding="utf-8"))
                self.stages, self.set_aside = kept["stages"], self.set_aside | kept["set_aside"]
        else:
            self.stages = []
            self.journal.begin()
        self._remove_stale()
        self._write_run_json()

    def _remove_stale(self) -> None:
        """Results of steps that are not on record would pass for this run's.

        What the step that was killed left half-done stays, if it fits the settings.
        """
        for name in ("report.html", "review.csv", "metrics.csv"):
            (self.output / name).unlink(missing_ok=True)
        done, stale = self.journal.done, [self.output / "pseudo_labels", self.output / "bundle"]
        if "propagation/first" not in done and not self.journal.half_done_fits:
            stale.append(self.output / "round_0")
        for folder in self.output.glob("round_[1-9]*"):
            half_done = (folder / "training.pt").exists() and self.journal.half_done_fits
            if f"{folder.name}/training" not in done and not half_done:
                stale.append(folder)
        for folder in stale:
            if folder.is_dir():
                log.info("removing %s of an earlier run", folder)
                shutil.rmtree(folder)

    def _step(self, name: str, work: Callable, *arguments) -> None:
        if name not in self.journal.done:
            work(*arguments)
            self.journal.add(name)

    def _write_run_json(self) -> None:
        record = {
            "versions": results.versions(),
            "seed": self.seed,
            "template": [case.name for case in self.cohort.templates],
            "classes": self.cohort.classes,
            "warnings": settling.doubts(self.output, self.best),
            "set_aside": self.set_aside,
            "rounds": self.rounds,
            "best_round": self.best,
            "stages": self.stages,
            "settings": self.settings,
            "config": self.source,
        }
        write_json(self.output / "run.json", record)


def evaluate_run(run: str | Path, dataset_dir: str | Path, split: str, said: dict | None = None) -> str:
    """Score a finished run's labels on ``split`` of a data set, as a table; metrics.csv gets the rows too.

    Cases that the run has not predicted yet are predicted by its last round's model first.

    Raises:
        DatasetError: ``run`` is no run's folder, or no case of the split has truth.
    """
    record = Path(run) / "run.json"
    if not record.is_file():
        raise DatasetError(f"{run}: no run.json there; expected the folder of a run.")
    record = json.loads(record.read_text(encoding="utf-8"))
    kept = {name: record["settings"][name] for name in ("train_spacing", "patch_size", "preset")}
    kept["num_rounds"] = record["rounds"]
    config = record["config"] | kept | {"template": record["template"], "dataset_dir": str(dataset_dir)}
    config |= {"output_dir": str(run)} | (said or {})
    job = Job(config)
    job.stages, job.set_aside, job.best = record["stages"], record["set_aside"], record["best_round"]
    if job.rounds:
        predictions = Path(run) / f"round_{job.best}" / "predictions"
        missing = [c for c in job.cohort.split(split) if not (predictions / f"{c.name}.nii.gz").exists()]
        if missing:
            job.predict(job.best, missing)
    rows = job.evaluate([split])
    if not rows:
        raise DatasetError(
            f"{dataset_dir}: no case of '{split}' has both a label of this run and truth to score it by."
        )
    table = Path(run) / "metrics.csv"
    others = [row for row in read_csv(table) if row["split"] != split] if table.exists() else []
    write_csv(others + rows, table)
    return summary_text(rows)
