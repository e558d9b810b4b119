"""Losses and gradients: of every option, in every dtype, whole and in parts, as one process finds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from oracle import NORMALIZERS, Problem, assert_within, error, naive_logits, reference_logits
from torch import Tensor
from torch import distributed as dist

from class_parallel_checks.common import (
    DRAWS,
    ROWS,
    SOME,
    C,
    check,
    device,
    fused,
    heads,
    in_place,
    labels_of,
    little_workspace,
    mild,
    noted,
    options_of,
    own_classes,
    own_rows,
    ranks,
    step,
)
from tde_kernels import reference
from tde_kernels.class_parallel.shards import Shards


def assert_equals_one_process(
    p: Problem, dtype: torch.dtype, target: Tensor, mask: Tensor | None, options: dict[str, Any], what: str
) -> None:
    """Everything that a training step gives: twice the error of one process and of naive torch, in that dtype."""
    none = options.get("reduction") == "none"
    upstream = torch.linspace(0.1, 1.0, len(target)) if none else torch.tensor(1.7)

    def composed(q: Problem, logits: Callable[[Problem], Tensor]) -> list[Tensor]:
        loss = reference.cross_entropy(logits(q), target, **options)
        return [loss.detach(), *torch.autograd.grad(loss, q.leaves(), upstream.to(loss))]

    measured = torch.zeros(len(p.leaves()) + 1)
    for _ in range(-(-10 // ranks())):  # one number, or few that cancel: the worst of some scales, each rank's own
        scales = 1 + torch.rand(2, generator=DRAWS)
        drawn = replace(p, x=p.x * scales[0], w=p.w * scales[1]).cast(dtype)
        right = composed(drawn.cast(torch.float64, grad=True), reference_logits)
        naive = composed(drawn.cast(dtype, grad=True), naive_logits)
        errors = torch.tensor([error(a, b) for a, b in zip(naive, right, strict=True)])
        measured = torch.maximum(measured, errors)
    measured = measured.to(device())
    dist.all_reduce(measured, dist.ReduceOp.MAX)
    want = composed(p.cast(torch.float64, grad=True), reference_logits)
    for backend in (fused(), "reference"):
        compare_with_one_process(p, dtype, target, mask, options, what, upstream, want, measured.tolist(), backend)


def compare_with_one_process(
    p: Problem,
    dtype: torch.dtype,
    target: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
    what: str,
    upstream: Tensor,
    want: list[Tensor],
    measured: list[float],
    backend: str,
) -> None:
    """On one backend, where naive torch has errors ``measured``."""
    none = options.get("reduction") == "none"
    q = p.cast(dtype, device())
    there = {name: value.to(q.x.device) if isinstance(value, Tensor) else value for name, value in options.items()}
    target, mask, upstream = (None if a is None else a.to(q.x.device) for a in (target, mask, upstream))
    whole, part = heads(q, backend=backend)
    alone = step(whole, q.x, upstream, target, mask=mask, **there)
    mine = {name: own_rows(value) if name == "target_b" else value for name, value in there.items()}
    loss, dx, *dw = step(
        part,
        own_rows(q.x),
        ranks() * own_rows(upstream) if none else upstream,  # the mean over ranks of their sums
        own_rows(target),
        mask=None if mask is None else own_rows(mask),
        **mine,
    )
    parts = [own_rows(want[0]) if none else want[0], own_rows(want[1]), *want[2:]]
    theirs = [error(a, b) for a, b in zip(alone, want, strict=True)]
    found = [loss, dx / ranks(), *(in_place(part, g, w) for g, w in zip(dw, want[2:], strict=True))]
    theirs = [max(pair) for pair in zip(theirs, measured, strict=True)]
    with noted(f"{what}, {p.normalizer}, {dtype}, {backend}"):
        for name, got, measure, right in zip(("loss", "dx", "dw", "dscale"), found, theirs, parts, strict=False):
            assert_within(got, measure, right, name)
        torch.testing.assert_close(part.ema, whole.ema, rtol=1e-5, atol=1e-5)
        assert torch.equal(part.num_updates, whole.num_updates)


@check
def every_option() -> None:
    generator = torch.Generator().manual_seed(7)
    mask = torch.rand(ranks() * ROWS, generator=generator) > 0.4
    for normalizer in NORMALIZERS:
        for what, options in options_of(ranks() * ROWS, generator).items():
            target = labels_of(ranks() * ROWS, options, generator)
            for dtype in (torch.float32, torch.bfloat16):
                assert_equals_one_process(mild(normalizer, dtype), dtype, target, mask, options, what)


@check
def some_classes_at_a_time() -> None:
    generator = torch.Generator().manual_seed(8)
    with little_workspace():
        for normalizer in SOME:
            offered = options_of(ranks() * ROWS, generator)
            for what in ("plain", "ignored class", *(name for name in offered if name.startswith("all"))):
                options = offered[what]
                target = labels_of(ranks() * ROWS, options, generator)
                for dtype in (torch.float32, torch.bfloat16):
                    assert_equals_one_process(mild(normalizer, dtype), dtype, target, None, options, what)


@check
def float64_is_exact() -> None:
    generator = torch.Generator().manual_seed(9)
    for normalizer in NORMALIZERS if ranks() == 2 else SOME:
        p = mild(normalizer, torch.float64)
        for what, options in options_of(ranks() * ROWS, generator).items():
            target = labels_of(ranks() * ROWS, options, generator)
            whole, part = heads(p)
            none = options.get("reduction") == "none"
            upstream = torch.rand(len(target), generator=generator, dtype=torch.float64) if none else torch.tensor(1.3)
            want = step(whole, p.x, upstream, target, **options)
            mine = {name: own_rows(value) if name == "target_b" else value for name, value in options.items()}
            own_upstream = ranks() * own_rows(upstream) if none else upstream
            loss, dx, *dw = step(part, own_rows(p.x), own_upstream, own_rows(target), **mine)
            parts = [own_rows(want[0]) if none else want[0], own_rows(want[1]), *want[2:]]
            found = [loss, dx / ranks(), *(in_place(part, g, w) for g, w in zip(dw, want[2:], strict=True))]
            with noted(f"{what}, {normalizer}"):
                torch.testing.assert_close(found, parts, rtol=1e-12, atol=1e-12)


@check
def learnt_class_vectors() -> None:
    """Their gradient is for a data-parallel mean."""
    p, target = mild("deconfound", torch.float32), torch.arange(ranks() * ROWS) % C
    whole, part = heads(p)
    biases = [torch.zeros(C, requires_grad=True) for _ in range(2)]
    whole.loss(p.x, target, logit_bias=biases[0]).backward()
    part.loss(own_rows(p.x), own_rows(target), logit_bias=biases[1]).backward()
    dist.all_reduce(biases[1].grad)
    torch.testing.assert_close(biases[1].grad / ranks(), biases[0].grad)
    torch.testing.assert_close(part.weight.grad, in_place(part, part.weight.grad, whole.weight.grad)[own_classes(part)])


@check
def uneven_batches_of_meaning() -> None:
    """A rank whose rows are all ignored, one that the mask leaves out, labels of one shard alone, no row at all."""
    p = mild("deconfound", torch.float32)
    target = torch.arange(ranks() * ROWS) % C
    last, first = slice(-ROWS, None), slice(ROWS)
    ignored, masked = target.clone(), torch.ones(len(target), dtype=torch.bool)
    ignored[last], masked[first] = -100, False
    assert_equals_one_process(p, torch.float32, ignored, masked, {}, "a rank ignored")
    for shard in range(ranks()):
        own = Shards(C, ranks()).of(shard)
        assert_equals_one_process(p, torch.float32, own.start + target % len(own), None, {}, "labels of one shard")
    for backend in (fused(), "reference"):
        _, part = heads(p, backend=backend)
        loss = part.loss(p.x[:0], target[:0], reduction="sum")
        loss.backward()
        assert loss == 0 and part.num_updates == 0 and not part.ema.any() and not part.weight.grad.any()
        nothing = torch.zeros(ROWS, dtype=torch.bool)
        part.loss(own_rows(p.x), own_rows(target), mask=nothing)
        assert part.num_updates == 0 and not part.ema.any()
        assert part.loss(own_rows(p.x), torch.full((ROWS,), -100)).isnan()


@check
def shapes_autocast_and_recomputation() -> None:
    p, target = mild("deconfound", torch.float32), torch.arange(ranks() * ROWS) % C
    whole, part = heads(p)
    x, y = own_rows(p.x), own_rows(target)
    flat = part.loss(x, y, reduction="none")
    assert torch.equal(part.loss(x[:, None], y[:, None], reduction="none"), flat[:, None])
    assert part(x[:, None]).shape == (ROWS, 1, C)
    with torch.autocast(device(), torch.bfloat16):
        mixed, alone = part.loss(x, y), whole.loss(p.x, target)
        assert part(x).dtype == torch.bfloat16 and mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, alone, rtol=2e-2, atol=2e-2)
    for rate in (1.0, 0.3):
        _, part = heads(p, sample_rate=rate)
        results = []
        for again in (False, True):
            part.zero_grad()
            part.num_updates.zero_()
            z = x.clone().requires_grad_()
            loss = torch.utils.checkpoint.checkpoint(part.loss, z, y, use_reentrant=False) if again else part.loss(z, y)
            loss.backward()
            results.append([loss.detach(), z.grad, part.weight.grad.clone()])
        torch.testing.assert_close(*results)
        assert part.num_updates == 1
