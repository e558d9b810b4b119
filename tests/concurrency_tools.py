"""Shared by the tests of threads, processes and signals. Worker processes import it, and so wait for all it imports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tde_kernels import FusedTDEHead

BATCH, DIM, CLASSES = 700, 48, 70  # enough that every pass and product is worth several threads


def batch(index: int) -> tuple[Tensor, Tensor]:
    """Features and labels of a thread; whole numbers, whose sums do not depend on their order."""
    generator = torch.Generator().manual_seed(index)
    x = torch.randint(-8, 9, (BATCH, DIM), generator=generator) + 1
    return x.float(), torch.randint(CLASSES, (BATCH,), generator=generator)


def head_of(backend: str | None = None, seed: int = 0, **options: Any) -> FusedTDEHead:
    """A head whose average has taken something in; no thread draws from the random numbers that all share."""
    weight = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(seed))
    return FusedTDEHead.from_weight(weight, backend=backend, **options).fit_direction(batch(99)[0])


def assert_same_bits(got: Sequence[Sequence[Tensor]], want: Sequence[Sequence[Tensor]]) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """torch computes on ``number`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Predicted(Dataset[Tensor]):
    """Logits of each batch of ``features [N, B, D]``, computed in the worker."""

    def __init__(self, head: FusedTDEHead, features: Tensor) -> None:
        self.head, self.features = head, features

    def __len__(self) -> int:
        return len(self.features)

    @torch.no_grad()
    def __getitem__(self, index: int) -> Tensor:
        logits: Tensor = self.head(self.features[index])
        return logits
