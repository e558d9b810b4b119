"""Which rank holds which classes."""

from __future__ import annotations

from typing import NamedTuple


class Shards(NamedTuple):
    """C classes over the ranks of a group, in order: as many to each as ``torch.chunk`` gives, so the last hold fewer.

    That is how a ``DTensor`` with ``Shard(0)`` lies, and what lets a checkpoint be read by another number of ranks.
    """

    classes: int
    ranks: int

    def of(self, rank: int) -> range:
        """The classes of a rank; none where there are fewer classes than ranks."""
        each = -(-self.classes // self.ranks)
        return range(min(rank * each, self.classes), min((rank + 1) * each, self.classes))

    @property
    def sizes(self) -> list[int]:
        """Number of classes of each rank."""
        return [len(self.of(rank)) for rank in range(self.ranks)]
