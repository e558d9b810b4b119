"""How the ranks share out a batch, so that a recipe means the same on any number of them.

Accelerate fills up the last batch of an epoch with images from its beginning; here it stays as small as it is in one
process, and every rank has its share of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import BatchSampler, Sampler

from tde_trainer.data import LongTailedData, make_loader
from tde_trainer.data.base import Images
from tde_trainer.errors import UserError
from tde_trainer.methods import Stage
from tde_trainer.network import Network
from tde_trainer.schema import Config

LEAST = 2  # images of a rank: batch norm has no statistics of one


def check_shares(batch_size: int, images: int, ranks: int) -> None:
    """Whether every rank gets its share of an epoch's last batch.

    Args:
        batch_size: over all ranks, which divide it.
        images: of an epoch.
        ranks: processes.

    Raises:
        UserError: it is too small for them.
    """
    last = images % batch_size
    if ranks > 1 and 0 < last < LEAST * ranks:
        raise UserError(
            f"train.batch_size={batch_size} leaves {last} of {images} training images for an epoch's last batch: "
            f"wanted are at least {LEAST} for each of the {ranks} processes"
        )


def check_lone_image(network: Network, data: LongTailedData, config: Config) -> None:
    """Whether one process can train ``network`` on an epoch's last batch where that is a single image.

    Over maps of several pixels batch norm has statistics of one image too, so this is for the network to say.

    Raises:
        UserError: it can't.
    """
    batch_size, images = config.train.batch_size, len(data.train)
    if (images % batch_size or batch_size) != 1:
        return
    image, target = data.train.evaluated()[torch.zeros(1, dtype=torch.int64)]
    pixels, stage = data.pipeline(image, training=True), Stage(data.class_counts, 0.0, config.loss)
    batch = network.method.compose(pixels, target, stage, lambda power: (pixels, target))
    try:
        with torch.no_grad():
            network.train().backbone(batch.images)
    except ValueError as error:
        raise UserError(
            f"train.batch_size={batch_size} leaves 1 of {images} training images for an epoch's last batch, on which "
            f"{config.model.name} cannot be trained: {error}"
        ) from error


class RankBatches(BatchSampler):
    """This rank's part of each batch, contiguous, its length within one of the others'.

    Args:
        sampler: the same on every rank.
        batch_size: over all ranks.
        rank: whose batches these are.
        ranks: how many there are.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, rank: int, ranks: int) -> None:
        super().__init__(sampler, batch_size, drop_last=False)
        self.rank, self.ranks = rank, ranks

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            # One without a share looks on, at an image that weighs nothing: the others wait for its gradients.
            yield batch[self._part(len(batch))] or batch[:1]

    def weight(self, step: int) -> float:
        """Of this rank's mean over its share of that batch, for the mean over ranks to be that over the batch."""
        batch: int = min(self.batch_size, len(self.sampler) - step * self.batch_size)  # type: ignore[arg-type]
        part = self._part(batch)
        mine: int = part.stop - part.start
        return mine * self.ranks / batch

    def _part(self, batch: int) -> slice:
        return slice(batch * self.rank // self.ranks, batch * (self.rank + 1) // self.ranks)


def training_loader(images: Images, batches: RankBatches, accelerator: Accelerator) -> Any:
    """This rank's batches on its device; a random sampler follows seed and epoch alone."""
    return prepare_data_loader(
        make_loader(images, batch_sampler=batches),
        accelerator.device,
        num_processes=1,  # they are shared out already
        process_index=0,
        put_on_device=True,
        use_seedable_sampler=True,
        non_blocking=accelerator.non_blocking,
    )
