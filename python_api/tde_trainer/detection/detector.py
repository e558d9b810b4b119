"""A recipe's detector, and the ways in which it can be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from tde_trainer.detection.cascade import CascadeRoIHeads
from tde_trainer.detection.methods import METHODS, BoxClassification
from tde_trainer.detection.models import cascade_mask_rcnn
from tde_trainer.detection.schema import DetectionConfig
from tde_trainer.errors import UserError


def build_detector(
    config: DetectionConfig, method: str, class_counts: Tensor, images: int, *, fetch: bool = True
) -> GeneralizedRCNN:
    """An untrained one.

    Args:
        config: the recipe.
        method: a name of `METHODS`.
        class_counts: ``[C]`` int64, training images that show each class.
        images: for training, in all.
        fetch: see `models.cascade_mask_rcnn`.

    Raises:
        UserError: the head refuses its options, for example a representation that the heads do not divide.
    """
    rare = class_counts < config.loss.rare_share * images
    try:
        classification = BoxClassification(METHODS[method], config.head, config.loss, rare)
        return cascade_mask_rcnn(config.model, config.data, classification, fetch=fetch)
    except ValueError as error:
        raise UserError(f"head of method {method!r}: {error}") from error


@contextmanager
def read_with(detector: GeneralizedRCNN, alpha: float, *, exempt: bool = True) -> Iterator[None]:
    """Inference inside the block is TDE of strength ``alpha``, 0 for none.

    Args:
        detector: of `build_detector`.
        alpha: of every stage.
        exempt: leave the background out of it (Eq. 9). Without, its logit is one of Eq. 8 as those of all classes.
    """
    heads = [predictor.head for predictor in cast(CascadeRoIHeads, detector.roi_heads).predictors]
    before = [(head.alpha.item(), head.background_index) for head in heads]
    try:
        for head in heads:
            head.alpha = alpha
            head.background_index = head.background_index if exempt else None
        yield
    finally:
        for head, (own_alpha, background) in zip(heads, before, strict=True):
            head.alpha, head.background_index = own_alpha, background
