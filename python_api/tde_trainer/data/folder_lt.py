"""An ImageFolder tree whose training split is long-tailed already: ``ROOT/train``, ``ROOT/test`` or ``ROOT/val``."""

from __future__ import annotations

import torch

from tde_trainer.data.base import LongTailedData
from tde_trainer.data.folder import folder_splits
from tde_trainer.data.pipeline import Pipeline
from tde_trainer.schema import DataConfig

# ImageNet's, which photographs share well enough
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VAL_SEED = 0


def folder_lt(config: DataConfig, seed: int) -> LongTailedData:
    """All of the training images; validation images are held out of the test split, the same for every seed.

    Raises:
        UserError: a split is missing, unreadable, or of other classes.
    """
    train, test = folder_splits(config)
    val, test_images = test.held_out(config.val_per_class, VAL_SEED)
    pipeline = Pipeline(MEAN, STD, padding=config.image_size // 8, flip=True)
    return LongTailedData(train.read(torch.arange(len(train.labels))), val, test_images, train.class_names, pipeline)
