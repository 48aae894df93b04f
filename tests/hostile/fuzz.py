"""``make fuzz``: tries every trial again and again with new seeds, and prints how they ended.

A wrong end is repeated by ``python -m tests.hostile.fuzz --seed SEED --only FAMILY/NAME``.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import argparse
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

from tests.hostile.families import TRIALS
from tests.hostile.trials import ASIDE, REFUSED, RIGHT, attempt, make_stock

COLUMNS = ("tried", REFUSED, ASIDE, RIGHT, "wrong")


def table(counts: dict[str, Counter]) -> str:
    rows = [["family", *COLUMNS]]
    rows += [[family, *(str(found[column]) for column in COLUMNS)] for family, found in counts.items()]
    rows.append(["all", *(str(sum(found[column] for found in counts.values())) for column in COLUMNS)])
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m tests.hostile.fuzz", description=__doc__)
    options.add_argument("--seconds", type=float, default=0, help="begin no new pass after this time (0: one pass)")
    options.add_argument("--seed", type=int, help="of the first pass; the next ones follow (random)")
    options.add_argument("--only", default="", metavar="TEXT", help="trials whose FAMILY/NAME begins so")
    options.add_argument("--verbose", action="store_true", help="print what each trial printed")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # it has kept the true standard error
    seed = chosen.seed if chosen.seed is not None else int(time.time()) % 1_000_000
    trials = [trial for trial in TRIALS if trial.id.startswith(chosen.only)]
    begun, wrong, counts = time.monotonic(), 0, {trial.family: Counter() for trial in trials}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        stock = make_stock(Path(folder) / "stock")
        while trials:
            for trial in trials:
                started = time.monotonic()
                end = attempt(trial, stock, Path(folder) / "place", seed)
                counts[trial.family].update(["tried", "wrong" if end.wrong else end.how])
                if end.wrong or chosen.verbose:
                    wrong += bool(end.wrong)
                    print(f"{'WRONG ' if end.wrong else ''}{trial.id} --seed {seed}: {'; '.join(end.wrong) or end.how}")
                if chosen.verbose:
                    print(f"{time.monotonic() - started:.2f} s\n{end.said[-4000:]}")
                sys.stdout.flush()
                if chosen.seconds and time.monotonic() - begun > chosen.seconds:
                    break
            seed += 1
            if time.monotonic() - begun > chosen.seconds:
                break
    print(f"\n{table(counts)}\n{time.monotonic() - begun:.0f} s")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
