"""What a person in front of MONAI Label reads when the bundle cannot label a scan yet."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from monai.transforms import Compose, Transform

from semisam_o1.types import UserError

NO_MODEL = (
    "this bundle has no trained model yet. In MONAI Label, submit the label of one scan and train; without the app of "
    "`semisam-o1 monailabel-app`, restart the server then. Or serve RUN/bundle, the trained bundle of a finished run."
)
RESTART = (
    "the first model of this bundle was trained after the server started. Restart the server to use it, or serve the "
    "bundle by the app of `semisam-o1 monailabel-app`, which needs no restart."
)
CONFLICT = 409  # status of an answer that the state of the server forbids
UNPROCESSABLE = 422  # status of an answer to a scan that cannot be labelled


def trained_alone(chain: Compose, bundle_root: str | Path | None = None) -> Compose:
    """``chain`` of the shipped bundle in ``bundle_root``: it prepares a scan only once the bundle is trained.

    ``bundle_root`` None is for weights from elsewhere, with which it is ``chain``.
    """
    return chain if bundle_root is None else Compose([RefuseUntrained(bundle_root), *chain.transforms])


class RefuseUntrained(Transform):
    """Passes an item on if the bundle that this transform belongs to is trained.

    MONAI Label reads a bundle's config at its start. If it still uses the shipped bundle's although the one on disk is
    a trained bundle's, it would load a model that does not fit into it, without a word.

    Raises:
        UserError: there is no model, or it is newer than the config in use. In a web server, FastAPI's exception with
            the same text, because a server hides all others from the person who asks.
    """

    def __init__(self, bundle_root: str | Path):
        self.root = Path(bundle_root)

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        config = self.root / "configs" / "inference.json"
        if not (self.root / "models" / "model.pt").is_file():
            refuse(NO_MODEL)
        if config.is_file() and trained_alone.__name__ not in config.read_text(encoding="utf-8"):
            refuse(RESTART)
        return data


def refuse(text: str, status: int = CONFLICT) -> None:
    web = sys.modules.get("fastapi")
    raise UserError(text) if web is None else web.HTTPException(status, text)
