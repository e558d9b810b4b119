"""Eq. 9 on every fused backend: probabilities within twice naive torch's error, logarithms that never cancel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from oracle import NORMALIZERS, Problem, assert_close, naive_exempt, naive_logits, problem
from torch import Tensor

from tde_kernels import functional as F
from tde_kernels import reference

Fused = tuple[str, str]


def run(p: Problem, background: int, backend: str | None = None, *, log: bool = False) -> Tensor:
    assert p.direction is not None
    return F.background_exempt(
        p.x, p.w, p.direction, alpha=p.alpha, background_index=background, log=log, **p.family, backend=backend
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("background", [0, 5, -1])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("classes", [8, 127, 1231])
def test_oracle(classes: int, normalizer: str, background: int, dtype: torch.dtype, fused: Fused) -> None:
    backend, device = fused
    p = replace(problem(33, 24, classes, 2, normalizer, tde=True, dtype=dtype), tau=4.0)
    want = run(p.cast(torch.float64), background, "reference")
    got = run(p.cast(dtype, device), background, backend)
    assert got.dtype == dtype
    assert_close(got, naive_exempt(p, background % classes), want, "probabilities")
    # a rounding of the logits, of size 10 here, moves all probabilities of a row together
    atol = 32 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2
    torch.testing.assert_close(got.double().sum(-1).cpu(), want.sum(-1), rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_logarithm(dtype: torch.dtype, fused: Fused) -> None:
    """Its softmax is Eq. 9; its error is that of naive log-softmaxes, not that of the logarithm of a rounded number."""
    backend, device = fused
    p = problem(64, 24, 200, 2, tde=True, dtype=dtype)
    want = run(p.cast(torch.float64), 3, "reference", log=True)
    got = run(p.cast(dtype, device), 3, backend, log=True)
    plain, share = naive_logits(replace(p, direction=None)).log_softmax(-1), naive_logits(p)
    share = share.masked_fill(torch.arange(200) == 3, -torch.inf).log_softmax(-1)
    naive = torch.log1p(-plain[:, 3:4].exp()) + share
    naive[:, 3] = plain[:, 3]
    assert_close(got, naive, want, "log-probabilities")


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF], ids=hex)
def test_a_class_that_is_no_number(bits: int, fused: Fused) -> None:
    """Nothing is a probability beside it, whatever its bits."""
    backend, device = fused
    p = problem(5, 24, 40, 2, tde=True).cast(torch.float32, device)
    p.w[7] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert run(p, 3, backend).isnan().all()


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,), (2, 0)], ids=str)
def test_leading_shapes(shape: tuple[int, ...], fused: Fused) -> None:
    p = problem(shape, 12, 9, 2, tde=True)
    got = run(p.cast(torch.float32, fused[1]), 0, fused[0])
    assert got.shape == (*shape, 9)
    torch.testing.assert_close(got.cpu().double(), run(p.cast(torch.float64), 0), rtol=1e-5, atol=1e-6)


def test_extreme_logits_stay_finite(fused: Fused) -> None:
    """Probabilities that are 1 or 0 to the last bit of float32; zero rows; one class that is the background."""
    p = replace(problem(50, 24, 30, 2, tde=True), tau=2000.0)
    p.x[3] = 0
    for background in (0, 17, 29):
        want = run(p.cast(torch.float64), background, log=True)
        got = run(p.cast(torch.float32, fused[1]), background, fused[0], log=True)
        assert got.isfinite().all()
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=2e-3)
        prob = run(p.cast(torch.float32, fused[1]), background, fused[0])
        torch.testing.assert_close(
            prob.sum(-1).cpu(), torch.ones(50), rtol=0, atol=2000 * torch.finfo(torch.float32).eps
        )
    alone = replace(p, w=p.w[:1]).cast(torch.float32, fused[1])
    assert (run(alone, 0, fused[0]) == 1).all()


def test_zero_direction_is_the_plain_softmax(fused: Fused) -> None:
    p = problem(20, 12, 9, 2, tde=True)
    p = replace(p, direction=torch.zeros(12)).cast(torch.float32, fused[1])
    want = F.grouped_logits(p.x, p.w, **p.family).softmax(-1)
    torch.testing.assert_close(run(p, 4, fused[0]), want, rtol=1e-5, atol=1e-7)


def test_a_gradient_comes_from_the_reference(fused: Fused) -> None:
    backend, device = fused
    p = problem(6, 12, 9, 2, tde=True).cast(torch.float32, device, grad=True)
    out = run(p, 0, log=True)
    want = reference.background_exempt(p.x, p.w, p.direction, alpha=p.alpha, background_index=0, log=True, **p.family)
    upstream = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, p.leaves(), upstream), torch.autograd.grad(want, p.leaves(), upstream), strict=True
    ):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="cannot serve background_exempt: it has no gradient"):
        run(p, 0, backend)
    with torch.no_grad():
        run(p, 0, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_autocast(dtype: torch.dtype, fused: Fused) -> None:
    """Logits are subtracted in float32, rounded once."""
    p = problem(20, 24, 50, 2, tde=True).cast(torch.float32, fused[1])
    want = run(p.cast(torch.float64), 0, log=True)
    with torch.autocast(fused[1], dtype):
        got = run(p, 0, log=True)
    assert got.dtype == dtype
    naive = want.to(dtype)  # nothing can be closer
    low = p.cast(dtype)
    operands = run(low.cast(torch.float64), 0, log=True)  # what rounding the operands alone costs
    assert (got.cpu().double() - want.cpu()).abs().max() <= 2 * (
        (operands - want.cpu()).abs().max() + (naive.cpu().double() - want.cpu()).abs().max()
    )


def test_alpha_sweep_under_autocast_multiplies_in_float32(fused: Fused) -> None:
    p = problem(500, 24, 50, 2, tde=True).cast(torch.float32, fused[1])
    alphas = [0.0, 0.7, 1.4, 3.0]
    outside = F.alpha_sweep(p.x, p.w, p.direction, alphas, **p.family, backend=fused[0])
    with torch.autocast(fused[1], torch.bfloat16):
        inside = F.alpha_sweep(p.x, p.w, p.direction, alphas, **p.family, backend=fused[0])
    assert torch.equal(inside, outside)
    exact = p.cast(torch.float64)
    want = reference.alpha_sweep(exact.x, exact.w, exact.direction, alphas, **exact.family)
    for got, right, alpha in zip(outside.cpu(), want, alphas, strict=True):  # they differ only where the best two tie
        scores = naive_logits(replace(exact, alpha=alpha)).gather(-1, torch.stack([got, right], -1))
        torch.testing.assert_close(scores[:, 0], scores[:, 1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)], ids=str)
def test_alpha_sweep_and_topk_keep_leading_shapes(shape: tuple[int, ...], fused: Fused) -> None:
    p = problem(shape, 12, 9, 2, tde=True).cast(torch.float32, fused[1])
    swept = F.alpha_sweep(p.x, p.w, p.direction, [0.0, 2.0], **p.family, backend=fused[0])
    assert torch.equal(swept, reference.alpha_sweep(p.x, p.w, p.direction, [0.0, 2.0], **p.family))
    values, classes = F.topk(p.x, p.w, 3, direction=p.direction, alpha=2.0, **p.family, backend=fused[0])
    want, right = reference.topk(p.x, p.w, 3, direction=p.direction, alpha=2.0, **p.family)
    assert torch.equal(classes, right)
    torch.testing.assert_close(values, want)
    assert F.alpha_sweep(p.x, p.w, p.direction, [], **p.family, backend=fused[0]).shape == (0, *shape)
