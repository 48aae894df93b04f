"""Mistakes on the command line end the run in a line, before anything is computed."""

import pytest

from semisam_o1.cli import main, parser
from semisam_o1.workflows import PUBLISHED_NAMES


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "max_iteration=3"], "no id 'max_iteration'"),
        (["--set", "max_iterations"], "ID=VALUE"),
        (["--method", "magic"], "no method 'magic'"),
        (["--template", "nobody"], "nobody"),
        (["--set", "affine_prob=often"], "affine_prob is 'often': expected a number from 0 to 1"),
        (["--set", "max_iterations=many"], "max_iterations is 'many': expected a whole number"),
        (["--set", "max_iterations=-5"], "max_iterations is -5: expected a whole number from 1"),
        (["--set", "iterations_per_epoch=7"], "iterations_per_epoch is 7: expected a divisor of a round's 1000"),
        (["--set", "threads=0"], "threads is 0: expected a whole number"),
        (["--set", "flip_axes=[3]"], "flip_axes is [3]: expected a list of whole numbers from 0 to 2"),
        (["--set", "patch_size=abc"], "patch_size is 'abc': expected 3 whole numbers"),
        (["--set", "train#optimizer#weight_decy=0"], "unexpected keyword argument 'weight_decy'"),
        (["--set", "train#method#_target_=sure.Sure"], "'train#method' cannot be built with these settings: "),
        (["--set", "refinement#propse=1"], "no id 'refinement#propse': did you mean refinement#propose"),
        (["--device", "cuda:7"], "cuda:7"),
        (["--device", "gpu"], "device is 'gpu': expected cpu or cuda"),
    ],
)
def test_mistakes_end_without_traceback(phantom_dir, tmp_path, capsys, arguments, said):
    assert main(["run", str(phantom_dir), "--output", str(tmp_path / "run"), *arguments]) == 2
    message = capsys.readouterr()
    assert said in message.err + message.out and "Traceback" not in message.err
    assert not (tmp_path / "run" / "round_0").exists()


def test_every_help_text_is_text(capsys):
    for command in ("run", "propagate", "predict", "test", "evaluate", "validate", "suggest-template", "demo-data"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        said = capsys.readouterr().out
        assert "option_strings" not in said and "%%" not in said


def test_a_folder_too_low_and_one_that_is_not_there_are_said(phantom_dir, tmp_path, capsys):
    assert main(["validate", str(phantom_dir / "images")]) == 2
    assert "name the folder above it" in capsys.readouterr().err
    scan = str(phantom_dir / "images" / "phantom_01.nii.gz")
    assert main(["predict", scan, "--run", str(tmp_path / "RUNN"), "--output", str(tmp_path / "out")]) == 2
    assert "RUNN: no such folder" in capsys.readouterr().err


def test_published_methods_have_both_names():
    command = ["predict", "x.nii", "--weights", "w.pth", "--output", "out", "--method"]
    for published, ours in PUBLISHED_NAMES.items():
        assert parser().parse_args([*command, ours]).method == published
        assert parser().parse_args([*command, published]).method == published
