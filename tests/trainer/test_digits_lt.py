"""The long tail and its splits."""

from __future__ import annotations

import pytest
import torch
from tde_trainer.data import ImageDataset
from tde_trainer.data.digits_lt import digits_lt
from tde_trainer.data.longtail import long_tailed_counts, shot_masks
from tde_trainer.errors import UserError
from tde_trainer.schema import DataConfig


def images(split: ImageDataset) -> set[bytes]:
    return {image.numpy().tobytes() for image in split.images}


def test_the_formula_gives_the_published_counts_of_cifar10_lt() -> None:
    assert long_tailed_counts(5000, 10, 100) == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert sum(long_tailed_counts(500, 100, 50)) == 12608


def test_counts_follow_the_formula_and_held_out_splits_are_balanced() -> None:
    data = digits_lt(DataConfig(), seed=0)
    assert data.class_counts.tolist() == long_tailed_counts(114, 10, 50)
    assert data.val.labels.bincount().tolist() == [20] * 10
    assert data.test.labels.bincount().tolist() == [40] * 10
    assert all(mask.any() for mask in shot_masks(data.class_counts).values())


def test_no_image_is_in_two_splits() -> None:
    data = digits_lt(DataConfig(), seed=3)
    train, val, test = images(data.train), images(data.val), images(data.test)
    assert not (train & val or train & test or val & test)


def test_the_seed_moves_training_and_validation_but_never_the_test_images() -> None:
    first, again, other = (digits_lt(DataConfig(), seed) for seed in (0, 0, 1))
    assert torch.equal(first.train.images, again.train.images)
    assert images(first.train) != images(other.train) and images(first.val) != images(other.val)
    assert torch.equal(first.test.images, other.test.images)
    assert not images(other.val) & images(first.test)


def test_only_training_images_are_shifted() -> None:
    data = digits_lt(DataConfig(), seed=0)
    torch.manual_seed(0)
    assert any(not torch.equal(data.train[0][0], data.train[0][0]) for _ in range(20))
    assert torch.equal(data.test[0][0], data.test.images[0]) and torch.equal(data.val[0][0], data.val.images[0])


@pytest.mark.parametrize(
    "config", [DataConfig(ratio=500), DataConfig(test_per_class=170), DataConfig(val_per_class=200)]
)
def test_a_class_without_training_images_is_refused(config: DataConfig) -> None:
    with pytest.raises(UserError, match="at least one training image"):
        digits_lt(config, seed=0)
