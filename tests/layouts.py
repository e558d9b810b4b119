"""Where a tensor's elements may lie: views of memory that is otherwise NaN, holding the values of ``a``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Layout = Callable[[Tensor], Tensor]


def _nan(a: Tensor, *shape: int) -> Tensor:
    return torch.full(shape, float("nan"), dtype=a.dtype, device=a.device)


def sliced(a: Tensor) -> Tensor:
    wide = _nan(a, *a.shape[:-1], a.shape[-1] + 7)
    wide[..., 3:-4] = a
    return wide[..., 3:-4]


def transposed(a: Tensor) -> Tensor:
    return a.mT.contiguous().mT if a.dim() > 1 else a


def every_other_row(a: Tensor) -> Tensor:
    wide = _nan(a, 2 * a.shape[0], *a.shape[1:])
    wide[::2] = a
    return wide[::2]


def strided_columns(a: Tensor) -> Tensor:
    wide = _nan(a, *a.shape, 2)
    wide[..., 0] = a
    return wide[..., 0]


def shifted(a: Tensor) -> Tensor:
    """From an odd element of the memory on, which is then not aligned."""
    wide = _nan(a, a.numel() + 1)
    wide[1:] = a.flatten()
    return wide[1:].view(a.shape)


def negated(a: Tensor) -> Tensor:
    """Memory of the negative, read through torch's negative bit."""
    return torch._neg_view(-a)


def expanded(a: Tensor) -> Tensor:
    """All rows are the first: stride 0."""
    return a[:1].expand(a.shape) if a.dim() > 1 else a


def overlapping(a: Tensor) -> Tensor:
    """Each row begins one element after the one before it."""
    if a.dim() < 2 or a.numel() == 0:
        return a
    rows, columns = a.shape[:-1].numel(), a.shape[-1]
    memory = torch.cat([a.flatten(0, -2)[0], a.flatten(0, -2)[1:, -1]])
    return memory.as_strided((rows, columns), (1, 1)).unflatten(0, a.shape[:-1])


KEEPING: dict[str, Layout] = {
    "contiguous": torch.clone,
    "sliced": sliced,
    "transposed": transposed,
    "every other row": every_other_row,
    "strided columns": strided_columns,
    "shifted": shifted,
    "negated": negated,
}
# Those whose elements share memory, so that values change with the layout
SHARING: dict[str, Layout] = {"expanded": expanded, "overlapping": overlapping}
