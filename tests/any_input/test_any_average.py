"""The moving average of any features, alone and with logits or loss; also where it lies in the features' own memory."""

from __future__ import annotations

import layouts
import torch
from drawn import PATTERNS, Kind, Recipe, Untouched, examples, recipes, same_bits, ways
from hypothesis import given
from hypothesis import strategies as st
from sizes import LARGEST, error, tiny
from torch import Tensor

from tde_kernels import functional as F

MASKS = {
    "all": lambda shape: None,
    "some": lambda shape: torch.rand(shape) < 0.6,
    "none": lambda shape: torch.zeros(shape, dtype=torch.bool),
    "strided": lambda shape: (torch.rand((*shape, 2)) < 0.6)[..., 0],
    "expanded": lambda shape: torch.tensor(True).expand(shape),
}
RIDING = ("alone", "logits", "loss")


def shared(x: Tensor, ema: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """Features and average in memory of their own, or in the same."""
    if how == "apart" or x.dtype != torch.float32 or x.numel() == 0:
        return x, ema
    if how == "features are the average":
        return ema.expand(x.shape), ema
    memory = x.resolve_neg().reshape(-1, x.shape[-1]).clone(memory_format=torch.contiguous_format)
    return memory.view(x.shape), memory[-1]


def taken_in(
    recipe: Recipe, x: Tensor, ema: Tensor, count: Tensor, backend: str, riding: str, **intake: object
) -> None:
    p = recipe.benign("normal").problem()
    family = {**p.family, "backend": backend}
    if riding == "alone":
        F.update_head_ema_(ema, x, **intake, backend=backend)
        count += 1
        return
    x_before = x.clone()
    if riding == "logits":
        got = F.grouped_logits_with_ema_(x, p.w, ema, count, **intake, **family)
        want = F.grouped_logits(x_before, p.w, **family)
    else:
        target = torch.zeros(x.shape[:-1], dtype=torch.int64)
        got = F.grouped_cross_entropy_with_ema_(x, p.w, target, ema, count, **intake, **family)
        want = F.grouped_cross_entropy(x_before, p.w, target, **family)
    torch.testing.assert_close(got, want, equal_nan=True)


@examples(20)
@given(
    recipe=recipes(),
    masked=st.sampled_from(sorted(MASKS)),
    how=st.sampled_from(["apart", "features are the average", "the average is a feature"]),
    riding=st.sampled_from(RIDING),
    momentum=st.sampled_from([0.9, 0.0, 1.0, 1]),
)
def test_average(recipe: Recipe, masked: str, how: str, riding: str, momentum: float) -> None:
    torch.manual_seed(recipe.seed)
    drawn, start, mask = recipe.problem().x, torch.randn(recipe.dim), MASKS[masked](recipe.leading)

    def mean(rows: Tensor) -> Tensor:
        return start.to(rows.dtype) if len(rows) == 0 else momentum * start.to(rows.dtype) + rows.mean(0)

    for backend in dict.fromkeys(backend for backend, _ in ways(recipe.dtype, "update_ema_")):
        runs = []
        for _ in range(2):
            x, ema = shared(drawn, start.clone(), how)
            with torch.no_grad():
                ema.copy_(start)
            rows = x.detach().reshape(-1, recipe.dim)[slice(None) if mask is None else mask.reshape(-1)].clone()
            count, untouched = torch.tensor(0), Untouched(drawn) if how == "apart" else Untouched()
            taken_in(recipe, x, ema, count, backend, riding, momentum=momentum, mask=mask)
            untouched.check()
            assert count == (len(rows) > 0) or riding == "alone"
            runs.append(ema.clone())
        exact = rows.double()
        size = start.abs().double() + exact.abs().sum(0) / max(1, len(rows))
        size = torch.where(exact.abs().sum(0) < LARGEST, size, torch.inf)
        equal = torch.rand(recipe.dim) * torch.ones(len(rows), recipe.dim)
        alike = error(mean(equal), mean(equal.double()), 1 + mean(equal.double()).abs())
        theirs = max(
            alike, error(mean(rows.float()), mean(exact), torch.where(exact.isfinite().all(0), size, torch.inf))
        )
        ours, bound = error(ema, mean(exact), size), 2 * theirs + tiny(torch.float32)
        assert ours <= bound, f"by {backend}: error {ours:.2e}, naive torch has {theirs:.2e}, bound {bound:.2e}"
        assert same_bits(*runs)


@examples(10)
@given(
    seed=st.integers(0, 2**32 - 1),
    pattern=st.sampled_from(sorted(PATTERNS)),
    scale=st.sampled_from(["about one", "huge", "tiny", "denormal", "NaN", "infinite"]),
    layout=st.sampled_from(sorted(layouts.KEEPING)),
    width=st.integers(1, 40),
    num_heads=st.sampled_from([1, 2, 3, 8]),
)
def test_direction(seed: int, pattern: str, scale: str, layout: str, width: int, num_heads: int) -> None:
    """Of unit norm in each head, or zero where the average is; what is no number stays in its head."""
    torch.manual_seed(seed)
    ema = Kind(pattern, scale, layout).of(width * num_heads, dtype=torch.float32)
    groups = ema.double().unflatten(-1, (num_heads, -1))
    norms = groups.norm(dim=-1, keepdim=True)
    nothing = norms < torch.finfo(torch.float32).tiny
    want = torch.where(nothing, 0.0, groups / torch.where(nothing, 1.0, norms))
    numbers = groups.isfinite().all(-1, keepdim=True).expand_as(groups)
    for backend in ("reference", "cpu"):
        untouched = Untouched(ema)
        got = F.head_direction(ema, num_heads=num_heads, backend=backend).unflatten(-1, (num_heads, -1))
        untouched.check()
        size = torch.where(numbers, 1.0, torch.inf).double()
        assert error(got, torch.where(numbers, want, 0.0), size) <= tiny(torch.float32)
