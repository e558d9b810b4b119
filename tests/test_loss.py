"""The fused cross entropy: values and gradients against the reference in float64, its memory, what rides along."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import FUSED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import NORMALIZERS, Problem, assert_within, error, naive_logits, problem, reference_logits
from torch import Tensor

from tde_kernels import FusedTDEHead, backends, checks, reference
from tde_kernels import functional as F
from tde_kernels.backends import loss_by_rows
from tde_kernels.backends.grouped import Grouped, Loss, LossPass

Fused = tuple[str, str]
BATCH, CLASSES = 16, 33
RESULTS = ("loss", "gradient of x", "gradient of w", "gradient of class_scale")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
OPTIONS = (
    "class_weight",
    "logit_bias",
    "margin",
    "label_smoothing",
    "target_b",
    "focal_exponent",
)


def some_options(names: set[str], batch: int, classes: int, device: str = "cpu") -> dict[str, Any]:
    """Random values for the options that are named."""
    drawn: dict[str, Any] = {
        "class_weight": torch.rand(classes) + 0.5,
        "logit_bias": torch.randn(classes),
        "margin": 3 * torch.rand(classes),
        "label_smoothing": 0.1,
        "target_b": torch.randint(classes, (batch,)),
        "focal_exponent": 1.5,
    }
    chosen = {name: value for name, value in drawn.items() if name in names}
    if "target_b" in chosen:
        chosen["lam"] = 0.3
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in chosen.items()}


def mild(normalizer: str, *size: int, **options: Any) -> Problem:
    """A problem whose logits are some tens at most: where nothing is normalised they grow with the features."""
    bounded = normalizer in ("cosine", "capsule", "deconfound")
    return problem(*size, normalizer, tau=16.0 if bounded else 1.0, **options)


def labels(batch: int, classes: int) -> Tensor:
    """Random ones, every fifth ignored."""
    target = torch.randint(classes, (batch,))
    target[::5] = -100
    return target


def with_gradients(loss: Tensor, p: Problem, upstream: Tensor) -> tuple[Tensor, ...]:
    return (loss.detach(), *torch.autograd.grad(loss, p.leaves(), upstream.to(loss)))


def check(
    p: Problem, fused: Fused, dtype: torch.dtype, target: Tensor, reduction: str, options: dict[str, Any]
) -> None:
    """The bound of every oracle test: twice what naive torch loses in that dtype."""
    backend, device = fused
    if backends.refusal(backend, "cross_entropy", device, dtype) is not None:
        pytest.skip(f"{backend} does not serve {dtype}")
    upstream = torch.randn(target.shape) if reduction == "none" else torch.tensor(1.7)

    def composed(q: Problem, logits: Any) -> tuple[Tensor, ...]:
        return with_gradients(reference.cross_entropy(logits(q), target, reduction=reduction, **options), q, upstream)

    want = composed(p.cast(torch.float64, grad=True), reference_logits)
    q = p.cast(dtype, device, grad=True)
    there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    loss = F.grouped_cross_entropy(
        q.x, q.w, target.to(device), reduction=reduction, **there, **q.family, backend=backend
    )
    assert loss.dtype == torch.float32
    measure = [0.0] * len(want)
    for _ in range(10):  # one number, or a few that cancel: the worst of some scales, at which everything rounds anew
        drawn = replace(p, x=p.x * (1 + torch.rand(())), w=p.w * (1 + torch.rand(()))).cast(dtype)
        right = composed(drawn.cast(torch.float64, grad=True), reference_logits)
        naive = composed(drawn.cast(dtype, grad=True), naive_logits)
        measure = [max(m, error(a, b)) for m, a, b in zip(measure, naive, right, strict=True)]
    for name, got, right, theirs in zip(RESULTS, with_gradients(loss, q, upstream), want, measure, strict=False):
        assert_within(got, theirs, right, name)


@pytest.fixture(params=["whole", "rows", "classes"])
def way(request: pytest.FixtureRequest, fused: Fused, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to the loss, with a few rows or classes at a time."""
    passes = backends.implementation(fused[0]).PASSES
    rows = {"whole": BATCH, "rows": 10, "classes": BATCH - 1}[request.param]
    monkeypatch.setattr(type(passes), "workspace", rows * CLASSES * 4)
    monkeypatch.setattr(type(passes), "fewest_rows", 10 if request.param == "rows" else 1000)
    monkeypatch.setattr(loss_by_rows, "_CLASSES_AT_ONCE", 10)
    way: str = request.param
    return way


@DTYPES
@REDUCTIONS
@pytest.mark.parametrize("options", [(), OPTIONS], ids=["plain", "every option"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_oracle(normalizer: str, options: tuple[str, ...], reduction: str, dtype: torch.dtype, fused: Fused) -> None:
    p = mild(normalizer, BATCH, 24, CLASSES, 3, dtype=dtype)
    check(p, fused, dtype, labels(BATCH, CLASSES), reduction, some_options(set(options), BATCH, CLASSES))


@DTYPES
@REDUCTIONS
@pytest.mark.parametrize("normalizer", ["linear", "deconfound", "lws"])
def test_every_way(normalizer: str, reduction: str, dtype: torch.dtype, way: str, fused: Fused) -> None:
    p = mild(normalizer, BATCH, 24, CLASSES, 3, dtype=dtype)
    implementation = backends.implementation(fused[0])
    assert implementation.LOSS.way(Grouped.of(p.x, p.w, checks.logits(p.x, p.w, **p.family)), torch.float32) == way
    check(p, fused, dtype, labels(BATCH, CLASSES), reduction, some_options(set(OPTIONS), BATCH, CLASSES))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("classes", [1100, 1104])
def test_rows_of_many_blocks(classes: int, dtype: torch.dtype, fused: Fused) -> None:
    """More classes than a kernel takes at once, read one by one and sixteen bytes at a time."""
    p = mild("deconfound", 8, 24, classes, 2, dtype=dtype)
    for reduction in ("sum", "none"):
        check(p, fused, dtype, labels(8, classes), reduction, some_options(set(OPTIONS), 8, classes))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(8, 16),
    classes=st.integers(8, 60),
    normalizer=st.sampled_from(NORMALIZERS),
    options=st.sets(st.sampled_from(OPTIONS)),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    seed=st.integers(0, 2**16),
)
def test_any_combination(
    batch: int, classes: int, normalizer: str, options: set[str], reduction: str, seed: int, fused: Fused
) -> None:
    torch.manual_seed(seed)
    p = mild(normalizer, batch, 48, classes, 3)
    check(p, fused, torch.float32, labels(batch, classes), reduction, some_options(options, batch, classes))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_used_twice_in_one_graph(reduction: str, fused: Fused) -> None:
    backend, device = fused
    p = problem(10, 12, 9, 2).cast(torch.float32, device, grad=True)
    target = torch.randint(9, (10,), device=device)

    def loss(q: Problem, backend: str) -> Tensor:
        each = F.grouped_cross_entropy(q.x, q.w, target, reduction=reduction, **q.family, backend=backend)
        return (each**2 + 3 * each).sum()

    got = torch.autograd.grad(loss(p, backend), p.leaves(), retain_graph=True)
    want = torch.autograd.grad(loss(p, "reference"), p.leaves())
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("upstream", [1.0, -0.5])
def test_gradients_are_the_callers_own(upstream: float, fused: Fused) -> None:
    """A graph that is kept gives the same again, whatever became of what it gave before."""
    backend, device = fused
    p = problem(10, 12, 9, 2).cast(torch.float32, device, grad=True)
    target = torch.randint(9, (10,), device=device)
    loss = upstream * F.grouped_cross_entropy(p.x, p.w, target, **p.family, backend=backend)
    found = []
    for keeps in (True, True, False):
        gradients = torch.autograd.grad(loss, p.leaves(), retain_graph=keeps)
        found.append([gradient.clone() for gradient in gradients])
        for gradient in gradients:
            gradient.fill_(torch.nan)
    want = torch.autograd.grad(
        upstream * F.grouped_cross_entropy(p.x, p.w, target, **p.family, backend="reference"), p.leaves()
    )
    for each in found:
        torch.testing.assert_close(each, list(want), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, p.leaves())


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_what_is_asked_for(wanted: tuple[bool, bool], fused: Fused) -> None:
    backend, device = fused
    p = problem(10, 12, 9, 2).cast(torch.float32, device, grad=True)
    target = torch.randint(9, (10,), device=device)
    for leaf, wants in zip(p.leaves(), wanted, strict=True):
        leaf.requires_grad_(wants)
    loss = F.grouped_cross_entropy(p.x, p.w, target, **p.family, backend=backend)
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    assert [leaf.grad is not None for leaf in p.leaves()] == list(wanted)


def test_nothing_to_take_the_mean_of(fused: Fused) -> None:
    """As torch has it: not a number, and a sum of nothing is 0."""
    backend, device = fused
    p = problem(4, 12, 9, 2).cast(torch.float32, device)
    target = torch.full((4,), -100, device=device)
    assert F.grouped_cross_entropy(p.x, p.w, target, **p.family, backend=backend).isnan()
    for reduction in ("sum", "none"):
        loss = F.grouped_cross_entropy(p.x, p.w, target, reduction=reduction, **p.family, backend=backend)
        assert (loss == 0).all()
    for extra in ({}, {"target_b": torch.tensor([1, 2, 8, 0], device=device), "lam": 0.5}):  # of the other term alone
        leaves = []
        for name in (backend, "reference"):
            q = p.cast(torch.float32, device, grad=True)
            loss = F.grouped_cross_entropy(q.x, q.w, target, **extra, **q.family, backend=name)
            assert loss.isnan()
            leaves.append(torch.autograd.grad(loss, q.leaves()))
        for ours, right in zip(*leaves, strict=True):
            torch.testing.assert_close(ours, right)
        assert bool(leaves[0][1].any()) == bool(extra)
    empty = F.grouped_cross_entropy(p.x[:0], p.w, target[:0], reduction="sum", **p.family, backend=backend)
    assert empty == 0


def test_a_class_without_prior_and_a_certain_one(fused: Fused) -> None:
    """Logits of minus infinity and of great size lose nothing."""
    backend, device = fused
    p = problem(12, 12, 9, 2).cast(torch.float32, device, grad=True)
    bias = torch.zeros(9, device=device)
    bias[3], bias[5] = -torch.inf, 500.0
    target = torch.tensor([5, 1, 2] * 4, device=device)
    margin = torch.full((9,), 200.0, device=device)
    for extra in ({}, {"margin": margin}, {"margin": margin, "target_b": target.roll(1), "lam": 0.5}):
        results = []
        for name in (backend, "reference"):
            loss = F.grouped_cross_entropy(p.x, p.w, target, logit_bias=bias, **extra, **p.family, backend=name)
            results.append(with_gradients(loss, p, torch.tensor(1.0)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
        assert all(value.isfinite().all() for value in results[0])


def test_no_second_derivative(fused: Fused) -> None:
    backend, device = fused
    p = problem(4, 12, 9, 2).cast(torch.float32, device, grad=True)
    target = torch.randint(9, (4,), device=device)
    for reduction in ("mean", "none"):
        loss = F.grouped_cross_entropy(p.x, p.w, target, reduction=reduction, **p.family, backend=backend).sum()
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss, p.leaves(), create_graph=True)


def test_options_that_learn_have_their_gradient(fused: Fused) -> None:
    backend, device = fused
    p = problem(4, 12, 9, 2).cast(torch.float32, device)
    target = torch.tensor([1, 2, 1, 5], device=device)
    for option in ("logit_bias", "margin", "class_weight"):
        vector = torch.linspace(0.5, 1.5, 9, device=device).requires_grad_()
        for smoothing in (0.0, 0.1):

            def loss(vector: Tensor, option: str = option, smoothing: float = smoothing) -> Tensor:
                options = {option: vector, "label_smoothing": smoothing}
                return F.grouped_cross_entropy(p.x, p.w, target, **options, **p.family, backend=backend)

            (grad,) = torch.autograd.grad(loss(vector), vector)
            step = 0.01 * torch.randn(9, device=device)
            with torch.no_grad():
                along = loss(vector + step) - loss(vector - step)
            torch.testing.assert_close(2 * (grad * step).sum(), along, rtol=1e-2, atol=1e-4)


def test_a_label_that_is_no_class(fused: Fused) -> None:
    """Where nobody looks at labels before, their loss and gradient are not a number, and no memory is read for them."""
    backend, device = fused
    vector = torch.ones(9, device=device)
    for label in (-1, 9, 2**40, -(2**40)):
        z, losses = torch.randn(3, 9, device=device), torch.zeros(3, device=device)
        target = torch.tensor([2, label, 5], device=device)
        loss = Loss(target, torch.ones(3, device=device), None, None, vector, vector, vector, 0.1, -100, 1.5)
        backends.implementation(backend).PASSES.cross_entropy(z, loss, 9, LossPass(losses=losses, gradient=True))
        assert losses.isnan().tolist() == [False, True, False]
        assert z.isnan().all(1).tolist() == [False, True, False] and z[::2].isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_no_numbers(value: float, way: str, fused: Fused) -> None:
    """NaN comes out of the row, and of that row alone but for the weights' gradient."""
    backend, device = fused
    p = mild("linear", BATCH, 24, CLASSES, 3).cast(torch.float32, device)
    p.x[3, 5] = value
    p.x.requires_grad_()
    target = labels(BATCH, CLASSES).to(device)
    target[3] = 1
    losses = F.grouped_cross_entropy(p.x, p.w, target, reduction="none", **p.family, backend=backend)
    losses.sum().backward()
    wrong = torch.zeros(BATCH, dtype=torch.bool, device=device)
    wrong[3] = True
    assert torch.equal(losses.isnan(), wrong) and torch.equal(p.x.grad.isnan().any(1), wrong)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001], ids=hex)
def test_a_class_that_is_no_number(bits: int, way: str, fused: Fused) -> None:
    """No row's loss is one, whatever the bits; those of a NaN that a GPU made are others than a CPU's."""
    backend, device = fused
    p = mild("linear", BATCH, 24, CLASSES, 3).cast(torch.float32, device)
    p.w[3] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    target = labels(BATCH, CLASSES).to(device)
    target[target == 3] = 4
    losses = F.grouped_cross_entropy(p.x, p.w, target, reduction="none", **p.family, backend=backend)
    assert torch.equal(losses.isnan(), target != -100)


@DTYPES
@pytest.mark.parametrize("normalizer", ["linear", "deconfound"])
def test_the_ema_rides_along(normalizer: str, dtype: torch.dtype, way: str, fused: Fused) -> None:
    backend, device = fused
    if backends.refusal(backend, "cross_entropy", device, dtype) is not None:
        pytest.skip(f"{backend} does not serve {dtype}")
    p = problem(BATCH, 12, CLASSES, 2, normalizer, dtype=dtype).cast(dtype, device, grad=True)
    mask = torch.rand(BATCH, device=device) > 0.4
    target = torch.randint(CLASSES, (BATCH,), device=device)
    ema, count = torch.full((12,), 2.0, device=device), torch.tensor(0, device=device)
    loss = F.grouped_cross_entropy_with_ema_(
        p.x, p.w, target, ema, count, momentum=0.5, mask=mask, **p.family, backend=backend
    )
    torch.testing.assert_close(loss, F.grouped_cross_entropy(p.x, p.w, target, **p.family, backend=backend))
    torch.testing.assert_close(ema.double(), 1 + p.x.detach()[mask].double().mean(0), rtol=1e-6, atol=1e-6)
    assert count == 1
    loss.backward()


@pytest.mark.skipif(("cpu", "cpu") not in FUSED, reason="no compiled core")
def test_compiles_whole() -> None:
    torch.compiler.reset()
    head = FusedTDEHead(12, 9, backend="cpu")
    x, target = torch.randn(6, 12, requires_grad=True), torch.randint(9, (6,))
    step = torch.compile(lambda x: head.loss(x, target), fullgraph=True, backend="aot_eager")
    loss = step(x)
    loss.backward()
    got = x.grad
    x.grad = None
    head.loss(x, target).backward()
    torch.testing.assert_close(got, x.grad)
    assert head.num_updates == 2


MEASURE = """
import resource, torch
from tde_kernels import functional as F
torch.set_num_threads(1)
x, w = torch.randn(1024, 128, requires_grad=True), torch.randn({classes}, 128, requires_grad=True)
target = torch.randint({classes}, (1024,))
x.grad, w.grad = torch.ones_like(x), torch.ones_like(w)
w.grad.data_ptr()
small = F.grouped_cross_entropy(x[:8], w[:50].detach(), target[:8] % 50, num_heads=2, tau=16.0, backend="cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
x.grad = w.grad = None
F.grouped_cross_entropy(x, w, target, num_heads=2, tau=16.0, backend="cpu").backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(("cpu", "cpu") not in FUSED or not sys.platform.startswith("linux"), reason="no compiled core")
def test_memory() -> None:
    """Beyond inputs and gradients less than a fifth of what the logits would take."""
    classes = 200_000
    out = subprocess.run([sys.executable, "-c", MEASURE.format(classes=classes)], check=True, capture_output=True)
    assert int(out.stdout) < 1024 * classes * 4 / 5
