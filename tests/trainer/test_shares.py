"""How ranks share out a batch: nothing lost, nothing twice, and the mean over ranks is that over the batch."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from tde_trainer.errors import UserError
from tde_trainer.shares import RankBatches, check_shares
from torch.utils.data import BatchSampler, SequentialSampler


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
