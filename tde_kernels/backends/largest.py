"""The largest logits, of some classes at a time: what is kept is ``k`` of each row.

Value and class are one integer, in the order that is wanted: larger values first, of equal ones the lower class. So the
largest of a chunk and those kept are merged by ``torch.topk`` alone, which leaves ties open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tde_kernels.backends.by_classes import class_chunks, some_classes
from tde_kernels.backends.core import Kept
from tde_kernels.backends.grouped import NO_INTAKE, Grouped, Intake
from tde_kernels.backends.loss_passes import LossPasses, scaled

_CLASSES = 2**32  # more than there are


def _keys(values: Tensor, classes: Tensor) -> Tensor:
    """int64 keys ``[B, N]`` of values and their classes. NaN is above all numbers, as for torch."""
    values = values.float()
    values = torch.where(values.isnan(), torch.nan, values + 0.0)  # one NaN, and one zero
    bits = values.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # floats in the order of their bits as integers
    return ordered.long() * _CLASSES + (_CLASSES - 1 - classes)


def _largest(keys: Tensor, k: int) -> Tensor:
    return keys.topk(min(k, keys.shape[1]), dim=1).values


class _Chosen(NamedTuple):
    """The ``k + 1`` largest of a row, or all, as torch chooses them; which are ``above`` the next is for sure.

    Of equal ones, and of NaN, torch leaves the order open.
    """

    values: Tensor  # [B, k + 1], in descending order
    places: Tensor
    above: Tensor  # [B, k] bool

    @classmethod
    def of(cls, z: Tensor, k: int) -> _Chosen | None:
        """None on a GPU, where looking would synchronise."""
        if z.device.type != "cpu":
            return None
        values, places = z.topk(min(k + 1, z.shape[1]), dim=1)
        return cls(values, places, values[:, :-1] > values[:, 1:])


def _largest_of(z: Tensor, chosen: _Chosen | None, first: int, k: int) -> Tensor:
    """Keys of the ``k`` largest of ``z [B, N]``, the logits of the classes from ``first`` on, or of all there are."""
    if chosen is not None and chosen.above[:, k - 1 : k].all():  # these, in whatever order
        keys = _keys(chosen.values[:, :k], first + chosen.places[:, :k])
    else:
        keys = _keys(z, torch.arange(first, first + z.shape[1], device=z.device))
    return _largest(keys, k)


def topk(
    passes: LossPasses,
    logits: Callable[[Grouped, Intake, torch.dtype], tuple[Tensor, Kept, Tensor | None]],
    p: Grouped,
    *,
    k: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See ``tde::topk``; ``logits`` are the backend's own, where those of all classes fit in the workspace."""
    inside = passes.multiplied_as(dtype)
    share = 1 if p.x.device.type == "cpu" else 8  # a key is as large as two to four logits, and made of such
    chunks = list(class_chunks(p, inside, passes.workspace // share))
    if len(chunks) == 1:
        z, _, _ = logits(p, NO_INTAKE, dtype)
        chosen = _Chosen.of(z, k)
        if chosen is not None and chosen.above.all():
            return chosen.values[:, :k].contiguous(), chosen.places[:, :k].contiguous()
        kept = _largest_of(z, chosen, 0, k)
    else:
        x_hat, _, _ = passes.scaled_features(p.features, inside, NO_INTAKE)
        kept = torch.empty((p.x.shape[0], 0), dtype=torch.int64, device=p.x.device)
        for chunk in chunks:
            w_hat, _ = scaled(passes, some_classes(p.weights, chunk), inside)
            z = passes.product(x_hat, w_hat).to(dtype)
            found = _largest_of(z, _Chosen.of(z, k), chunk.start, k)
            kept = _largest(torch.cat([kept, found], 1), k)
    ordered = (kept // _CLASSES).int()  # rounded down: the class is what is left
    values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return values.to(dtype), _CLASSES - 1 - kept % _CLASSES
