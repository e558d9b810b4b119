"""The largest logits, of some classes at a time: what is kept is ``k`` of each row.

Value and class are one integer, in the order that is wanted: larger values first, of equal ones the lower class. So the
largest of a chunk and those kept are merged by ``torch.topk`` alone, which leaves ties open.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tde_kernels.backends.by_classes import class_chunks, some_classes
from tde_kernels.backends.grouped import Grouped, Intake
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


def _by_torch(z: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """Values and places of the ``k`` largest of ``z [B, N]`` as torch chooses them, or None where it may be wrong.

    That is where the last place is tied. On a GPU looking would synchronise.
    """
    if z.device.type != "cpu":
        return None
    values, places = z.topk(min(k, z.shape[1]), dim=1)
    last = values[:, -1:]
    shared = (z == last).sum(1) > (values == last).sum(1)
    return None if (shared | last[:, 0].isnan()).any() else (values, places)


def _ties(values: Tensor) -> bool:
    """Whether neighbours in descending ``values [B, K]`` are equal, or not a number."""
    return bool((values[:, 1:] == values[:, :-1]).any() | values[:, 0].isnan().any())


def _largest_of(z: Tensor, first: int, k: int) -> Tensor:
    """Keys of the ``k`` largest of ``z [B, N]``, the logits of the classes from ``first`` on, or of all there are."""
    chosen = _by_torch(z, k)
    if chosen is not None:
        return _keys(chosen[0], first + chosen[1])
    return _largest(_keys(z, torch.arange(first, first + z.shape[1], device=z.device)), k)


def topk(passes: LossPasses, p: Grouped, *, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See ``tde::topk``."""
    inside = passes.multiplied_as(dtype)
    x_hat, _, _ = passes.scaled_features(p.features, inside, Intake())
    kept = torch.empty((p.x.shape[0], 0), dtype=torch.int64, device=p.x.device)
    share = 1 if p.x.device.type == "cpu" else 8  # a key is as large as two to four logits, and made of such
    for chunk in class_chunks(p, inside, passes.workspace // share):
        w_hat, _ = scaled(passes, some_classes(p.weights, chunk), inside)
        z = passes.product(x_hat, w_hat).to(dtype)
        if z.shape[1] == p.w.shape[0] and (chosen := _by_torch(z, k)) is not None and not _ties(chosen[0]):
            return chosen  # of all classes at once, and in the one order that there is
        found = _largest_of(z, chunk.start, k)
        kept = _largest(torch.cat([kept, found], 1), k)
    ordered = (kept // _CLASSES).int()  # rounded down: the class is what is left
    values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return values.to(dtype), _CLASSES - 1 - kept % _CLASSES
