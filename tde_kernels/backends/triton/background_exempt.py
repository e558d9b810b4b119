"""Eq. 9 in two launches: the product with both projections, then one pass with both softmaxes online."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tde_kernels.backends.grouped import Grouped
from tde_kernels.backends.triton import configs, launch
from tde_kernels.backends.triton.arithmetic import rounded
from tde_kernels.backends.triton.logits import total_effects


@triton.jit
def _add_to_sum(highest, total, values, kept):
    """An online log-sum-exp of rows: ``(highest, total)`` takes in the ``values`` that are ``kept``."""
    values = tl.where(kept, values, float("-inf"))
    new = tl.maximum(highest, tl.max(values, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp(highest - base) + tl.sum(tl.exp(values - base[:, None]), 1)


@triton.jit
def _direct(total, along_x, along_w, strength, row, column, exists, present, classes, heads):
    """Logits of Eq. 7 ``[R, N]`` and those of Eq. 8, of some rows and columns."""
    z = tl.load(total + row[:, None] * classes + column, mask=exists[:, None] & present, other=0.0)
    direct = z
    for head in range(heads):
        of_row = tl.load(along_x + row * heads + head, mask=exists, other=0.0)
        direct -= (strength * of_row)[:, None] * tl.load(along_w + column * heads + head, mask=present, other=0.0)
    return z, direct


@triton.jit
def _exempt(
    total,
    along_x,
    along_w,
    alpha,
    out,
    rows,
    classes,
    heads,
    background,
    LOG: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row < rows
    lane = tl.arange(0, BLOCK_COLUMNS)[None, :]
    strength = tl.load(alpha)
    own = tl.load(total + row * classes + background, mask=exists, other=0.0)
    nothing = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    highest, everything = own, tl.full((BLOCK_ROWS,), 1.0, tl.float32)
    foreground_highest, foreground = nothing, tl.zeros((BLOCK_ROWS,), tl.float32)
    direct_highest, direct_sum = nothing, tl.zeros((BLOCK_ROWS,), tl.float32)
    for start in range(0, classes, BLOCK_COLUMNS):
        column = tl.cast(start, tl.int64) + lane
        z, direct = _direct(total, along_x, along_w, strength, row, column, exists, column < classes, classes, heads)
        kept = (column < classes) & (column != background)
        highest, everything = _add_to_sum(highest, everything, z, kept)
        foreground_highest, foreground = _add_to_sum(foreground_highest, foreground, z, kept)
        direct_highest, direct_sum = _add_to_sum(direct_highest, direct_sum, direct, kept)
    log_everything = highest + tl.log(everything)
    log_background = own - log_everything
    # what every foreground class adds to its direct effect: log (1 - p_0) less the log-sum of their direct effects
    share = (foreground_highest + tl.log(foreground) - log_everything) - (direct_highest + tl.log(direct_sum))
    for start in range(0, classes, BLOCK_COLUMNS):
        column = tl.cast(start, tl.int64) + lane
        inside = column < classes
        _, direct = _direct(total, along_x, along_w, strength, row, column, exists, inside, classes, heads)
        result = tl.where(column == background, log_background[:, None], direct + share[:, None])
        if not LOG:
            result = tl.exp(result)
        place = out + row[:, None] * classes + column
        tl.store(place, rounded(result, out.dtype.element_ty), mask=exists[:, None] & inside)


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
        "rows": batch,
        "classes": classes,
        "heads": along_x.shape[1],
        "background": background,
        "LOG": log,
    }
    config = configs.whole_rows(classes)
    launch.run(_exempt, triton.cdiv(batch, config["BLOCK_ROWS"]), total.device, arguments, config)
    return out
