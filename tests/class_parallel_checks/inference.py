"""Logits, predictions, ties, directions and alphas."""

from __future__ import annotations

from dataclasses import replace

import torch
from oracle import NORMALIZERS, problem

from class_parallel_checks.common import (
    ROWS,
    SOME,
    C,
    D,
    K,
    check,
    fused,
    heads,
    mild,
    own_classes,
    own_rows,
    rank,
    ranks,
    refused,
)


@check
def logits_and_predictions() -> None:
    for normalizer in NORMALIZERS if ranks() == 2 else SOME:
        for background in (None, 0, -1) if normalizer in SOME else (None,):
            for backend in (fused(), "reference"):
                p = mild(normalizer, torch.float32)
                whole, part = heads(p, background_index=background, backend=backend)
                mask = torch.arange(ranks() * ROWS) % 3 > 0
                upstream = torch.randn(ranks() * ROWS, C)
                x = p.x.clone().requires_grad_()
                mine = own_rows(p.x).clone().requires_grad_()
                want, got = whole(x, mask=mask), part(mine, mask=own_rows(mask))
                torch.testing.assert_close(got, own_rows(want), rtol=1e-5, atol=1e-5)
                want.backward(upstream)
                got.backward(ranks() * own_rows(upstream))
                torch.testing.assert_close(mine.grad / ranks(), own_rows(x.grad), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(part.weight.grad, whole.weight.grad[own_classes(part)], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(part.ema, whole.ema, rtol=1e-5, atol=1e-6)
                whole.eval(), part.eval()
                x, mine = p.x, own_rows(p.x)
                with torch.no_grad():
                    for extra in ({}, {"alpha": 0.5}, {"alpha": torch.tensor(2.0)}):
                        torch.testing.assert_close(
                            part(mine, **extra), own_rows(whole(x, **extra)), rtol=1e-4, atol=1e-4
                        )
                        for topk in (1, 5, C):  # the last more than a shard holds
                            (values, classes), found = (
                                whole.predict(x, topk, **extra),
                                part.predict(mine, topk, **extra),
                            )
                            torch.testing.assert_close(found[0], own_rows(values), rtol=1e-4, atol=1e-4)
                            assert (found[1] == own_rows(classes)).float().mean() > 0.98
                    alphas = [0.0, 0.5, 1.0, 3.0]
                    found = part.alpha_sweep(mine, alphas)
                    assert (
                        found == whole.alpha_sweep(x, alphas).unflatten(1, (ranks(), -1))[:, rank()]
                    ).float().mean() > 0.95
                    part.train()
                    assert torch.equal(part.predict(mine)[1], part.eval().predict(mine)[1])
                    assert part.alpha_sweep(mine, []).shape == (0, ROWS)


@check
def ties_go_to_the_lowest_class() -> None:
    """Of logits that are integers, and so alike whatever the order of summation."""
    p = problem(ranks() * ROWS, D, C, K, "linear", tau=float(K))
    p = replace(p, x=p.x.round(), w=(8 * p.w[:1]).round().repeat(C, 1))
    for backend in (fused(), "reference"):
        part = heads(p, backend=backend)[1].eval()
        found = [part.predict(own_rows(p.x), topk)[1] for topk in (1, 5, C)]
        swept = part.alpha_sweep(own_rows(p.x), [0.0, 1.0])
        for classes in found:
            assert torch.equal(classes, torch.arange(classes.shape[1]).expand_as(classes)), classes
        assert not swept.any()


@check
def directions_and_alphas() -> None:
    """Of all ranks' features, alike on all."""
    p, y = mild("deconfound", torch.float32), torch.arange(ranks() * ROWS) % C
    whole, part = heads(p)
    whole.fit_direction(p.x)
    part.fit_direction(own_rows(p.x).split(3))
    torch.testing.assert_close(part.ema, whole.ema)
    alphas = [0.0, 0.5, 1.0, 2.0, 3.0, 5.0]
    for metric in ("accuracy", "mean_per_class"):
        assert part.choose_alpha(own_rows(p.x), own_rows(y), alphas, metric) == whole.choose_alpha(
            p.x, y, alphas, metric
        )
    refused(lambda: part.choose_alpha(own_rows(p.x), own_rows(y)), "no exact curve")
