"""Softmax cross entropy of rows of logits and its gradient in their place: softmax online, some short rows at a time.

The sums are those of ``csrc/include/tde/cross_entropy.h``: over the classes that are no label of the row, so that no
margin is in them and ``1 - p`` of a label is a sum of its own, precise where ``p`` is almost 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from tde_kernels.backends.grouped import Loss, LossPass
from tde_kernels.backends.loss_passes import SUMS
from tde_kernels.backends.triton import configs, launch
from tde_kernels.backends.triton.arithmetic import rounded
from tde_kernels.backends.triton.norms import inverse_power

_SMALLEST = tl.constexpr(2.0**-126)


class _Options(NamedTuple):
    """A kernel's argument; pointers that are None are not read."""

    target: Any  # [B] int64, and what the row counts for
    share: Any
    target_b: Any
    share_b: Any
    class_weight: Any  # [C] float32 each
    bias: Any
    margin: Any
    ignored: Any
    smoothing: Any
    focal: Any
    SMOOTHED: Any  # constexpr: whether the numbers above are not zero
    FOCAL: Any


@triton.jit
def _base(peak):
    """As a peak of nothing minus infinity is right, but ``exp(z - peak)`` is then no number."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _lowered(weight, base, peak):
    """What ``sum w (peak - z)`` gains where the peak rises to ``base``."""
    return tl.where(weight == 0.0, 0.0, weight * (base - _base(peak)))


@triton.jit
def _label(labels, row, exists, ignored, classes):
    """The labels of rows, or -1 where there is none that counts."""
    label = tl.load(labels + row, mask=exists, other=-1)
    return tl.where((label != ignored) & (label >= 0) & (label < classes), label, -1)


@triton.jit
def _weight(loss, label):
    weight = tl.full(label.shape, 1.0, tl.float32)
    if loss.class_weight is not None:
        weight = tl.load(loss.class_weight + tl.where(label >= 0, label, 0), mask=label >= 0, other=0.0)
    return weight


@triton.jit
def _sums(z, column, inside, label_a, label_b, loss, weights, peak, total, below, weight):
    """The sums of each lane, with one more block of logits taken in."""
    other = inside & (column != label_a[:, None]) & (column != label_b[:, None])
    z = tl.where(other, z, float("-inf"))
    new = tl.maximum(peak, z)
    base = _base(new)
    total = total * tl.exp(peak - base) + tl.exp(z - base)
    if loss.SMOOTHED:
        weights = tl.where(other, weights, 0.0)
        below += _lowered(weight, base, peak) + tl.where(other, weights * (base - z), 0.0)
        weight += weights
    return new, total, below, weight


@triton.jit
def _term(loss, classes, label, label_other, z, z_other, peak, total, below, weight, scale):
    """Loss of a term, and what it adds to the gradient: ``spread p - smooth w``, at the label less ``pull``."""
    margin = 0.0
    known = tl.where(label >= 0, label, 0)
    if loss.margin is not None:
        margin = tl.load(loss.margin + known)
    z -= margin
    other = (label_other >= 0) & (label_other != label)
    highest = tl.maximum(peak, z)
    highest = tl.where(other, tl.maximum(highest, z_other), highest)
    others = total * tl.exp(peak - highest) + tl.where(other, tl.exp(z_other - highest), 0.0)
    everything = others + tl.exp(z - highest)
    log_sum = tl.log(everything)
    rest = others / everything
    log_p = (z - highest) - log_sum  # their sum would be rounded at the peak's size
    own_weight = _weight(loss, label)
    own = (1.0 - loss.smoothing) * own_weight
    share = loss.smoothing / classes
    value = own * -log_p
    weights = 0.0
    if loss.SMOOTHED:
        other_weight = tl.where(other, _weight(loss, label_other), 0.0)
        below += own_weight * (highest - z) + tl.where(other, other_weight * (highest - z_other), 0.0)
        below += _lowered(weight, highest, peak)
        weights = weight + own_weight + other_weight
        value += share * (below + weights * log_sum)
    factor = 1.0
    steepness = 0.0
    if loss.FOCAL:  # (1 - p)^g and its slope; never of quite 0, where that is infinite for exponents below 1
        factor = inverse_power(tl.maximum(rest, _SMALLEST), -loss.focal)
        slope = loss.focal * factor / tl.maximum(rest, _SMALLEST) * tl.exp(log_p) * value
        steepness = tl.where(rest > _SMALLEST, slope, 0.0)
    counts = label >= 0
    spread = tl.where(counts, scale * (factor * (own + share * weights) + steepness), 0.0)
    pull = scale * (factor * own + steepness)
    smooth = tl.where(counts, scale * factor * share, 0.0)
    own_gradient = (spread - pull) * (1.0 - rest) - pull * rest
    return scale * factor * value, highest, log_sum, spread, smooth, own_gradient


@triton.jit
def _unlabelled(labels, row, exists, label, ignored, value, scale):
    """A term's value, and what of it is in the gradient, where there may be no label.

    Not a number where a mean has nothing to divide by, which leaves the gradient at 0, or where the label is no class.
    """
    skipped = tl.load(labels + row, mask=exists, other=ignored) == ignored
    counted = tl.where(label >= 0, value, float("nan"))
    return tl.where(skipped, scale * 0.0, counted), tl.where(skipped, 0.0, counted)


@triton.jit
def _kept(sums, row, exists, LENGTH: tl.constexpr):
    """The six numbers of rows."""
    place = sums + row * LENGTH
    return (
        tl.load(place, mask=exists, other=0.0),
        tl.load(place + 1, mask=exists, other=0.0),
        tl.load(place + 2, mask=exists, other=0.0),
        tl.load(place + 3, mask=exists, other=0.0),
        tl.load(place + 4, mask=exists, other=0.0),
        tl.load(place + 5, mask=exists, other=0.0),
    )


@triton.jit
def _row_loss(
    logits,
    stride,
    rows,
    columns,
    loss,
    classes,
    first,
    sums,
    losses,
    BEGINS: tl.constexpr,
    TAKE: tl.constexpr,
    GRADIENT: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row < rows
    own = logits + (row * stride)[:, None]
    lane = tl.arange(0, BLOCK_COLUMNS)[None, :]
    label_a = _label(loss.target, row, exists, loss.ignored, classes)
    label_b = label_a * 0 - 1
    if loss.target_b is not None:
        label_b = _label(loss.target_b, row, exists, loss.ignored, classes)

    if TAKE:
        peaks = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), float("-inf"), tl.float32)
        totals = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        belows = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        weights = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        at_a = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        at_b = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for start in range(0, columns, BLOCK_COLUMNS):
            place = tl.cast(start, tl.int64) + lane
            column = first + place
            inside = exists[:, None] & (place < columns)
            z = tl.load(own + place, mask=inside, other=0.0).to(tl.float32)
            if loss.bias is not None:
                z += tl.load(loss.bias + column, mask=place < columns, other=0.0)
            each = tl.full((1, BLOCK_COLUMNS), 1.0, tl.float32)
            if loss.class_weight is not None:
                if loss.SMOOTHED:
                    each = tl.load(loss.class_weight + column, mask=place < columns, other=0.0)
            at_a += tl.where(column == label_a[:, None], z, 0.0)
            at_b += tl.where(column == label_b[:, None], z, 0.0)
            peaks, totals, belows, weights = _sums(
                z, column, inside, label_a, label_b, loss, each, peaks, totals, belows, weights
            )
        peak = tl.max(peaks, 1)
        base = _base(peak)
        total = tl.sum(totals * tl.exp(peaks - base[:, None]), 1)
        below = tl.sum(belows + _lowered(weights, base[:, None], peaks), 1)
        weight = tl.sum(weights, 1)
        logit_a = tl.sum(at_a, 1)
        logit_b = tl.sum(at_b, 1)
        if not BEGINS:
            peak_before, total_before, below_before, weight_before, a_before, b_before = _kept(
                sums, row, exists, LENGTH
            )
            new = tl.maximum(peak, peak_before)
            base = _base(new)
            total = total * tl.exp(peak - base) + total_before * tl.exp(peak_before - base)
            below += _lowered(weight, base, peak) + below_before + _lowered(weight_before, base, peak_before)
            weight += weight_before
            logit_a += a_before
            logit_b += b_before
            peak = new
        if sums is not None:
            tl.debug_barrier()  # all have read what is replaced
            tl.store(sums + row * LENGTH, peak, mask=exists)
            tl.store(sums + row * LENGTH + 1, total, mask=exists)
            tl.store(sums + row * LENGTH + 2, below, mask=exists)
            tl.store(sums + row * LENGTH + 3, weight, mask=exists)
            tl.store(sums + row * LENGTH + 4, logit_a, mask=exists)
            tl.store(sums + row * LENGTH + 5, logit_b, mask=exists)
    else:
        peak, total, below, weight, logit_a, logit_b = _kept(sums, row, exists, LENGTH)

    if losses is not None or GRADIENT:
        scale = tl.load(loss.share + row, mask=exists, other=0.0)
        value, peak_a, log_a, spread_a, smooth, gradient_a = _term(
            loss, classes, label_a, label_b, logit_a, logit_b, peak, total, below, weight, scale
        )
        value, counted = _unlabelled(loss.target, row, exists, label_a, loss.ignored, value, scale)
        base = _base(peak)
        spread = spread_a * tl.exp((base - peak_a) - log_a)
        gradient_b = gradient_a
        if loss.target_b is not None:
            scale_b = tl.load(loss.share_b + row, mask=exists, other=0.0)
            value_b, peak_b, log_b, spread_b, smooth_b, gradient_b = _term(
                loss, classes, label_b, label_a, logit_b, logit_a, peak, total, below, weight, scale_b
            )
            value_b, counted_b = _unlabelled(loss.target_b, row, exists, label_b, loss.ignored, value_b, scale_b)
            value += value_b
            counted += counted_b
            # a term of no label has nothing to add, where its own numbers may be none
            spread = tl.where(label_a >= 0, spread, 0.0)
            spread += tl.where(label_b >= 0, spread_b * tl.exp((base - peak_b) - log_b), 0.0)
            smooth += smooth_b
            same = label_a == label_b
            own_a = tl.where(label_a >= 0, gradient_a, 0.0)
            own_b = tl.where(label_b >= 0, gradient_b, 0.0)
            across_a = tl.where(label_b >= 0, spread_b * tl.exp((logit_a - peak_b) - log_b), 0.0)
            across_b = tl.where(label_a >= 0, spread_a * tl.exp((logit_b - peak_a) - log_a), 0.0)
            gradient_a = own_a + tl.where(same, own_b, across_a)
            gradient_b = own_b + tl.where(same, own_a, across_b)
        if losses is not None:
            tl.store(losses + row, value, mask=exists)
        if GRADIENT:
            nothing = ((label_a < 0) & (label_b < 0)) | (counted != counted)
            for start in range(0, columns, BLOCK_COLUMNS):
                place = tl.cast(start, tl.int64) + lane
                column = first + place
                inside = exists[:, None] & (place < columns)
                z = tl.load(own + place, mask=inside, other=0.0).to(tl.float32)
                if loss.bias is not None:
                    z += tl.load(loss.bias + column, mask=place < columns, other=0.0)
                gradient = spread[:, None] * tl.exp(z - base[:, None])
                gradient = tl.where(column == label_a[:, None], gradient_a[:, None], gradient)
                gradient = tl.where(column == label_b[:, None], gradient_b[:, None], gradient)
                if loss.SMOOTHED:
                    each = tl.full((1, BLOCK_COLUMNS), 1.0, tl.float32)
                    if loss.class_weight is not None:
                        each = tl.load(loss.class_weight + column, mask=place < columns, other=0.0)
                    gradient -= smooth[:, None] * each
                gradient = tl.where(nothing[:, None], counted[:, None], gradient)
                tl.store(own + place, rounded(gradient, logits.dtype.element_ty), mask=inside)


def row_loss(z: Tensor, loss: Loss, classes: int, what: LossPass) -> None:
    """See :meth:`tde_kernels.backends.loss_passes.LossPasses.cross_entropy`."""
    smoothed, focal = tl.constexpr(loss.label_smoothing > 0), tl.constexpr(loss.focal_exponent != 0)
    numbers = loss.ignore_index, loss.label_smoothing, loss.focal_exponent
    arguments = {
        "logits": z,
        "stride": z.stride(0),
        "rows": z.shape[0],
        "columns": z.shape[1],
        "loss": _Options(*loss[:7], *numbers, smoothed, focal),
        "classes": classes,
        "first": what.first,
        "sums": what.sums,
        "losses": what.losses,
        "BEGINS": what.first == 0,
        "TAKE": what.take,
        "GRADIENT": what.gradient,
        "LENGTH": SUMS,
    }
    config = configs.whole_rows(z.shape[1])
    launch.run(_row_loss, triton.cdiv(z.shape[0], config["BLOCK_ROWS"]), z.device, arguments, config)
