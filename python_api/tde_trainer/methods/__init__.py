"""Methods by name: how the classifier is built, trained and read."""

from __future__ import annotations

from tde_trainer.methods.base import Batch, Draw, Method, Stage
from tde_trainer.methods.bbn import BBN
from tde_trainer.methods.class_balanced import ClassBalanced
from tde_trainer.methods.decouple import ClassifierRetraining, Joint, LearnableWeightScaling, TauNorm
from tde_trainer.methods.focal import Focal
from tde_trainer.methods.ldam import LDAM
from tde_trainer.methods.linear import Linear
from tde_trainer.methods.mixup import Mixup
from tde_trainer.methods.ncm import NearestClassMean
from tde_trainer.methods.normalised import Normalised
from tde_trainer.methods.oltr import OLTR, FineTunedOLTR
from tde_trainer.methods.priors import BalancedSoftmax, LogitAdjustment
from tde_trainer.methods.two_stage import SecondStage, StageOne

METHODS: dict[str, Method] = {
    "linear": Linear(),
    "focal": Focal(),
    "mixup": Mixup(),
    "class_balanced": ClassBalanced(),
    "ldam": LDAM(),
    "ldam_drw": LDAM(deferred=True),
    "bbn": BBN(),
    "balanced_softmax": BalancedSoftmax(),
    "logit_adjustment": LogitAdjustment(),
    "cosine": Normalised("cosine"),
    "capsule": Normalised("capsule"),
    "deconfound": Normalised("deconfound"),
    "joint": Joint(),
    "ncm": NearestClassMean(),
    "crt": ClassifierRetraining(),
    "tau_norm": TauNorm(),
    "lws": LearnableWeightScaling(),
    "oltr": FineTunedOLTR(),
    "decouple_oltr": OLTR(),
}

__all__ = ["METHODS", "Batch", "Draw", "Method", "SecondStage", "Stage", "StageOne"]
