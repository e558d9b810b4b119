"""What drawn inputs have found: a test for each bug, by the name of what goes wrong."""

from __future__ import annotations

import pytest
import torch
from oracle import problem
from torch import Tensor
from torch.autograd import forward_ad

from tde_kernels import functional as F
from tde_kernels import reference

FAMILY = {"num_heads": 2, "tau": 16.0}
X, W, TARGET = torch.randn(5, 12), torch.randn(7, 12), torch.tensor([0, 1, 2, 3, 6])


def loss_of(w: Tensor, x: Tensor = X, target: Tensor = TARGET) -> Tensor:
    return F.grouped_cross_entropy(x, w, target, **FAMILY)


def test_a_transform_of_torch_func_is_followed() -> None:
    """The ops had no batching rule, and their autograd Function no support for transforms."""
    torch.testing.assert_close(
        torch.func.grad(loss_of)(W), torch.autograd.grad(loss_of(v := W.clone().requires_grad_()), v)[0]
    )
    each = torch.vmap(torch.func.grad(loss_of), (None, 0, 0))(W, X, TARGET)
    torch.testing.assert_close(each.mean(0), torch.func.grad(loss_of)(W))
    alphas, direction = torch.arange(3.0), F.head_direction(torch.randn(12), num_heads=2)
    swept = torch.vmap(lambda alpha: F.tde_logits(X, W, direction, alpha=alpha, **FAMILY))(alphas)
    torch.testing.assert_close(swept[2], F.tde_logits(X, W, direction, alpha=2.0, **FAMILY))
    with pytest.raises(ValueError, match=r"backend=.cpu. cannot serve logits: torch\.func and forward-mode"):
        torch.vmap(lambda x: F.grouped_logits(x, W, **FAMILY, backend="cpu"))(X)


@pytest.mark.parametrize("of", ["logits", "loss"])
def test_a_forward_derivative_is_not_lost(of: str) -> None:
    """Outside of ``torch.func`` it came out as none at all, which reads as zero."""

    def run(x: Tensor) -> Tensor:
        return F.grouped_logits(x, W, **FAMILY) if of == "logits" else loss_of(W, x)

    towards = torch.randn_like(X)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(run(forward_ad.make_dual(X, towards))).tangent
    assert tangent is not None
    jacobian = torch.autograd.functional.jacobian(run, X)
    torch.testing.assert_close(tangent, (jacobian * towards).sum((-1, -2)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operand", ["x", "w", "direction", "class_scale"])
def test_a_lazily_negated_view_keeps_its_sign(operand: str) -> None:
    """``z.conj().imag`` is memory that holds the negative of its values; kernels read memory."""
    p = problem(5, 12, 7, 2, "lws", tde=True)
    operands = {name: getattr(p, name) for name in ("x", "w", "direction", "class_scale")}
    lazily = {**operands, operand: torch._neg_view(-operands[operand])}
    assert lazily[operand].is_neg() and torch.equal(lazily[operand], operands[operand])
    family = {**p.family, "class_scale": None}

    def run(x: Tensor, w: Tensor, direction: Tensor, class_scale: Tensor) -> tuple[Tensor, ...]:
        leaves = [a.detach().requires_grad_() for a in (x, w, class_scale)]
        out = F.tde_logits(*leaves[:2], direction, alpha=1.5, **{**family, "class_scale": leaves[2]})
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    assert all(map(torch.equal, run(**lazily), run(**operands)))


def test_an_upstream_gradient_without_memory_is_zero() -> None:
    x = X.clone().requires_grad_()
    logits = F.grouped_logits(x, W, **FAMILY)
    (grad,) = torch.autograd.grad(logits, x, torch._efficientzerotensor(logits.shape))
    assert (grad == 0).all()


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 1e30])
def test_the_reference_in_float32_knows_norms_whose_squares_it_cannot_hold(size: float) -> None:
    """They were 0 or infinite, and the logits 0: those of weights that decayed, for one."""
    p = problem(5, 12, 7, 2, tde=True, gamma=0.0)
    want = reference.tde_logits(p.x, p.w, p.direction, alpha=1.5, **p.family)
    assert p.direction is not None
    torch.testing.assert_close(reference.tde_logits(size * p.x, p.w, p.direction, alpha=1.5, **p.family), want)
    torch.testing.assert_close(reference.tde_logits(p.x, size * p.w, p.direction, alpha=1.5, **p.family), want)
    torch.testing.assert_close(
        reference.head_direction(size * p.x[0], num_heads=2), reference.head_direction(p.x[0], num_heads=2)
    )


@pytest.mark.parametrize("alpha", [2**70, -(2**63) - 1])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_alpha_may_be_a_whole_number_of_any_size(backend: str, alpha: int) -> None:
    """One beyond int64 was an overflow within torch; so were those of gamma, exponent and focal_exponent."""
    direction = F.head_direction(torch.randn(12), num_heads=2)
    want = F.tde_logits(X, W, direction, alpha=float(alpha), **FAMILY, backend=backend)
    assert torch.equal(F.tde_logits(X, W, direction, alpha=alpha, **FAMILY, backend=backend), want)
    assert F.grouped_logits(X, W, **FAMILY, gamma=abs(alpha), backend=backend).isfinite().all()
    assert F.grouped_logits(X, W, **FAMILY, normalizer="tau_norm", exponent=abs(alpha), backend=backend).shape == (5, 7)
    assert not F.grouped_cross_entropy(X, W, TARGET, **FAMILY, focal_exponent=abs(alpha), backend=backend).isnan()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_an_average_in_the_features_own_memory(backend: str) -> None:
    """The reference changed the average before it had read the features."""
    for normalizer in ("linear", "deconfound", "tau_norm"):
        start, count = torch.randn(12), torch.tensor(0)
        want = F.grouped_logits(start.expand(3, 12), W, **FAMILY, normalizer=normalizer)
        ema = start.clone()
        got = F.grouped_logits_with_ema_(
            ema.expand(3, 12), W, ema, count, momentum=0.5, **FAMILY, normalizer=normalizer, backend=backend
        )
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(ema, 1.5 * start)


def test_features_with_a_negative_bit_enter_the_average() -> None:
    """torch's own fallback for such views refuses an op that may write to an argument which is None."""
    for x in (torch._neg_view(-X), torch.complex(X, X).conj().imag.neg()):
        ema = F.update_head_ema_(torch.zeros(12), x, momentum=0.9)
        torch.testing.assert_close(ema, x.mean(0))
        torch.testing.assert_close(F.feature_sum(x)[:-1], x.sum(0))
