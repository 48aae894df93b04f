"""Lets MONAI Label import torchvision where its compiled operators do not fit the installed torch, e.g. a CPU build.

Python loads this module at its start if its folder is in PYTHONPATH. Nothing that the tests run calls the operators;
torchvision only has to find them declared.
"""

import importlib.abc
import sys


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds nothing. Declares torchvision's operators just before torchvision is imported."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            kept.append(self.library)
            self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


kept = []  # a declaration lasts as long as its library
sys.meta_path.insert(0, DeclareOperators())
