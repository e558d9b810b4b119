"""Predictions of Eq. 8 for many alphas, for all of them, and the largest logits: against one TDE inference."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.rivals import ALPHA, GAMMA, HEADS, TAU, Problem
from bench.shapes import CPU_SHAPES, SHAPES
from bench.timing import ratio
from tde_kernels import functional as F
from tde_kernels import reference

MEASURED = (*CPU_SHAPES, "inat18")
FAMILY: dict[str, Any] = {"num_heads": HEADS, "tau": TAU, "gamma": GAMMA}
ALPHAS = torch.linspace(0, 3, 32)
LARGEST = 5
Runs = dict[str, Callable[[], Tensor]]


@cache
def runs(shape_name: str) -> Runs:
    """One inference, the sweeps of this package, and what its users would write around that inference."""
    runs.cache_clear()
    p = Problem.draw(SHAPES[shape_name])
    x, w = p.x.detach(), p.w.detach()
    direction = reference.head_direction(p.ema, num_heads=HEADS)

    def inference(alpha: float = ALPHA) -> Tensor:
        return F.tde_logits(x, w, direction, alpha=alpha, **FAMILY)

    return {
        "inference": inference,
        "sweep": lambda: F.alpha_sweep(x, w, direction, ALPHAS, **FAMILY),
        "all alphas": lambda: F.alpha_segments(x, w, direction, **FAMILY).classes,
        "sweep by inference": lambda: torch.stack([inference(alpha).argmax(-1) for alpha in ALPHAS.tolist()]),
        "topk": lambda: F.topk(x, w, LARGEST, direction=direction, alpha=ALPHA, **FAMILY)[1],
        "topk of inference": lambda: inference().topk(LARGEST).indices,
    }


def check(found: Runs) -> None:
    """Raises unless both ways to a result agree but for ties."""
    for ours, theirs in (("sweep", "sweep by inference"), ("topk", "topk of inference")):
        differing = (found[ours]() != found[theirs]()).double().mean().item()
        assert differing < 1e-3, f"{ours} and {theirs} differ in {differing:.1%}"


@pytest.mark.parametrize("rival", ["sweep", "all alphas", "sweep by inference", "topk", "topk of inference"])
def test_alpha(benchmark: Any, shape_name: str, rival: str) -> None:
    benchmark.group = f"alpha {shape_name}"
    found = runs(shape_name)
    check(found)
    run, limit = found[rival], found["inference"]
    run()
    limit()
    if not benchmark.disabled:
        measured, turns = ratio(run, limit)
        benchmark.extra_info.update(
            rival=rival, ratio_to_inference=measured, turns=turns, shape=SHAPES[shape_name]._asdict()
        )
    benchmark.pedantic(run, rounds=3, iterations=1)
