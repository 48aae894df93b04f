"""An installed wheel holds every module, the pages' templates and the bundle, and finds it outside the checkout."""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import semisam_o1

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / "bundles" / "semisam_o1"
SOURCES = ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE", "semisam_o1", "bundles")
# Git ignores trained weights, and setup.py leaves them out.
NOT_SHIPPED = {".pt", ".pth", ".onnx", ".pyc"}


def files_below(folder: Path, *suffixes: str) -> set[str]:
    """The files below ``folder``, as relative paths; only those with one of ``suffixes``, if given."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix not in NOT_SHIPPED and (not suffixes or path.suffix in suffixes)
    }


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of the working tree, built from a copy: a build leaves folders behind."""
    for module in ("pip", "setuptools"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed, so no wheel can be built without fetching it")
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, ".", cwd=copy)
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    installed = tmp_path / "semisam_o1"

    missing = files_below(ROOT / "semisam_o1", ".py", ".j2") - files_below(installed, ".py", ".j2")
    assert not missing, f"not in the wheel, for want of an __init__.py or a line in setup.py: {sorted(missing)}"
    assert files_below(installed / "bundle") == files_below(BUNDLE)
    # Nothing else at the top: `tests` or `bundles` there would be in the way of others' packages.
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".dist-info"] == ["semisam_o1"]

    # -I, so that neither PYTHONPATH nor the current folder leads back to the checkout.
    code = "import sys; sys.path.insert(0, sys.argv[1]); import semisam_o1; print(semisam_o1.BUNDLE_ROOT)"
    assert Path(run(sys.executable, "-I", "-c", code, tmp_path, cwd=tmp_path).strip()) == installed / "bundle"


def test_bundle_root_of_the_checkout():
    assert semisam_o1.BUNDLE_ROOT == BUNDLE
    assert semisam_o1.BUNDLE_ROOT.is_dir()


def test_import_is_light():
    code = "import sys, semisam_o1; print(sorted({'torch', 'monai', 'numpy', 'itk'} & set(sys.modules)))"
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "[]"
