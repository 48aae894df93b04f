"""``run.json``: the settings and versions of a run, the cost of each stage, the cases set aside. It holds data only."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import semisam_o1
from semisam_o1.files import write_json
from semisam_o1.job.config import JobConfig
from semisam_o1.runfolder import LAYOUT, RunFolder

PACKAGES = (
    "torch", "monai", "pytorch-ignite", "numpy", "nibabel", "SimpleITK", "h5py", "faiss-cpu", "faiss-gpu", "itk",
    "scipy",
)  # fmt: skip


class RunRecord:
    """The record of a run; continues the record that an earlier start left in the folder.

    Attributes:
        stages: name, seconds and peak memory (MiB) of each stage.
        failed: case -> reason, of scans on which a stage failed; in run.json part of ``set_aside``.
        rounds, best_round: the number of rounds, and the round whose model is the final one.
        labels_round: the round whose labels are the final ones: ``best_round``, or 0 if its labels are judged better.
        corrections: what the run has learned from people, in the order in which it came: after each start that brought
            something, the labels (case -> SHA-256), the rejected scans, the round after which they came, and the round
            that they call for, if any.
        more_rounds: the rounds that were added for corrections.
        imported: case -> what was taken from another run for it, see `review.corrections.mark`.
        stale: scans whose label of round 0 has to be fused again, because of corrections.
        handed_out: the labels that were handed out after so many ``corrections``, see `report.curve.handed_out`.
        warnings: problems that a user of the labels must know.
    """

    def __init__(self, run: RunFolder, config: JobConfig):
        self.run, self.config = run, config
        kept = run.read_record()
        self.stages: list[dict] = kept.get("stages", [])
        self.failed: dict[str, str] = {}
        self.rounds, self.best_round = kept.get("rounds", 0), kept.get("best_round", 0)  # auto selects them again
        self.labels_round = kept.get("labels_round", self.best_round)
        self.corrections: list[dict] = kept.get("corrections", [])
        self.more_rounds: int = kept.get("more_rounds", 0)
        self.handed_out: list[dict] = kept.get("handed_out", [])
        self.imported: dict[str, str] = kept.get("imported", {})
        self.stale: list[str] = kept.get("stale", [])
        self.warnings: Sequence[str] = ()
        self._kept_failed = kept.get("failed", {})

    def take_up(self) -> None:
        """Continue an earlier start: scans on which its stages failed stay set aside.

        Scans whose files could not be used are looked at afresh by every start.
        """
        self.fail(self._kept_failed)

    def fail(self, found: dict[str, str]) -> None:
        """Set scans aside on which a stage failed (case -> reason): the cohort goes on without them."""
        self.failed |= found
        self.config.cohort = self.config.cohort.without(found)

    @property
    def called_for(self) -> int:
        """The last round that corrections called for; 0 if none did."""
        return max((entry.get("round") or 0 for entry in self.corrections), default=0)

    @property
    def set_aside(self) -> dict[str, str]:
        """Case -> reason, of all scans that this start does not use."""
        return self.config.cohort.set_aside

    def add_handed_out(self, found: dict) -> None:
        """Record the labels that are handed out; they replace those handed out after the same corrections."""
        count = len(self.corrections)
        before = [kept for kept in self.handed_out if kept["corrections"] < count]
        self.handed_out = [*before, {"corrections": count, **found}]

    def add_stage(self, name: str, seconds: float, peak_mib: float) -> None:
        """Record a finished stage; replaces an earlier entry of the same name."""
        self.stages = [stage for stage in self.stages if stage["stage"] != name]
        self.stages.append({"stage": name, "seconds": round(seconds, 1), "peak_memory_mib": round(peak_mib)})
        self.write()

    def write(self) -> None:
        config, cohort = self.config, self.config.cohort
        place = {"dataset_dir": str(Path(config.setting("dataset_dir")).absolute())}  # found again from every folder
        content = {
            "layout": LAYOUT,
            "versions": versions(),
            "seed": config.setting("seed"),
            "template": [case.name for case in cohort.templates],
            "classes": cohort.classes,
            "warnings": list(self.warnings),
            "set_aside": self.set_aside,
            "failed": self.failed,
            "rounds": self.rounds,
            "best_round": self.best_round,
            "labels_round": self.labels_round,
            "corrections": self.corrections,
            "more_rounds": self.more_rounds,
            "handed_out": self.handed_out,
            "imported": self.imported,
            "stale": self.stale,
            "stages": self.stages,
            "settings": config.settings | place,
        }
        write_json(self.run.record, content)


@functools.cache
def versions() -> dict[str, str]:
    """Versions of this package and of its main dependencies that are installed."""
    found = {"semisam-o1": semisam_o1.__version__}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):  # of FAISS there is one of two builds
            found[name] = version(name)
    return found
