"""Gradients that are wanted or not, grad modes, and the transforms of torch.func: the same numbers, and no other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from drawn import Kind, Recipe, examples, recipes
from hypothesis import given
from hypothesis import strategies as st
from oracle import Problem
from torch import Tensor

from tde_kernels import functional as F

LEAVES = ("x", "w", "class_scale", "direction", "alpha", "class_weight")
MODES: dict[str, Callable[[], Any]] = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
ORDINARY = st.builds(
    Kind, st.just("normal"), st.just("about one"), st.sampled_from(["contiguous", "transposed", "expanded"])
)
OPS = ("logits", "loss", "background_exempt")
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=2).map(tuple)


def leaves_of(p: Problem, wanted: set[str]) -> dict[str, Tensor | None]:
    """Operands and options as tensors; those that are ``wanted`` require a gradient."""
    found = {
        "x": p.x,
        "w": p.w,
        "class_scale": p.class_scale,
        "direction": p.direction,
        "alpha": None if p.direction is None else torch.tensor(p.alpha, dtype=p.x.dtype),
        "class_weight": torch.linspace(0.5, 1.5, len(p.w), dtype=p.x.dtype),
    }
    return {name: None if a is None else a.detach().requires_grad_(name in wanted) for name, a in found.items()}


def run(op: str, p: Problem, leaves: dict[str, Tensor | None], backend: str | None) -> Tensor:
    x, w, scale, direction, alpha, class_weight = leaves.values()
    family = {**p.family, "class_scale": scale, "backend": backend}
    if op == "loss":
        target = torch.arange(x[..., 0].numel()).reshape(x.shape[:-1]) % len(w)
        return F.grouped_cross_entropy(x, w, target, class_weight=class_weight, **family)
    if direction is None:
        return F.grouped_logits(x, w, **family)
    if op == "background_exempt":
        return F.background_exempt(x, w, direction, alpha=alpha, background_index=0, log=True, **family)
    return F.tde_logits(x, w, direction, alpha=alpha, **family)


def used(op: str, leaves: dict[str, Tensor | None]) -> list[str]:
    """Those that the result depends on."""
    others = {"direction", "alpha"} if op == "loss" else {"class_weight"}
    return [name for name, a in leaves.items() if a is not None and name not in others]


@examples(12)
@given(
    recipe=recipes(dtypes=(torch.float32, torch.float64), kinds=ORDINARY, leading=SHAPES),
    wanted=st.sets(st.sampled_from(LEAVES)),
    mode=st.sampled_from(sorted(MODES)),
    op=st.sampled_from(OPS),
)
def test_what_is_wanted(recipe: Recipe, wanted: set[str], mode: str, op: str) -> None:
    torch.manual_seed(recipe.seed)
    p = recipe.problem()
    leaves, plain = leaves_of(p, wanted), leaves_of(p, wanted)
    versions = {name: a._version for name, a in leaves.items() if a is not None}
    with MODES[mode]():
        got = run(op, p, leaves, None)
    want = run(op, p, plain, "reference")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert versions == {name: a._version for name, a in leaves.items() if a is not None}
    learns = [name for name in used(op, leaves) if name in wanted]
    assert got.requires_grad == (mode == "grad" and bool(learns))
    assert got.is_inference() == (mode == "inference")
    if not got.requires_grad:
        return
    upstream = torch.randn_like(got)
    got.backward(upstream)
    want.backward(upstream)
    for name, a in leaves.items():
        if name in learns:
            near = 1e-3 * (1 + float(plain[name].grad.abs().max()))  # of one channel a head they are nothing
            torch.testing.assert_close(a.grad, plain[name].grad, rtol=1e-3, atol=near)
        else:
            assert a is None or a.grad is None


@examples(6)
@given(
    recipe=recipes(dtypes=(torch.float32,), kinds=ORDINARY, leading=SHAPES),
    over=st.integers(1, 3),
    op=st.sampled_from(OPS),
)
def test_torch_func(recipe: Recipe, over: int, op: str) -> None:
    torch.manual_seed(recipe.seed)
    p = recipe.problem()
    leaves = leaves_of(p, set())
    many = torch.randn(over, *p.x.shape)

    def of(x: Tensor) -> Tensor:
        return run(op, p, {**leaves, "x": x}, None)

    def total(x: Tensor) -> Tensor:
        return of(x).square().sum()

    near = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(torch.vmap(of)(many), torch.stack([of(x) for x in many]), **near)
    # Gradients in float64: of one channel a head they are nothing, and in float32 the rounding of what cancels
    leaves, many = {name: None if a is None else a.double() for name, a in leaves.items()}, many.double()
    x = many[0].clone().requires_grad_()
    (want,) = torch.autograd.grad(total(x), x)
    size = float(want.abs().max()) + 1
    torch.testing.assert_close(torch.func.grad(total)(many[0]) / size, want / size, **near)
    torch.testing.assert_close(torch.vmap(torch.func.grad(total))(many)[0] / size, want / size, **near)
    towards = torch.randn_like(many[0])
    _, along = torch.func.jvp(total, (many[0],), (towards,))
    torch.testing.assert_close(along / size, (want * towards).sum() / size, rtol=1e-2, atol=1e-2)
