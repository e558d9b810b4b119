"""How ranks share out a batch: nothing lost, nothing twice, and the mean over ranks is that over the batch."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import chain

import pytest
import torch
from tde_trainer.config import load_config
from tde_trainer.data import DATASETS
from tde_trainer.errors import UserError
from tde_trainer.network import build_network
from tde_trainer.shares import RankBatches, check_lone_image, check_shares
from torch.utils.data import BatchSampler, SequentialSampler
from trainer_tools import SECOND_STAGE, TINY


def shared(images: int, batch_size: int, ranks: int) -> list[RankBatches]:
    sampler = SequentialSampler(range(images))
    return [RankBatches(sampler, batch_size, rank, ranks) for rank in range(ranks)]


@pytest.mark.parametrize(
    ("images", "batch_size", "ranks"), [(53, 12, 2), (48, 12, 2), (54, 12, 3), (5, 12, 1), (7, 8, 2)]
)
def test_ranks_together_see_the_batches_of_one_process(images: int, batch_size: int, ranks: int) -> None:
    whole = list(BatchSampler(SequentialSampler(range(images)), batch_size, drop_last=False))
    each = shared(images, batch_size, ranks)
    assert {len(batches) for batches in each} == {len(whole)}
    for parts, batch in zip(zip(*each, strict=True), whole, strict=True):
        assert list(chain(*parts)) == batch
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("images", "ranks"), [(53, 2), (54, 3), (53, 1)])
def test_the_mean_over_ranks_is_that_over_the_batch(images: int, ranks: int) -> None:
    losses = torch.rand(images, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    each = shared(images, 12, ranks)
    for step, parts in enumerate(zip(*each, strict=True)):
        means = [losses[part].mean() * batches.weight(step) for part, batches in zip(parts, each, strict=True)]
        torch.testing.assert_close(torch.stack(means).mean(), losses[12 * step : 12 * (step + 1)].mean())


@pytest.mark.parametrize("images", [49, 51])
def test_a_last_batch_too_small_for_the_ranks_is_refused(images: int) -> None:
    wanted = f"train.batch_size=12 leaves {images % 12} of {images} training images .* at least 2 for each of the 2"
    with pytest.raises(UserError, match=wanted):
        check_shares(12, images, 2)
    for enough in (48, 52):
        check_shares(12, enough, 2)
    check_shares(12, images, 1)  # one process takes what there is


@pytest.mark.parametrize(
    ("method", "model", "batch_size", "trainable"),
    [
        ("linear", "small_conv", 356, False),  # its batch norm is over vectors
        ("linear", "small_conv", 1, False),
        ("linear", "small_conv", 355, True),
        ("linear", "resnet32", 356, True),
        ("bbn", "small_conv", 356, True),  # to each image it draws another
        ("crt", "small_conv", 356, True),  # of a second stage the backbone learns nothing
        ("oltr", "small_conv", 356, False),
    ],
)
def test_a_lone_image_is_refused_where_batch_norm_has_no_statistics_of_it(
    method: str, model: str, batch_size: int, trainable: bool
) -> None:
    first = ["from=RUN"] if method in SECOND_STAGE else []
    given = [*TINY, f"method={method}", f"model.name={model}", f"train.batch_size={batch_size}", *first]
    config = load_config("digits_lt", given)
    data = DATASETS["digits_lt"](config.data, 0)
    network = build_network(config, method, data.channels, data.num_classes)
    refused = f"train.batch_size={batch_size} leaves 1 of 357 training images .*, on which small_conv cannot be trained"
    with nullcontext() if trainable else pytest.raises(UserError, match=refused):
        check_lone_image(network, data, config)
