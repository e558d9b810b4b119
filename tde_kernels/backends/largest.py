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


def _keys(z: Tensor, first: int) -> Tensor:
    """int64 keys of float32 ``z [B, N]``, the logits of the classes from ``first`` on. NaN is above all numbers."""
    z = torch.where(z.isnan(), torch.nan, z + 0.0)  # one NaN, and one zero
    bits = z.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # floats in the order of their bits as integers
    classes = torch.arange(first, first + z.shape[1], device=z.device)
    return ordered.long() * _CLASSES + (_CLASSES - 1 - classes)


def _largest(keys: Tensor, k: int) -> Tensor:
    return keys.topk(min(k, keys.shape[1]), dim=1).values


def topk(passes: LossPasses, p: Grouped, *, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See ``tde::topk``."""
    x_hat, _, _ = passes.scaled_features(p.features, dtype, Intake())
    kept = torch.empty((p.x.shape[0], 0), dtype=torch.int64, device=p.x.device)
    for chunk in class_chunks(p, dtype, passes.workspace // 4):  # an integer is as large as two to four logits
        w_hat, _ = scaled(passes, some_classes(p.weights, chunk), dtype)
        keys = _keys(passes.product(x_hat, w_hat).float(), chunk.start)
        kept = _largest(torch.cat([kept, _largest(keys, k)], 1), k)
    ordered = (kept // _CLASSES).int()  # rounded down: the class is what is left
    values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return values.to(dtype), _CLASSES - 1 - kept % _CLASSES
