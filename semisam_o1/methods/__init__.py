"""Semi-supervised methods. Each is a loss and a handler for MONAI's trainer."""

from semisam_o1.methods.average import WeightAverage
from semisam_o1.methods.dan import AdversarialLoss, AdversarialNetwork
from semisam_o1.methods.dtc import DualTaskLoss
from semisam_o1.methods.mean_teacher import MeanTeacher, MeanTeacherLoss
from semisam_o1.methods.state import TrainingState
from semisam_o1.methods.two_stream import LossProgress, PolynomialDecay, TwoStreamLoss, TwoStreamSampler, prepare_batch
from semisam_o1.methods.ua_mt import UncertaintyAwareLoss, UncertaintyAwareTeacher

__all__ = [
    "AdversarialLoss",
    "AdversarialNetwork",
    "DualTaskLoss",
    "LossProgress",
    "MeanTeacher",
    "MeanTeacherLoss",
    "PolynomialDecay",
    "TrainingState",
    "TwoStreamLoss",
    "TwoStreamSampler",
    "UncertaintyAwareLoss",
    "UncertaintyAwareTeacher",
    "WeightAverage",
    "prepare_batch",
]
