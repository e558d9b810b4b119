"""Eq. 1 to 10 in plain torch: the definition that every backend is tested against, and the fallback.

Everything is differentiable by autograd (in float64 it passes ``gradcheck``) and runs on any device. float64 is
computed in float64; every other dtype in float32, and the result is returned in the features' dtype.

Symbols: features ``x [..., D]``, class weights ``w [C, D]``, ``K = num_heads`` contiguous groups of ``d = D/K``
channels, head direction ``direction [D]``, of unit norm in each head (or zero). Arguments are checked as the
functional API checks them: ``ValueError``/``TypeError`` name the argument, what came and what was wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from tde_kernels import checks, distributed
from tde_kernels.envelope import Envelope, segments
from tde_kernels.normalizers import Classifier, NormFactor


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _split(a: Tensor, num_heads: int) -> Tensor:
    """``[..., D] -> [..., K, d]``."""
    groups: Tensor = a.unflatten(-1, (num_heads, -1))
    return groups


def _norm(a: Tensor) -> Tensor:
    """``||a^k||`` for ``a [..., K, d]``: ``[..., K, 1]``."""
    norm: Tensor = torch.linalg.vector_norm(a, dim=-1, keepdim=True)
    limits = torch.finfo(a.dtype)
    if checks.readable(a) and not ((norm > limits.tiny**0.25) & (norm < limits.max**0.25)).all():
        # Squares may have left the dtype's range: those of the numbers divided by the largest do not
        largest = a.detach().abs().amax(-1, keepdim=True)
        unit = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
        norm = torch.linalg.vector_norm(a / unit, dim=-1, keepdim=True) * unit
    return norm


def _factor(factor: NormFactor, a: Tensor) -> Tensor:
    """``f(||a^k||)`` for ``a [..., K, d]``: ``[..., K, 1]``, and 0 where ``||a^k|| + offset`` is zero."""
    if factor.power == 0:
        return torch.ones((), dtype=a.dtype, device=a.device)
    base = _norm(a) + factor.offset
    zero = base < torch.finfo(a.dtype).tiny
    return torch.where(zero, 0.0, torch.where(zero, 1.0, base) ** -factor.power)


def _operands(x: Tensor, w: Tensor, classifier: Classifier) -> tuple[Tensor, Tensor]:
    """Scaled features ``[..., K, d]`` and weights ``[C, K, d]`` whose inner product, summed over heads, is Eq. 10."""
    dtype = _compute_dtype(x)
    xk, wk = _split(x.to(dtype), classifier.num_heads), _split(w.to(dtype), classifier.num_heads)
    x_hat = _factor(classifier.normalizer.feature, xk) * xk
    w_hat = classifier.scale * _factor(classifier.normalizer.weight, wk) * wk
    if classifier.class_scale is not None:
        w_hat = w_hat / classifier.class_scale.to(dtype)[:, None, None]
    return x_hat, w_hat


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b^T`` in the operands' own dtype, whatever the autocast state."""
    kind = a.device.type
    with torch.autocast(kind, enabled=False) if kind != "meta" else nullcontext():
        return a @ b.mT


def _total(x: Tensor, w: Tensor, classifier: Classifier) -> Tensor:
    """Eq. 10 in the compute dtype."""
    x_hat, w_hat = _operands(x, w, classifier)
    return product(x_hat.flatten(-2), w_hat.flatten(-2))


def effects(x: Tensor, w: Tensor, direction: Tensor, classifier: Classifier) -> tuple[Tensor, Tensor, Tensor]:
    """The total effect (Eq. 7) ``[..., C]``, and the projections of x and w on the direction, ``[..., K]``, ``[C, K]``.

    Their product over K is what one unit of alpha takes off the total effect (Eq. 8). All in the compute dtype.
    """
    x_hat, w_hat = _operands(x, w, classifier)
    d_hat = _split(direction.to(x_hat.dtype), classifier.num_heads)
    along_x, along_w = (x_hat * d_hat).sum(-1), (w_hat * d_hat).sum(-1)
    return product(x_hat.flatten(-2), w_hat.flatten(-2)), along_x, along_w


def _number(alpha: float | Tensor) -> float | Tensor:
    """A number as a float: torch takes no whole one beyond int64."""
    return alpha if isinstance(alpha, Tensor) else float(alpha)


def logits(
    x: Tensor, w: Tensor, classifier: Classifier, direction: Tensor | None = None, alpha: float | Tensor = 0.0
) -> Tensor:
    """:func:`tde_logits`, or without a direction :func:`grouped_logits`, of arguments that were checked."""
    if direction is None:
        return _total(x, w, classifier).to(x.dtype)
    total, along_x, along_w = effects(x, w, direction, classifier)
    return (total - _number(alpha) * product(along_x, along_w)).to(x.dtype)


def head_direction(ema: Tensor, *, num_heads: int) -> Tensor:
    """The head direction: ``d_hat^k = ema^k / ||ema^k||``, each head by itself; zero where ``ema^k`` is zero.

    Args:
        ema: ``[D]``, the un-normalised moving average of the features.

    Returns:
        ``[D]``, of unit norm in each head.
    """
    checks.average(ema, num_heads)
    groups = _split(ema, num_heads)
    return (_factor(NormFactor(power=1.0), groups) * groups).flatten(-2)


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
) -> Tensor:
    """Eq. 7 and its family, Eq. 10: ``z_bi = tau/K sum_k r(||x_b^k||) s_i(||w_i^k||) <x_b^k, w_i^k>``.

    Returns:
        Logits ``[..., C]`` in the dtype of ``x``.
    """
    return logits(x, w, checks.logits(x, w, num_heads, tau, gamma, normalizer, exponent, class_scale))


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
) -> Tensor:
    """Eq. 8: the logits less the counterfactual effect of the head direction.

    ``z_bi - alpha tau/K sum_k r s <x_b^k, d_hat^k> <w_i^k, d_hat^k>``: the features are replaced by their projection
    on the direction in the numerator, the denominators stay. With the deconfound normalizer this is Eq. 8 to the
    letter; with cosine and capsule it is the paper's Cosine-TDE and Capsule-TDE.

    Args:
        direction: ``[D]``, of unit norm in each head, or zero.
        alpha: strength of the subtraction, a number or a 0-d tensor.

    Returns:
        Logits ``[..., C]`` in the dtype of ``x``.
    """
    classifier = checks.logits(x, w, num_heads, tau, gamma, normalizer, exponent, class_scale)
    checks.counterfactual(x, direction, alpha)
    return logits(x, w, classifier, direction, alpha)


def feature_sum(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """``[D + 1]`` float32: the sum of the rows where ``mask [...]`` holds, then their number."""
    rows = x.detach().reshape(-1, x.shape[-1]).to(_compute_dtype(x))
    if mask is None:
        count = torch.full((1,), float(rows.shape[0]), dtype=rows.dtype, device=rows.device)
    else:
        keep = mask.reshape(-1, 1)
        rows, count = torch.where(keep, rows, 0.0), keep.sum(0, dtype=rows.dtype)
    return torch.cat([rows.sum(0), count]).float()


def fold_ema_(ema: Tensor, num_updates: Tensor | None, total: Tensor, momentum: float) -> None:
    """``ema <- momentum * ema + sum / count`` in place, and one more update counted; nothing where the count is 0."""
    count = total[-1]
    seen = count > 0
    updated = torch.where(seen, momentum * ema + total[:-1] / count, ema)
    if num_updates is None:
        ema.copy_(updated)
    else:  # both in one call: no interrupt comes in between
        torch._foreach_copy_([ema, num_updates], [updated, num_updates + seen])


@torch.no_grad()
def update_head_ema_(
    ema: Tensor,
    x: Tensor,
    *,
    momentum: float,
    mask: Tensor | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Assumption 1: ``ema <- momentum * ema + mean_b(x_b)`` in place, over the rows where ``mask`` holds.

    Under ``torch.distributed`` sum and count are reduced over ``group`` (default: all ranks). No row at all changes
    nothing.

    Args:
        ema: ``[D]`` float32, changed in place.
        x: features ``[..., D]``; taken detached.
        mask: bool ``[...]``.

    Returns:
        ``ema``.
    """
    checks.ema(ema, x, momentum, mask)
    fold_ema_(ema, None, distributed.reduce_sum(feature_sum(x, mask), group), momentum)
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
) -> Tensor:
    """Eq. 9: the background keeps ``p_0`` of Eq. 7, the foreground shares ``1 - p_0`` as Eq. 8 says.

    ``P_0 = p_0`` and ``P_i = (1 - p_0) q_i / (1 - q_0)``, computed as differences of log-sum-exps: nothing cancels.

    Returns:
        Probabilities ``[..., C]`` that sum to 1, or their logarithms, in the dtype of ``x``.
    """
    classifier = checks.logits(x, w, num_heads, tau, gamma, normalizer, exponent, class_scale)
    checks.counterfactual(x, direction, alpha)
    background = checks.class_index(background_index, w.shape[0], "background_index")
    checks.flag(log, "log")
    return exempt(x, w, classifier, direction, alpha, background, log)


def exempt(
    x: Tensor, w: Tensor, classifier: Classifier, direction: Tensor, alpha: float | Tensor, background: int, log: bool
) -> Tensor:
    """:func:`background_exempt` of arguments that were checked."""
    total, along_x, along_w = effects(x, w, direction, classifier)
    log_p = exempt_logits(total, total - _number(alpha) * product(along_x, along_w), background)
    return (log_p if log else log_p.exp()).to(x.dtype)


def exempt_logits(total: Tensor, direct: Tensor, background: int) -> Tensor:
    """The logarithm of Eq. 9 from logits of Eq. 7, ``total [..., C]``, and of Eq. 8, ``direct [..., C]``."""
    everything = torch.logsumexp(total, -1, keepdim=True)
    is_background = torch.arange(total.shape[-1], device=total.device) == background
    log_foreground = torch.logsumexp(total.masked_fill(is_background, -torch.inf), -1, keepdim=True) - everything
    share = torch.log_softmax(direct.masked_fill(is_background, -torch.inf), -1)
    return torch.where(is_background, total - everything, log_foreground + share)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    class_weight: Tensor | None = None,
    logit_bias: Tensor | None = None,
    margin: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    target_b: Tensor | None = None,
    lam: float | Tensor = 1.0,
    focal_exponent: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Softmax cross entropy of ``logits [..., C]`` with what long-tailed training needs.

    Args:
        target: int64 ``[...]``, in ``[0, C)`` or ``ignore_index``.
        class_weight: ``[C]``, a weight for each class; "mean" divides by their sum over the samples, as torch does.
        logit_bias: ``[C]``, added to the logits (balanced softmax, logit adjustment).
        margin: ``[C]``, taken off the target's logit, in units of the logit (LDAM: scale times the margin).
        label_smoothing: in ``[0, 1]``, as in ``torch.nn.functional.cross_entropy``.
        target_b: int64 ``[...]``: the second target of mixup, ``lam * CE(target) + (1 - lam) * CE(target_b)``.
        focal_exponent: g of the focal loss, ``(1 - p_target)^g * CE``.
        reduction: "none", "mean" or "sum".

    Returns:
        Loss in float32 (float64 for float64 logits): 0-d, or ``[...]`` for "none", where an ignored sample has 0.
    """
    checks.cross_entropy(
        logits,
        logits.shape[-1],
        target,
        class_weight=class_weight,
        logit_bias=logit_bias,
        margin=margin,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        target_b=target_b,
        lam=lam,
        focal_exponent=focal_exponent,
        reduction=reduction,
    )
    z = logits.to(_compute_dtype(logits)).reshape(-1, logits.shape[-1])
    if logit_bias is not None:
        z = z + logit_bias.to(z.dtype)

    def term(labels: Tensor) -> Tensor:
        labels = labels.reshape(-1)
        taken = labels != ignore_index
        known = torch.where(taken, labels, 0)
        shifted = z
        if margin is not None:
            shifted = z - (torch.arange(z.shape[-1], device=z.device) == known[:, None]) * margin.to(z.dtype)
        weight = None if class_weight is None else class_weight.to(z.dtype)
        log_p = torch.log_softmax(shifted, -1)
        own = log_p.gather(-1, known[:, None]).squeeze(-1)
        loss = -(1 - label_smoothing) * (own if weight is None else weight[known] * own)
        if label_smoothing != 0:
            loss = loss - label_smoothing / z.shape[-1] * (log_p if weight is None else weight * log_p).sum(-1)
        loss = torch.where(taken, loss, 0.0)
        if focal_exponent != 0:
            # 1 - p through expm1, and never quite 0: its power has an infinite slope there for exponents below 1
            loss = (-torch.expm1(own)).clamp_min(torch.finfo(z.dtype).tiny) ** float(focal_exponent) * loss
        if reduction == "none":
            return loss
        if reduction == "sum":
            return loss.sum()
        total = taken.sum() if weight is None else torch.where(taken, weight[known], 0).sum()
        return loss.sum() / total

    loss = term(target)
    if target_b is not None:
        loss = lam * loss + (1 - lam) * term(target_b)
    return loss.reshape(target.shape) if reduction == "none" else loss


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
) -> Tensor:
    """:func:`cross_entropy` of :func:`grouped_logits`; the logits are not rounded to the dtype of ``x`` in between."""
    classifier = checks.logits(x, w, num_heads, tau, gamma, normalizer, exponent, class_scale)
    return cross_entropy(
        _total(x, w, classifier),
        target,
        class_weight=class_weight,
        logit_bias=logit_bias,
        margin=margin,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        target_b=target_b,
        lam=lam,
        focal_exponent=focal_exponent,
        reduction=reduction,
    )


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
) -> Tensor:
    """The predicted class of Eq. 8 for every alpha, from one product.

    Returns:
        int64 ``[A, ...]``; ties go to the lowest class.
    """
    classifier = checks.logits(x, w, num_heads, tau, gamma, normalizer, exponent, class_scale)
    steps = checks.alphas(alphas, x.device)
    checks.counterfactual(x, direction, 0.0)
    return winners(*effects(x, w, direction, classifier), steps)


def winners(total: Tensor, along_x: Tensor, along_w: Tensor, alphas: Tensor) -> Tensor:
    """argmax of ``total - alpha * along_x @ along_w^T`` for every alpha: int64 ``[A, ...]``, ties to the lowest."""
    correction = product(along_x, along_w)
    found = [torch.argmax(total - alpha * correction, -1) for alpha in alphas]
    return torch.stack(found) if found else total.new_empty((0, *total.shape[:-1]), dtype=torch.int64)


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
) -> Envelope:
    """The predicted class of Eq. 8 for every alpha: the upper envelope of the logits as lines in alpha.

    Returns:
        The segments of the ``N`` features of ``x [..., D]``, flat.
    """
    classifier = checks.logits(x, w, num_heads, tau, gamma, normalizer, exponent, class_scale)
    checks.counterfactual(x, direction, 0.0)
    total, along_x, along_w = effects(x.reshape(-1, x.shape[-1]), w, direction, classifier)
    return Envelope.packed(*segments(total, product(along_x, along_w), w.shape[0]))


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
) -> tuple[Tensor, Tensor]:
    """The ``k`` largest logits of Eq. 8 (of Eq. 7 without a direction) and their classes, both ``[..., k]``.

    In descending order; ties go to the lowest class.
    """
    classifier = checks.logits(x, w, num_heads, tau, gamma, normalizer, exponent, class_scale)
    checks.at_most(k, w.shape[0], "k")
    if direction is not None:
        checks.counterfactual(x, direction, alpha)
    return lowest_topk(logits(x, w, classifier, direction, alpha), k)


def lowest_topk(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``torch.topk`` of ``scores [..., C]`` with ties to the lowest index, which torch leaves open."""
    values, classes = torch.sort(scores, dim=-1, descending=True, stable=True)
    return values[..., :k].contiguous(), classes[..., :k].contiguous()
