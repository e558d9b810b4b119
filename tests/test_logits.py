"""Eq. 7, Eq. 8 and all of Eq. 10 on every fused backend: values and gradients within twice naive torch's own error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import FUSED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import every_other_row, expanded, sliced, strided_columns, transposed
from oracle import (
    NORMALIZERS,
    Problem,
    assert_close,
    assert_within,
    error,
    gradients,
    naive_logits,
    problem,
    reference_logits,
    tiny,
)
from torch import Tensor

from tde_kernels import functional as F
from tde_kernels.backends import cpu
from tde_kernels.normalizers import NormFactor

Fused = tuple[str, str]
RESULTS = ("logits", "gradient of x", "gradient of w", "gradient of class_scale")
# Batch, features of a head, classes, heads: every ragged size and every number of heads comes up
SIZES = [
    (1, 129, 127, 1),
    (127, 64, 1, 2),
    (129, 43, 10, 3),
    (5, 63, 1231, 4),
    (33, 127, 129, 8),
    (1000, 8, 17, 2),
]


@pytest.fixture
def fused(every_way: Fused) -> Fused:
    """Every backend, and every way of the CPU's."""
    return every_way


def run_on(backend: str) -> Callable[[Problem], Tensor]:
    def run(p: Problem) -> Tensor:
        if p.direction is None:
            return F.grouped_logits(p.x, p.w, **p.family, backend=backend)
        return F.tde_logits(p.x, p.w, p.direction, alpha=p.alpha, **p.family, backend=backend)

    return run


def check(p: Problem, fused: Fused, dtype: torch.dtype, upstream: Tensor | None = None) -> None:
    """Values and gradients of a fused backend against the reference in float64, measured by naive torch."""
    backend, device = fused
    upstream = torch.randn(*p.x.shape[:-1], p.w.shape[0]) if upstream is None else upstream
    measure = naive_errors(p, dtype, upstream)
    want, want_grads = gradients(p.cast(torch.float64, grad=True), reference_logits, upstream.to(dtype))
    ours, our_grads = gradients(p.cast(dtype, device, grad=True), run_on(backend), upstream.to(dtype))
    for name, got, right, theirs in zip(RESULTS, (ours, *our_grads), (want, *want_grads), measure, strict=False):
        assert got.dtype == dtype
        assert_within(got, theirs, right, name)


def naive_errors(p: Problem, dtype: torch.dtype, upstream: Tensor) -> list[float]:
    """Error of naive torch for logits and gradients.

    With few classes, or few channels of a head, which may cancel, it is luck: the worst of ten draws then, of a scale
    of features, weights and upstream gradient, which changes nothing but how everything rounds.
    """
    draws = [(p, upstream)]
    if min(len(p.w), p.x.shape[-1] // p.num_heads) < 8 or not p.x.numel():
        draws += [
            (replace(p, x=p.x * (1 + torch.rand(())), w=p.w * (1 + torch.rand(()))), upstream * (1 + torch.rand(())))
            for _ in range(9)
        ]
    worst = [0.0] * (1 + len(p.leaves()))
    for drawn, draw in draws:
        q = drawn.cast(dtype)  # representable
        want, want_grads = gradients(q.cast(torch.float64, grad=True), reference_logits, draw.to(dtype))
        naive, naive_grads = gradients(q.cast(dtype, grad=True), naive_logits, draw.to(dtype))
        errors = [error(a, b) for a, b in zip((naive, *naive_grads), (want, *want_grads), strict=True)]
        worst = [max(pair) for pair in zip(worst, errors, strict=True)]
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("tde", [False, True], ids=["eq7", "eq8"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_oracle(size: tuple[int, ...], normalizer: str, tde: bool, dtype: torch.dtype, fused: Fused) -> None:
    batch, width, classes, num_heads = size
    check(problem(batch, num_heads * width, classes, num_heads, normalizer, tde=tde, dtype=dtype), fused, dtype)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    leading=st.lists(st.integers(0, 6), max_size=3),
    width=st.integers(2, 40),
    num_heads=st.integers(1, 9),
    classes=st.integers(1, 40),
    normalizer=st.sampled_from(NORMALIZERS),
    tde=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape(
    leading: list[int],
    width: int,
    num_heads: int,
    classes: int,
    normalizer: str,
    tde: bool,
    seed: int,
    fused: Fused,
) -> None:
    torch.manual_seed(seed)
    p = problem(leading, width * num_heads, classes, num_heads, normalizer, tde=tde)
    check(p, fused, torch.float32)


@pytest.mark.parametrize("view", [sliced, transposed, every_other_row, strided_columns, expanded])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("normalizer", ["deconfound", "linear", "lws"])
def test_any_strides(view: Callable[[Tensor], Tensor], normalizer: str, dtype: torch.dtype, fused: Fused) -> None:
    """The same bits for a view of features, weights, small operands and upstream gradient as for dense copies."""
    backend, device = fused
    p = problem(20, 12, 9, 2, normalizer, tde=normalizer != "linear", dtype=dtype).cast(dtype, device)
    x, w, upstream = view(p.x), view(p.w), view(torch.randn(20, 9, device=device).to(dtype))
    small = {name: getattr(p, name) for name in ("direction", "class_scale") if getattr(p, name) is not None}
    views = {name: strided_columns(value) for name, value in small.items()}

    def results(x: Tensor, w: Tensor, upstream: Tensor, small: dict[str, Tensor]) -> tuple[Tensor, ...]:
        q = replace(p, x=x.detach().requires_grad_(), w=w.detach().requires_grad_(), **small)
        out = run_on(backend)(q)
        return out, *torch.autograd.grad(out, (q.x, q.w), upstream)

    dense = {name: value.clone() for name, value in small.items()}
    wanted = results(x.contiguous(), w.contiguous(), upstream.contiguous(), dense)
    for got, want in zip(results(x, w, upstream, views), wanted, strict=True):
        # torch's own product may sum in another order for another layout: not a rounding more than that
        assert error(got, want) <= tiny(dtype)


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 4), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("tde", [False, True], ids=["eq7", "eq8"])
def test_leading_shapes(shape: tuple[int, ...], tde: bool, fused: Fused) -> None:
    p = problem(shape, 12, 9, 2, tde=tde)
    check(p, fused, torch.float32)
    assert run_on(fused[0])(p.cast(torch.float32, fused[1])).shape == (*shape, 9)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_zero_groups(normalizer: str, dtype: torch.dtype, fused: Fused) -> None:
    """A zero group of features, weights or direction contributes exactly 0, and no gradient is NaN."""
    backend, device = fused
    p = problem(6, 12, 5, 3, normalizer, tde=True, dtype=dtype).cast(dtype, device)
    assert p.direction is not None
    p.x[0] = 0
    p.x[1, 4:8] = 0
    p.w[2] = 0
    p.w[3, :4] = 0
    p.direction[8:] = 0
    q = p.cast(dtype, device, grad=True)
    upstream = torch.randn(6, 5).to(dtype)
    out, grads = gradients(q, run_on(backend), upstream)
    want, want_grads = gradients(p.cast(torch.float64, grad=True), reference_logits, upstream)
    assert (out[0] == 0).all() and (out[:, 2] == 0).all()
    others = torch.tensor([2, 3, 4, 5])  # naive torch, which says NaN for the rest, is the measure where it can be
    kept = replace(
        p, x=p.x[others], w=p.w[[0, 1, 4]], class_scale=None if p.class_scale is None else p.class_scale[[0, 1, 4]]
    )
    theirs = max(error(naive_logits(kept.cast(dtype)), reference_logits(kept.cast(torch.float64))), 0.0)
    assert error(out, want) <= 2 * theirs + tiny(dtype)
    for got, right in zip(grads, want_grads, strict=True):
        assert got.isfinite().all()
        assert error(got, right) <= 4 * theirs + 2 * tiny(dtype)  # two products deep
    still = torch.zeros_like(p.direction)
    plain = run_on(backend)(replace(p, direction=None))
    # without factors and direction a kernel may take all channels as one head, and sum them in another order
    assert error(run_on(backend)(replace(p, direction=still)), plain) <= tiny(dtype)


@pytest.mark.parametrize("power", [-100, -40, 60, 100])
@pytest.mark.parametrize("normalizer", ["cosine", "capsule", "deconfound", "tau_norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_huge_and_tiny_norms(power: int, normalizer: str, dtype: torch.dtype, fused: Fused) -> None:
    """Norms of 1e-30 to 1e30, whose squares leave float32. Naive torch at norm 1 is the measure."""
    backend, device = fused
    p = problem(8, 24, 7, 2, normalizer, tde=True, dtype=dtype)
    upstream = torch.randn(8, 7).to(dtype)
    naive, naive_grads = gradients(p.cast(dtype, grad=True), naive_logits, upstream)
    want, want_grads = gradients(p.cast(torch.float64, grad=True), reference_logits, upstream)
    theirs = error(naive, want)
    theirs_grads = [error(a, b) for a, b in zip(naive_grads, want_grads, strict=True)]
    for scaled in (replace(p, x=p.x * 2.0**power), replace(p, w=p.w * 2.0**power)):
        want, want_grads = gradients(scaled.cast(torch.float64, grad=True), reference_logits, upstream)
        out, grads = gradients(scaled.cast(dtype, device, grad=True), run_on(backend), upstream)
        assert error(out, want) <= 2 * theirs + tiny(dtype)
        for got, right, measure in zip(grads, want_grads, theirs_grads, strict=True):
            if right.abs().max() < 1e30 and right.abs().max() > 1e-30:  # representable
                assert error(got, right) <= 2 * measure + tiny(dtype)


def test_rows_of_mixed_norms_do_not_disturb_each_other(fused: Fused) -> None:
    p = problem(40, 24, 7, 2, tde=True)
    spread = 10.0 ** torch.linspace(-12, 12, 40)[:, None]
    mixed = replace(p, x=p.x * spread)
    upstream = torch.randn(40, 7)
    _, want = gradients(mixed.cast(torch.float64, grad=True), reference_logits, upstream)
    _, naive = gradients(mixed.cast(torch.float32, grad=True), naive_logits, upstream)
    _, ours = gradients(mixed.cast(torch.float32, fused[1], grad=True), run_on(fused[0]), upstream)
    assert_close(ours[0], naive[0], want[0], "gradient of x")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("classes", [100, 64])
def test_what_is_no_number_stays_in_its_row(classes: int, dtype: torch.dtype, value: float, fused: Fused) -> None:
    """In the logits and the features' gradient: libraries' tiles reach into the next row where the lengths are odd."""
    backend, device = fused
    p = problem(129, 36, classes, 3).cast(dtype, device)
    upstream = torch.randn(129, classes, dtype=dtype, device=device)
    p.x[::3], upstream[::3] = value, value
    logits, (dx, *_) = gradients(p.cast(dtype, device, grad=True), run_on(backend), upstream)
    for result in (logits, dx):
        finite = result.isfinite()
        assert not finite[::3].any() and finite[1::3].all() and finite[2::3].all()


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_one_row_one_class_one_channel_a_head(normalizer: str, fused: Fused) -> None:
    p = problem(1, 3, 1, 3, normalizer, tde=True)
    out = run_on(fused[0])(p.cast(torch.float32, fused[1]))
    assert_close(out, naive_logits(p), reference_logits(p.cast(torch.float64)))


def test_alpha_may_be_a_tensor_of_any_dtype(fused: Fused) -> None:
    backend, device = fused
    p = problem(6, 12, 5, 2, tde=True).cast(torch.float32, device)
    want = run_on(backend)(p)
    for alpha in (
        torch.tensor(1.5),
        torch.tensor(1.5, dtype=torch.float64),
        torch.tensor(1.5, device=device).bfloat16(),
    ):
        assert torch.equal(F.tde_logits(p.x, p.w, p.direction, alpha=alpha, **p.family, backend=backend), want)
    whole = F.tde_logits(p.x, p.w, p.direction, alpha=torch.tensor(2), **p.family, backend=backend)
    assert torch.equal(whole, F.tde_logits(p.x, p.w, p.direction, alpha=2, **p.family, backend=backend))


@pytest.mark.parametrize("normalizer", ["deconfound", "linear", "lws"])
def test_upstream_gradient_is_read_only(normalizer: str, fused: Fused) -> None:
    backend, device = fused
    p = problem(64, 12, 9, 2, normalizer, tde=True).cast(torch.float32, device, grad=True)
    out = run_on(backend)(p)
    upstream = torch.randn(64, 9, device=device)
    kept = upstream.clone()
    inputs = [leaf.detach().clone() for leaf in p.leaves()]
    torch.autograd.grad(out, p.leaves(), upstream)
    assert torch.equal(upstream, kept)
    assert all(torch.equal(a, b) for a, b in zip(p.leaves(), inputs, strict=True))


def test_expanded_upstream_gradient(fused: Fused) -> None:
    """``sum()`` hands back a single number, expanded: strides of zero."""
    p = problem(50, 12, 9, 2, tde=True)
    check(p, fused, torch.float32, upstream=torch.ones(()).expand(50, 9))
    check(p, fused, torch.float32, upstream=torch.randn(9).expand(50, 9))


@pytest.mark.parametrize("normalizer", ["deconfound", "lws"])
def test_only_the_gradients_that_are_wanted(normalizer: str, fused: Fused) -> None:
    backend, device = fused
    p = problem(20, 12, 9, 2, normalizer, tde=True)
    upstream = torch.randn(20, 9)
    full = p.cast(torch.float32, device, grad=True)
    _, wanted = gradients(full, run_on(backend), upstream)
    for chosen in range(1, 2 ** len(full.leaves()) - 1):
        q = p.cast(torch.float32, device)
        picked = [i for i in range(len(q.leaves())) if chosen >> i & 1]
        leaves = [q.leaves()[i].requires_grad_() for i in picked]
        got = torch.autograd.grad(run_on(backend)(q), leaves, upstream.to(device))
        assert all(torch.equal(g, wanted[i]) for g, i in zip(got, picked, strict=True))
        assert all(leaf.grad is None for leaf in q.leaves())
    assert not run_on(backend)(p.cast(torch.float32, device)).requires_grad


def test_double_use_in_one_graph(fused: Fused) -> None:
    backend, device = fused
    p = problem(20, 12, 9, 2)
    tde = problem(20, 12, 9, 2, tde=True)
    a, b = torch.randn(20, 9, device=device), torch.randn(20, 9, device=device)
    q = p.cast(torch.float32, device, grad=True)
    direction = tde.cast(torch.float32, device).direction

    def second(q: Problem) -> Tensor:
        return run_on(backend)(replace(q, direction=direction))

    _, first_grads = gradients(q, run_on(backend), a)
    _, second_grads = gradients(q, second, b)
    both = torch.autograd.grad((run_on(backend)(q) * a + second(q) * b).sum(), q.leaves())
    for got, one, two in zip(both, first_grads, second_grads, strict=True):
        torch.testing.assert_close(got, one + two, rtol=1e-6, atol=1e-6)


def test_backward_twice_over_a_retained_graph(fused: Fused) -> None:
    p = problem(20, 12, 9, 2, tde=True).cast(torch.float32, fused[1], grad=True)
    out = run_on(fused[0])(p).square().sum()
    first = torch.autograd.grad(out, p.leaves(), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(out, p.leaves()), strict=True))


def test_no_second_derivative_is_an_error_not_a_silence(fused: Fused) -> None:
    p = problem(4, 12, 5, 2).cast(torch.float32, fused[1], grad=True)
    out = run_on(fused[0])(p)
    (grad,) = torch.autograd.grad(out.sum(), p.x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        (out.sum() + grad.square().sum()).backward()
    q = problem(4, 12, 5, 2, "lws").cast(torch.float32, fused[1])
    scale = q.class_scale.requires_grad_()
    (grad,) = torch.autograd.grad(run_on(fused[0])(q).square().sum(), scale, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        grad.square().sum().backward()


def test_batched_upstream_gradients(fused: Fused) -> None:
    """``is_grads_batched`` goes by an older vmap than that of ``torch.func``."""
    backend, device = fused
    p = problem(4, 12, 5, 2).cast(torch.float32, device, grad=True)
    target = torch.tensor([0, 4, 1, 1], device=device)
    for result in (
        run_on(backend)(p),
        F.grouped_cross_entropy(p.x, p.w, target, **p.family, backend=backend),
        F.grouped_cross_entropy(p.x, p.w, target, reduction="none", **p.family, backend=backend),
    ):
        upstream = torch.randn(3, *result.shape, device=device)
        together = torch.autograd.grad(result, p.leaves(), upstream, is_grads_batched=True, retain_graph=True)
        apart = [torch.autograd.grad(result, p.leaves(), each, retain_graph=True) for each in upstream]
        for got, want in zip(together, zip(*apart, strict=True), strict=True):
            torch.testing.assert_close(got, torch.stack(want))


def test_weights_changed_before_the_backward_are_noticed(fused: Fused) -> None:
    p = problem(4, 12, 5, 2).cast(torch.float32, fused[1], grad=True)
    out = run_on(fused[0])(p).sum()
    with torch.no_grad():
        p.w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_two_runs_give_the_same_bits(dtype: torch.dtype, fused: Fused) -> None:
    p = problem(300, 256, 100, 4, tde=True, dtype=dtype)
    upstream = torch.randn(300, 100)
    runs = [gradients(p.cast(dtype, fused[1], grad=True), run_on(fused[0]), upstream) for _ in range(2)]
    assert torch.equal(runs[0][0], runs[1][0])
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_float16_and_float64_are_served(fused: Fused) -> None:
    """By whichever implementation takes them; float64 to the last bits."""
    del fused
    for dtype in (torch.float16, torch.float64):
        p = problem(20, 24, 9, 2, tde=True, dtype=dtype)
        got = F.tde_logits(p.x, p.w, p.direction, alpha=p.alpha, **p.family)
        assert got.dtype == dtype
        assert_close(got, naive_logits(p), reference_logits(p.cast(torch.float64)))


def test_a_common_default_dtype_or_device_changes_nothing(fused: Fused) -> None:
    backend, device = fused
    p = problem(20, 12, 9, 2, "lws", tde=True).cast(torch.float32, device, grad=True)
    upstream = torch.randn(20, 9)
    want, want_grads = gradients(p, run_on(backend), upstream)
    for default in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            out, grads = gradients(p, run_on(backend), upstream)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(out, want) and all(map(torch.equal, grads, want_grads))
    with torch.device("meta"):
        out, grads = gradients(p, run_on(backend), upstream)
    assert torch.equal(out, want) and all(map(torch.equal, grads, want_grads))


def test_backward_inside_autocast_of_a_forward_outside_it(fused: Fused) -> None:
    """Products in float32 stay so, whatever surrounds them."""
    p = problem(20, 12, 9, 2, tde=True).cast(torch.float32, fused[1], grad=True)
    out, upstream = run_on(fused[0])(p), torch.randn(20, 9, device=fused[1])
    want = torch.autograd.grad(out, p.leaves(), upstream, retain_graph=True)
    with torch.autocast(fused[1], torch.bfloat16):
        got = torch.autograd.grad(out, p.leaves(), upstream)
    assert all(map(torch.equal, got, want))


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="one thread")
def test_threads_do_not_change_a_bit() -> None:
    """Of the core's own passes; how torch's product sums is torch's affair."""
    from tde_kernels.backends import cpu
    from tde_kernels.backends.grouped import Rows

    x, direction, alpha = torch.randn(1000, 64), torch.randn(64), torch.tensor(1.5)
    mask, grad = torch.rand(1000) > 0.3, torch.randn(1000, 64)

    def passes() -> list[Tensor]:
        rows = Rows(x, 4, NormFactor(0.0, 1.0), direction=direction, alpha=alpha)
        norms, along, sums = torch.empty(1000, 4), torch.empty(1000, 4), torch.empty(65)
        out = cpu.PASSES.normalize(rows, torch.float32, norms=norms, along=along, mask=mask, sums=sums)
        back = cpu.PASSES.backward(rows, grad.clone(), norms, None)
        return [out, norms, along, sums, back, cpu.feature_sum(x, mask)]

    threads = torch.get_num_threads()
    many = passes()
    torch.set_num_threads(1)
    try:
        assert all(map(torch.equal, passes(), many))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(("cpu", "cpu") not in FUSED, reason="no compiled core")
@pytest.mark.parametrize("plan", ["small", "unscaled", "product"])
def test_threads_do_not_change_a_bit_of_small_problems(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does what the workspace held before."""
    monkeypatch.setattr(cpu, "plan", plan)
    p = problem(1000, 64, 45, 2, tde=True).cast(torch.float32, grad=True)
    upstream = torch.randn(1000, 45)
    threads = torch.get_num_threads()
    many = gradients(p, run_on("cpu"), upstream)
    torch.set_num_threads(1)
    try:
        other = problem(300, 200, 70, 2).cast(torch.float32, grad=True)
        gradients(other, run_on("cpu"), torch.randn(300, 70))
        one = gradients(p, run_on("cpu"), upstream)
    finally:
        torch.set_num_threads(threads)
    for got, want in zip((one[0], *one[1]), (many[0], *many[1]), strict=True):
        if plan == "small":
            assert torch.equal(got, want)
        else:  # the libraries' products promise no order of the terms
            assert error(got, want.double()) < 1e-5


def test_rounding_to_bfloat16_is_torchs() -> None:
    """To nearest, ties to even, to the bit: the error bound alone would let truncation pass."""
    from tde_kernels.backends import cpu
    from tde_kernels.backends.grouped import Rows

    def rounded(a: Tensor) -> Tensor:
        return cpu.PASSES.normalize(Rows(a, 1, NormFactor(0.0, 0.0)), torch.bfloat16)

    ties = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.4e38, float("inf"), -0.0, 1e-40])
    x = torch.cat([torch.randn(1000), ties])[None].repeat(3, 1)
    assert torch.equal(rounded(x).view(torch.int16), x.bfloat16().view(torch.int16))
    assert rounded(torch.full((1, 4), float("nan"))).isnan().all()


def test_fresh_memory_is_poisoned(fused: Fused) -> None:
    """The fixture that makes an unwritten element show does so for every way the backends allocate."""
    like = torch.zeros(5, 5, device=fused[1])
    for fresh in (torch.empty(300, 300), torch.empty_like(like), like.new_empty(3, 3), torch.empty(7).bfloat16()):
        assert fresh.isnan().all()
    assert like.new_empty(9, dtype=torch.bfloat16).isnan().all()
