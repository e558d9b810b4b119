"""Augmentation and normalisation: against crops and flips made pixel by pixel."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
import torch
from tde_trainer.config import load_config
from tde_trainer.data import DATASETS, Pipeline
from tde_trainer.device import make_accelerator
from tde_trainer.evaluate import extract
from tde_trainer.network import build_network
from tde_trainer.train import Training
from torch import Tensor
from torch.optim import SGD
from torchvision.transforms.v2 import functional
from trainer_tools import TINY

BYTES = Pipeline([0.0] * 2, [1 / 255] * 2, padding=1, flip=True)  # leaves the values of the bytes as they are
SIZE = (2, 3, 4)


def distinct(count: int) -> Tensor:
    """Images none of whose pixels has the value of another, or of the padding."""
    return torch.arange(1, 1 + count * 24, dtype=torch.uint8).view(count, *SIZE)


def crop(image: Tensor, down: int, right: int, flip: bool) -> Tensor:
    """``image`` as a window sees it that has moved so far from it, over black; then mirrored."""
    channels, height, width = image.shape
    seen = torch.zeros(image.shape)
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                row, column = y + down, x + right
                if 0 <= row < height and 0 <= column < width:
                    seen[c, y, width - 1 - x if flip else x] = image[c, row, column]
    return seen


def crops(image: Tensor, padding: int, flips: tuple[bool, ...]) -> list[bytes]:
    shifts = range(-padding, padding + 1)
    return [crop(image, y, x, flip).numpy().tobytes() for y in shifts for x in shifts for flip in flips]


def shown(images: Tensor, pipeline: Pipeline = BYTES) -> list[bytes]:
    return [image.numpy().tobytes() for image in pipeline(images, training=True).round()]


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("flips", [(False,), (False, True)], ids=["", "flip"])
def test_every_crop_is_as_likely_as_any_other_and_there_are_no_others(padding: int, flips: tuple[bool, ...]) -> None:
    image, wanted = distinct(1), crops(distinct(1)[0], padding, flips)
    each = 400
    pipeline = replace(BYTES, padding=padding, flip=len(flips) > 1)
    counted = Counter(shown(image.expand(each * len(wanted), -1, -1, -1), pipeline))
    # An edge that shows nothing but padding looks alike from several places
    expected = Counter(wanted)
    assert counted.keys() == expected.keys()
    for look, ways in expected.items():
        assert abs(counted[look] - ways * each) < 5 * (ways * each) ** 0.5


def test_every_sample_is_a_crop_of_itself() -> None:
    images = distinct(10)
    for _ in range(20):
        for image, seen in zip(images, shown(images), strict=True):
            assert seen in crops(image, 1, (False, True))


def test_samples_of_a_batch_are_drawn_each_for_itself() -> None:
    assert len(set(shown(distinct(1).expand(100, -1, -1, -1)))) > 10


def test_the_window_moves_both_ways_by_draws_of_its_own() -> None:
    looks = set(shown(distinct(1).expand(500, -1, -1, -1)))
    for down, right in ((-1, 1), (1, -1), (1, 1), (0, 1)):
        assert crop(distinct(1)[0], down, right, False).numpy().tobytes() in looks


def test_evaluation_changes_nothing_and_draws_nothing() -> None:
    images, state = distinct(10), torch.get_rng_state()
    assert torch.equal(BYTES(images, training=False).round(), images.float())
    assert torch.equal(torch.get_rng_state(), state)


def test_without_padding_and_flip_training_images_are_left_alone() -> None:
    pipeline, images = replace(BYTES, padding=0, flip=False), distinct(10)
    assert torch.equal(pipeline(images, training=True), pipeline(images, training=False))


def test_pixels_are_normalised_per_channel() -> None:
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    images = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    wanted = torch.empty(images.shape, dtype=torch.float64)
    for channel in range(3):
        wanted[:, channel] = (images[:, channel].double() / 255 - mean[channel]) / std[channel]
    for training in (False, True):
        seen = Pipeline(mean, std)(images, training=training)
        assert seen.dtype == torch.float32
        torch.testing.assert_close(seen.double(), wanted, rtol=1e-5, atol=1e-6)


def test_padding_is_black_not_the_mean() -> None:
    pipeline = Pipeline([0.5], [0.25], padding=1)
    seen = pipeline(torch.full((200, 1, 2, 2), 255, dtype=torch.uint8), training=True)
    assert set(seen.flatten().tolist()) == {-2.0, 2.0}


COLOURS = Pipeline([0.0] * 3, [1.0] * 3, jitter=0.4)


def test_colours_are_scaled_as_torchvision_does_it() -> None:
    images = torch.randint(256, (20, 3, 5, 6), dtype=torch.uint8)
    torch.manual_seed(1)
    seen = COLOURS(images, training=True)
    torch.manual_seed(1)
    factors = torch.empty(3, 20).uniform_(0.6, 1.4)
    for image, look, (brightness, contrast, saturation) in zip(images, seen, factors.T.tolist(), strict=True):
        wanted = functional.adjust_brightness(image.double() / 255, brightness)
        wanted = functional.adjust_saturation(functional.adjust_contrast(wanted, contrast), saturation)
        torch.testing.assert_close(look.double(), wanted, rtol=0, atol=1e-6)


def test_every_sample_has_a_brightness_of_its_own() -> None:
    grey = torch.full((2000, 3, 2, 2), 100, dtype=torch.uint8)  # which contrast and saturation leave as it is
    seen = COLOURS(grey, training=True).flatten(1) * 2.55
    assert (seen - seen[:, :1]).abs().max() < 1e-5
    factors = seen[:, 0]
    assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4 and abs(factors.mean() - 1) < 0.02


def test_colours_stay_within_bounds_and_are_left_alone_in_evaluation() -> None:
    images = torch.randint(256, (50, 3, 4, 4), dtype=torch.uint8)
    seen = COLOURS(images, training=True)
    assert seen.min() == 0 and seen.max() == 1
    torch.testing.assert_close(COLOURS(images, training=False), images / 255)
    assert COLOURS(images[:0], training=True).shape == (0, 3, 4, 4)


def test_the_same_seed_gives_the_same_batch_and_another_another() -> None:
    images, batches = distinct(10), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        batches.append(BYTES(images, training=True))
    assert torch.equal(batches[0], batches[1]) and not torch.equal(batches[0], batches[2])


def test_stored_images_are_not_written_to() -> None:
    images = distinct(10)
    BYTES(images, training=True)
    assert images.dtype == torch.uint8 and torch.equal(images, distinct(10))


@pytest.mark.parametrize("batch", [0, 1])
def test_batches_of_none_and_of_one(batch: int) -> None:
    assert BYTES(distinct(1)[:batch], training=True).shape == (batch, *SIZE)


@dataclass(frozen=True)
class Spy(Pipeline):
    """Writes down what it was called for."""

    calls: list[tuple[bool, Tensor]] = field(default_factory=list)

    def __call__(self, images: Tensor, *, training: bool) -> Tensor:
        seen = super().__call__(images, training=training)
        self.calls.append((training, seen))
        return seen


def test_training_augments_and_evaluation_does_not() -> None:
    config, accelerator = load_config("digits_lt", TINY), make_accelerator("fp32")
    data = DATASETS["digits_lt"](config.data, 0)
    spy = Spy(data.pipeline.mean, data.pipeline.std, data.pipeline.padding)
    network = build_network(config, "linear", data.channels, data.num_classes)
    training = Training(
        replace(data, pipeline=spy), network, SGD(network.parameter_groups(), 0.1), config, accelerator, 0
    )
    epochs = []
    for epoch in (0, 1, 0):
        spy.calls.clear()
        training.epoch(epoch)
        assert all(augmented for augmented, _ in spy.calls)
        epochs.append(torch.cat([seen for _, seen in spy.calls]))
    assert torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])
    spy.calls.clear()
    extract(network, data.test, spy, 64, accelerator)
    assert not any(augmented for augmented, _ in spy.calls)
    torch.testing.assert_close(torch.cat([seen for _, seen in spy.calls]), data.test.images / 16)
