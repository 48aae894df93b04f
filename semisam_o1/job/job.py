"""The whole job on one data set and one RUN folder: runs each stage once, in order."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

from monai.utils import set_determinism

from semisam_o1 import processes
from semisam_o1.data.cohort import Cohort
from semisam_o1.data.findings import left_out, table, warnings, write_problems
from semisam_o1.files import remove
from semisam_o1.job import results, selection
from semisam_o1.job.bundle import write_bundle
from semisam_o1.job.claim import claim, protect_names, recover, remove_handed_out, remove_stale
from semisam_o1.job.config import JobConfig
from semisam_o1.job.record import RunRecord
from semisam_o1.job.resume import Journal, round_of
from semisam_o1.job.settings import lost_classes, try_out
from semisam_o1.job.stages import ROUND_0, Stage, lacking, round_stages, stage_named
from semisam_o1.job.stopwatch import Stopwatch
from semisam_o1.job.together import Helper
from semisam_o1.job.tracking import Tracking, untracked
from semisam_o1.job.update import is_new, learn, take_in
from semisam_o1.lock import lock_folder
from semisam_o1.report.curve import curve, curve_text, handed_out
from semisam_o1.report.metrics import MEASURES, summary_text, write_csv
from semisam_o1.report.page import write_report
from semisam_o1.reviewed import Reviewed
from semisam_o1.runfolder import RunFolder
from semisam_o1.types import Case, DatasetError

log = logging.getLogger("semisam_o1")


MOST_NAMED = 5  # scans listed in a message


def named(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more


class Job:
    """The whole job.

    Args:
        config: the raw config of the bundle.

    Raises:
        DatasetError: the data set cannot be used, or the folder has an earlier layout. Nothing is written in that
            case.
    """

    def __init__(self, config: dict):
        config, tracking = untracked(config)
        self.config = JobConfig(config)
        self.run_folder = RunFolder(self.config.value("output_dir"))
        self.tracking = Tracking(self.run_folder, self.config, tracking)
        protect_names(self.run_folder, self.config.value("pseudonyms"))
        self.config.cohort  # noqa: B018 - opened before anything is written
        self.record = RunRecord(self.run_folder, self.config)
        self.auto = self.config.setting("num_rounds") == "auto"
        self.round_0_alone = False

    @property
    def cohort(self) -> Cohort:
        """The data set without the scans that were set aside, with what people gave."""
        return self.config.cohort

    # Public entry points.

    def run(self) -> None:
        """Run every stage, from scans to pseudo-labels, trained bundle and report; finished stages are skipped."""
        self._plan_rounds()
        if self.auto or self.record.rounds:
            try_out(self.config)
        claim(self.run_folder, self.cohort)
        with lock_folder(self.run_folder.path):
            self.tracking.begin()
            journal = self._begin()
            if not journal.done and (lost := lost_classes(self.config)):
                log.warning("classes that are too small:\n%s", table(lost))
            self._follow_plan(journal)
            complete = self._is_complete(journal)
            news = is_new(self, self._given)
            if news:
                journal.distrust()
                learn(self, self._given, journal.done, complete)
                self._plan_rounds()
                self._follow_plan(journal)
            if not complete:
                remove_handed_out(self.run_folder)
            if news or not complete:
                remove_stale(self.run_folder, journal.done, journal.half_done_fits, journal.names)
                journal.cleaned()
            again, stale = lacking(self, journal.done, complete and not news), self.record.stale
            for stage in self._stages():
                if stage.name not in journal.done:
                    self._work(stage)
                    journal.add(stage.name)
                elif stage.name in again:
                    self._repeat(stage, again[stage.name], [*journal.came, *stale])
            self.finish()

    def propagate(self) -> None:
        """Run round 0 on the cases of ``split``; writes what a run writes, except training rounds and bundle."""
        if self.run_folder.round(1).path.is_dir():
            path = self.run_folder.path
            raise DatasetError(f"{path} contains a run with trained rounds; name another folder for round 0 alone.")
        self.round_0_alone = True
        self.run()

    def alone(self, name: str, round: int = 0) -> None:
        """Run a single stage from its start: "features", "propagation", "training", ..., or "finish".

        The rounds of a run stay as they are on record; in a folder of single stages they are those of the settings.
        """
        claim(self.run_folder, self.cohort)
        with lock_folder(self.run_folder.path):
            if not self.run_folder.read_journal():
                self._plan_rounds()
            self.record.take_up()
            take_in(self)
            self.record.write()
            if name == "finish":
                self.finish()
            elif name == "features":
                self._work(ROUND_0[0])
            elif name == "propagation":
                self._propagate_anew()
            elif name == "quality" and round == 0:
                self._judge_round_0()
            else:
                if name == "training":  # an unfinished one may have other settings
                    self.run_folder.round(round).training_state.unlink(missing_ok=True)
                self._work(stage_named(f"round_{round}/{name}"))

    def prepare_round(self) -> None:
        """Run round 0 if it is missing, so that a single round can train (MONAI Label calls ``run``)."""
        folder = self.run_folder.round(0)
        if not all(folder.label(case.name).exists() for case in self.cohort.pool):
            claim(self.run_folder, self.cohort)
            with lock_folder(self.run_folder.path):
                if not self.run_folder.read_journal():
                    self._plan_rounds()
                take_in(self)
                self.record.write()
                self._work(ROUND_0[0])
                self._propagate_anew()
                self._judge_round_0()

    def evaluate(self, splits: Sequence[str] = ("pool", "val", "test")) -> list[dict]:
        """Rows of metrics.csv for all labels in the run folder that have truth."""
        definition = self.config.setting("metric_definition")
        return results.scores(self.run_folder, self.cohort, splits, self.record.rounds, definition)

    def finish(self) -> None:
        """Write the final labels, metrics, review list, trained bundle and report."""
        run, record = self.run_folder, self.record
        gain = selection.expected_gain(run, record.best_round, self.cohort)
        if record.best_round and gain is not None:
            run.round(record.best_round).keep_gain(gain)
            log.info("expected gain of mean Dice by training, over round 0: %+.3f", gain)
        record.labels_round = selection.labels_round(record.best_round, gain)
        log.info("labels of round %d are handed out", record.labels_round)
        doubts = selection.doubts(run, record.best_round, record.labels_round, gain)
        for doubt in doubts:
            log.warning(doubt)
        record.warnings = [*doubts, *warnings(self.cohort.problems)]
        with self._stopwatch("evaluation"):
            cases, folder = self.cohort.split(self.config.setting("split")), run.round(record.labels_round)
            results.hand_out(folder, run, cases, self.cohort.touched)
            for name in Reviewed(run.reviewed).rejected():
                run.ledger.remove(run.pseudo_label(name))
            results.write_review(folder, run, cases, self.cohort.class_numbers)
            rows = self.evaluate()
            with run.ledger.writing(run.metrics) as aside:
                write_csv(rows, aside)
            names = [case.name for case in self.cohort.untouched if case in cases]
            metric = MEASURES[self.config.setting("metric_definition")][0].name
            labelled = len(self.cohort.labelled)
            found = handed_out(run, record.labels_round, labelled, record.best_round, names, rows, metric)
            record.add_handed_out(found)
        if record.rounds:
            write_bundle(run, self.config, record.best_round)
        else:
            run.ledger.remove_below(run.bundle)
        record.write()
        self.tracking.finish(rows, record.rounds)
        write_report(run.path, self.cohort)
        if rows:
            log.info("\n%s", summary_text(rows, self.config.setting("metric_definition")))
        if steps := curve(record.handed_out):
            log.info("%s", curve_text(steps))
        self._tell_of_labels()
        log.info("labels: %s", run.pseudo_labels)
        log.info("report: %s", run.report)

    # Internals.

    def _plan_rounds(self) -> None:
        """The rounds of the settings, and those that corrections called for; the latter end the search of ``auto``."""
        if self.round_0_alone:
            self.auto, self.record.rounds = False, 0
        elif self.auto and self.record.more_rounds:
            self.auto = False
        elif not self.auto and self.config.setting("num_rounds") != "auto":
            planned = int(self.config.setting("num_rounds")) + self.record.more_rounds
            self.record.rounds = max(planned, self.record.called_for)  # fewer rounds may be asked for than before
        if not self.auto:
            self.record.best_round = self.record.rounds

    def _last_round(self) -> int:
        return int(self.config.setting("most_rounds")) if self.auto else self.record.rounds

    def _is_refined(self, number: int) -> bool:
        """Whether the plan refines the predictions of a round."""
        return self.auto or number < self._last_round() or bool(self.config.setting("refine_last"))

    def _follow_plan(self, journal: Journal) -> None:
        """Have done again what describes other labels of a round than those that it has by the plan.

        A round that was the last one may have to be refined now, and refined labels do not count in one that has become
        the last one; they stay for the rounds that have learned from them.
        """
        for number in range(1, self._last_round() + 1):
            folder, refined = self.run_folder.round(number), self._is_refined(number)
            steps = [stage.name for stage in round_stages(number, refined)]
            journal.follow(steps)
            if folder.refined is not None and folder.refinement_counts != refined:
                journal.forget(steps[-1:])
                folder.count_refinement(refined)

    def _is_complete(self, journal: Journal) -> bool:
        """Whether every step is done; a search for the best round is when its labels were handed out."""
        last = self.record.rounds if self.auto and self.run_folder.review.is_file() else None
        return all(stage.name in journal.done for stage in self._stages(settle=False, last=last))

    def _stages(self, settle: bool = True, last: int | None = None) -> Iterator[Stage]:
        """Every stage in order, up to round ``last`` if it is given.

        With ``num_rounds`` auto, training stops when the labels settle, if ``settle``.
        """
        yield from ROUND_0
        for number in range(1, (self._last_round() if last is None else last) + 1):
            yield from round_stages(number, self._is_refined(number))
            if self.auto and settle:
                self.record.rounds, self.record.best_round = number, self._best_round(number)
                if self._settled(number):
                    break
        if self.auto and settle:
            log.info("round %d of %d selected", self.record.best_round, self.record.rounds)

    def _work(self, stage: Stage, cases: Sequence[Case] | None = None) -> None:
        """Run one stage, by default on all its cases, unless its setting switches it off."""
        if stage.wanted and not self.config.setting(stage.wanted):
            return
        with self._stopwatch(stage.title, stage.round):
            stage.work(self, stage.round, cases)

    def _repeat(self, stage: Stage, cases: Sequence[Case], came: Sequence[str]) -> None:
        """Run a finished stage once more on ``cases`` whose results are not on disk: new scans, and deleted files."""
        gone = [case.name for case in cases if case.name not in came]
        if gone:
            log.warning("%s is done again for %s: its results are not there", stage.title, named(gone))
        self._work(stage, cases)

    def _propagate_anew(self) -> None:
        """Propagate from scratch: existing results may come from other features."""
        remove(self.run_folder.round(0).work("").folder)
        for stage in ROUND_0[1:3]:
            self._work(stage)

    def _judge_round_0(self) -> None:
        for stage in ROUND_0[3:]:
            self._work(stage)

    def _stopwatch(self, title: str, round: int = 0) -> Stopwatch:
        set_determinism(int(self.config.setting("seed")) + round)
        log.info("%s", title)
        return Stopwatch(title, self._stage_done)

    def _stage_done(self, title: str, seconds: float, peak_mib: float) -> None:
        log.info("%s: %.0f s, peak %.0f MiB", title, seconds, peak_mib)
        self.record.add_stage(title, seconds, peak_mib)

    def _begin(self) -> Journal:
        """Continue an earlier start with the same settings and data, or start from scratch.

        Raises:
            DatasetError: the folder was started with other settings.
        """
        files = [(case.name, case.split, case.image) for case in self.cohort.cases]
        files += [(case.name, "label", case.label) for case in self.cohort.templates]
        journal = Journal(
            self.run_folder,
            self.config.leaves(),
            lambda step: self.config.needed(stage_named(step).needs()),
            {f"cohort#{split} {name}": path for name, split, path in files},
        )
        if journal.open(self.config.setting("restart_from")):
            if journal.done:
                log.info("going on after: %s", ", ".join(journal.done))
            self._tell_of_scans(journal)
            step = self.config.setting("restart_from")
            if step is None or round_of(step):  # otherwise all steps on which a scan fails are done again
                self.record.take_up()
        else:
            self.record.stages = []
            journal.begin()
        recover(self.run_folder)
        self._given = take_in(self)
        step, rounds = (self.config.setting(id) for id in ("restart_from", "num_rounds"))
        if step and (rounds == "auto" or round_of(step) <= int(rounds)):
            self.record.corrections, self.record.more_rounds = [], 0  # known from the start
            self.record.handed_out = []
            self.auto = rounds == "auto"
            self._plan_rounds()
        self.record.write()
        if self.cohort.problems:
            with self.run_folder.ledger.writing(self.run_folder.problems) as aside:
                write_problems(aside, self.cohort.problems)
            if left_out(self.cohort.problems):
                log.warning("all problems of the data set: %s", self.run_folder.problems)
        return journal

    def _tell_of_labels(self) -> None:
        """How labels of the data set that are for metrics alone would count."""
        names = [case.name for case in self.cohort.untouched if case.label is not None]
        if names:
            log.info(
                "labels of %d scans of the pool (%s) are for metrics alone. To have one count: semisam-o1 review %s "
                "--take FILE",
                len(names), named(names), self.run_folder.path,
            )  # fmt: skip

    def _tell_of_scans(self, journal: Journal) -> None:
        if journal.came and journal.done:
            log.warning(
                "new since the last start: %s. Each gets a label, and changes no label of another scan. To learn from "
                "the new scans too: --restart-from propagation.",
                named(journal.came),
            )
        if journal.went:
            log.warning("no longer among the scans: %s. What was learned from them stays.", named(journal.went))

    def _settled(self, number: int) -> bool:
        """Whether to stop training: the labels hardly change, or their predicted Dice falls."""
        before, after = map(self.run_folder.round, (number - 1, number))
        change = selection.change(before, after, self.cohort)
        (quality,) = selection.mean_predicted_dice([after])
        log.info("round %d: labels changed by %.4f (1 - mean Dice), predicted Dice %.4f", number, change, quality)
        return change < self.config.setting("least_change") or self.record.best_round != number

    def _best_round(self, last: int) -> int:
        numbers = range(1, last + 1)
        means = selection.mean_predicted_dice([self.run_folder.round(n) for n in numbers])
        return selection.best_round(dict(zip(numbers, means)), self.config.setting("quality_tolerance"))


def job_or_helper(config: dict) -> Job | Helper:
    """The job of ``config`` in the first process of torchrun; in the others, what helps it to train."""
    return Helper() if processes.number() else Job(config)
