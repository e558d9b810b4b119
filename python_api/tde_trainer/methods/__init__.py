"""Methods by name: how the classifier is built, trained and read."""

from __future__ import annotations

from tde_trainer.methods.base import Batch, Draw, Method, Stage
from tde_trainer.methods.bbn import BBN
from tde_trainer.methods.class_balanced import ClassBalanced
from tde_trainer.methods.focal import Focal
from tde_trainer.methods.ldam import LDAM
from tde_trainer.methods.linear import Linear
from tde_trainer.methods.mixup import Mixup
from tde_trainer.methods.normalised import Normalised
from tde_trainer.methods.priors import BalancedSoftmax, LogitAdjustment

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
}

__all__ = ["METHODS", "Batch", "Draw", "Method", "Stage"]
