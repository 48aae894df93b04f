"""All that can be wrong with a data set is found in one pass, with what was expected and what to do."""

import h5py
import itk
import nibabel
import numpy as np
import pytest

from semisam_o1.data.checks import check_case, find_problems
from semisam_o1.data.datasets import open_cohort
from semisam_o1.data.estimate import estimate, estimate_text, validate_text
from semisam_o1.data.findings import LABEL_NOT_USED, NOTE, SET_ASIDE, STOPS, Problem, table
from semisam_o1.types import Case, DatasetError

SHAPE = (6, 7, 8)


def write_nifti(path, array, affine=None):
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def voxels(seed=0):
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def organ(classes=3):
    label = np.zeros(SHAPE, np.uint8)
    for k in range(1, classes):
        label[2:4, 2:4, 1 + k] = k
    return label


def study(root, images, labelled="", **lists):
    """A NIfTI data set of cases with one-letter names, some `labelled`; lists by their file's stem."""
    for folder, cases in (("images", images), ("labels", labelled)):
        (root / folder).mkdir(parents=True)
        for number, name in enumerate(cases):
            write_nifti(root / folder / f"{name}.nii.gz", organ() if folder == "labels" else voxels(number))
    for name, text in lists.items():
        (root / f"{name}.txt").write_text(text)
    return root


def names(cases):
    return [case.name for case in cases]


@pytest.fixture
def root(tmp_path):
    """Template ``t``, pool ``a`` and ``b``, test ``z``, all sound and labelled."""
    return study(tmp_path, "tabz", "tabz", train="t\na\nb\n", test="z\n")


def image_of(root, name="a"):
    return root / "images" / f"{name}.nii.gz"


def label_of(root, name="a"):
    return root / "labels" / f"{name}.nii.gz"


def halve(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def with_value(value, array=None):
    array = voxels() if array is None else array.astype(np.float32)
    array[1, 2, 3] = value
    return array


def flattened(array):
    """All but one voxel set to zero: nothing varies between the percentiles that clip intensities."""
    array = np.zeros_like(array)
    array[1, 1, 1] = 5
    return array


BROKEN_IMAGES = {
    "truncated": (lambda path: halve(path), "truncated or damaged"),
    "empty": (lambda path: path.write_bytes(b""), "file is empty"),
    "not an image": (lambda path: path.write_bytes(b"hello"), "truncated or damaged"),
    "missing": (lambda path: path.unlink(), "no image of that name"),
    "NaN": (lambda path: write_nifti(path, with_value(np.nan)), "1 NaN or infinite"),
    "infinite": (lambda path: write_nifti(path, with_value(-np.inf)), "1 NaN or infinite"),
    "constant": (lambda path: write_nifti(path, np.full(SHAPE, 7.0)), "a constant image"),
    "nearly constant": (lambda path: write_nifti(path, flattened(voxels())), "constant but for a few"),
    "2D": (lambda path: write_nifti(path, voxels()[..., 0]), "a 2D image, 6 x 7"),
    "one slice": (lambda path: write_nifti(path, voxels()[..., :1]), "single slice"),
    "4D": (lambda path: write_nifti(path, np.stack([voxels()] * 2, -1)), "a 4D image, 6 x 7 x 8 x 2"),
    "zero-sized": (lambda path: write_nifti(path, voxels()[:, :0]), "no voxels in the image, 6 x 0 x 8"),
    "complex": (lambda path: write_nifti(path, voxels().astype(np.complex64)), "complex numbers"),
}


@pytest.mark.parametrize("kind", BROKEN_IMAGES)
def test_a_broken_image_sets_the_case_aside(root, kind):
    spoil, found = BROKEN_IMAGES[kind]
    spoil(image_of(root))
    cohort = open_cohort(root)
    assert found in cohort.set_aside["a"]
    assert list(cohort.set_aside) == ["a"] and names(cohort.pool) == ["b"]
    (problem,) = [problem for problem in cohort.problems if problem.severity == SET_ASIDE]
    assert problem.case == "a" and problem.expected and problem.remedy
    with pytest.raises(DatasetError, match="set aside"):
        cohort.case("a")


@pytest.mark.parametrize("kind", BROKEN_IMAGES)
def test_a_broken_template_stops_the_run(root, kind):
    spoil, _ = BROKEN_IMAGES[kind]
    spoil(image_of(root, "t"))
    with pytest.raises(DatasetError, match=r"(?m)^t +stops the run"):
        open_cohort(root)


def test_a_broken_test_case_is_set_aside(root):
    halve(image_of(root, "z"))
    cohort = open_cohort(root)
    assert cohort.test == () and "z" in cohort.set_aside


def moved(by):
    affine = np.eye(4)
    affine[0, 3] = by
    return affine


BROKEN_LABELS = {
    "truncated": (lambda path: halve(path), "truncated or damaged"),
    "shape": (lambda path: write_nifti(path, organ()[:-1]), "label 5 x 7 x 8"),
    "2D": (lambda path: write_nifti(path, organ()[..., 3]), "a 2D label"),
    "affine": (lambda path: write_nifti(path, organ(), moved(0.5)), "affine differs, by 0.5 voxels"),
    "spacing": (lambda path: write_nifti(path, organ(), np.diag([1, 1, 1.1, 1])), "affine differs"),
    "fractions": (lambda path: write_nifti(path, with_value(0.5, organ())), "not of whole numbers"),
    "NaN": (lambda path: write_nifti(path, with_value(np.nan, organ())), "not of whole numbers"),
    "negative": (lambda path: write_nifti(path, with_value(-1, organ())), "holds -1"),
}


@pytest.mark.parametrize("kind", BROKEN_LABELS)
def test_a_broken_label_is_not_used_and_the_case_stays(root, kind):
    spoil, found = BROKEN_LABELS[kind]
    spoil(label_of(root))
    cohort = open_cohort(root)
    assert cohort.case("a").label is None and cohort.case("b").label is not None
    (problem,) = cohort.problems
    assert (problem.case, problem.severity) == ("a", LABEL_NOT_USED) and found in problem.found


@pytest.mark.parametrize("kind", BROKEN_LABELS)
def test_a_broken_template_label_stops_the_run(root, kind):
    spoil, _ = BROKEN_LABELS[kind]
    spoil(label_of(root, "t"))
    with pytest.raises(DatasetError, match=r"(?m)^t +stops the run"):
        open_cohort(root)


def test_classes_that_the_template_lacks(root):
    write_nifti(label_of(root), with_value(7, organ()))
    cohort = open_cohort(root)
    assert cohort.num_classes == 3 and cohort.case("a").label is None
    assert "class 7" in cohort.problems[0].found
    assert open_cohort(root, num_classes=8).case("a").label is not None


def test_rounded_affines_are_the_same(root):
    write_nifti(label_of(root), organ(), moved(0.01))
    assert open_cohort(root).problems == ()


def test_a_template_without_foreground(root):
    write_nifti(label_of(root, "t"), np.zeros(SHAPE, np.uint8))
    with pytest.raises(DatasetError, match="no foreground"):
        open_cohort(root)


def test_an_empty_label_elsewhere_is_worth_a_note(root):
    write_nifti(label_of(root), np.zeros(SHAPE, np.uint8))
    cohort = open_cohort(root)
    assert [problem.severity for problem in cohort.problems] == [NOTE] and cohort.case("a").label is not None


def test_255_for_the_foreground(root):
    write_nifti(label_of(root, "t"), organ(2) * 255)
    with pytest.raises(DatasetError, match="renumber"):
        open_cohort(root)


@pytest.mark.parametrize("num_classes", [0, 1, 2, 1000])
def test_num_classes_that_cannot_be(root, num_classes):
    with pytest.raises(DatasetError, match=f"num_classes is {num_classes}"):
        open_cohort(root, num_classes=num_classes)


def test_gaps_in_the_classes_are_worth_a_note(root):
    for name in "tabz":
        write_nifti(label_of(root, name), organ(2) * 2)
    cohort = open_cohort(root)
    assert cohort.num_classes == 3
    assert [(problem.severity, problem.found) for problem in cohort.problems] == [(NOTE, "no voxel of class 1")]


def test_the_same_case_in_two_lists(root):
    (root / "test.txt").write_text("z\na\n")
    with pytest.raises(DatasetError, match=r"(?m)^a +stops the run.*train.txt"):
        open_cohort(root)


def test_the_template_in_another_list_too(root):
    (root / "val.txt").write_text("t\n")
    with pytest.raises(DatasetError, match=r"(?m)^t +stops the run"):
        open_cohort(root)


def test_a_case_twice_in_one_list_counts_once(root):
    (root / "train.txt").write_text("t\na\nb\na\n")
    cohort = open_cohort(root)
    assert names(cohort.pool) == ["a", "b"] and cohort.problems[0].severity == NOTE


BAD_NAMES = ["../a", "/etc/passwd", "sub/a", "..", "sub\\a", "C:a", "a\0b", "../images/a.nii.gz"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_leave_the_data_folder(root, name):
    with pytest.raises(DatasetError, match="leaves the"):
        open_cohort(root, template=name)
    (root / "train.txt").write_text(f"t\na\n{name}\n")
    with pytest.raises(DatasetError, match="leaves the"):
        open_cohort(root)


def test_lists_that_cannot_be_read(root):
    (root / "val.txt").write_bytes(b"\xff\xfea\0b\0")
    with pytest.raises(DatasetError, match="val.txt"):
        open_cohort(root)
    (root / "val.txt").unlink()
    (root / "val.txt").mkdir()
    with pytest.raises(DatasetError, match="val.txt"):
        open_cohort(root)


def test_an_empty_list(root):
    (root / "train.txt").write_text("\n\n")
    with pytest.raises(DatasetError, match="an empty list"):
        open_cohort(root)


def test_no_template(tmp_path):
    study(tmp_path, "ab")
    with pytest.raises(DatasetError, match="no template"):
        open_cohort(tmp_path)
    with pytest.raises(DatasetError, match="labeled_num is 0"):
        open_cohort(study(tmp_path / "listed", "ab", "a", train="a\nb"), labeled_num=0)
    with pytest.raises(DatasetError, match=r"(?m)^nobody +stops the run"):
        open_cohort(tmp_path, template="nobody")


def test_the_first_listed_case_has_no_label(root):
    label_of(root, "t").unlink()
    with pytest.raises(DatasetError, match="(?s)without a.*label"):
        open_cohort(root)


def test_an_empty_pool(root):
    for name in "ab":
        halve(image_of(root, name))
    with pytest.raises(DatasetError, match="no usable case"):
        open_cohort(root)
    assert set(open_cohort(root, need_pool=False).set_aside) == {"a", "b"}


def test_all_cases_labelled_and_no_list_leaves_no_pool(tmp_path):
    with pytest.raises(DatasetError, match="(?s)pool is empty.*--template"):
        open_cohort(study(tmp_path, "ab", "ab"))


@pytest.mark.parametrize("kind", ["missing", "file", "empty"])
def test_no_data_set(tmp_path, kind):
    path = tmp_path / "here"
    if kind == "file":
        path.touch()
    if kind == "empty":
        path.mkdir()
    with pytest.raises(DatasetError, match="stops the run"):
        open_cohort(path)


def test_two_files_of_one_case(root):
    nibabel.save(nibabel.load(image_of(root)), root / "images" / "a.nii")
    nibabel.save(nibabel.load(label_of(root, "b")), root / "labels" / "b.nii")
    cohort = open_cohort(root)
    assert "2 images: a.nii, a.nii.gz" in cohort.set_aside["a"]
    assert cohort.case("b").label is None


def test_files_that_no_case_uses_are_named_once(root):
    for name in "uvwx":
        write_nifti(image_of(root, name), voxels())
    write_nifti(label_of(root, "q"), organ())
    found = [problem.found for problem in open_cohort(root).problems]
    assert found == ["4 images in no list: u, v, w ...", "1 labels without an image: q"]


def write_h5(path, **arrays):
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array


def test_hdf5_faults(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_h5(data / "t.h5", image=voxels(), label=organ())
    write_h5(data / "ok.h5", image=voxels(1).astype(np.float16))
    write_h5(data / "key.h5", scan=voxels(), label=organ())
    write_h5(data / "cut.h5", image=voxels(), label=organ())
    write_h5(data / "nothing.h5", image=voxels()[:0])
    write_h5(data / "shape.h5", image=voxels(), label=organ()[1:])
    halve(data / "cut.h5")
    (tmp_path / "train.txt").write_text("t\nok\nkey\ncut\nnothing\nshape\n")
    cohort = open_cohort(tmp_path)
    assert set(cohort.set_aside) == {"key", "cut", "nothing"}
    assert "['label', 'scan']" in cohort.set_aside["key"]
    assert cohort.case("shape").label is None and cohort.case("ok").label is None


def test_3d_slicer_faults(tmp_path):
    study(tmp_path, "ta", "t")
    folder = tmp_path / "images"
    turned = np.ascontiguousarray(voxels().transpose(2, 1, 0))
    itk.imwrite(itk.image_from_array(turned), str(folder / "cut.mha"))
    halve(folder / "cut.mha")
    itk.imwrite(itk.image_from_array(turned[0]), str(folder / "flat.nrrd"))
    itk.imwrite(itk.image_from_array(np.stack([turned] * 3, -1), is_vector=True), str(folder / "colour.nrrd"))
    itk.imwrite(itk.image_from_array(np.stack([turned] * 2)), str(folder / "film.mha"))
    aside = open_cohort(tmp_path).set_aside
    assert set(aside) == {"cut", "flat", "colour", "film"}
    assert "2D" in aside["flat"] and "4D" in aside["colour"] and "4D" in aside["film"]


def test_an_affine_without_inverse(root):
    path = root / "images" / "a.nii"
    nibabel.save(nibabel.load(image_of(root)), path)
    image_of(root).unlink()
    header = nibabel.load(path).header
    header["srow_z"], header["sform_code"] = 0, 1
    path.write_bytes(header.binaryblock + path.read_bytes()[len(header.binaryblock) :])
    assert "no inverse" in open_cohort(root).set_aside["a"]


def test_all_problems_come_in_one_table(root):
    """A stop does not hide what else is wrong, and nothing is printed of a header's free text."""
    write_nifti(label_of(root, "t"), np.zeros(SHAPE, np.uint8))
    image = nibabel.Nifti1Image(with_value(np.nan), np.eye(4))
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


def test_estimate_grows_with_rounds_and_iterations(phantom_dir):
    cohort = open_cohort(phantom_dir)
    nothing = estimate(cohort, {"num_rounds": 0, "max_iterations": 100})
    one, two = (estimate(cohort, {"num_rounds": n, "max_iterations": 100}) for n in (1, 2))
    assert nothing["training"] == nothing["prediction"] == nothing["model_bytes"] == 0 < nothing["features"]
    long = estimate(cohort, {"num_rounds": 2, "max_iterations": 100, "first_round_factor": 3})
    assert long["training"] == pytest.approx(4 * one["training"], abs=0.3)
    assert two["training"] == 2 * one["training"] > 0 and two["bytes"] > one["bytes"] > nothing["bytes"]
    for result in (nothing, one, two):
        stages = sum(result[stage] for stage in ("features", "propagation", "training", "prediction"))
        assert result["seconds"] == pytest.approx(stages, abs=0.3)
    assert "on disk" in estimate_text(one)


def test_estimate_hangs_on_no_spacing(phantom_h5_dir):
    """Scans whose voxel size is unsaid cost what they cost with it, as `choose_spacing` promises."""
    settings = {"num_rounds": 1, "max_iterations": 10, "feature_voxels": 5000}
    unsaid, said = (estimate(open_cohort(phantom_h5_dir, spacing=s), settings) for s in (None, 0.4))
    assert unsaid["seconds"] == pytest.approx(said["seconds"], rel=0.01)


def test_validate_text(root):
    halve(image_of(root))
    text = validate_text(open_cohort(root), {"num_rounds": 1, "max_iterations": 10})
    for part in (
        "truncated",
        "1 pool, 0 val, 1 test, 1 set aside",
        "1 class 1, 2 class 2",
        "6 x 7 x 8",
        "on disk",
    ):
        assert part in text
    assert max(map(len, text.splitlines())) <= 100
