"""Run folders that are somebody else's or in the way, what a person changed there, and other commands' folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np

from tests.hostile.labels import at_one_voxel, volume
from tests.hostile.run_files import AGAIN, EVALUATE, FIRST, PREDICT, deleted, of
from tests.hostile.trials import (
    ASIDE,
    OTHER,
    POOL,
    REFUSED,
    RIGHT,
    TEMPLATE,
    TEST,
    Place,
    leave,
    same_labels,
)  # fmt: skip

# A first run into a folder with things that it did not make.


def with_file(name: str, text: str = "mine\n") -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        path = place.root / "xmine" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        place.work_of_a_person(path)
        place.words["out"] = str(place.root / "xmine")

    return spoil


def beside(name: str) -> Callable[[Place], None]:
    """As `with_file`, but the run may go on: its results come beside it."""

    def spoil(place: Place) -> None:
        path = place.out / name
        path.parent.mkdir(parents=True)
        path.write_text("mine\n")
        place.work_of_a_person(path)

    return spoil


def link_instead(name: str, in_run: bool) -> Callable[[Place], None]:
    """A link to the user's folder in place of a part of the run."""

    def spoil(place: Place) -> None:
        top = place.run if in_run else place.out
        top.mkdir(exist_ok=True)
        deleted(name)(place) if in_run else None
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).symlink_to(place.user)

    return spoil


def output_at(where: str) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        place.words["out"] = where.format(**place.words, root=place.root)

    return spoil


PLACES = {
    "empty_text": "", "blank": " ", "root": "/", "data": "{data}", "above_data": "{root}", "dot": ".", "dots": "..",
    "images": "{data}/images", "labels": "{data}/labels", "home": "~", "proc": "/proc", "null": "/dev/null/x",
    "file": "{user}/notes.txt", "below_file": "{user}/notes.txt/run", "nowhere": "/proc/nowhere/run",
    "long": "/tmp/" + "n" * 300, "deep": "{cwd}/" + "d/" * 2100, "data_by_dots": "{data}/images/..",
}  # fmt: skip


def output_is_link(target: str) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        (place.root / "xlink").symlink_to(target.format(**place.words))
        place.words["out"] = str(place.root / "xlink")

    return spoil


# What a person did with what was handed out.


def edit(path: Path, place: Place) -> None:
    volume(lambda array: np.roll(array, 1, 0))(path, place)
    place.work_of_a_person(path)


def edited(place: Place) -> None:
    edit(place.run / "pseudo_labels" / f"{POOL}.nii.gz", place)


def edited_both(place: Place) -> None:
    for name in (POOL, OTHER):
        edit(place.run / "pseudo_labels" / f"{name}.nii.gz", place)


def edited_then_rounds_gone(place: Place) -> None:
    edited(place)
    deleted("round_2")(place)


def resaved(place: Place) -> None:
    path = place.run / "pseudo_labels" / f"{POOL}.nii.gz"
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj).astype(np.float32), image.affine), path)


def table_edited(name: str) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        with (place.run / name).open("a") as file:
            file.write("looked at all of them\n")
        place.work_of_a_person(place.run / name)

    return spoil


def added(name: str) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        path = place.run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine\n")
        place.work_of_a_person(path)

    return spoil


def label_of_a_user(place: Place) -> None:
    """A label in pseudo_labels/ that the run did not write: the ledger does not know it."""
    edited(place)
    deleted("written.json")(place)


# The folders that other commands write.


def users_file_at(name: str, word: str = "out") -> Callable[[Place], None]:
    """A user's file where a command would write; nothing of it may change."""

    def spoil(place: Place) -> None:
        path = place.user / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(place.label(POOL), path)
        place.work_of_a_person(path)
        place.words[word] = str(place.user)

    return spoil


def output_is_data(place: Place) -> None:
    place.words["out"] = str(place.data)


def of_the_demo(place: Place) -> None:
    """The data set was made by demo-data, whose ledger lies in it: not what `predict` wrote."""
    output_is_data(place)
    shutil.copyfile(place.stock.ledger, place.data / "written.json")


def output_is_run(place: Place) -> None:
    place.words["out"] = str(place.run)
    for path in (place.run / "pseudo_labels").iterdir():
        place.work_of_a_person(path)


def own_output(place: Place) -> None:
    """The input lies where the output would."""
    path = place.user / "labels" / "a.nii.gz"
    path.parent.mkdir()
    shutil.copyfile(place.image(TEST), path)
    place.words |= {"image": str(path), "out": str(place.user)}


def own_output_by_link(place: Place) -> None:
    own_output(place)
    (place.root / "xlink").symlink_to(place.user)
    place.words["out"] = str(place.root / "xlink")


def images_of(change: Callable[[Path, Place], None]) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        change(place.image(POOL), place)

    return spoil


def cut_image(path: Path, place: Place) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: place.rng.randrange(1, len(data) // 2)])


TWO = ("predict", "{data}/images/phantom_01.nii.gz", "{image}", *PREDICT[2:])
IMAGES: dict[str, Callable[[Path, Place], None]] = {
    "cut": cut_image,
    "text": lambda path, place: path.write_text("an image"),
    "empty": lambda path, place: path.write_bytes(b""),
    "nan": at_one_voxel(np.nan, np.float32),
    "folder": lambda path, place: (path.unlink(), path.mkdir()),
    "fifo": lambda path, place: (path.unlink(), os.mkfifo(path)),
    "loop": lambda path, place: (path.unlink(), path.symlink_to(path.name)),
    "gone": lambda path, place: path.unlink(),
}
SUGGEST = ("suggest-template", "{data}", "--output", "{out}")
DEMO = ("demo-data", "{out}", "--cases", "3")
TEST_RUN = ("test", "{data}", "--run", "{run}", "--save-pred", "{out}", "--device", "cpu")


def template_changed(place: Place) -> None:
    volume(lambda array: np.roll(array, 1, 0))(place.label(TEMPLATE), place)


TRIALS = [
    *(of(f"foreign_{name}", with_file(name), FIRST, REFUSED) for name in (
        "pseudo_labels/a.nii.gz", "report.html", "review.csv", "metrics.csv", "features/mine.h5",
        "round_0/labels/a.nii.gz", "round_1/mine.txt", "round_7/mine.txt", "bundle/mine.txt",
        "reviewed/a.nii.gz", "written.json", "run.json",
        "progress.json", "problems.csv",
    )),
    *(of(f"beside_{name}", beside(name), FIRST, RIGHT, REFUSED) for name in (
        "round_1_by_dr_x/a.nii.gz", "round_01/a.nii.gz", "notes.txt", "round_x/a.txt", ".partial-mine", ".held-mine",
    )),
    *(of(f"place_{name}", output_at(where), FIRST, REFUSED) for name, where in PLACES.items()),
    *(of(f"link_{name}", link_instead(name, True), AGAIN, REFUSED) for name in (
        "round_1", "pseudo_labels", "features", "bundle", "reviewed", "round_1/labels", "round_0/work", "bundle/models",
    )),
    *(of(f"first_link_{name}", link_instead(name, False), FIRST, REFUSED) for name in (
        "round_0", "pseudo_labels", "features",
    )),
    *(of(f"output_link_{name}", output_is_link(target), FIRST, REFUSED) for name, target in {
        "data": "{data}", "labels": "{data}/labels", "loop": "xlink", "file": "{user}/notes.txt",
    }.items()),
    of("edited", edited, AGAIN, RIGHT),
    of("edited_both", edited_both, AGAIN, RIGHT),
    of("edited_then_rounds_gone", edited_then_rounds_gone, AGAIN, RIGHT),
    of("edited_then_restart", edited, (*AGAIN, "--restart-from", "round_2"), RIGHT),
    of("edited_then_other_settings", edited, (*AGAIN, "learning_rate=0.5", "--restart-from", "round_1"), RIGHT),
    of("edited_table", table_edited("review.csv"), AGAIN, RIGHT, check=same_labels),
    of("edited_metrics", table_edited("metrics.csv"), AGAIN, RIGHT, check=same_labels),
    of("edited_metrics_evaluate", table_edited("metrics.csv"), EVALUATE, RIGHT, REFUSED),
    of("edited_report", table_edited("report.html"), AGAIN, RIGHT, check=same_labels),
    of("edited_bundle", table_edited("bundle/docs/README.md"), AGAIN, RIGHT, check=same_labels),
    of("edited_ledger_gone", label_of_a_user, AGAIN, RIGHT, REFUSED),
    of("resaved", resaved, AGAIN, RIGHT, check=same_labels),
    of("added_label", added("pseudo_labels/mine.nii.gz"), (*AGAIN, "--restart-from", "round_2"), RIGHT),
    of("added_round", added("round_1_by_dr_x/mine.txt"), (*AGAIN, "--restart-from", "round_1"), RIGHT),
    of("added_in_round", added("round_1/mine.txt"), (*AGAIN, "--restart-from", "round_1"), RIGHT),
    of("added_in_labels", added("round_1/labels/mine.txt"), (*AGAIN, "--restart-from", "round_1"), RIGHT),
    of("added_held", added("pseudo_labels/.held-mine.nii.gz"), AGAIN, RIGHT),
    of("predict_data", output_is_data, ("predict", "{data}/images/phantom_01.nii.gz", *PREDICT[2:]), REFUSED),
    of("predict_demo_data", of_the_demo, ("predict", "{data}/images/phantom_01.nii.gz", *PREDICT[2:]), REFUSED),
    of("predict_own_output", own_output, PREDICT, REFUSED),
    of("predict_own_output_link", own_output_by_link, PREDICT, REFUSED),
    of("predict_into_run", output_is_run, PREDICT, REFUSED, RIGHT),
    of("predict_label", users_file_at(f"labels/{TEST}.nii.gz"), PREDICT, REFUSED),
    of("predict_map", users_file_at(f"uncertainty/{TEST}.nii.gz"), PREDICT, REFUSED),
    of("predict_table", users_file_at("uncertainty.csv"), PREDICT, REFUSED),
    of("predict_ledger", users_file_at("written.json"), PREDICT, REFUSED),
    *(of(f"predict_image_{name}", images_of(change), TWO, RIGHT if name == "nan" else REFUSED)
      for name, change in IMAGES.items()),  # a single NaN is filled
    *(of(f"predict_place_{name}", output_at(where), PREDICT, REFUSED) for name, where in PLACES.items() if name in (
        "empty_text", "blank", "data", "null", "file", "below_file", "nowhere", "long",
    )),
    of("demo_over_image", users_file_at("images/phantom_CT_2020.nii.gz"), DEMO, REFUSED),
    of("demo_over_list", users_file_at("train.txt"), DEMO, REFUSED),
    of("demo_into_data", output_is_data, DEMO, REFUSED),
    of("demo_beside_notes", users_file_at("images/other/a.nii.gz"), DEMO, REFUSED),
    of("demo_empty_text", output_at(""), DEMO, REFUSED),
    of("demo_file", output_at("{user}/notes.txt"), DEMO, REFUSED),
    of("demo_null", output_at("/dev/null/x"), DEMO, REFUSED),
    of("suggest_over_page", users_file_at("suggestion.html"), SUGGEST, REFUSED),
    of("suggest_empty_text", output_at(""), SUGGEST, REFUSED),
    of("suggest_file", output_at("{user}/notes.txt"), SUGGEST, REFUSED),
    of("suggest_ledger", users_file_at("written.json"), SUGGEST, REFUSED),
    of("test_over_table", users_file_at("test.csv"), TEST_RUN, REFUSED),
    of("test_file", output_at("{user}/notes.txt"), TEST_RUN, REFUSED),
    of("convert_over", users_file_at("mine.safetensors"),
       ("convert-weights", "{run}/round_2/model.pt", "{user}/mine.safetensors"), REFUSED),
    of("convert_no_folder", leave,
       ("convert-weights", "{run}/round_2/model.pt", "{user}/notes.txt/a.safetensors"), REFUSED),
    of("evaluate_other_data", lambda place: shutil.rmtree(place.data / "labels"), EVALUATE, REFUSED),
    of("evaluate_no_data", lambda place: shutil.rmtree(place.data), EVALUATE, REFUSED),
    of("data_gone", lambda place: shutil.rmtree(place.data), AGAIN, REFUSED),
    of("one_scan_gone", lambda place: place.image(POOL).unlink(), AGAIN, RIGHT, ASIDE, REFUSED),
    of("template_changed", template_changed, AGAIN, REFUSED),
    of("other_settings", leave, (*AGAIN, "feature_voxels=1500"), REFUSED),
]  # fmt: skip
