"""Few features, wide weights on the CPU: the weights are multiplied as they are, and each head's product is scaled.

    z = sum_k s_k o (x_hat^k w^k^T),     dx_hat^k = (s_k o dz) w^k

A scaled copy of the weights would be written once and read twice; what is scaled instead are B x C numbers a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tde_kernels.backends import around_product, core
from tde_kernels.backends.around_product import Passes
from tde_kernels.backends.by_classes import some_classes
from tde_kernels.backends.core import Kept, Saved, dense_rows
from tde_kernels.backends.grouped import Grouped, Rows, Wants

_CLASSES_AT_ONCE = 1024  # their weights are still in the cache when the product follows the norms
_LEAST_WEIGHTS = 1 << 22  # a copy of fewer stays in the cache from one product to the next


def serves(p: Grouped, dtype: torch.dtype, *, always: bool = False) -> bool:
    """Whether this way is the fastest, or ``always`` whether it can serve, from shapes and dtypes alone."""
    # The weights first: where they decide, no graph is bound to a number of rows
    wide = p.w.shape[0] * p.w.shape[1] >= _LEAST_WEIGHTS and p.x.shape[0] * p.heads <= p.x.shape[1]
    exact = p.x.dtype == p.w.dtype == dtype == torch.float32
    return (wide or always) and exact and not p.weights.untouched(dtype)


def saves(passes: Passes, p: Grouped) -> list[Saved]:
    """See :class:`~tde_kernels.backends.core.Saved`: nothing of the size of the weights."""
    x_hat, _, *others = around_product.saves(passes, p, p.x.dtype)
    return [x_hat, Saved((0,)), *others]


def _factors(weights: Rows, norms: Tensor) -> Tensor:
    """``s [K, C]`` of ``norms [C, K]``, 0 where a norm and its offset are."""
    offset, power = weights.factor
    base = norms.t() + offset
    factors = torch.where(base < torch.finfo(base.dtype).tiny, 0.0, base**-power) if power else torch.ones_like(base)
    return factors * (weights.scale if weights.divisor is None else weights.scale / weights.divisor)


def logits(p: Grouped, normalize_features: Callable[..., Tensor]) -> tuple[Tensor, Kept]:
    """The logits and what is kept; ``normalize_features`` is the pass over the features."""
    (batch, dim), classes = p.x.shape, p.w.shape[0]
    x_hat, x_norms = p.x, None
    if not p.features.untouched(p.x.dtype):
        x_norms = p.x.new_empty((batch, p.heads))
        x_hat = normalize_features(p.features, p.x.dtype, norms=x_norms)
    w = dense_rows(p.w)
    w_norms = w.new_empty((classes, p.heads))
    z, of_head = w.new_empty((batch, classes)), w.new_empty((batch, min(classes, _CLASSES_AT_ONCE)))
    for begin in range(0, classes, _CLASSES_AT_ONCE):
        some = slice(begin, min(begin + _CLASSES_AT_ONCE, classes))
        norms = w_norms[some]
        core.compiled().row_norms(core.matrix(w[some]), p.heads, norms.data_ptr(), torch.get_num_threads())
        factors = _factors(some_classes(p.weights, some), norms)
        part = of_head[:, : some.stop - begin]
        for k, head in enumerate(_heads(dim, p.heads)):
            torch.mm(x_hat[:, head], w[some, head].t(), out=part)
            if k == 0:
                torch.mul(part, factors[k], out=z[:, some])
            else:
                z[:, some].addcmul_(part, factors[k])
    return z, Kept(None if x_norms is None else x_hat, None, x_norms, w_norms)


def _heads(dim: int, heads: int) -> list[slice]:
    width = dim // heads
    return [slice(k * width, (k + 1) * width) for k in range(heads)]


def logits_backward(
    passes: Passes, p: Grouped, grad: Tensor, saved: Kept, wants: Wants
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``tde::logits_backward``."""
    dx, dw, dscale = around_product.logits_backward(passes, p, grad, saved, wants._replace(x=False))
    if wants.x:
        assert saved.w_norms is not None
        factors = _factors(p.weights, saved.w_norms)
        dx_hat = torch.empty_like(p.x, memory_format=torch.contiguous_format)
        for k, head in enumerate(_heads(p.x.shape[1], p.heads)):
            torch.mm(grad * factors[k], p.w[:, head], out=dx_hat[:, head])
        dx = dx_hat if saved.x_norms is None else passes.backward(p.features, dx_hat, saved.x_norms, None)
    return dx, dw, dscale
