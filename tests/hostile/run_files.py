"""Files of a run folder that are damaged or gone; of the family folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.hostile.trials import (
    QUICK,
    REFUSED,
    RIGHT,
    SETTINGS,
    Damage,
    Place,
    Trial,
    content,
    instead,
    same_labels,
)  # fmt: skip

AGAIN = ("run", "{data}", "--output", "{run}", *SETTINGS)
FIRST = ("propagate", "{data}", "--output", "{out}", *QUICK)
PREDICT = ("predict", "{image}", "--run", "{run}", "--output", "{out}", "--device", "cpu")
EVALUATE = ("evaluate", "{run}", "{data}")


# Damage to a file of a run folder.


def flipped(data: bytes, place: Place) -> bytes:
    changed = bytearray(data)
    for _ in range(8):
        changed[place.rng.randrange(len(changed))] = place.rng.randrange(256)
    return bytes(changed)


def of_wrong_kind(data: bytes, place: Place) -> bytes:
    """One random entry has another kind of value."""
    content = json.loads(data)
    content[place.rng.choice(sorted(content))] = place.rng.choice([None, 5, "text", [], {}, [None], {"a": None}])
    return json.dumps(content).encode()


def one_gone(data: bytes, place: Place) -> bytes:
    content = json.loads(data)
    del content[place.rng.choice(sorted(content))]
    return json.dumps(content).encode()


DAMAGE: dict[str, Damage] = {
    "empty": content(lambda data, place: b""),
    "text": content(lambda data, place: b"nothing of the kind\n"),
    "cut": content(lambda data, place: data[: place.rng.randrange(1, len(data))]),
    "random": content(lambda data, place: place.rng.randbytes(500)),
    "flipped": content(flipped),
    "folder": instead(lambda path, place: path.mkdir()),
    "fifo": instead(lambda path, place: os.mkfifo(path)),
    "loop": instead(lambda path, place: path.symlink_to(path.name)),
    "gone": instead(lambda path, place: None),
}
JSON: dict[str, Damage] = {
    "null": content(lambda data, place: b"null"),
    "list": content(lambda data, place: b"[]"),
    "object": content(lambda data, place: b"{}"),
    "brackets": content(lambda data, place: b'{"a":' + b"[" * 100_000),
    "other_layout": content(lambda data, place: json.dumps(json.loads(data) | {"layout": 1}).encode()),
    "nan": content(lambda data, place: b"NaN"),
    "wrong_kind": content(of_wrong_kind),
    "wrong_kind_2": content(of_wrong_kind),
    "wrong_kind_3": content(of_wrong_kind),
    "one_gone": content(one_gone),
    "one_gone_2": content(one_gone),
}
TABLES: dict[str, Damage] = {
    "other_columns": content(lambda data, place: b"a,b\n1,2\n"),
    "no_numbers": content(lambda data, place: data.replace(b"0.", b"x.")),
    "short_rows": content(lambda data, place: b"\n".join(line[: len(line) // 3] for line in data.split(b"\n"))),
    "quote": content(lambda data, place: data + b'"unfinished'),
    "huge_cell": content(lambda data, place: data + b"x" * 200_000 + b"\n"),
}
FILES: dict[str, dict[str, Damage]] = {
    "progress.json": DAMAGE | JSON,
    "run.json": DAMAGE | JSON,
    "written.json": DAMAGE | JSON,
    "round_1/refinement.json": {name: DAMAGE[name] for name in ("empty", "cut", "folder")} | JSON,
    "round_1/quality.csv": {name: DAMAGE[name] for name in ("empty", "random", "fifo")} | TABLES,
    "round_2/uncertainty.csv": {name: DAMAGE[name] for name in ("text", "folder")} | TABLES,
    "round_2/model.pt": {name: DAMAGE[name] for name in ("empty", "text", "cut", "folder", "fifo")},
    "round_0/work/first/phantom_01.h5": {name: DAMAGE[name] for name in ("empty", "text", "cut")},
    # It is code, so that entries of another kind are its author's affair.
    "bundle/configs/inference.json": {name: DAMAGE[name] for name in ("empty", "cut", "folder", "fifo")}
    | {name: JSON[name] for name in ("null", "list", "object", "brackets", "nan")},
}


def of(name: str, spoil, command, *ends: str, check=None) -> Trial:
    return Trial("folders", name, spoil, command, ends, check)


def damaged(file: str, damage: Damage) -> Callable[[Place], None]:
    return lambda place: damage(place.run / file, place)


def of_file(file: str, name: str, damage: Damage) -> list[Trial]:
    short, spoil = f"{Path(file).name}_{name}", damaged(file, damage)
    found = [Trial("folders", f"again_{short}", spoil, AGAIN, (REFUSED, RIGHT), same_labels)]
    if file == "run.json":
        found.append(Trial("folders", f"evaluate_{short}", spoil, EVALUATE, (REFUSED, RIGHT)))
    if file == "bundle/configs/inference.json":
        found = [Trial("folders", f"predict_{short}", spoil, PREDICT, (REFUSED, RIGHT))]
    return found


# Files of a finished run that are deleted: the same command makes the same final labels.
DELETED = [
    "round_0/labels/phantom_01.nii.gz", "round_0/confidence/phantom_01.nii.gz", "round_0/copied/phantom_01.nii.gz",
    "round_0/quality.csv", "round_0/work", "round_0", "features", "round_1/model.pt",
    "round_1/predictions/phantom_01.nii.gz", "round_1/uncertainty/phantom_02.nii.gz", "round_1/uncertainty.csv",
    "round_1/labels", "round_1/refinement.json", "round_1/quality.csv", "round_1", "round_2/model.pt",
    "round_2/predictions/phantom_02.nii.gz", "round_2/predictions", "round_2",
    "pseudo_labels/phantom_01.nii.gz", "pseudo_labels", "bundle/models/model.pt", "bundle", "report.html",
    "review.csv", "metrics.csv", "run.json", "written.json",
]  # fmt: skip


def deleted(*files: str) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        for file in files:
            path = place.run / file
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    return spoil


def deleted_at_random(place: Place) -> None:
    files = sorted(path for path in place.run.rglob("*") if path.is_file() and path.name != "progress.json")
    for path in place.rng.sample(files, 5):
        path.unlink()


TRIALS = [
    *(trial for file in FILES for name, damage in FILES[file].items() for trial in of_file(file, name, damage)),
    *(of(f"deleted_{file}", deleted(file), AGAIN, RIGHT, REFUSED, check=same_labels) for file in DELETED),
    of("deleted_at_random", deleted_at_random, AGAIN, RIGHT, check=same_labels),
    of("deleted_at_random_2", deleted_at_random, AGAIN, RIGHT, check=same_labels),
    of("deleted_progress", deleted("progress.json"), AGAIN, RIGHT, REFUSED, check=same_labels),
    of("deleted_both_records", deleted("progress.json", "run.json"), AGAIN, REFUSED),
]  # fmt: skip
