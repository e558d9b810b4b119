"""digits_lt: scikit-learn's 1,797 real 8x8 digits, made long-tailed."""

from __future__ import annotations

import torch
from torch import Tensor

from tde_trainer.data.base import ImageDataset, LongTailedData
from tde_trainer.data.longtail import long_tailed_counts
from tde_trainer.data.pipeline import Pipeline
from tde_trainer.errors import UserError
from tde_trainer.schema import DataConfig

TEST_SEED = 0
PIPELINE = Pipeline(mean=[0.0], std=[16 / 255], padding=1)  # 0 .. 16 to 0 .. 1, shifted by up to a pixel


def digits_lt(config: DataConfig, seed: int) -> LongTailedData:
    """Split the digits and cut the training part to a long tail.

    The test images are the same for every seed, so that nothing chosen on one seed's validation split has met
    another's test. The seed shuffles the others, per class, into ``val_per_class`` for validation and the rest for
    training. ``n_max`` is what the smallest class has left, so that the counts follow the formula exactly. Classes
    keep label order, as in CIFAR-LT: 0 is the head, 9 the tail.

    Raises:
        UserError: the splits ask for more images than there are, or leave a class without any.
    """
    from sklearn.datasets import load_digits  # takes a second: only for whom it serves

    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)  # [N, 1, 8, 8] in 0 .. 16
    labels = torch.from_numpy(digits.target).long()
    held_out = config.test_per_class + config.val_per_class
    n_max = int(labels.bincount().min()) - held_out
    counts = long_tailed_counts(n_max, len(digits.target_names), config.ratio)
    if min(counts) < 1:
        raise UserError(
            f"data.test_per_class={config.test_per_class}, data.val_per_class={config.val_per_class} and "
            f"data.ratio={config.ratio:g} leave class counts {counts}: every class needs at least one training image"
        )
    fixed, seeded = torch.Generator().manual_seed(TEST_SEED), torch.Generator().manual_seed(seed)
    parts: dict[str, list[Tensor]] = {"test": [], "val": [], "train": []}
    for label, count in enumerate(counts):
        members = _shuffled((labels == label).nonzero().flatten(), fixed)
        test, others = members.tensor_split([config.test_per_class])
        val, rest = _shuffled(others, seeded).tensor_split([config.val_per_class])
        parts["test"].append(test)
        parts["val"].append(val)
        parts["train"].append(rest[:count])
    index = {name: torch.cat(pieces) for name, pieces in parts.items()}
    splits = {name: ImageDataset(images[chosen], labels[chosen]) for name, chosen in index.items()}
    return LongTailedData(**splits, class_names=tuple(map(str, digits.target_names)), pipeline=PIPELINE)


def _shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    return values[torch.randperm(len(values), generator=generator)]
