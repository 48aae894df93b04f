"""Damaged run.json and progress.json are refused by the entry that is wrong, before anything uses them."""

import json

import pytest

from semisam_o1.files import write_json
from semisam_o1.runfolder import JOURNAL, LAYOUT, RECORD, RunFolder
from semisam_o1.types import DatasetError

ENTRIES = [("run.json", name) for name in RECORD] + [("progress.json", name) for name in JOURNAL]


@pytest.fixture
def folder(run, tmp_path) -> RunFolder:
    for name in ("run.json", "progress.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    return RunFolder(tmp_path)


def read(folder: RunFolder, file: str) -> dict:
    return folder.read_record() if file == "run.json" else folder.read_journal()


@pytest.mark.parametrize(("file", "entry"), ENTRIES)
@pytest.mark.parametrize("value", ["text", None, 1.5, [None], {"a": None}])
def test_an_entry_of_another_type_is_named(folder, file, entry, value):
    path = folder.path / file
    content = json.loads(path.read_text())
    assert read(folder, file) == content
    if entry == "settings" and value == {"a": None}:  # settings may be anything
        return
    path.write_text(json.dumps(content | {entry: value}))
    with pytest.raises(DatasetError, match=rf"{file} is damaged: '{entry}'"):
        read(folder, file)


@pytest.mark.parametrize(("failed", "refused"), [(None, True), ([], True), ({"a": 1}, True), ({"a": "why"}, False)])
def test_a_record_whose_failed_scans_have_another_type_is_refused(tmp_path, failed, refused):
    """A record of an earlier version has no such entry."""
    content = {"layout": LAYOUT, **{name: kind[0]() for name, kind in RECORD.items() if name != "failed"}}
    write_json(tmp_path / "run.json", content)
    assert RunFolder(tmp_path).read_record() == content
    write_json(tmp_path / "run.json", content | {"failed": failed})
    if refused:
        with pytest.raises(DatasetError, match="'failed' is no dict of str"):
            RunFolder(tmp_path).read_record()
    else:
        assert RunFolder(tmp_path).read_record()["failed"] == failed
