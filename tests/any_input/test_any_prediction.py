"""Eq. 9, the largest logits, and the winners of some alphas and of all, for any input."""

from __future__ import annotations

from dataclasses import replace

import torch
from drawn import Recipe, Untouched, exactly, examples, recipes, same_bits, ways
from hypothesis import given
from hypothesis import strategies as st
from oracle import Problem, naive_logits, reference_logits
from sizes import SMALLEST, error, sizes, tiny
from torch import Tensor

from tde_kernels import functional as F
from tde_kernels import reference

ALPHAS = [-1.0, 0.0, 1.5, 40.0]


def tolerance(recipe: Recipe, p: Problem, dtype: torch.dtype) -> Tensor:
    """``[...]``: what the logits of a row may be off; infinite where nothing is claimed of one of them."""
    measure = 0.0
    for pattern in ("normal", "constant") * 3:
        q = replace(recipe.benign(pattern), dtype=dtype).problem()
        nothing = torch.zeros(*recipe.leading, recipe.classes, dtype=torch.float64)
        size = sizes(exactly(q), nothing, dtype, "plain").logits
        measure = max(measure, error(naive_logits(q), reference_logits(exactly(q)), size))
    size = sizes(exactly(p), torch.zeros(*recipe.leading, recipe.classes, dtype=torch.float64), recipe.dtype).logits
    least = max(SMALLEST, torch.finfo(recipe.dtype).tiny)  # below, it is the rounding of denormal results
    off = ((2 * measure + tiny(dtype)) * size.clamp_min(least)).amax(-1)
    return torch.where(reference_logits(exactly(p)).isfinite().all(-1) & off.isfinite(), off, torch.inf)


def assert_largest(chosen: Tensor, scores: Tensor, off: Tensor) -> None:
    """The logit of the ``chosen [...]`` class is the largest of ``scores [..., C]``, or as good as."""
    assert ((chosen >= 0) & (chosen < scores.shape[-1])).all()
    known = off.isfinite()
    short = scores.amax(-1) - scores.gather(-1, chosen[..., None])[..., 0]
    assert (short[known] <= 2 * off[known]).all()


@examples(12)
@given(recipe=recipes(tde=st.just(True)), share=st.floats(0, 1))
def test_largest(recipe: Recipe, share: float) -> None:
    torch.manual_seed(recipe.seed)
    p = recipe.problem()
    k = max(1, round(share * recipe.classes))
    scores, off = reference_logits(exactly(p)), tolerance(recipe, p, recipe.dtype)
    known = off.isfinite()
    for backend in dict.fromkeys(backend for backend, _ in ways(recipe.dtype, "topk")):
        untouched = Untouched(p.x, p.w, p.direction, p.class_scale)
        runs = [
            F.topk(p.x, p.w, k, direction=p.direction, alpha=p.alpha, **p.family, backend=backend) for _ in range(2)
        ]
        untouched.check()
        values, classes = runs[0]
        assert all(map(same_bits, *runs)) and values.dtype == recipe.dtype
        assert ((classes >= 0) & (classes < recipe.classes)).all()
        assert (classes.sort(-1).values.diff(dim=-1) > 0).all(), "a class twice"
        right = scores.topk(k).values
        for got in (values.double(), scores.gather(-1, classes)):
            assert ((got - right).abs().amax(-1)[known] <= 2 * off[known]).all()
        assert (values[known].double().diff(dim=-1) <= 0).all(), "not in descending order"


@examples(10)
@given(recipe=recipes(tde=st.just(True)))
def test_winners(recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    p = recipe.problem()
    dtype = torch.float64 if recipe.dtype == torch.float64 else torch.float32  # the product's
    off = tolerance(recipe, p, dtype)
    for backend in dict.fromkeys(backend for backend, _ in ways(recipe.dtype, "alpha_sweep")):
        untouched = Untouched(p.x, p.w, p.direction, p.class_scale)
        swept = F.alpha_sweep(p.x, p.w, p.direction, ALPHAS, **p.family, backend=backend)
        found = F.alpha_segments(p.x, p.w, p.direction, **p.family, backend=backend)
        untouched.check()
        rows = off.numel()
        assert found.offsets.shape == (rows + 1,) and (found.offsets.diff() > 0).all()
        assert (found.starts[found.offsets[:-1]] == -torch.inf).all()
        for chosen, alpha in zip(swept, ALPHAS, strict=True):
            scores = reference_logits(exactly(replace(p, alpha=alpha)))
            here = off * (1 + abs(alpha))
            assert_largest(chosen, scores, here)
            segments = found.at(alpha)
            if len(segments) == rows:
                assert_largest(segments.reshape(off.shape), scores, here)
            else:  # a sample of numbers has one winner, whatever the others are
                assert not off.isfinite().all()


@examples(10)
@given(recipe=recipes(tde=st.just(True)), place=st.floats(0, 1), log=st.booleans())
def test_background(recipe: Recipe, place: float, log: bool) -> None:
    torch.manual_seed(recipe.seed)
    p = recipe.problem()
    background = round(place * (recipe.classes - 1))
    arguments = {"alpha": p.alpha, "background_index": background}
    exact = exactly(p)
    want = reference.background_exempt(exact.x, exact.w, exact.direction, log=True, **arguments, **exact.family)
    off = 4 * tolerance(recipe, p, torch.float64 if recipe.dtype == torch.float64 else torch.float32)
    off = off + tiny(torch.float32) * (1 + recipe.classes)
    if recipe.dtype not in (torch.float32, torch.float64):  # operands may be scaled in the dtype
        off = off + 4 * tolerance(recipe, p, recipe.dtype)
    for backend in dict.fromkeys(backend for backend, _ in ways(recipe.dtype, "background_exempt")):
        untouched = Untouched(p.x, p.w, p.direction, p.class_scale)
        got = F.background_exempt(p.x, p.w, p.direction, log=log, **arguments, **p.family, backend=backend)
        untouched.check()
        known = off.isfinite()
        rounding = torch.finfo(recipe.dtype).eps
        if log:
            numbers = known[..., None] & want.isfinite() & (want > -torch.finfo(recipe.dtype).max / 2)
            wrong = (got.double() - want).abs() > off[..., None] + rounding * want.abs()
            assert not (wrong & numbers).any() and got[numbers].isfinite().all()
        else:
            sums = got.double().sum(-1)
            slack = off.expm1() + recipe.classes * rounding
            assert ((sums - 1).abs()[known] <= slack[known]).all()
            assert ((got.double() - want.exp()).abs().amax(-1)[known] <= slack[known]).all()
