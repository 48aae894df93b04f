"""All that can be wrong with a data set is found in one pass, with what was expected and what to do."""

import nibabel
import numpy as np
import pytest

from semisam_o1.data.checks import check_case, find_problems
from semisam_o1.data.datasets import open_cohort
from semisam_o1.data.findings import LABEL_NOT_USED, NOTE, SET_ASIDE, STOPS, Problem, left_out, table
from semisam_o1.types import Case, DatasetError
from tests.data.studies import SHAPE, halve, image_of, label_of, organ, study, with_value, write_nifti


def test_all_problems_come_in_one_table(root):
    """A stop does not hide what else is wrong, and nothing is printed of a header's free text."""
    write_nifti(label_of(root, "t"), np.zeros(SHAPE, np.uint8))
    image = nibabel.Nifti1Image(with_value(np.nan)[..., None, :], np.eye(4))
    image.header["descrip"] = b"Doe^Jane"
    nibabel.save(image, image_of(root, "a"))
    write_nifti(label_of(root, "b"), organ()[1:])
    (root / "train.txt").write_text("t\na\nb\nmissing\n../out\n")
    (root / "val.txt").write_text("z\n")
    with pytest.raises(DatasetError) as raised:
        open_cohort(root)
    text = str(raised.value)
    starts = [line.split("  ")[0] for line in text.splitlines()]
    assert {"t", "a", "b", "z", "missing", "../out"} <= set(starts)
    assert "Doe" not in text
    assert starts.index("t") < starts.index("a") < starts.index("b")  # the gravest first
    assert max(map(len, text.splitlines()[1:])) <= 100


def test_image_and_label_of_one_case_are_both_reported(root):
    halve(image_of(root))
    halve(label_of(root))
    case = Case("a", image_of(root), label_of(root), "pool")
    assert [problem.severity for problem in check_case(case)] == [SET_ASIDE, LABEL_NOT_USED]


def test_find_problems_looks_at_templates_first(root):
    splits = {"a": "pool", "t": "template"}
    cases = [Case(name, image_of(root, name), label_of(root, name), split) for name, split in splits.items()]
    write_nifti(label_of(root), with_value(3, organ()))
    findings = find_problems(cases)
    assert findings.classes == {0, 1, 2}
    assert [(problem.case, problem.severity) for problem in findings.problems] == [("a", LABEL_NOT_USED)]


def test_table_fits_whatever_it_holds():
    long = Problem("case_" + "x" * 60, STOPS, "found " * 12, "expected " * 9, "do " * 30)
    text = table([Problem("a", NOTE, "f", "e", "r"), long])
    assert max(map(len, text.splitlines())) <= 100
    assert text.index("stops the run") < text.index("note")
    assert table([]) == "No problems found."


@pytest.mark.parametrize("found", ["f", "found " * 12])
def test_fifty_lines_of_a_kind_are_printed_and_the_rest_is_left_out(found):
    """In lines of the table, so a problem that wraps counts more than once."""
    problems = [Problem(f"case_{number:02d}", NOTE, found, "e", "r") for number in range(50)]
    shown = sum(f"case_{number:02d}" in table(problems) for number in range(50))
    assert len(table(problems).splitlines()) <= 2 + 50 + 2
    assert left_out(problems) == (shown < 50) == (f"{50 - shown} more of: note" in table(problems)) == (found != "f")


def test_templates_without_a_common_class_stop(tmp_path):
    """Two people's labels of one structure, as 1 and as 17."""
    study(tmp_path, "sta", "st")
    write_nifti(label_of(tmp_path, "t"), np.uint8(17) * (organ() > 0))
    with pytest.raises(DatasetError, match="(?s)holds class 17;.*that of s"):
        open_cohort(tmp_path)
    assert open_cohort(tmp_path, binary_label=True).num_classes == 2


def test_templates_with_some_classes_in_common_are_a_warning(tmp_path):
    study(tmp_path, "sta", "st")
    write_nifti(label_of(tmp_path, "t"), (organ() > 0).astype(np.uint8))
    (found,) = [problem for problem in open_cohort(tmp_path).problems if "that of s" in problem.found]
    assert (found.case, found.severity) == ("t", "warning")
    assert found.found == "the label holds class 1; that of s holds 1, 2"
