"""Which rank holds which classes."""

from __future__ import annotations

from typing import NamedTuple


class Shards(NamedTuple):
    """C classes over the ranks of a group, in order: as many to each as ``torch.chunk`` gives, so the last hold fewer.

    That is how a ``DTensor`` with ``Shard(0)`` lies, and what lets a checkpoint be read by another number of ranks.
    """

    classes: int
    ranks: int

    @property
    def each(self) -> int:
        """Classes of every rank but the last."""
        return -(-self.classes // self.ranks)

    def of(self, rank: int) -> range:
        """The classes of a rank; none where there are too few for all ranks."""
        return range(min(rank * self.each, self.classes), min((rank + 1) * self.each, self.classes))

    @property
    def sizes(self) -> list[int]:
        """Number of classes of each rank."""
        return [len(self.of(rank)) for rank in range(self.ranks)]
