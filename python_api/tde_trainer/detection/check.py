"""Whether a recipe of detectors names what there is."""

from __future__ import annotations

import math

from tde_trainer.detection.methods import LOSSES, METHODS
from tde_trainer.detection.models import BACKBONES
from tde_trainer.detection.schema import DetectionConfig
from tde_trainer.detection.sets import SETS
from tde_trainer.errors import UserError, unknown


def check_detectors(config: DetectionConfig) -> None:
    """Whether all names are known.

    Raises:
        UserError: one is not, or no alpha can be chosen.
    """
    named = [("data.name", config.data.name, [*SETS]), ("model.name", config.model.name, [*BACKBONES])]
    named += [("method", method, [*METHODS]) for method in config.methods]
    named += [("loss.name", config.loss.name, [*LOSSES])] if config.loss.name else []
    for what, given, known in named:
        if given not in known:
            raise unknown(what, given, known)
    if config.head.alpha is None:
        if not SETS[config.data.name].val:
            raise UserError(f"head.alpha must be given: {config.data.name} has no validation images to choose it on")
        if not config.head.alphas or not all(0 <= alpha < math.inf for alpha in config.head.alphas):
            raise UserError(f"head.alphas={config.head.alphas} must be a non-empty list of finite numbers from 0")
