"""The definition checked from outside: by naive equations, torch's own losses, autograd and the paper's algebra."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from oracle import NORMALIZERS, Problem, naive_exempt, naive_logits, problem, reference_logits
from torch import Tensor
from torch.nn import functional as nnf

from tde_kernels import reference

F64 = torch.float64


def double(*args: object, **kwargs: object) -> Problem:
    return problem(*args, **kwargs).cast(F64)  # type: ignore[arg-type]


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tde", [False, True], ids=["eq7", "eq8"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_equals_naive_equations(normalizer: str, tde: bool) -> None:
    for num_heads in (1, 2, 3, 4):
        p = double((3, 5), 12, 7, num_heads, normalizer, tde=tde)
        same(reference_logits(p), naive_logits(p))


@pytest.mark.parametrize("tde", [False, True], ids=["eq7", "eq8"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_gradcheck(normalizer: str, tde: bool) -> None:
    p = double(4, 6, 5, 2, normalizer, tde=tde).cast(F64, grad=True)

    def run(x: Tensor, w: Tensor, *scale: Tensor) -> Tensor:
        return reference_logits(replace(p, x=x, w=w, class_scale=scale[0] if scale else None))

    assert torch.autograd.gradcheck(run, p.leaves())


def test_gradients_reach_direction_and_alpha() -> None:
    p = double(4, 6, 5, 2, tde=True)
    assert p.direction is not None
    alpha = torch.tensor(1.5, dtype=F64, requires_grad=True)

    def run(direction: Tensor, alpha: Tensor) -> Tensor:
        return reference.tde_logits(p.x, p.w, direction, alpha=alpha, **p.family)

    assert torch.autograd.gradcheck(run, (p.direction.requires_grad_(), alpha))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_eq8_equivalent_forms(normalizer: str) -> None:
    """Subtracting the effect of the projected features is a rank-K correction of Eq. 7."""
    p = double(4, 12, 5, 3, normalizer, tde=True)
    assert p.direction is not None
    total, along_x, along_w = reference.effects(
        p.x, p.w, p.direction, reference.checks.logits(p.x, p.w, *list(p.family.values()))
    )
    same(total, naive_logits(replace(p, direction=None)))
    same(total - p.alpha * along_x @ along_w.T, naive_logits(p))
    if normalizer == "deconfound":  # Eq. 8 to the letter
        z = torch.zeros(4, 5, dtype=F64)
        for k in range(3):
            x, w, u = (a[..., 4 * k : 4 * k + 4] for a in (p.x, p.w, p.direction))
            cos = (x @ u) / x.norm(dim=-1)
            factual = (x / x.norm(dim=-1, keepdim=True)) @ w.T
            z += (p.tau / 3) * (factual - p.alpha * cos[:, None] * (w @ u)) / (w.norm(dim=-1) + p.gamma)
        same(naive_logits(p), z)


def test_head_direction_is_of_unit_norm_in_each_head() -> None:
    ema = torch.randn(12, dtype=F64)
    direction = reference.head_direction(ema, num_heads=3).view(3, 4)
    same(direction, ema.view(3, 4) / ema.view(3, 4).norm(dim=1, keepdim=True))
    ema[4:8] = 0
    same(reference.head_direction(ema, num_heads=3).view(3, 4).norm(dim=1), torch.tensor([1.0, 0, 1], dtype=F64))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("zero", ["feature", "weight", "direction", "feature group"])
def test_zeros_contribute_exactly_nothing(normalizer: str, zero: str) -> None:
    p = double(4, 6, 5, 2, normalizer, tde=True).cast(F64, grad=True)
    assert p.direction is not None
    with torch.no_grad():
        {
            "feature": p.x[1],
            "weight": p.w[2],
            "direction": p.direction,
            "feature group": p.x[1, :3],
        }[zero].zero_()
    out = reference_logits(p)
    grads = torch.autograd.grad(out.square().sum() + out.sum(), p.leaves())
    assert out.isfinite().all() and all(g.isfinite().all() for g in grads)
    if zero == "feature":
        assert (out[1] == 0).all()
    elif zero == "weight":
        assert (out[:, 2] == 0).all()
    elif zero == "direction":
        same(out, reference_logits(replace(p, direction=None)))
    else:  # what is left is the other head
        half = replace(p, x=p.x[:, 3:], w=p.w[:, 3:], direction=p.direction[3:], num_heads=1, tau=p.tau / 2)
        same(out[1], reference_logits(half)[1])


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("background", [0, 3, -1])
def test_background_exempt(normalizer: str, background: int) -> None:
    p = double((2, 4), 6, 5, 2, normalizer, tde=True)
    arguments = dict(alpha=p.alpha, background_index=background, **p.family)
    prob = reference.background_exempt(p.x, p.w, p.direction, **arguments)
    same(prob, naive_exempt(p, background % 5))
    same(prob.sum(-1), torch.ones(2, 4, dtype=F64))
    log = reference.background_exempt(p.x, p.w, p.direction, log=True, **arguments)
    same(log.exp(), prob)
    same(log.softmax(-1), prob)


def test_background_exempt_where_the_quotient_would_be_nothing_over_nothing() -> None:
    """With q_0 = 1 to the last bit, Eq. 9 as written is 0/0; the foreground's share is defined all the same."""
    p = replace(double(4, 6, 5, 2, tde=True), tau=4000.0)
    for background in range(5):
        for alpha in (0.0, 3.0):
            arguments = dict(alpha=alpha, background_index=background, **p.family)
            log = reference.background_exempt(p.x, p.w, p.direction, log=True, **arguments)
            assert log.isfinite().all()
            same(log.exp().sum(-1), torch.ones(4, dtype=F64))


LOSS_CASES = {
    "plain": {},
    "class_weight": {"class_weight": torch.rand(7, dtype=F64) + 0.2},
    "smoothing": {"label_smoothing": 0.1},
    "both": {"class_weight": torch.rand(7, dtype=F64) + 0.2, "label_smoothing": 0.3},
    "ignore": {"ignore_index": 2},
    "ignore weighted": {"ignore_index": 2, "class_weight": torch.rand(7, dtype=F64) + 0.2, "label_smoothing": 0.2},
}


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("case", LOSS_CASES)
def test_cross_entropy_is_that_of_torch(case: str, reduction: str) -> None:
    options = dict(LOSS_CASES[case])
    p = double(9, 6, 7, 2)
    y = torch.tensor([0, 2, 6, 2, 1, 3, 4, 5, 2])
    z = naive_logits(p)
    ours = dict(options)
    theirs = {"weight": options.pop("class_weight", None), **options}
    want = nnf.cross_entropy(z, y, reduction=reduction, **theirs)
    same(reference.cross_entropy(z, y, reduction=reduction, **ours), want)
    same(reference.grouped_cross_entropy(p.x, p.w, y, reduction=reduction, **ours, **p.family), want)


def test_cross_entropy_keeps_leading_shape_and_is_float32_for_16_bits() -> None:
    p = problem((3, 4), 6, 7, 2).cast(torch.bfloat16)
    y = torch.randint(7, (3, 4))
    loss = reference.grouped_cross_entropy(p.x, p.w, y, reduction="none", **p.family)
    assert loss.shape == (3, 4) and loss.dtype == torch.float32
    wide = p.cast(F64)
    want = reference.grouped_cross_entropy(wide.x, wide.w, y, reduction="none", **p.family)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)  # logits were not rounded in between


def test_balanced_softmax_margin_focal_and_mixup() -> None:
    z = torch.randn(6, 7, dtype=F64)
    a, b = torch.randint(7, (6,)), torch.randint(7, (6,))
    counts = torch.randint(1, 100, (7,)).double()
    prob = z.exp() * counts
    same(
        reference.cross_entropy(z, a, logit_bias=counts.log(), reduction="none"),
        -(prob[range(6), a] / prob.sum(-1)).log(),
    )
    margin = torch.rand(7, dtype=F64)
    shifted = z.clone()
    shifted[range(6), a] -= margin[a]
    same(reference.cross_entropy(z, a, margin=margin), nnf.cross_entropy(shifted, a))
    p_target = z.softmax(-1)[range(6), a]
    same(reference.cross_entropy(z, a, focal_exponent=2.0, reduction="none"), -((1 - p_target) ** 2) * p_target.log())
    same(
        reference.cross_entropy(z, a, target_b=b, lam=0.3),
        0.3 * nnf.cross_entropy(z, a) + 0.7 * nnf.cross_entropy(z, b),
    )
    everything = dict(margin=margin, logit_bias=counts.log(), class_weight=margin + 0.1, label_smoothing=0.1)
    wanted = torch.nn.functional.cross_entropy(
        shifted + counts.log(), a, weight=margin + 0.1, label_smoothing=0.1, reduction="sum"
    )
    same(reference.cross_entropy(z, a, reduction="sum", **everything), wanted)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_loss_gradients_are_finite_and_right(exponent: float) -> None:
    z = (8 * torch.randn(5, 7, dtype=F64)).requires_grad_()
    y = torch.tensor([0, -100, 3, 6, 2])
    options = dict(focal_exponent=exponent, label_smoothing=0.1, class_weight=torch.rand(7, dtype=F64) + 0.1)
    assert torch.autograd.gradcheck(lambda z: reference.cross_entropy(z, y, **options), (z,))
    certain = torch.zeros(1, 7, dtype=F64).index_fill_(1, torch.tensor([3]), 1e4).requires_grad_()
    (grad,) = torch.autograd.grad(
        reference.cross_entropy(certain, torch.tensor([3]), focal_exponent=exponent), (certain,)
    )
    assert grad.isfinite().all()


def test_all_ignored_is_torchs_nan_mean_and_zero_sum() -> None:
    z, y = torch.randn(3, 4), torch.full((3,), -100)
    assert math.isnan(reference.cross_entropy(z, y)) and math.isnan(nnf.cross_entropy(z, y))
    assert reference.cross_entropy(z, y, reduction="sum") == 0


def test_alpha_sweep_is_the_argmax_for_each_alpha() -> None:
    p = double((3, 20), 6, 9, 2, tde=True)
    alphas = [0.0, 0.5, 1.0, 3.0, -2.0]
    swept = reference.alpha_sweep(p.x, p.w, p.direction, alphas, **p.family)
    want = torch.stack([naive_logits(replace(p, alpha=a)).argmax(-1) for a in alphas])
    assert swept.dtype == torch.int64 and torch.equal(swept, want)
    assert len({tuple(row.flatten().tolist()) for row in swept}) == len(alphas)  # alpha does change the answer
    assert torch.equal(reference.alpha_sweep(p.x, p.w, p.direction, torch.tensor(alphas), **p.family), want)


@pytest.mark.parametrize("tde", [False, True])
def test_topk(tde: bool) -> None:
    p = double((2, 8), 6, 9, 2, tde=tde)
    values, classes = reference.topk(p.x, p.w, 4, direction=p.direction, alpha=p.alpha, **p.family)
    want = naive_logits(p).topk(4)
    same(values, want.values)
    assert torch.equal(classes, want.indices)


def test_ties_go_to_the_lowest_class() -> None:
    x, w, direction = torch.ones(3, 4), torch.ones(40, 4), torch.tensor([1.0, 0, 1, 0])
    w[0] = -1
    family = dict(num_heads=2, tau=1.0)
    assert reference.topk(x, w, 3, **family)[1].tolist() == [[1, 2, 3]] * 3
    assert reference.alpha_sweep(x, w, direction, [0.0, 0.1], **family).tolist() == [[1] * 3] * 2


def test_ema_recurrence() -> None:
    """Assumption 1: un-normalised, one mean a step."""
    ema, want = torch.zeros(6), torch.zeros(6, dtype=F64)
    for step in range(4):
        x = torch.randn(step + 1, 5, 6)
        assert reference.update_head_ema_(ema, x, momentum=0.7) is ema
        want = 0.7 * want + x.double().mean((0, 1))
    torch.testing.assert_close(ema.double(), want, rtol=1e-6, atol=1e-6)
