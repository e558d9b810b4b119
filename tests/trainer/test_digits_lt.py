"""The long tail and its splits."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from tde_trainer.data.digits_lt import digits_lt
from tde_trainer.data.longtail import long_tailed_counts, shot_masks
from tde_trainer.errors import UserError
from tde_trainer.schema import DataConfig
from torch import Tensor
from torch.nn.functional import pad


def images(stack: Iterable[Tensor]) -> set[bytes]:
    return {image.numpy().tobytes() for image in stack}


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
    train, val, test = (images(split.images) for split in (data.train, data.val, data.test))
    assert not (train & val or train & test or val & test)


def test_the_seed_moves_training_and_validation_but_never_the_test_images() -> None:
    first, again, other = (digits_lt(DataConfig(), seed) for seed in (0, 0, 1))
    assert torch.equal(first.train.images, again.train.images)
    assert images(first.train.images) != images(other.train.images)
    assert images(first.val.images) != images(other.val.images)
    assert torch.equal(first.test.images, other.test.images)
    assert not images(other.val.images) & images(first.test.images)


def test_only_training_images_are_shifted() -> None:
    data = digits_lt(DataConfig(), seed=0)
    assert data.train.images.dtype == torch.uint8 and data.train.images.max() == 16
    image = data.train.images[:1].expand(20, -1, -1, -1)
    assert len(images(data.pipeline(image, training=True))) > 1
    for split in (data.train, data.val, data.test):
        torch.testing.assert_close(data.pipeline(split.images, training=False), split.images / 16)


def test_digits_are_shifted_by_a_pixel_at_most_and_never_mirrored() -> None:
    data = digits_lt(DataConfig(), seed=0)
    image = data.train.images[:1]
    padded = pad(image, (1, 1, 1, 1))
    shifts = images(padded[..., y : y + 8, x : x + 8] for y in range(3) for x in range(3))
    shown = data.pipeline(image.expand(200, -1, -1, -1), training=True)
    assert images((16 * shown).round().byte()[:, None]) == shifts


@pytest.mark.parametrize(
    "config", [DataConfig(ratio=500), DataConfig(test_per_class=170), DataConfig(val_per_class=200)]
)
def test_a_class_without_training_images_is_refused(config: DataConfig) -> None:
    with pytest.raises(UserError, match="at least one training image"):
        digits_lt(config, seed=0)
