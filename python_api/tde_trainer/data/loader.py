"""Every data loader of the trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler

from tde_trainer.data.base import Batch, Images


def collated(batch: Any) -> Any:
    """A batch of `Images` is one already."""
    return batch


def make_loader(
    data: Images,
    batch_size: int = 1,
    *,
    shuffle: bool = False,
    sampler: Sampler[int] | None = None,
    batch_sampler: BatchSampler | None = None,
) -> DataLoader[Batch]:
    """Batches of ``data`` in its own order, shuffled, as ``sampler`` draws them, or those of ``batch_sampler``."""
    return DataLoader(
        data,
        batch_size,
        shuffle=shuffle,
        sampler=sampler,
        batch_sampler=batch_sampler,
        num_workers=data.workers,
        collate_fn=collated,
        pin_memory=torch.cuda.is_available(),
    )
