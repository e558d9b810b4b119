"""Every alpha at once: segments against brute force, exact curves, the alpha that they choose; the largest logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import NORMALIZERS, naive_logits, problem
from torch import Tensor

from tde_kernels import FusedTDEHead, backends, envelope, metrics, reference
from tde_kernels import functional as F

Fused = tuple[str, str]


@pytest.fixture
def small_chunks(fused: Fused, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows, or classes, at a time."""
    monkeypatch.setattr(type(backends.implementation(fused[0]).PASSES), "workspace", 3000)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_segments_hold_the_winner_of_every_alpha(normalizer: str, small_chunks: None, fused: Fused) -> None:
    p = problem((2, 15), 24, 50, 3, normalizer, tde=True).cast(torch.float32, fused[1])
    found = F.alpha_segments(p.x, p.w, p.direction, **p.family, backend=fused[0])
    exact = p.cast(torch.float64)
    assert found.offsets[0] == 0 and len(found.offsets) == 31 and (found.offsets.diff() > 0).all()
    assert (found.starts[found.offsets[:-1]] == -torch.inf).all()
    for alpha in (-5.0, 0.0, 0.3, 1.0, 2.5, 40.0):
        scores = naive_logits(replace(exact, alpha=alpha)).flatten(0, -2)
        of_found = scores.gather(-1, found.at(alpha)[:, None])[:, 0]
        torch.testing.assert_close(of_found, scores.amax(-1), rtol=0, atol=1e-5 * scores.abs().max().item())


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.integers(1, 6), classes=st.integers(1, 12), distinct=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_segments_of_lines_that_tie(rows: int, classes: int, distinct: int, seed: int) -> None:
    """Whole numbers: lines coincide, run parallel and cross three at a time, and every comparison is exact."""
    generator = torch.Generator().manual_seed(seed)
    value, slope = torch.randint(-distinct, distinct + 1, (2, rows, classes), generator=generator).double()
    starts, winners, counts = envelope.segments(value, slope, classes)
    found = envelope.Envelope.packed(starts, winners, counts)
    for row in range(rows):
        own = slice(int(found.offsets[row]), int(found.offsets[row + 1]))
        assert (found.starts[own].diff() > 0).all() and len(found.classes[own].unique()) == len(found.classes[own])
    for alpha in torch.linspace(-15, 15, 241).tolist():
        score = value - alpha * slope
        right = score.amax(1)
        assert torch.equal(score.gather(1, found.at(alpha)[:, None])[:, 0], right)
        inside = ~torch.isin(torch.tensor(alpha, dtype=torch.float64), found.starts)
        if inside:  # between crossings, the lowest of the lines that coincide
            assert torch.equal(found.at(alpha), (score == right[:, None]).double().argmax(1))


def test_both_ways_to_segments_agree(fused: Fused) -> None:
    p = problem(40, 24, 60, 2, tde=True).cast(torch.float32, fused[1])
    found = F.alpha_segments(p.x, p.w, p.direction, **p.family, backend=fused[0])
    right = reference.alpha_segments(*(a.double() for a in (p.x, p.w, p.direction)), **p.family)
    assert torch.equal(found.classes, right.classes) and torch.equal(found.offsets, right.offsets)
    torch.testing.assert_close(found.starts, right.starts, rtol=1e-3, atol=1e-4)


def test_more_segments_than_usual(fused: Fused, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(9, 24, 80, 2, tde=True).cast(torch.float32, fused[1])
    want = F.alpha_segments(p.x, p.w, p.direction, **p.family, backend=fused[0])
    monkeypatch.setattr(F, "_USUAL_SEGMENTS", 1)
    found = F.alpha_segments(p.x, p.w, p.direction, **p.family, backend=fused[0])
    assert all(map(torch.equal, found, want))
    empty = F.alpha_segments(p.x[:0], p.w, p.direction, **p.family, backend=fused[0])
    assert len(empty.starts) == 0 and empty.offsets.tolist() == [0]


@pytest.mark.parametrize("steps", [1, 2, 33])
def test_sweep_of_unordered_alphas(steps: int, small_chunks: None, fused: Fused) -> None:
    p = problem(30, 24, 50, 2, tde=True).cast(torch.float32, fused[1])
    alphas = 8 * torch.rand(steps, dtype=torch.float64) - 2
    found = F.alpha_sweep(p.x, p.w, p.direction, alphas, **p.family, backend=fused[0])
    exact = p.cast(torch.float64)
    for got, alpha in zip(found, alphas.tolist(), strict=True):
        scores = naive_logits(replace(exact, alpha=alpha))
        of_found = scores.gather(-1, got[:, None])[:, 0]
        torch.testing.assert_close(of_found, scores.amax(-1), rtol=0, atol=1e-4)


def head_with_validation(samples: int = 60) -> tuple[FusedTDEHead, Tensor, Tensor]:
    """Features with a common mean, some of their labels right and some not."""
    head = FusedTDEHead(12, 7, num_heads=2).eval()
    x = torch.randn(samples, 12) + 2 * torch.randn(12)
    head.fit_direction(x)
    y = torch.where(torch.rand(samples) < 0.6, head(x, alpha=1.0).argmax(-1), torch.randint(7, (samples,)))
    return head, x, y


COUNTS = [500, 300, 101, 100, 20, 19, 1]


@pytest.mark.parametrize("metric", metrics.NAMES)
def test_the_curve_is_the_metric_at_every_alpha(metric: str) -> None:
    head, x, y = head_with_validation()
    curve = head.alpha_curve(x, y, metric, class_counts=COUNTS)
    assert curve.starts[0] == -torch.inf and (curve.starts.diff() > 0).all() and len(curve.starts) > 10
    assert len(curve.scores.unique()) > 5
    score = metrics.resolve(metric, y, 7, COUNTS)
    for start, end, value in zip(curve.starts[1:-1], curve.starts[2:], curve.scores[1:-1], strict=True):
        predicted = head(x, alpha=float(start + end) / 2).argmax(-1)
        assert score(predicted, y) == pytest.approx(float(value), abs=1e-9)


def test_metrics_by_hand() -> None:
    y = torch.tensor([0, 0, 0, 3, 5, 5])
    predicted = torch.tensor([0, 0, 1, 3, 5, 2])
    value = {name: metrics.resolve(name, y, 7, COUNTS)(predicted, y) for name in metrics.NAMES}
    assert value["accuracy"] == pytest.approx(4 / 6)
    assert value["mean_per_class"] == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
    assert value["harmonic_mean_of_shots"] == pytest.approx(3 / (3 / 2 + 1 + 2))
    nothing = metrics.resolve("harmonic_mean_of_shots", y, 7, COUNTS)(torch.tensor([0, 0, 1, 3, 1, 2]), y)
    assert nothing == 0  # one group without a hit


@pytest.mark.parametrize("metric", metrics.NAMES)
def test_choose_alpha_of_all(metric: str) -> None:
    """No grid does better."""
    head, x, y = head_with_validation()
    chosen = head.choose_alpha(x, y, metric=metric, class_counts=COUNTS)
    assert chosen == head.alpha and chosen >= 0
    score = metrics.resolve(metric, y, 7, COUNTS)
    best = score(head(x, alpha=chosen).argmax(-1), y)
    grid = torch.linspace(0, 20, 501).tolist()
    assert best >= max(score(predicted, y) for predicted in head.alpha_sweep(x, grid)) - 1e-12


def test_a_curve_that_never_changes() -> None:
    """Nobody is ever right, or there is one class: the score is constant and an alpha is still chosen."""
    head, x, _ = head_with_validation()
    never = torch.tensor([c for c in range(7) if c not in set(head.alpha_sweep(x, [0.0, 1.0]).flatten().tolist())])
    only = FusedTDEHead(12, 1).eval()
    only.fit_direction(x)
    curve = only.alpha_curve(x, torch.zeros(60, dtype=torch.int64))
    assert curve.starts.tolist() == [-torch.inf] and curve.scores.tolist() == [pytest.approx(1)] and curve.best() == 1.0
    if len(never):
        assert head.alpha_curve(x, never[0].expand(60)).scores[0] >= 0


def test_a_background_has_no_curve() -> None:
    head = FusedTDEHead(12, 7, background_index=0)
    with pytest.raises(ValueError, match="background_index has no exact curve"):
        head.alpha_curve(torch.randn(3, 12), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("k", [1, 5, 40, 50])
def test_topk_is_that_of_the_logits(k: int, dtype: torch.dtype, small_chunks: None, fused: Fused) -> None:
    """Values as torch.topk has them, ties to the lowest class; many of bfloat16's tie."""
    backend, device = fused
    p = problem(9, 24, 50, 2, tde=True, dtype=dtype).cast(dtype, device)
    values, classes = F.topk(p.x, p.w, k, direction=p.direction, alpha=1.5, **p.family, backend=backend)
    logits = F.tde_logits(p.x, p.w, p.direction, alpha=1.5, **p.family, backend=backend)
    near = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps * logits.abs().max().item()}  # scaled rows are rounded too
    torch.testing.assert_close(values, logits.topk(k).values, **near)
    torch.testing.assert_close(values, logits.gather(1, classes), **near)
    assert all(len(row.unique()) == k for row in classes)
    if backend != "triton":  # which ranks what it has not rounded
        tie = values[:, 1:] == values[:, :-1]
        assert (values.diff() <= 0).all() and (classes.diff()[tie] > 0).all()


def test_topk_in_one_piece_is_the_sort(fused: Fused) -> None:
    backend, device = fused
    p = problem(9, 24, 50, 2, tde=True).cast(torch.float32, device)
    values, classes = F.topk(p.x, p.w, 20, direction=p.direction, alpha=1.5, **p.family, backend=backend)
    logits = F.tde_logits(p.x, p.w, p.direction, alpha=1.5, **p.family, backend=backend)
    right, order = logits.sort(descending=True, stable=True)
    torch.testing.assert_close(values, right[:, :20])
    assert torch.equal(classes, order[:, :20])


def test_topk_of_rounded_logits_leaves_ties_to_the_lowest_class() -> None:
    p = problem(200, 8, 400, 2).cast(torch.float16)
    values, classes = F.topk(p.x, p.w, 20, **p.family)
    tie = values[:, 1:] == values[:, :-1]
    assert tie.sum() > 10 and (classes.diff()[tie] > 0).all()


def test_topk_of_what_is_no_number(fused: Fused) -> None:
    """It is above all numbers, as for torch; of several the lowest class comes first, and every class is one."""
    backend, device = fused
    p = problem(9, 24, 50, 2, tde=True).cast(torch.float32, device)
    want, order = F.topk(p.x, p.w, 3, direction=p.direction, alpha=1.5, **p.family, backend=backend)
    without = order.ne(17).all(1)
    p.x[4], p.w[17] = torch.nan, torch.nan
    values, classes = F.topk(p.x, p.w, 3, direction=p.direction, alpha=1.5, **p.family, backend=backend)
    assert classes[4].tolist() == [0, 1, 2] and values[4].isnan().all()
    others = without & (torch.arange(9, device=device) != 4)
    assert others.sum() > 5 and (classes[others, 0] == 17).all() and values[others, 0].isnan().all()
    assert torch.equal(classes[others, 1:], order[others, :2]) and torch.equal(values[others, 1:], want[others, :2])


def test_topk_of_numbers_that_are_hard_to_order(fused: Fused) -> None:
    """Zeros of both signs tie; infinities and negative numbers keep their order."""
    backend, device = fused
    w = torch.tensor([-0.0, 0.0, -1.0, torch.inf, -torch.inf, 3.0, 3.0, -2.0, 1e-42, -1e-42], device=device)[:, None]
    x = torch.ones(1, 1, device=device)
    if backend == "triton":
        w = w[torch.isfinite(w[:, 0])]  # tiles are padded with zeros, and infinity times zero is none
    values, classes = F.topk(x, w, len(w), num_heads=1, tau=1.0, normalizer="linear", backend=backend)
    right, order = (x @ w.t() + 0.0).sort(descending=True, stable=True)
    assert torch.equal(values, right) and torch.equal(classes, order)
