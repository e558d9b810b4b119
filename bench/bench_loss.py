"""A training step with its loss, against the three bare products and its rivals: time, and the memory it takes.

What is wrong is not timed: every rival's loss is first held against the reference in float64.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from bench.loss_rivals import LOSSES, Absent, Step
from bench.memory import peak_bytes
from bench.rivals import GAMMA, HEADS, TAU, Problem, bare
from bench.shapes import LOSS_SHAPES, SHAPES
from bench.timing import ratio
from tde_kernels import reference

MEASURED = LOSS_SHAPES


@cache
def problem(shape_name: str) -> Problem:
    problem.cache_clear()  # one shape's operands at a time
    return Problem.draw(SHAPES[shape_name])


@cache
def expected(shape_name: str) -> float:
    """The loss in float64."""
    p = problem(shape_name)
    x, w = p.x.detach().double(), p.w.detach().double()
    return reference.grouped_cross_entropy(x, w, p.target, num_heads=HEADS, tau=TAU, gamma=GAMMA).item()


def step_of(rival: str, shape_name: str) -> Step:
    """The rival's step, after it was found right."""
    torch.compiler.reset()  # one shape's compiled code must not make the next one's dynamic
    try:
        run = LOSSES[rival](problem(shape_name))
    except Absent as reason:
        pytest.skip(str(reason))
    found, wanted = run().item(), expected(shape_name)
    assert abs(found - wanted) < 1e-5 * abs(wanted), f"{rival} is wrong at {shape_name}: {found} for {wanted}"
    return run


@pytest.mark.parametrize("rival", LOSSES)
def test_loss(benchmark: Any, shape_name: str, rival: str) -> None:
    benchmark.group = f"loss {shape_name}"
    run, shape = step_of(rival, shape_name), SHAPES[shape_name]
    if not benchmark.disabled:
        p = problem(shape_name)
        measured, turns = ratio(run, bare(p)["step"])

        run.clear()
        peak = peak_bytes(run, p.x.device.type)
        gradients = 4 * (shape.batch + shape.classes) * shape.dim
        benchmark.extra_info.update(
            rival=rival,
            ratio_to_bare=measured,
            turns=turns,
            shape=shape._asdict(),
            product_flops=3 * shape.product_flops(),
            peak_mib=(peak - gradients) / 2**20,
            logits_mib=4 * shape.batch * shape.classes / 2**20,
        )
    benchmark.pedantic(run, rounds=3, iterations=1)
