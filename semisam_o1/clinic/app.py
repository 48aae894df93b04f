"""Our app for MONAI Label: its sample app `monaibundle`, with a strategy that names the scan to look at next.

Imported by the server alone: this package does not depend on MONAI Label.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy

from semisam_o1.clinic.make_app import MODEL
from semisam_o1.clinic.next_scan import next_scan
from semisam_o1.clinic.serving import UNPROCESSABLE, refuse
from semisam_o1.errors import plainly
from semisam_o1.types import UserError

log = logging.getLogger("semisam_o1")
REVIEW = "review"


def sample_app() -> type:
    """The class of the sample app `monaibundle` that MONAI Label brings along.

    Raises:
        UserError: it is not where MONAI Label installs it.
    """
    place = Path("monailabel", "sample-apps", "monaibundle", "main.py")
    found = [path for root in (sys.prefix, Path(sys.prefix, "local")) if (path := Path(root, place)).is_file()]
    if not found:
        raise UserError(f"MONAI Label's sample app is not at {Path(sys.prefix, place)}: install MONAI Label again.")
    spec = importlib.util.spec_from_file_location("monaibundle_main", found[0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MyApp


class Review(Strategy):
    """Hands out the image whose correction is expected to win most on those that nobody looked at."""

    def __init__(self, bundle_root: Path):
        super().__init__("The scan whose correction is expected to win most (after a training; before: the first)")
        self.bundle_root = bundle_root

    def __call__(self, request: Mapping[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        found = next_scan(self.bundle_root, datastore.get_unlabeled_images())
        if found.image is None:
            return None
        log.info("next: %s (%s); %d images are left to look at", found.image, found.reason, found.left)
        return {"id": found.image, "weight": found.left, "reason": found.reason, "left": found.left}


class ReviewApp(sample_app()):  # type: ignore[misc]
    """`monaibundle` with the bundle in ``app_dir``/model, the strategy "review", and a count of what is left.

    It needs no restart after the first training."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]):
        self.bundle_root = Path(app_dir, "model", MODEL)
        super().__init__(app_dir, studies, {"models": MODEL, "zoo_source": "local", "sam2": "false"} | conf)

    def init_infers(self) -> dict[str, Any]:
        self.served = self._on_disk()
        return super().init_infers()

    def info(self) -> dict[str, Any]:
        """What 3D Slicer asks first, the names of the classes among it."""
        self._read_again()
        return super().info()

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> Any:
        """A scan that cannot be labelled is answered with the sentence that `predict` prints; MONAI Label alone answers
        with a bare 500."""
        self._read_again()
        try:
            return super().infer(request, datastore)
        except Exception as error:
            if text := plainly(error):
                refuse(text, UNPROCESSABLE)
            raise

    def _read_again(self) -> None:
        """Use the bundle as it is on disk: MONAI Label alone reads its config when the server starts, and a training
        may have changed it since."""
        if self._on_disk() != self.served:
            log.info("the bundle has changed: its config is read again")
            self._infers = self.init_infers()

    def _on_disk(self) -> list[int]:
        """The times at which config and description of the bundle changed."""
        return [
            (self.bundle_root / "configs" / f"{name}.json").stat().st_mtime_ns for name in ("inference", "metadata")
        ]

    def init_strategies(self) -> dict[str, Strategy]:
        return {REVIEW: Review(self.bundle_root)} | super().init_strategies()

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        return super().next_sample(request if request.get("strategy") else request | {"strategy": REVIEW})

    def on_save_label(self, image_id: str, label_id: str) -> dict[str, Any]:
        """What the server answers when a label was saved: how many images are left to look at."""
        super().on_save_label(image_id, label_id)
        left = next_scan(self.bundle_root, self.datastore().get_unlabeled_images()).left
        log.info("label of %s saved; %d images are left to look at", image_id, left)
        return {"left": left}
