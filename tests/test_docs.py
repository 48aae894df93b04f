"""What the pages say of settings, commands and files is there."""

import argparse
import ast
import inspect
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from monai.utils import optional_import

from semisam_o1.cli import parser
from semisam_o1.job.config import ACTIONS
from semisam_o1.job.results import REVIEW

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
CONFIGS = ROOT / "bundles" / "semisam_o1" / "configs"
OVERLAYS = sorted(path for folder in CONFIGS.iterdir() if folder.is_dir() for path in folder.glob("*.json"))
TRAIN = json.loads((CONFIGS / "train.json").read_text())
HEADS = ["id", "default", "unit", "range", "what it does", "when to touch it"]
MISSING = object()


def tables(page: Path) -> list[list[list[str]]]:
    """The tables of a page, each a list of rows of cells, the head first."""
    found, open_table = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            open_table = False
            continue
        if not open_table:
            found.append([])
        open_table = True
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not all(re.fullmatch(":?-+:?", cell) for cell in cells):
            found[-1].append(cells)
    return found


def of_settings() -> dict[str, str]:
    """Id -> default, as docs/settings.md says them."""
    rows = [row for table in tables(ROOT / "docs" / "settings.md") if table[0] == HEADS for row in table[1:]]
    return {row[0].strip("`"): row[1] for row in rows}


def value_of(config: dict, id: str) -> Any:
    """The value of an id; an argument that the config leaves out has its component's default."""
    if id in config:
        return config[id]
    parts, value = id.split("#"), config
    for number, part in enumerate(parts):
        if part not in value:
            if "_target_" not in value or number != len(parts) - 1:
                return MISSING
            module, _, name = value["_target_"].rpartition(".")
            argument = inspect.signature(optional_import(module, name=name)[0]).parameters.get(part)
            return MISSING if argument is None else argument.default
        value = value[part]
    return value


def is_plain(value: Any) -> bool:
    """Whether a value is data, and neither a component nor an expression."""
    if isinstance(value, list):
        return all(map(is_plain, value))
    return not isinstance(value, dict) and not (isinstance(value, str) and value.startswith(("$", "@", "%")))


def first_code(cell: str) -> str:
    found = re.match("`([^`]*)`", cell)
    return found[1] if found else ""


def ids() -> set[str]:
    """Every id of the config and of its overlays, the first part of nested ones."""
    names = {name for path in [CONFIGS / "train.json", *OVERLAYS] for name in json.loads(path.read_text())}
    return {name.split("#")[0] for name in names} - set(ACTIONS)


def test_every_setting_has_its_row():
    assert sorted(ids() - set(of_settings())) == []


def test_every_row_is_a_setting_with_its_default():
    overlays = {name: value for path in OVERLAYS for name, value in json.loads(path.read_text()).items()}
    for id, default in of_settings().items():
        value = value_of(TRAIN, id)
        if value is MISSING:
            value = overlays.get(id, MISSING)
        assert value is not MISSING, f"docs/settings.md: the config has no id {id}"
        if is_plain(value):
            assert json.loads(first_code(default)) == value, f"docs/settings.md: {id} is {value}"
        elif isinstance(value, dict) and first_code(default).startswith("semisam_o1."):
            assert value["_target_"] == first_code(default)


def test_the_table_of_presets():
    (table,) = [
        table for table in tables(ROOT / "docs" / "settings.md") if table[0][1:] == ["`quick`", "`standard`", "`paper`"]
    ]
    listed = {row[0].strip("`"): row[1:] for row in table[1:]}
    for number, preset in enumerate(("quick", "standard", "paper")):
        overlay = json.loads((CONFIGS / "presets" / f"{preset}.json").read_text())
        for id, cells in listed.items():
            value = overlay.get(id, value_of(TRAIN, id))
            if is_plain(value):
                assert json.loads(first_code(cells[number])) == value, f"{id} of {preset} is {value}"
        text = (ROOT / "docs" / "settings.md").read_text()
        assert all(f"`{id.split('#')[0]}" in text for id in overlay)


def commands() -> dict[str, argparse.ArgumentParser]:
    (actions,) = [action for action in parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return actions.choices


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: page.name)
def test_commands_and_options_are_there(page):
    known = commands()
    options = {option for command in known.values() for option in command._option_string_actions}
    of_others = {"--config_file", "--bundle_root", "--dataset_dir", "--output_dir", "--num_rounds", "--round", "--ID"}
    of_others |= {"--app", "--studies", "--host", "--port", "--conf"}  # of MONAI Label's server
    of_others |= {"--tracking", "--tracking_uri", "--experiment_name", "--run_name", "--backend-store-uri"}
    of_others |= {"--filepath", "--ckpt_file", "--meta_file", "--converter_kwargs"}  # of MONAI's exports
    of_others |= {"--standalone", "--nproc_per_node"}  # of torchrun
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"semisam-o1 ([a-z][a-z-]+)", text):
        assert name in known, f"semisam-o1 has no command {name}"
    for line in re.findall(r"semisam-o1 ([a-z][a-z-]+[^`\n]*)", text):
        name, *words = line.split("#")[0].split()
        for option in re.findall(r"--[a-z-]+", " ".join(words)):
            assert option in known[name]._option_string_actions, f"semisam-o1 {name} has no option {option}"
    for option in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", text):
        assert option in options | of_others, f"no command has an option {option}"


def anchors(page: Path) -> set[str]:
    """What a link to a heading of a page may name."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match("[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link} leads nowhere"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link} names no heading"


@pytest.mark.parametrize("name", ["data_way", "monai_label"])
def test_the_drawn_pictures_know_every_stage_and_are_there(name, tmp_path):
    drawn = runpy.run_path(str(ROOT / "docs" / "make_pictures.py"))
    drawn[name](tmp_path / "picture.png")
    assert (tmp_path / "picture.png").is_file() and (ROOT / "docs" / "images" / f"{name}.png").is_file()


def test_every_module_is_in_the_overview():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    names = {path.name for path in (ROOT / "semisam_o1").rglob("*.py")} - {"__init__.py"}
    assert sorted(name for name in names if name not in text) == []


def texts_of_the_code() -> list[str]:
    """Every text in the package's code, with `...` for what a formatted one fills in."""
    found = []
    for path in sorted((ROOT / "semisam_o1").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[\w.]*[a-z]", "...", node.value))
    return found


def test_the_files_of_a_run_and_the_columns_of_its_list_are_explained(run):
    page = (ROOT / "docs" / "data_formats.md").read_text(encoding="utf-8").partition("## Files of a run")[2]
    for path in (*run.iterdir(), *run.glob("round_*/*")):
        place = "" if path.parent == run else "round_0/" if path.parent.name == "round_0" else "round_N/"
        known = [f"`{place}{path.name}{'/' if path.is_dir() else ''}`", f"`round_N/{path.name}`"]
        assert re.match("round_", path.name) or any(name in page for name in known), f"{path} is not explained"
    for column in REVIEW:
        assert f"`{column}`" in page, f"column {column} of review.csv is not explained"


def test_messages_are_numbered_in_order():
    rows = [row for table in tables(ROOT / "docs" / "troubles.md") for row in table[1:]]
    assert [row[0] for row in rows] == [str(number) for number in range(1, len(rows) + 1)]


def test_messages_are_those_of_the_code():
    rows = [row for table in tables(ROOT / "docs" / "troubles.md") for row in table[1:]]
    texts = texts_of_the_code()
    assert len(rows) >= 20
    for row in rows:
        for message in re.findall("`([^`]+)`", row[1]):
            for part in filter(str.strip, message.split("...")):
                assert any(part.strip() in text for text in texts), f"docs/troubles.md: no message says '{part}'"
