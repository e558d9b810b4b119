"""The loss of any input and options, whole or in pieces, against float64; what is no number stays in its row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from drawn import Recipe, Untouched, exactly, examples, recipes, same_bits
from hypothesis import given
from hypothesis import strategies as st
from oracle import Problem, naive_logits, reference_logits
from sizes import error, sizes, tiny
from test_loss import OPTIONS, RESULTS, some_options
from torch import Tensor

from tde_kernels import backends, reference
from tde_kernels import functional as F
from tde_kernels.backends import cpu, loss_by_rows

PIECES = ("whole", "rows", "classes")


@contextmanager
def in_pieces(way: str, rows: int, classes: int) -> Iterator[None]:
    """A workspace for all logits, for some rows of them, or for some classes."""
    room = {"whole": rows, "rows": max(1, rows // 2), "classes": max(1, rows // 2)}[way]
    passes = type(cpu.PASSES)
    with (
        patch.object(passes, "workspace", 4 * max(1, room * classes)),
        patch.object(passes, "fewest_rows", 1 if way == "rows" else 10**6),
        patch.object(loss_by_rows, "_CLASSES_AT_ONCE", 10),
    ):
        yield


def fused(p: Problem, target: Tensor, backend: str, options: dict[str, Any]) -> Tensor:
    return F.grouped_cross_entropy(p.x, p.w, target, **options, **p.family, backend=backend)


def results(p: Problem, loss: Tensor) -> tuple[Tensor, ...]:
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return loss.detach(), *torch.autograd.grad(loss, p.leaves(), upstream)


def learning(p: Problem) -> Problem:
    scale = None if p.class_scale is None else p.class_scale.detach().requires_grad_()
    return replace(p, x=p.x.detach().requires_grad_(), w=p.w.detach().requires_grad_(), class_scale=scale)


def loss_sizes(p: Problem, target: Tensor, dtype: torch.dtype, options: dict[str, Any], way: str) -> list[Tensor]:
    """Of what loss and gradients are made: an error of the logits moves each probability by as much at most."""
    classes = len(p.w)
    of = sizes(p, torch.zeros(*target.shape, classes, dtype=torch.float64), dtype, way)
    each = 1 + of.logits.amax(-1) + torch.tensor(float(classes)).log()
    each = each + sum(float(options[name].abs().max()) for name in ("logit_bias", "margin") if name in options)
    each = each * (1 + options.get("focal_exponent", 0.0)) * 1.5
    if options["reduction"] != "mean":
        each = each * options.get("class_weight", torch.ones(1)).max()
    count = max(1, int((target != -100).sum())) if options["reduction"] == "mean" else 1
    upstream = (each / count)[..., None].expand(*target.shape, classes)
    _, *gradients = sizes(p, torch.where(upstream.isfinite(), upstream, 0.0), dtype, way)
    lost = torch.where(upstream.isfinite().all(), 0.0, torch.inf)
    loss = each if options["reduction"] == "none" else (each / count).sum()
    return [loss, *(size + lost for size in gradients)]


@examples(20)
@given(
    recipe=recipes(tde=st.just(False)),
    names=st.sets(st.sampled_from(OPTIONS)),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    ignored=st.booleans(),
    way=st.sampled_from(PIECES),
)
def test_loss(recipe: Recipe, names: set[str], reduction: str, ignored: bool, way: str) -> None:
    torch.manual_seed(recipe.seed)
    p, rows = recipe.problem(), torch.Size(recipe.leading).numel()
    options = {**some_options(names, rows, recipe.classes), "reduction": reduction}
    target = torch.randint(recipe.classes, recipe.leading)
    if "target_b" in options:
        options["target_b"] = options["target_b"].reshape(recipe.leading)
    if ignored:
        target = torch.where(torch.rand(recipe.leading) < 0.3, -100, target)

    def exact(q: Problem, logits: Any) -> tuple[Tensor, ...]:
        return results(q, reference.cross_entropy(logits(q), target, **options))

    measure = [0.0] * 4
    for pattern in ("normal", "constant") * 3:
        benign = recipe.benign(pattern).problem()
        want = exact(exactly(benign).cast(torch.float64, grad=True), reference_logits)
        naive = exact(benign.cast(recipe.dtype, grad=True), naive_logits)
        size = loss_sizes(exactly(benign), target, recipe.dtype, options, "plain")
        measure = [max(m, error(*one)) for m, one in zip(measure, zip(naive, want, size, strict=False), strict=False)]
    want = exact(exactly(p).cast(torch.float64, grad=True), reference_logits)
    for backend in ("reference", "cpu"):
        if backends.refusal(backend, "cross_entropy", "cpu", recipe.dtype) is not None:
            continue
        untouched = Untouched(p.x, p.w, p.class_scale, target)
        with in_pieces(way, rows, recipe.classes):
            got, again = (results(q, fused(q, target, backend, options)) for q in (learning(p), learning(p)))
        untouched.check()
        size = loss_sizes(exactly(p), target, recipe.dtype, options, "plain" if backend == "reference" else "product")
        for name, a, b, of, theirs in zip(RESULTS, got, want, size, measure, strict=False):
            ours, bound = error(a, b, of), 2 * theirs + tiny(recipe.dtype)
            assert ours <= bound, f"{name} by {backend}: error {ours:.2e}, naive {theirs:.2e}, bound {bound:.2e}"
        assert all(map(same_bits, got, again)), "not the same bits twice"
