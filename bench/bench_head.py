"""Forward, training step and TDE inference of the head on the CPU, against the bare products and its rivals.

What is wrong is not timed: every rival's result is first held against the reference in float64.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.rivals import ALPHA, GAMMA, HEADS, LIMITS, RIVALS, TAU, WORKS, Problem, Run
from bench.shapes import CPU_SHAPES, SHAPES
from bench.timing import ratio
from tde_kernels import reference

MEASURED = CPU_SHAPES


@cache
def problem(shape_name: str) -> Problem:
    return Problem.draw(SHAPES[shape_name])


@cache
def works(shape_name: str, rival: str) -> dict[str, Run]:
    torch.compiler.reset()  # one shape's compiled code must not make the next one's dynamic
    return RIVALS[rival](problem(shape_name))


def expected(p: Problem, work: str) -> Tensor:
    """The result in float64."""
    x, w = p.x.detach().double(), p.w.detach().double()
    family: dict[str, Any] = {"num_heads": HEADS, "tau": TAU, "gamma": GAMMA}
    if work == "inference":
        direction = reference.head_direction(p.ema.double(), num_heads=HEADS)
        return reference.tde_logits(x, w, direction, alpha=ALPHA, **family)
    return reference.grouped_logits(x, w, **family)


def check(shape_name: str, rival: str, work: str) -> None:
    """Raises unless the rival computes what it is timed for; inference comes first, before training moves the EMA."""
    found, wanted = works(shape_name, rival)[work]().detach().double(), expected(problem(shape_name), work)
    error = (found - wanted).norm() / wanted.norm()
    assert error < 1e-5, f"{rival} is wrong at {work}, {shape_name}: relative error {error:.1e}"


@pytest.mark.parametrize("work", sorted(WORKS, key=lambda work: work != "inference"))
@pytest.mark.parametrize("rival", RIVALS)
def test_head(benchmark: Any, shape_name: str, work: str, rival: str) -> None:
    benchmark.group = f"{work} {shape_name}"
    run, limit = works(shape_name, rival)[work], works(shape_name, "bare")[work]
    if rival not in LIMITS:
        check(shape_name, rival, work)
    run()
    limit()
    if not benchmark.disabled:
        shape = SHAPES[shape_name]
        measured, turns = ratio(run, limit)
        products = 3 if work == "step" else 1
        benchmark.extra_info.update(
            rival=rival,
            ratio_to_bare=measured,
            turns=turns,
            shape=shape._asdict(),
            product_flops=products * shape.product_flops(),
        )
    benchmark.pedantic(run, rounds=5, iterations=1)
