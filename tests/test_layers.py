"""Imports inside the package point downwards only, and never in a circle.

The table is a start, not a law: move a name when the work shows that it stands wrong, and say why in the
commit.
"""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "semisam_o1"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

# From top to bottom. A name is a module or a folder of the package; `__init__` is the package itself.
LAYERS = (
    {"cli", "__main__"},
    {"commands"},
    {"workflows"},
    {"clinic"},
    {"job"},
    {"refinement", "review"},
    {"round_0"},
    {"report"},
    {"handlers", "features", "methods"},
    {"encoders", "networks"},
    {"data"},
    {"runfolder", "runtime", "processes", "uncertainty", "options", "reviewed"},
    {"tables", "neighbours", "weights"},
    {"ledger", "lock"},
    {"files", "literals", "kinds", "signals"},
    {"errors"},
    {"types", "version", "__init__"},
)
HEIGHT = {name: -depth for depth, layer in enumerate(LAYERS) for name in layer}


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, for each module below ``root``; an ``__init__.py`` has its folder's name."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = [root.name, *path.relative_to(root).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_for_types_alone(node: ast.AST) -> bool:
    """Whether ``node`` is ``if TYPE_CHECKING:`` or ``if typing.TYPE_CHECKING:``."""
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(name: str, path: Path, known: set[str], types_too: bool = True) -> set[str]:
    """The modules of ``known`` that ``name`` imports, those inside functions too.

    ``types_too``: also what stands under ``if TYPE_CHECKING``, which is never run.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    nodes = [ast.parse(path.read_text(encoding="utf-8"), str(path))]
    while nodes:
        node = nodes.pop()
        skipped = node.body if is_for_types_alone(node) and not types_too else ()
        nodes += [child for child in ast.iter_child_nodes(node) if child not in skipped]
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parent, base] if base else parent)
            # `from package import name` imports a module where name is one, else something in package.
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in known else base)
    return (found & known) - {name}


def place(name: str) -> str:
    """The name that stands in the table for a module: semisam_o1.encoders.base -> encoders."""
    return (name.split(".") + ["__init__"])[1]


def faults(root: Path) -> list[str]:
    """What is wrong with the imports below ``root``, a sentence each."""
    files = modules(root)
    unknown = sorted({place(name) for name in files} - set(HEIGHT))
    if unknown:
        return [f"{name} is in no layer: place it in LAYERS of {Path(__file__).name}" for name in unknown]
    found = [
        f"{name} imports {other}, which lies higher"
        for name, path in files.items()
        for other in sorted(imports(name, path, set(files)))
        if HEIGHT[place(other)] > HEIGHT[place(name)]
    ]
    # Two modules may name each other's types: what is never run makes no circle.
    graph = {name: imports(name, path, set(files), types_too=False) for name, path in files.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append("a circle of imports: " + " <- ".join(error.args[1]))
    return found


def test_imports_point_downwards():
    assert modules(ROOT), f"no modules in {ROOT}"
    assert not faults(ROOT), "\n".join(faults(ROOT))


TYPES_OF_DATASETS = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from semisam_o1.data.cohort import Cohort
"""


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cli.py": "from semisam_o1 import types", "types.py": ""}, None),
        ({"handlers.py": "from .methods.a import x", "methods/a.py": "from .. import __version__"}, None),
        ({"data/checks.py": TYPES_OF_DATASETS, "data/cohort.py": "from semisam_o1.data.checks import x"}, None),
        ({"types.py": TYPES_OF_DATASETS, "data/cohort.py": ""}, "which lies higher"),
        ({"types.py": "import semisam_o1.cli", "cli.py": ""}, "types imports semisam_o1.cli, which lies"),
        ({"neighbours.py": "def f():\n    from . import handlers", "handlers.py": ""}, "which lies higher"),
        ({"features.py": "from . import handlers", "handlers.py": "from .features import x"}, "a circle"),
        ({"methods/__init__.py": "from .a import x", "methods/a.py": "from . import y"}, "a circle"),
        ({"extra.py": ""}, "extra is in no layer: place it"),
    ],
)
def test_the_check_itself(tmp_path, files, expected):
    root = tmp_path / PACKAGE
    for name, text in {"__init__.py": "", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    found = faults(root)
    assert (expected in " ".join(found)) if expected else not found


@pytest.mark.parametrize("path", sorted((ROOT.parent / "bundles").rglob("*.json")), ids=lambda path: path.name)
def test_no_component_has_the_name_of_a_module(path):
    """From Python 3.12 on, such a name gives the module, and configs cannot be built."""
    targets = set(re.findall(rf'"_target_": "({PACKAGE}[\w.]+)"', path.read_text()))
    assert not targets & set(modules(ROOT))
