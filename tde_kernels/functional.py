"""The functional API: stateless, checked, on the backend that fits.

Symbols: features ``x [..., D]`` of any strides, class weights ``w [C, D]``, ``K = num_heads`` groups of ``d = D/K``
channels, head direction ``direction [D]``, of unit norm in each head or zero. Gradients flow to ``x``, ``w`` and
``class_scale``. Under autocast the products run in the autocast dtype and logits are returned in it; losses are
float32. ``backend`` names one of reference, cpu, cuda, triton, and raises where that cannot serve; None chooses.

Arguments that recur:

- ``num_heads``: K, which divides D.
- ``tau``: the temperature; logits carry ``tau / K``.
- ``gamma``: added to the weight norms by the deconfound normalizer.
- ``normalizer``: linear, cosine, capsule, deconfound, tau_norm or lws.
- ``exponent``: p of tau_norm.
- ``class_scale``: ``[C]``, the learnt divisor of lws.

Errors: ``ValueError`` and ``TypeError`` name the argument, what came and what was wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tde_kernels import checks, distributed, ops, reference
from tde_kernels.backends import select
from tde_kernels.backends.grouped import NO_INTAKE, Intake, Loss, plain
from tde_kernels.envelope import Envelope
from tde_kernels.normalizers import Classifier

_USUAL_SEGMENTS = 32  # a sample's winners over all alphas; more are asked for a second time


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that operands are multiplied in and logits returned in: autocast's where it is on, as for a Linear."""
    if x.dtype != torch.float64 and checks.autocast(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _as_rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """``rows [B, C]`` with the leading shape of ``x [..., D]``."""
    return rows if x.dim() == 2 else rows.reshape(*x.shape[:-1], rows.shape[-1])


def wants_grad(*tensors: Tensor | float | None) -> bool:
    """Whether autograd asks for the gradient of one of them."""
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def _alpha_tensor(alpha: float | Tensor, x: Tensor) -> Tensor:
    """alpha as the kernels take it, 0-d float32 on the device; filled there, not copied: no synchronisation."""
    if isinstance(alpha, Tensor):
        there = alpha.dtype == torch.float32 and alpha.device == x.device
        return plain(alpha) if there else alpha.detach().to(x.device, torch.float32).resolve_neg()
    return torch.full((), float(alpha), dtype=torch.float32, device=x.device)


def _flat_mask(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.reshape(-1).contiguous()


def _logits(
    x: Tensor,
    w: Tensor,
    classifier: Classifier,
    *,
    direction: Tensor | None = None,
    alpha: float | Tensor = 0.0,
    ema: Tensor | None = None,
    num_updates: Tensor | None = None,
    momentum: float = 0.0,
    mask: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    pending: distributed.PendingSum | None = None,
    asked: str | None,
) -> Tensor:
    """Eq. 7, or Eq. 8 with a direction, and the update of ``ema`` if there is one: every logit of this module."""
    dtype = product_dtype(x)
    beyond = "it has no gradient for direction and alpha; detach them" if wants_grad(direction, alpha) else None
    backend = select("logits", x.device, dtype, asked, beyond, operands=(x, w), size=x.numel() * w.shape[0])
    if backend == "reference":
        result = reference.logits(x.to(dtype), w.to(dtype), classifier, direction, alpha)
        if ema is not None:  # last: it may be the features' own memory
            _take_in_(ema, num_updates, reference.feature_sum(x, mask), momentum, group, pending, asked)
        return result
    intake, across_ranks = NO_INTAKE, False
    if ema is not None:
        across_ranks = distributed.active()
        here = None if across_ranks else ema
        intake = Intake(_flat_mask(mask), here, None if here is None else num_updates, momentum, across_ranks)
    logits, total = ops.logits(
        _rows(x),
        w,
        classifier,
        direction=direction,
        alpha=None if direction is None else _alpha_tensor(alpha, x),
        intake=intake,
        dtype=dtype,
        backend=backend,
    )
    if ema is not None and across_ranks:
        assert total is not None  # it was asked for: a rank must not skip the collective in silence
        _take_in_(ema, num_updates, total, momentum, group, pending, asked)
    return _as_rows_of(x, logits)


def grouped_logits(
    x: Tensor,
    w: Tensor,
    *,
    num_heads: int,
    tau: float,
    gamma: float = 0.0,
    normalizer: str = "deconfound",
    exponent: float = 1.0,
    class_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Eq. 7 and its family, Eq. 10: ``z_bi = tau/K sum_k r(||x_b^k||) s_i(||w_i^k||) <x_b^k, w_i^k>``.

    Returns:
        Logits ``[..., C]`` in the dtype of ``x``.
    """
    classifier = checks.logits(x, w, num_heads, tau, gamma, normalizer, exponent, class_scale)
    return _logits(x, w, classifier, asked=backend)


def tde_logits(
    x: Tensor,
    w: Tensor,
    direction: Tensor,
    *,
    alpha: float | Tensor,
    num_heads: int,
    tau: float,
    gamma: float = 0.0,
    normalizer: str = "deconfound",
    exponent: float = 1.0,
    class_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Eq. 8: the logits less ``alpha tau/K sum_k r s <x_b^k, d_hat^k> <w_i^k, d_hat^k>``.

    Args:
        alpha: strength of the subtraction, a number or a 0-d tensor.

    Returns:
        Logits ``[..., C]`` in the dtype of ``x``. ``direction`` and ``alpha`` are constants to the fused kernels;
        where one of them requires a gradient, the reference serves.
    """
    classifier = checks.logits(x, w, num_heads, tau, gamma, normalizer, exponent, class_scale)
    checks.counterfactual(x, direction, alpha)
    return _logits(x, w, classifier, direction=direction, alpha=alpha, asked=backend)


def head_direction(ema: Tensor, *, num_heads: int, backend: str | None = None) -> Tensor:
    """The head direction, ``d_hat^k = ema^k / ||ema^k||``, each head by itself; zero where ``ema^k`` is zero.

    Args:
        ema: ``[D]``, the un-normalised moving average of the features.

    Returns:
        ``[D]``, of unit norm in each head.
    """
    checks.average(ema, num_heads)
    beyond = None
    if ema.dim() != 1 or ema.dtype != torch.float32 or wants_grad(ema):
        beyond = "it takes one average in float32, and has no gradient"
    chosen = select("head_direction", ema.device, ema.dtype, backend, beyond)
    if chosen == "reference":
        return reference.head_direction(ema, num_heads=num_heads)
    return ops.head_direction(plain(ema), num_heads=num_heads, backend=chosen)


def _take_in_(
    ema: Tensor,
    num_updates: Tensor | None,
    total: Tensor,
    momentum: float,
    group: torch.distributed.ProcessGroup | None,
    pending: distributed.PendingSum | None,
    asked: str | None,
) -> None:
    """Folds the feature sum, reduced over the ranks, into ``ema``: now, or who holds ``pending`` does it later."""
    if pending is not None and distributed.active():
        pending.add(total, momentum, group)
    else:
        fold_ema_(ema, num_updates, distributed.reduce_sum(total, group), momentum=momentum, backend=asked)


@torch.no_grad()
def fold_ema_(
    ema: Tensor, num_updates: Tensor | None, total: Tensor, *, momentum: float, backend: str | None = None
) -> None:
    """``ema <- momentum * ema + sum / count`` in place, of a :func:`feature_sum`; nothing where it has no rows."""
    checks.fold(ema, num_updates, total, momentum)
    chosen = select("fold_ema_", ema.device, ema.dtype, backend)
    if chosen == "reference":
        reference.fold_ema_(ema, num_updates, total, momentum)
    else:
        ops.fold_ema_(ema, num_updates, total.contiguous(), momentum=momentum, backend=chosen)


def grouped_logits_with_ema_(
    x: Tensor,
    w: Tensor,
    ema: Tensor,
    num_updates: Tensor | None = None,
    *,
    momentum: float,
    mask: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    pending: distributed.PendingSum | None = None,
    num_heads: int,
    tau: float,
    gamma: float = 0.0,
    normalizer: str = "deconfound",
    exponent: float = 1.0,
    class_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`grouped_logits`, and :func:`update_head_ema_` in the same pass over the features: a training step.

    Args:
        num_updates: int64 0-d, one more wherever ``ema`` changed.
        pending: where there are ranks, takes the sum of the features and leaves ``ema`` to the caller.

    Returns:
        Logits ``[..., C]`` in the dtype of ``x``.
    """
    classifier = checks.logits(x, w, num_heads, tau, gamma, normalizer, exponent, class_scale)
    checks.ema(ema, x, momentum, mask)
    checks.counter(num_updates, x, "num_updates")
    return _logits(
        x,
        w,
        classifier,
        ema=ema,
        num_updates=num_updates,
        momentum=momentum,
        mask=mask,
        group=group,
        pending=pending,
        asked=backend,
    )


@torch.no_grad()
def feature_sum(x: Tensor, mask: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """What the EMA takes in of a batch: the sum of the rows where ``mask [...]`` holds, then their number.

    Returns:
        ``[D + 1]`` float32; such sums may be added over batches and ranks.
    """
    checks.channels(x, "x")
    checks.row_mask(mask, x)
    chosen = select("feature_sum", x.device, x.dtype, backend)
    if chosen == "reference":
        return reference.feature_sum(x, mask)
    return ops.feature_sum(plain(_rows(x)), _flat_mask(mask), backend=chosen)


@torch.no_grad()
def update_head_ema_(
    ema: Tensor,
    x: Tensor,
    *,
    momentum: float,
    mask: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    backend: str | None = None,
) -> Tensor:
    """Assumption 1: ``ema <- momentum * ema + mean_b(x_b)`` in place, over the rows where ``mask`` holds.

    Under ``torch.distributed`` sum and count are reduced over ``group`` (default: all ranks), so that every rank holds
    the same. No row at all changes nothing.

    Args:
        ema: ``[D]`` float32, changed in place.
        x: features ``[..., D]``, taken detached.
        mask: bool ``[...]``; a row that it leaves out is not read.

    Returns:
        ``ema``.
    """
    checks.ema(ema, x, momentum, mask)
    chosen = select("update_ema_", x.device, x.dtype, backend)
    if chosen == "reference" or distributed.active():
        _take_in_(ema, None, feature_sum(x, mask, backend=backend), momentum, group, None, backend)
    else:
        rows = plain(_rows(x))
        ops.update_ema_(ema, None, rows, _flat_mask(mask), momentum=momentum, backend=chosen)
    return ema


def background_exempt(
    x: Tensor,
    w: Tensor,
    direction: Tensor,
    *,
    alpha: float | Tensor,
    background_index: int,
    num_heads: int,
    tau: float,
    gamma: float = 0.0,
    normalizer: str = "deconfound",
    exponent: float = 1.0,
    class_scale: Tensor | None = None,
    log: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Eq. 9: the background keeps its probability of Eq. 7, the foreground shares the rest as Eq. 8 says.

    The fused kernels have no gradient here: where one is wanted, the reference serves.

    Args:
        background_index: the class that is the background; negative counts from the end.
        log: logarithms of the probabilities, so that a softmax leaves them as they are.

    Returns:
        ``[..., C]`` in the dtype of ``x``; rows sum to 1 (with ``log``, their exponentials do).
    """
    classifier = checks.logits(x, w, num_heads, tau, gamma, normalizer, exponent, class_scale)
    checks.counterfactual(x, direction, alpha)
    background = checks.class_index(background_index, w.shape[0], "background_index")
    checks.flag(log, "log")
    dtype = product_dtype(x)
    beyond = "it has no gradient; use no_grad()" if wants_grad(x, w, direction, alpha, class_scale) else None
    chosen = select("background_exempt", x.device, dtype, backend, beyond, operands=(x, w))
    if chosen == "reference":
        return reference.exempt(x.to(dtype), w.to(dtype), classifier, direction, alpha, background, log)
    result = ops.background_exempt(
        _rows(x),
        w,
        classifier,
        direction=direction,
        alpha=_alpha_tensor(alpha, x),
        background=background,
        log=log,
        dtype=dtype,
        backend=chosen,
    )
    return _as_rows_of(x, result)


def grouped_cross_entropy(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    *,
    num_heads: int,
    tau: float,
    gamma: float = 0.0,
    normalizer: str = "deconfound",
    exponent: float = 1.0,
    class_scale: Tensor | None = None,
    class_weight: Tensor | None = None,
    logit_bias: Tensor | None = None,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    target_b: Tensor | None = None,
    lam: float | Tensor = 1.0,
    focal_exponent: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Softmax cross entropy of Eq. 7 or any member of Eq. 10; options as in :func:`reference.cross_entropy`.

    Logits live in a workspace of fixed size, which :func:`tde_kernels.info` states: whole where they fit, else some
    rows or some classes at a time. Where ``class_weight``, ``logit_bias``, ``margin`` or ``lam`` require a gradient,
    torch's loss follows the fused logits. The mean over no sample at all is NaN, as torch has it. A target that is no
    class is an error on the CPU; on a GPU, where looking would synchronise, its loss and gradient are NaN, unless
    ``TDE_DEBUG=1`` is in the environment: then it is an error there too.

    Returns:
        Loss in float32 (float64 for float64 features): 0-d, or ``[...]`` with ``reduction="none"``.
    """
    classifier = checks.logits(x, w, num_heads, tau, gamma, normalizer, exponent, class_scale)
    options = LossOptions(
        class_weight, logit_bias, margin, label_smoothing, ignore_index, target_b, lam, focal_exponent, reduction
    )
    return _cross_entropy(x, w, target, classifier, options, asked=backend)


def grouped_cross_entropy_with_ema_(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    ema: Tensor,
    num_updates: Tensor | None = None,
    *,
    momentum: float,
    mask: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    pending: distributed.PendingSum | None = None,
    num_heads: int,
    tau: float,
    gamma: float = 0.0,
    normalizer: str = "deconfound",
    exponent: float = 1.0,
    class_scale: Tensor | None = None,
    class_weight: Tensor | None = None,
    logit_bias: Tensor | None = None,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    target_b: Tensor | None = None,
    lam: float | Tensor = 1.0,
    focal_exponent: float = 0.0,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """:func:`grouped_cross_entropy`, and :func:`update_head_ema_` in the same pass over the features."""
    classifier = checks.logits(x, w, num_heads, tau, gamma, normalizer, exponent, class_scale)
    checks.ema(ema, x, momentum, mask)
    checks.counter(num_updates, x, "num_updates")
    options = LossOptions(
        class_weight, logit_bias, margin, label_smoothing, ignore_index, target_b, lam, focal_exponent, reduction
    )
    return _cross_entropy(
        x,
        w,
        target,
        classifier,
        options,
        ema=ema,
        num_updates=num_updates,
        momentum=momentum,
        mask=mask,
        group=group,
        pending=pending,
        asked=backend,
    )


class LossOptions(NamedTuple):
    """Those of :func:`reference.cross_entropy`."""

    class_weight: Tensor | None = None
    logit_bias: Tensor | None = None
    margin: Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int = -100
    target_b: Tensor | None = None
    lam: float | Tensor = 1.0
    focal_exponent: float = 0.0
    reduction: str = "mean"

    def of(self, target: Tensor, dtype: torch.dtype = torch.float32) -> Loss:
        """The loss of flat rows: the reduction and the shares of mixup, in ``dtype``, are what each row counts for."""
        labels = target.reshape(-1).contiguous()
        other = None if self.target_b is None else self.target_b.reshape(-1).contiguous()
        return Loss(
            labels,
            self._share(labels, dtype) if other is None else self._share(labels, dtype) * self.lam,
            other,
            None if other is None else self._share(other, dtype) * (1 - self.lam),
            self.class_weight,
            self.logit_bias,
            self.margin,
            self.label_smoothing,
            self.ignore_index,
            self.focal_exponent,
        )

    def _share(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        if self.reduction != "mean":
            return torch.ones(labels.shape, dtype=dtype, device=labels.device)
        taken = labels != self.ignore_index
        if self.class_weight is None:
            return taken.to(dtype) / taken.sum()
        known = taken & (labels >= 0) & (labels < len(self.class_weight))  # where nobody looks at labels before
        weight = torch.where(known, self.class_weight.detach().to(dtype)[torch.where(known, labels, 0)], 0)
        return torch.ones_like(weight) / weight.sum()


def _cross_entropy(
    x: Tensor,
    w: Tensor,
    target: Tensor,
    classifier: Classifier,
    options: LossOptions,
    *,
    ema: Tensor | None = None,
    num_updates: Tensor | None = None,
    momentum: float = 0.0,
    mask: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
    pending: distributed.PendingSum | None = None,
    asked: str | None,
) -> Tensor:
    """The loss, and the update of ``ema`` if there is one."""
    checks.cross_entropy(x, w.shape[0], target, **options._asdict())  # before the average takes the batch in
    dtype = product_dtype(x)
    backend = select("cross_entropy", x.device, dtype, asked, operands=(x, w), size=x.numel() * w.shape[0])
    if backend == "reference" or wants_grad(options.class_weight, options.logit_bias, options.margin, options.lam):
        logits = _logits(
            x,
            w,
            classifier,
            ema=ema,
            num_updates=num_updates,
            momentum=momentum,
            mask=mask,
            group=group,
            pending=pending,
            asked=asked,
        )
        return reference.cross_entropy(logits, target, **options._asdict())
    across_ranks = ema is not None and distributed.active()
    kept = (None, None) if across_ranks else (ema, num_updates)
    loss, total = ops.cross_entropy(
        _rows(x),
        w,
        classifier,
        options.of(target),
        total=options.reduction != "none",
        intake=Intake(_flat_mask(mask), *kept, momentum, across_ranks),
        dtype=dtype,
        backend=backend,
    )
    if ema is not None and across_ranks:
        _take_in_(ema, num_updates, total, momentum, group, pending, asked)
    return loss.reshape(target.shape) if options.reduction == "none" else loss


@torch.no_grad()
def alpha_sweep(
    x: Tensor,
    w: Tensor,
    direction: Tensor,
    alphas: Tensor | Sequence[float],
    *,
    num_heads: int,
    tau: float,
    gamma: float = 0.0,
    normalizer: str = "deconfound",
    exponent: float = 1.0,
    class_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The predicted class of Eq. 8 for every alpha, from one product, which is taken in float32.

    Returns:
        int64 ``[A, ...]``; ties go to the lowest class.
    """
    classifier = checks.logits(x, w, num_heads, tau, gamma, normalizer, exponent, class_scale)
    steps = checks.alphas(alphas, x.device)
    checks.counterfactual(x, direction, 0.0)
    chosen = select("alpha_sweep", x.device, x.dtype, backend, operands=(w,))
    if chosen == "reference":
        return reference.winners(*reference.effects(x, w, direction, classifier), steps)
    rows = _rows(x)
    found = ops.alpha_sweep(rows, w, direction, steps, classifier, backend=chosen)
    return found.reshape(len(steps), *x.shape[:-1])


@torch.no_grad()
def alpha_segments(
    x: Tensor,
    w: Tensor,
    direction: Tensor,
    *,
    num_heads: int,
    tau: float,
    gamma: float = 0.0,
    normalizer: str = "deconfound",
    exponent: float = 1.0,
    class_scale: Tensor | None = None,
    backend: str | None = None,
) -> Envelope:
    """The predicted class of Eq. 8 for every alpha, exactly: the segments of alpha on which each class wins.

    Logits are lines in alpha; of one product in float32, where lines cross is computed in float64. For analysis, not
    for a hot path: the number of segments depends on the data, and is read.

    Returns:
        An :class:`~tde_kernels.envelope.Envelope` of the ``N`` features of ``x [..., D]``, flat.
    """
    classifier = checks.logits(x, w, num_heads, tau, gamma, normalizer, exponent, class_scale)
    checks.counterfactual(x, direction, 0.0)
    chosen = select("alpha_segments", x.device, x.dtype, backend, operands=(w,))
    rows = _rows(x)
    if chosen == "reference":
        return reference.alpha_segments(
            rows,
            w,
            direction,
            num_heads=num_heads,
            tau=tau,
            gamma=gamma,
            normalizer=normalizer,
            exponent=exponent,
            class_scale=class_scale,
        )
    most = _USUAL_SEGMENTS
    while True:
        starts, classes, counts = ops.alpha_segments(rows, w, direction, classifier, most, backend=chosen)
        found = int(counts.max()) if len(counts) else 0
        if found <= most:
            return Envelope.packed(starts, classes, counts)
        most = found


@torch.no_grad()
def topk(
    x: Tensor,
    w: Tensor,
    k: int,
    *,
    direction: Tensor | None = None,
    alpha: float | Tensor = 0.0,
    num_heads: int,
    tau: float,
    gamma: float = 0.0,
    normalizer: str = "deconfound",
    exponent: float = 1.0,
    class_scale: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` largest logits of Eq. 8 (of Eq. 7 without a direction) and their classes, both ``[..., k]``.

    In descending order; ties go to the lowest class. No logits are stored but those of some classes at a time.
    """
    classifier = checks.logits(x, w, num_heads, tau, gamma, normalizer, exponent, class_scale)
    checks.at_most(k, w.shape[0], "k")
    if direction is not None:
        checks.counterfactual(x, direction, alpha)
    dtype = product_dtype(x)
    chosen = select("topk", x.device, dtype, backend, operands=(x, w))
    if chosen == "reference":
        return reference.lowest_topk(reference.logits(x.to(dtype), w.to(dtype), classifier, direction, alpha), k)
    values, classes = ops.topk(
        _rows(x),
        w,
        classifier,
        k,
        direction=direction,
        alpha=None if direction is None else _alpha_tensor(alpha, x),
        dtype=dtype,
        backend=chosen,
    )
    return _as_rows_of(x, values), _as_rows_of(x, classes)
