"""What the error of a result is measured by: the size of the terms that it is a sum of, which may cancel.

With ``|x_hat| = r(||x||) ||x||`` and ``|w_hat| = s(||w||) ||w||`` of each head, by Cauchy and Schwarz:

    |z_bi| <= (1 + |alpha|) sum_k |x_hat_b^k| |w_hat_i^k|
    |dx_b^k| <= (1 + |alpha|) r_b^k sum_i |dz_bi| |w_hat_i^k|,    and so for dw and the class scale
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from oracle import Problem
from torch import Tensor

from tde_kernels.normalizers import NormFactor, resolve

LARGEST = 1e37  # what is made of larger numbers may leave float32 on its way,
SMALLEST = 1e-30  # and what is made of smaller ones its precision
SQUARE = 1e16  # what can be squared, and more, in float32


class Sizes(NamedTuple):
    """Of the shapes of the results: infinite where nothing is claimed, and NaN where the operands are."""

    logits: Tensor
    dx: Tensor
    dw: Tensor
    dscale: Tensor


def _factor(factor: NormFactor, norms: Tensor) -> Tensor:
    base = norms + factor.offset
    zero = (base < torch.finfo(torch.float32).tiny) & torch.tensor(factor.power != 0)
    return torch.where(zero, 0.0, torch.where(zero, 1.0, base) ** -factor.power)


def _norms(a: Tensor, num_heads: int) -> Tensor:
    return a.unflatten(-1, (num_heads, -1)).norm(dim=-1)


def _unprojected(norms: Tensor, grad: Tensor, most: float, *, plain: bool) -> Tensor:
    """Groups ``[R, K]`` whose gradient is not projected in range, by ``<g, a> / ||a||^2``; ``norms``, ``grad [R, K]``.

    The plain formula has autograd square the norms besides.
    """
    inner = norms * grad
    out = (inner >= most) | (grad / norms >= most) | ((inner <= SMALLEST) & (grad > 0))
    if plain:
        out = out | (norms > SQUARE) | (norms < 1 / SQUARE)
    return out & (norms > 0)


def sizes(p: Problem, upstream: Tensor, dtype: torch.dtype, way: str = "") -> Sizes:
    """Those of a problem in float64, ``x [..., D]``, and an upstream gradient ``[..., C]``, computed in ``dtype``.

    Args:
        way: "plain": gradients are autograd's, which squares the norms; "unscaled": weights are multiplied as they are.
    """
    family = resolve(p.normalizer, gamma=p.gamma, exponent=p.exponent)
    x_norms, w_norms = _norms(p.x, p.num_heads), _norms(p.w, p.num_heads)
    r, own = _factor(family.feature, x_norms), _factor(family.weight, w_norms)
    s = own * abs(p.tau) / p.num_heads
    if p.class_scale is not None:
        s = s / p.class_scale.abs()[:, None]
    x_hat, w_hat, dz = r * x_norms, s * w_norms, upstream.abs()
    direct = 1 + (0 if p.direction is None else abs(p.alpha))
    width = p.x.shape[-1] // p.num_heads
    logits = direct * x_hat @ w_hat.T
    dx_hat, dw_hat = direct * (dz @ w_hat), direct * (dz.reshape(-1, len(p.w)).T @ x_hat.reshape(-1, p.num_heads))
    dx, dw = r * dx_hat, s * dw_hat
    dscale = (dz * logits).reshape(-1, len(p.w)).sum(0) / (1 if p.class_scale is None else p.class_scale.abs())
    most, least = min(LARGEST, torch.finfo(dtype).max / 4), max(SMALLEST, torch.finfo(dtype).tiny)
    rows, classes = (
        ((norm >= LARGEST) | (hat >= most) | (f >= most) | ((hat <= least) & (hat > 0))).any(-1)
        for norm, hat, f in ((x_norms, x_hat, r), (w_norms, w_hat, own))
    )
    if way == "unscaled":
        products = w_norms * x_hat.reshape(-1, p.num_heads).amax(0, keepdim=True) if x_hat.numel() else w_norms
        classes = classes | ((products >= most) | ((products <= least) & (products > 0))).any(-1)
    own_row, own_class = (~a.isfinite().all(-1) | out for a, out in ((p.x, rows), (p.w, classes)))
    no_dx, no_dw = (
        own[..., None] | _unprojected(n, grad, most, plain=way == "plain")
        for own, n, grad in ((own_row, x_norms, dx_hat), (own_class, w_norms, dw_hat))
    )

    def claimed(size: Tensor, *lost: Tensor) -> Tensor:
        """Where it is in the range of ``dtype``, and so is its own operand: NaN may fill the row it came in on."""
        for where in (size >= most, *lost):
            size = torch.where(where, torch.inf, size)
        return size

    return Sizes(
        claimed(logits, own_row[..., None], own_class),
        claimed(dx, no_dx, classes.any()).repeat_interleave(width, -1),
        claimed(dw, no_dw, rows.any()).repeat_interleave(width, -1),
        claimed(dscale, no_dw.any(-1), rows.any()),
    )


def error(got: Tensor, want: Tensor, size: Tensor) -> float:
    """The largest error relative to ``size``; infinite where a number is wanted and none came."""
    dtype, got, want = got.dtype, got.detach().double(), want.detach().double()
    assert got.shape == want.shape == size.shape, f"{tuple(got.shape)} for {tuple(want.shape)} of {tuple(size.shape)}"
    numbers = want.isfinite() & ~(size == torch.inf)
    if not got[numbers].isfinite().all():
        return float("inf")
    measured = numbers & size.isfinite()
    if not measured.any():
        return 0.0
    least = max(SMALLEST, torch.finfo(dtype).tiny)
    return float(((got - want).abs() / size.clamp_min(least))[measured].max())


def tiny(dtype: torch.dtype) -> float:
    """Rounding to ``dtype``, and a little of what is computed in: what naive torch may avoid by luck."""
    inside = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return torch.finfo(dtype).eps / 2 + 8 * inside
