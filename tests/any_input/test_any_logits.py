"""Logits and their gradients of any input, by every way of the CPU and by the reference, against float64."""

from __future__ import annotations

from dataclasses import replace

import torch
from drawn import Recipe, Untouched, Way, exactly, examples, held_to, recipes, same_bits, ways
from hypothesis import given, note
from oracle import Problem, gradients, naive_logits, reference_logits
from sizes import error, sizes, tiny
from test_logits import RESULTS, run_on
from torch import Tensor


def results(p: Problem, upstream: Tensor, way: Way) -> tuple[Tensor, ...]:
    """Logits and the gradients of what the problem learns, of the very tensors that it has."""
    scale = None if p.class_scale is None else p.class_scale.detach().requires_grad_()
    q = replace(p, x=p.x.detach().requires_grad_(), w=p.w.detach().requires_grad_(), class_scale=scale)
    with held_to(way[1]):
        out, grads = gradients(q, run_on(way[0]), upstream)
    return out.detach(), *grads


def naive_errors(recipe: Recipe, p: Problem, upstream: Tensor) -> list[float]:
    """The worst of naive torch in the dtype: on ordinary numbers of these shapes, and on these, if it can have them.

    Of equal numbers all roundings are alike, and add up.
    """
    worst = [0.0] * 4
    for q in (p, *(recipe.benign(pattern).problem() for pattern in ("normal", "constant") * 3)):
        exact = exactly(q)
        of = sizes(exact, upstream.double(), recipe.dtype, "plain")
        want, want_grads = gradients(exact.cast(torch.float64, grad=True), reference_logits, upstream)
        naive, naive_grads = gradients(q.cast(recipe.dtype, grad=True), naive_logits, upstream)
        for i, (a, b) in enumerate(zip((naive, *naive_grads), (want, *want_grads), strict=True)):
            known = error(a, b, torch.where(a.isfinite() & b.isfinite(), of[i], torch.inf))
            worst[i] = max(worst[i], known if q is not p or known < 0.05 else 0.0)
    return worst


def check(recipe: Recipe, way: Way, p: Problem, upstream: Tensor, measure: list[float]) -> tuple[Tensor, ...]:
    exact = exactly(p)
    want = gradients(exact.cast(torch.float64, grad=True), reference_logits, upstream)
    untouched = Untouched(p.x, p.w, p.direction, p.class_scale, upstream)
    got = results(p, upstream, way)
    untouched.check()
    of = sizes(exact, upstream.double(), recipe.dtype, "plain" if way[0] == "reference" else way[1])
    for name, a, b, size, theirs in zip(RESULTS, got, (want[0], *want[1]), of, measure, strict=False):
        assert a.dtype == recipe.dtype
        ours, bound = error(a, b, size), 2 * theirs + tiny(recipe.dtype)
        assert ours <= bound, f"{name} by {way}: error {ours:.2e}, naive torch has {theirs:.2e}, bound {bound:.2e}"
    return got


@examples(45)
@given(recipe=recipes())
def test_logits(recipe: Recipe) -> None:
    torch.manual_seed(recipe.seed)
    p = recipe.problem()
    upstream = torch.randn(*recipe.leading, recipe.classes).to(recipe.dtype)
    measure = naive_errors(recipe, p, upstream)
    note(f"naive torch: {measure}")
    for way in ways(recipe.dtype):
        got = check(recipe, way, p, upstream, measure)
        assert all(map(same_bits, got, results(p, upstream, way))), "not the same bits twice"
