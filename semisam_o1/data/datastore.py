"""What the datastore file of MONAI Label says of the values in a label that lies in a studies folder.

3D Slicer numbers the values of a label by the order of its segments, and says their names beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from semisam_o1.data.folders import composed
from semisam_o1.files import read_json

STORE = "datastore_v2.json"


def segments_in(info: Mapping[str, Any]) -> dict[int, str]:
    """Value -> name from what 3D Slicer sends along with a label, ``label_info``: [{"name": ..., "idx": ...}]."""
    found = info.get("label_info")
    pairs = [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
    return {int(one["idx"]): str(one["name"]) for one in pairs if str(one.get("idx", "")).isdigit() and one.get("name")}


def segments_beside(label: Path) -> dict[int, str]:
    """Value -> name of a label in STUDIES/labels/TAG; empty if it lies elsewhere, or nothing is said of it.

    Raises:
        UserError: the datastore file is damaged.
    """
    tag = label.absolute().parent
    store = tag.parent.parent / STORE
    if tag.parent.name != "labels" or not store.is_file():
        return {}
    for name, known in read_json(store).get("objects", {}).items():
        given = known.get("labels", {}).get(tag.name) or {}
        if composed(f"{name}{given.get('ext', '')}") == composed(label.name):
            return segments_in(given.get("info") or {})
    return {}
