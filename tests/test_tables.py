"""Tables come back as they were written, whatever a case is called, and no cell is a formula."""

import csv

import pytest

from semisam_o1.job.results import write_review
from semisam_o1.round_0.quality import Quality
from semisam_o1.runfolder import LAYOUT, QUALITY, RunFolder
from semisam_o1.tables import COUNT, TEXT, CaseTable, read_rows, write_rows
from semisam_o1.types import Case, DatasetError

NAMES = ["a", "a, b", "=1+1", "+x", "-x", "@x", "'x", "''=x", 'with "quotes"', "line\nbreak"]


def test_rows_come_back(tmp_path):
    columns = {"name": TEXT, "number": COUNT, "share": ".3f"}
    rows = [{"name": name, "number": i, "share": None if i % 2 else i / 8} for i, name in enumerate(NAMES)]
    path = write_rows(tmp_path / "t.csv", columns, rows)
    assert read_rows(path, columns) == rows
    with open(path, newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@"))]
    with pytest.raises(ValueError, match="no column other; expected name,other"):
        read_rows(path, {"name": TEXT, "other": TEXT})


def test_a_case_table_keeps_its_order_and_is_empty_where_there_is_none(tmp_path):
    table = CaseTable(tmp_path / "t.csv", {"share": ".2f"}, order=lambda row: -row[1]["share"])
    assert table.read() == {}
    table.write({"a": {"share": 0.25}, "=b": {"share": 0.5}})
    assert list(table.read().items()) == [("=b", {"share": 0.5}), ("a", {"share": 0.25})]


def test_the_list_for_review_takes_any_name(tmp_path):
    run, cases = RunFolder(tmp_path), [Case(name, tmp_path, None, "pool") for name in ("a, b", "=c", "d", "e")]
    folder = run.round(1)
    folder.uncertainty.write({case.name: {"uncertainty": 0.1} for case in cases})
    values = {"a, b": 0.5, "=c": 0.4}
    judged = {name: Quality(dice, 0, 1, 1, 1, 0, 0, 0, 0, (0.9, dice)) for name, dice in values.items()}
    judged["e"] = judged["a, b"]._replace(doubt="-unlike")
    judged["=c"] = judged["=c"]._replace(odd={0: "0.5 times its usual volume"})
    folder.quality.write({name: found.row([0, 2, 5]) for name, found in judged.items()})
    assert list(folder.quality.read()) == ["e", "=c", "a, b"]
    write_review(folder, run, cases)
    assert run.review.read_text().splitlines() == [
        "case,uncertainty,predicted_dice,low,high,class,class_dice,outside,odd,cannot_tell,reviewed",
        "e,0.100000,,,,,,,,'-unlike,",
        "'=c,0.100000,0.4000,0.0000,1.0000,5,0.4000,,2: 0.5 times its usual volume,,",
        '"a, b",0.100000,0.5000,0.0000,1.0000,5,0.5000,,,,',
        "d,0.100000,,,,,,,,,",
    ]  # fmt: skip


def test_the_columns_of_quality_are_those_of_the_estimate():
    assert Quality._fields == (*QUALITY, "classes", "doubt", "odd")


def test_a_table_of_quality_from_before_there_was_doubt_is_read(tmp_path):
    folder = RunFolder(tmp_path).round(0)
    folder.quality.write({"a": Quality(0.5, 0, 1, 1, 1, 0, 0, 0, 0, (0.5,)).row([0, 1])})
    text = folder.quality.path.read_text().splitlines()
    position = text[0].split(",").index("cannot_tell")
    cells = [line.split(",") for line in text]
    folder.quality.path.write_text("\n".join(",".join(c[:position] + c[position + 1 :]) for c in cells) + "\n")
    found = folder.quality.read()["a"]
    assert found["predicted_dice"] == 0.5 and "cannot_tell" not in found


@pytest.mark.parametrize("name", ["run.json", "progress.json"])
def test_a_folder_of_an_earlier_layout_is_refused(tmp_path, name):
    (tmp_path / name).write_text('{"done": [], "settings": {}}')
    run = RunFolder(tmp_path)
    with pytest.raises(DatasetError, match=f"earlier version.*layout 1, expected {LAYOUT}.*name another folder"):
        (run.read_record if name == "run.json" else run.read_journal)()
