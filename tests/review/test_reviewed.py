"""The folder of what people gave: nothing that was in it is ever lost."""

import errno
import random
import shutil

import pytest

from semisam_o1.errors import WriteError
from semisam_o1.files import checksum
from semisam_o1.ledger import dated
from semisam_o1.reviewed import ACCEPTED, CORRECTED, REJECTED, Entry, Reviewed
from semisam_o1.types import UserError


def given(folder, text):
    path = folder / f"given_{text}.nii.gz"
    path.write_text(text)
    return path


def test_entries_come_back_in_the_order_in_which_they_came(tmp_path):
    reviewed = Reviewed(tmp_path / "reviewed")
    reviewed.add(Entry("b", CORRECTED, 2, 17, 0.875), given(tmp_path, "one"))
    reviewed.add(Entry("a", REJECTED))
    found = reviewed.entries()
    assert list(found) == ["b", "a"] and found["b"].when and found["a"].sha256 is None
    assert found["b"][:5] == ("b", CORRECTED, 2, 17, 0.875)
    assert found["b"].sha256 == checksum(reviewed.label("b"))
    assert list(reviewed.labels()) == ["b"] and reviewed.rejected() == ["a"]


def test_a_second_label_keeps_the_first_and_undo_brings_it_back(tmp_path):
    reviewed = Reviewed(tmp_path / "reviewed")
    first = reviewed.add(Entry("a", CORRECTED, 0, 5, 0.9), given(tmp_path, "one"))
    reviewed.add(Entry("a", CORRECTED, 1, 3, 0.95), given(tmp_path, "two"))
    assert reviewed.label("a").read_text() == "two"
    assert reviewed.undo("a") == first and reviewed.entries() == {"a": first}
    assert reviewed.label("a").read_text() == "one"
    assert reviewed.undo("a") is None and reviewed.entries() == {} and not reviewed.label("a").exists()
    with pytest.raises(UserError, match="--undo a: nothing was given for it"):
        reviewed.undo("a")


def test_no_order_of_steps_loses_a_label(tmp_path):
    draw, reviewed, texts = random.Random(1), Reviewed(tmp_path / "reviewed"), set()
    for number in range(60):
        case, step = draw.choice("abc"), draw.choice(["label", "label", "reject", "undo"])
        if step == "label":
            texts.add(f"{number}")
            reviewed.add(Entry(case, draw.choice([CORRECTED, ACCEPTED])), given(tmp_path, f"{number}"))
        elif step == "reject":
            reviewed.add(Entry(case, REJECTED))
        elif case in reviewed.entries():
            reviewed.undo(case)
        for name, entry in reviewed.entries().items():
            assert entry.sha256 is None or entry.sha256 == checksum(reviewed.label(name))
    assert texts <= {path.read_text() for path in reviewed.folder.glob("*.nii.gz")}


def test_a_table_that_cannot_be_trusted_is_named(tmp_path):
    reviewed = Reviewed(tmp_path)
    reviewed.add(Entry("a", ACCEPTED), given(tmp_path, "one"))
    reviewed.label("a").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="case a: .*says accepted, but .* is not there"):
        reviewed.entries()
    reviewed.table.write_text("case,what\na,accepted\n")
    with pytest.raises(UserError, match="is damaged: .*no column"):
        reviewed.entries()
    text = "case,what,round,voxels_changed,dice,when,sha256\na,praised,,,,,\n"
    reviewed.table.write_text(text)
    with pytest.raises(UserError, match="found 'praised', expected one of corrected"):
        reviewed.entries()


def test_an_undo_that_cannot_be_done_changes_nothing(tmp_path):
    """The label was changed in the folder itself, so that the one before is nowhere."""
    reviewed = Reviewed(tmp_path / "reviewed")
    reviewed.add(Entry("a", CORRECTED), given(tmp_path, "one"))
    reviewed.label("a").write_text("two")
    reviewed.add(Entry("a", CORRECTED), reviewed.label("a"))
    found = reviewed.entries()
    with pytest.raises(UserError, match="its earlier label is no longer in"):
        reviewed.undo("a")
    assert reviewed.entries() == found and reviewed.label("a").read_text() == "two"


def test_a_full_disk_leaves_the_label_before(tmp_path, monkeypatch):
    reviewed = Reviewed(tmp_path / "reviewed")
    first = reviewed.add(Entry("a", CORRECTED), given(tmp_path, "one"))

    def full(source, target):
        raise OSError(errno.ENOSPC, "No space left on device", str(target))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfile", full)
        with pytest.raises(WriteError):
            reviewed.add(Entry("a", CORRECTED), given(tmp_path, "two"))
    assert reviewed.entries() == {"a": first} and reviewed.label("a").read_text() == "one"


def test_a_label_that_a_killed_process_left_under_its_earlier_name_is_put_back(tmp_path):
    reviewed = Reviewed(tmp_path / "reviewed")
    first = reviewed.add(Entry("a", CORRECTED), given(tmp_path, "one"))
    reviewed.label("a").rename(dated(reviewed.label("a")))
    with pytest.raises(UserError, match="is not there"):
        reviewed.entries()
    reviewed.recover()
    assert reviewed.entries() == {"a": first} and reviewed.label("a").read_text() == "one"


def test_a_step_whose_label_is_lost_can_be_taken_back(tmp_path):
    reviewed = Reviewed(tmp_path / "reviewed")
    reviewed.add(Entry("a", CORRECTED), given(tmp_path, "one"))
    reviewed.label("a").unlink()
    assert reviewed.undo("a") is None and reviewed.entries() == {}
