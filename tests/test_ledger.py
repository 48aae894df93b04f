"""What a person made or changed is never replaced or removed."""

import os

import nibabel
import numpy as np
import pytest

from semisam_o1.files import partial_path
from semisam_o1.ledger import Ledger, State
from semisam_o1.types import UserError

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def save(path, value, dtype=np.uint8, affine=AFFINE):
    array = np.zeros((4, 4, 4), dtype)
    array[value] = 1
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "run", "predict")


@pytest.fixture
def label(ledger):
    """A label that was handed out."""
    path = ledger.folder / "pseudo_labels" / "a.nii.gz"
    with ledger.writing(path) as aside:
        save(aside, 1)
    return path


def first_voxels(path) -> np.ndarray:
    return np.flatnonzero(np.asarray(nibabel.load(path).dataobj).any((1, 2)))


def hand_out(ledger, path, value):
    with ledger.writing(path) as aside:
        save(aside, value)


def test_states(ledger, label):
    assert ledger.state(label) is State.OURS
    save(label, 1, np.float64)  # as a viewer saves it: other bytes, the same voxels
    assert ledger.state(label) is State.RESAVED
    save(label, 1, affine=np.eye(4))
    assert ledger.state(label) is State.CHANGED
    label.write_bytes(b"not an image")
    assert ledger.state(label) is State.CHANGED
    label.unlink()
    assert ledger.state(label) is State.ABSENT
    save(label.with_name("b.nii.gz"), 2)
    assert ledger.state(label.with_name("b.nii.gz")) is State.FOREIGN


def test_untouched_and_resaved_labels_are_replaced(ledger, label):
    hand_out(ledger, label, 2)
    assert first_voxels(label) == 2
    save(label, 2, np.int16)
    hand_out(ledger, label, 3)
    assert first_voxels(label) == 3 and not ledger.reviewed.exists()


def kept(ledger, name):
    """The first voxel of the one kept version of a label; a name without a date is that of a label that counts."""
    (path,) = ledger.reviewed.glob(f"{name}_20*.nii.gz")
    return int(first_voxels(path)[0])


def test_a_changed_label_moves_to_reviewed(ledger, label, caplog):
    save(label, 3)
    hand_out(ledger, label, 2)
    assert first_voxels(label) == 2 and kept(ledger, "a") == 3
    assert "your version is kept in" in caplog.text


def test_a_changed_label_stays_if_nothing_new_is_handed_out(ledger, label):
    save(label, 3)
    for _ in range(2):
        hand_out(ledger, label, 1)
        assert first_voxels(label) == 3
        assert [first_voxels(path) for path in ledger.reviewed.iterdir()] == [3]


def test_a_changed_label_that_was_copied_is_replaced_with_a_word(ledger, label, caplog):
    save(label, 3)
    hand_out(ledger, label, 1)  # nothing new: it stays, with a copy
    caplog.clear()
    hand_out(ledger, label, 2)
    assert first_voxels(label) == 2 and "is replaced; your version is kept in" in caplog.text
    assert [first_voxels(path).item() for path in ledger.reviewed.iterdir()] == [3]


def test_every_version_is_kept(ledger, label):
    for value in (2, 3):
        save(label, value)
        hand_out(ledger, label, value - 2)
    assert sorted(int(first_voxels(path)[0]) for path in ledger.reviewed.iterdir()) == [2, 3]


def test_a_label_saved_while_it_is_replaced_is_kept(ledger, label):
    with ledger.writing(label) as aside:
        save(aside, 2)
        save(label, 3)  # just before the block ends
    assert first_voxels(label) == 2 and kept(ledger, "a") == 3


def test_a_changed_table_is_kept_under_its_date(ledger):
    table = ledger.folder / "review.csv"
    with ledger.writing(table) as aside:
        aside.write_text("case\na\n")
    table.write_text("case\na, looks good\n")
    with ledger.writing(table) as aside:
        aside.write_text("case\nb\n")
    (kept,) = ledger.folder.glob("review_20*.csv")
    assert "looks good" in kept.read_text() and "b" in table.read_text()


def test_only_known_files_are_removed(ledger, label):
    other = label.with_name("notes.txt")
    other.write_text("mine")
    hand_out(ledger, label.with_name("b.nii.gz"), 1)
    save(label.with_name("b.nii.gz"), 3)
    ledger.remove_below(label.parent)
    assert sorted(path.name for path in label.parent.iterdir()) == ["notes.txt"]
    assert kept(ledger, "b") == 3


def test_changed_labels_may_stay(ledger, label):
    hand_out(ledger, label.with_name("b.nii.gz"), 1)
    save(label, 3)
    ledger.remove_below(label.parent, changed=False)
    assert [path.name for path in label.parent.iterdir()] == [label.name] and not ledger.reviewed.exists()


def test_foreign_files_are_refused(ledger, label):
    ledger.refuse_foreign([label, label.with_name("new.nii.gz")])
    save(label.with_name("b.nii.gz"), 1)
    with pytest.raises(UserError, match=r"predict would replace files that it did not write: .*b\.nii\.gz"):
        ledger.refuse_foreign([label, label.with_name("b.nii.gz")])


def test_what_another_command_wrote_is_foreign(ledger, label):
    assert Ledger(ledger.folder, "demo-data").foreign([label]) == [label]


def test_a_link_is_foreign(ledger, label, tmp_path):
    label.rename(tmp_path / "theirs.nii.gz")
    label.symlink_to(tmp_path / "theirs.nii.gz")
    assert ledger.foreign([label]) == [label]


def test_what_a_killed_process_moved_aside_comes_back(ledger, label):
    save(label, 3)
    label.rename(label.with_name(f".held-{label.name}"))
    ledger.recover()
    assert kept(ledger, "a") == 3 and not list(label.parent.glob(".held-*"))


def test_every_command_puts_right_what_a_killed_process_left(ledger, label):
    """Before it writes; a file of the user that only looks like ours stays."""
    save(label, 3)
    label.rename(label.with_name(f".held-{label.name}"))
    label.with_name(".held-notes").write_text("mine")
    ledger.refuse_foreign([])
    assert kept(ledger, "a") == 3
    assert [path.name for path in label.parent.iterdir()] == [".held-notes"]


def test_the_same_correction_of_two_cases_is_kept_twice(ledger, label):
    """Names that begin alike: equal bytes of one case are no copy of the other's."""
    second = label.with_name("a_10.nii.gz")
    hand_out(ledger, second, 1)
    for path in (second, label):
        save(path, 3)
        hand_out(ledger, path, 2)
    assert len(list(ledger.reviewed.iterdir())) == 2


def test_a_killed_process_that_had_put_its_version_in_place(ledger, label):
    """Its checksum is on record before the file is there, so it does not count as changed."""
    aside = partial_path(label)
    save(aside, 2)
    ledger._expect(label, aside)
    aside.replace(label)
    assert Ledger(ledger.folder, "predict").state(label) is State.OURS


def test_nothing_is_left_of_a_failure(ledger, label):
    with pytest.raises(ZeroDivisionError), ledger.writing(label) as aside:
        aside.write_bytes(b"half")
        raise ZeroDivisionError
    assert os.listdir(label.parent) == [label.name] and first_voxels(label) == 1
