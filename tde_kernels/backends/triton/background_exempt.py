"""Eq. 9 in two launches: the product with both projections, then one pass with both softmaxes online."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tde_kernels.backends.grouped import Grouped
from tde_kernels.backends.triton import launch
from tde_kernels.backends.triton.arithmetic import rounded
from tde_kernels.backends.triton.logits import total_effects

_CONFIG = {"BLOCK": 1024, "num_warps": 4, "num_stages": 2}


@triton.jit
def _add_to_sum(highest, total, values, kept):
    """An online log-sum-exp: ``(highest, total)`` takes in the ``values`` that are ``kept``."""
    values = tl.where(kept, values, float("-inf"))
    new = tl.maximum(highest, tl.max(values, 0))
    base = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp(highest - base) + tl.sum(tl.exp(values - base), 0)


@triton.jit
def _exempt(
    total,
    along_x,
    along_w,
    alpha,
    out,
    classes,
    heads,
    background,
    LOG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    strength = tl.load(alpha)
    own = tl.load(total + row * classes + background)
    highest, everything = own, 1.0
    foreground_highest, foreground = own - float("inf"), 0.0
    direct_highest, direct_sum = own - float("inf"), 0.0
    for start in range(0, classes, BLOCK):
        column = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
        kept = (column < classes) & (column != background)
        z = tl.load(total + row * classes + column, mask=kept, other=0.0)
        direct = z
        for head in range(heads):
            shift = tl.load(along_w + column * heads + head, mask=kept, other=0.0)
            direct -= strength * tl.load(along_x + row * heads + head) * shift
        highest, everything = _add_to_sum(highest, everything, z, kept)
        foreground_highest, foreground = _add_to_sum(foreground_highest, foreground, z, kept)
        direct_highest, direct_sum = _add_to_sum(direct_highest, direct_sum, direct, kept)
    log_everything = highest + tl.log(everything)
    log_background = own - log_everything
    # what every foreground class adds to its direct effect: log (1 - p_0) less the log-sum of their direct effects
    share = (foreground_highest + tl.log(foreground) - log_everything) - (direct_highest + tl.log(direct_sum))
    for start in range(0, classes, BLOCK):
        column = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
        inside = column < classes
        direct = tl.load(total + row * classes + column, mask=inside, other=0.0)
        for head in range(heads):
            shift = tl.load(along_w + column * heads + head, mask=inside, other=0.0)
            direct -= strength * tl.load(along_x + row * heads + head) * shift
        result = tl.where(column == background, log_background, direct + share)
        if not LOG:
            result = tl.exp(result)
        tl.store(out + row * classes + column, rounded(result, out.dtype.element_ty), mask=inside)


def background_exempt(p: Grouped, *, background: int, log: bool, dtype: torch.dtype) -> Tensor:
    """See ``tde::background_exempt``."""
    total, along_x, along_w = total_effects(p)
    batch, classes = total.shape
    out = total if dtype == torch.float32 else total.new_empty((batch, classes), dtype=dtype)
    arguments = {
        "total": total,
        "along_x": along_x,
        "along_w": along_w,
        "alpha": p.alpha,
        "out": out,
        "classes": classes,
        "heads": along_x.shape[1],
        "background": background,
        "LOG": log,
    }
    launch.run(_exempt, batch, total.device, arguments, _CONFIG)
    return out
