"""What only a device can show: kernels on its streams and graphs. Everything else joins the other tests by fixture."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from oracle import (
    NORMALIZERS,
    Problem,
    assert_close,
    assert_within,
    error,
    gradients,
    naive_exempt,
    naive_logits,
    problem,
    reference_logits,
    tiny,
)
from torch import Tensor

from tde_kernels import FusedTDEHead, backends
from tde_kernels import functional as F

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def serving(op: str, *, fused: bool = False) -> list[str]:
    """Backends that serve ``op`` on a device; with ``fused`` without the reference."""
    if not torch.cuda.is_available():
        return ["reference"]  # every test here is skipped
    names = (n for n in backends.NAMES if not (fused and n == "reference"))
    return [n for n in names if backends.refusal(n, op, "cuda", torch.float32) is None]


BACKENDS = pytest.mark.parametrize("backend", serving("feature_sum"))
LOGITS = pytest.mark.parametrize("backend", serving("logits", fused=True))
LOGITS_AND_REFERENCE = pytest.mark.parametrize("backend", serving("logits"))
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
LARGE = 4096, 512, 1231, 2
IMAGENET_LT = 512, 2048, 1000, 2


def expect(x: Tensor, mask: Tensor | None, start: Tensor, momentum: float) -> Tensor:
    rows = x.double().cpu() if mask is None else x.double().cpu()[mask.cpu()]
    return momentum * start.double().cpu() + rows.mean(0)


@BACKENDS
@DTYPES
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (127, 3), (129, 128), (1000, 1231), (70_000, 257)], ids=str)
def test_ema(shape: tuple[int, int], masked: bool, dtype: torch.dtype, backend: str) -> None:
    x = (torch.randn(shape, device="cuda") + 1).to(dtype)
    mask = torch.rand(shape[0], device="cuda") > 0.5 if masked else None
    if mask is not None:
        mask[0] = True
        x[~mask] = float("nan")
    start = torch.randn(shape[1], device="cuda")
    ema = start.clone()
    F.update_head_ema_(ema, x, momentum=0.7, mask=mask, backend=backend)
    torch.testing.assert_close(ema.double().cpu(), expect(x, mask, start, 0.7), rtol=2e-6, atol=2e-6)


@BACKENDS
def test_strided_and_empty(backend: str) -> None:
    wide = torch.randn(100, 50, device="cuda")
    for view in (wide[:, 3:20], wide.T, wide[::3], wide[:1].expand(9, 50), wide[:, ::2]):
        ema = torch.zeros(view.shape[1], device="cuda")
        F.update_head_ema_(ema, view, momentum=0.9, backend=backend)
        torch.testing.assert_close(ema, view.double().mean(0).float(), rtol=1e-5, atol=1e-6)
    ema = torch.randn(50, device="cuda")
    before = ema.clone()
    F.update_head_ema_(ema, wide[:0], momentum=0.9, backend=backend)
    F.update_head_ema_(ema, wide, momentum=0.9, mask=torch.zeros(100, dtype=torch.bool, device="cuda"), backend=backend)
    assert torch.equal(ema, before)
    torch.cuda.synchronize()  # and no error of a launch without blocks is left behind


@BACKENDS
@DTYPES
def test_two_runs_give_the_same_bits(dtype: torch.dtype, backend: str) -> None:
    x = torch.randn(50_001, 300, device="cuda").to(dtype)
    runs = [F.feature_sum(x, backend=backend) for _ in range(4)]
    assert all(torch.equal(run, runs[0]) for run in runs)


@BACKENDS
def test_runs_on_the_current_stream(backend: str) -> None:
    """Features that another stream is still writing: only work queued on that stream sees them whole."""
    stream = torch.cuda.Stream()
    x, ema = torch.zeros(4096, 512, device="cuda"), torch.zeros(512, device="cuda")
    F.update_head_ema_(ema.clone(), x, momentum=0.9, backend=backend)  # loads the kernels
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1)
        F.update_head_ema_(ema, x, momentum=0.9, backend=backend)
    stream.synchronize()
    assert (ema == 1).all()


@BACKENDS
def test_capture(backend: str) -> None:
    """A graph that is replayed takes in what lies in its input then, and counts."""
    head = FusedTDEHead(64, 10, device="cuda")
    x = torch.ones(32, 64, device="cuda")
    warm = torch.cuda.Stream()
    with torch.cuda.stream(warm):
        F.update_head_ema_(torch.zeros(64, device="cuda"), x, momentum=0.5, backend=backend)
        head(x)
    torch.cuda.synchronize()
    head.reset_parameters()
    ema = torch.zeros(64, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        F.update_head_ema_(ema, x, momentum=0.5, backend=backend)
        out = head(x)
    ema.zero_()
    head.ema.zero_()
    head.num_updates.zero_()
    graph.replay()
    x.fill_(3)
    graph.replay()
    torch.cuda.synchronize()
    assert (ema == 3.5).all() and head.num_updates == 2 and out.isfinite().all()
    torch.testing.assert_close(head.ema, torch.full((64,), 0.9 + 3, device="cuda"))


@LOGITS
def test_reduce_overhead(backend: str) -> None:
    """``torch.compile`` warms up in the memory of the graph that it will capture: nothing may be kept there."""
    torch._dynamo.reset()
    eager = FusedTDEHead(64, 10, device="cuda", backend=backend)
    compiled = copy.deepcopy(eager)
    call = torch.compile(compiled, mode="reduce-overhead")
    batches = [torch.randn(32, 64, device="cuda") for _ in range(4)]
    for training in (True, False):
        eager.train(training), compiled.train(training)
        for x in batches:
            torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad():
                torch.testing.assert_close(call(x).clone(), eager(x))
    torch.testing.assert_close(compiled.ema, eager.ema)
    assert compiled.num_updates == len(batches)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one device")
@BACKENDS
def test_the_device_of_the_tensor_not_the_current_one(backend: str) -> None:
    x, ema = torch.ones(5, 8, device="cuda:1"), torch.zeros(8, device="cuda:1")
    with torch.cuda.device(0):
        F.update_head_ema_(ema, x, momentum=0.9, backend=backend)
    assert (ema == 1).all()


def test_autograd_sees_the_write_and_nothing_synchronises() -> None:
    head, x = FusedTDEHead(64, 10, device="cuda"), torch.randn(32, 64, device="cuda")
    head(x)
    version = head.ema._version
    torch.cuda.set_sync_debug_mode("error")
    try:
        head(x, mask=torch.ones(32, dtype=torch.bool, device="cuda")).sum().backward()
        head.eval()(x, alpha=1.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert head.ema._version > version


def test_refusals_say_why() -> None:
    assert "not on cpu" in str(backends.refusal("cuda", "feature_sum", "cpu", torch.float32)) or "no CUDA" in str(
        backends.refusal("cuda", "feature_sum", "cpu", torch.float32)
    )
    assert "CPU, not on cuda" in str(backends.refusal("cpu", "feature_sum", "cuda", torch.float32))
    with pytest.raises(ValueError, match="backend='cpu' cannot serve feature_sum: it serves tensors on the CPU"):
        F.feature_sum(torch.ones(3, 4, device="cuda"), backend="cpu")


def test_mixed_devices_are_refused() -> None:
    x, w = torch.ones(3, 4, device="cuda"), torch.ones(5, 4)
    with pytest.raises(ValueError, match="w must be on the device of x, cuda:0, got cpu"):
        F.grouped_logits(x, w, num_heads=1, tau=1.0)


@LOGITS
@pytest.mark.parametrize("masked", [False, True])
def test_two_training_steps_give_the_same_bits(masked: bool, backend: str) -> None:
    """Logits, gradients and EMA: no order in which programs happen to run may show in a sum."""
    p = problem(*LARGE, dtype=torch.bfloat16).cast(torch.bfloat16, "cuda", grad=True)
    upstream = torch.randn(LARGE[0], LARGE[2], device="cuda").bfloat16()
    mask = torch.rand(LARGE[0], device="cuda") > 0.5 if masked else None

    def step() -> list[Tensor]:
        ema, count = torch.zeros(LARGE[1], device="cuda"), torch.tensor(0, device="cuda")
        z = F.grouped_logits_with_ema_(p.x, p.w, ema, count, momentum=0.9, mask=mask, **p.family, backend=backend)
        return [z.detach(), ema, count, *torch.autograd.grad(z, p.leaves(), upstream)]

    first = step()
    assert first[2] == 1 and all(a.isfinite().all() for a in first)
    for _ in range(5):
        assert all(map(torch.equal, step(), first))


@LOGITS_AND_REFERENCE
@DTYPES
def test_the_ema_riding_along_is_the_ema_alone(dtype: torch.dtype, backend: str) -> None:
    """Fifty calls back to back, of changing sizes: a counter of arrivals that is not left at zero folds too soon."""
    p = problem(*LARGE, dtype=dtype).cast(dtype, "cuda")
    riding, alone = (torch.zeros(LARGE[1], device="cuda") for _ in range(2))
    count = torch.tensor(0, device="cuda")
    for call in range(50):
        rows = (LARGE[0], 129, 1000, 1)[call % 4]
        classes = (LARGE[2], 17)[call % 3 == 0]
        x = p.x[torch.randperm(LARGE[0], device="cuda")[:rows]]
        mask = torch.rand(rows, device="cuda") > 0.5 if call % 2 and rows > 1 else None
        family = dict(p.family, backend=backend)
        F.grouped_logits_with_ema_(x, p.w[:classes], riding, count, momentum=0.5, mask=mask, **family)
        F.update_head_ema_(alone, x, momentum=0.5, mask=mask, backend=backend)
        torch.testing.assert_close(riding, alone, rtol=1e-6, atol=1e-6)
    assert count == 50


@LOGITS_AND_REFERENCE
@DTYPES
def test_capture_of_logits_with_another_alpha(dtype: torch.dtype, backend: str) -> None:
    """alpha lies on the device: a graph reads what it holds when it is replayed, and the features of then."""
    p = problem(300, 128, 77, 2, tde=True, dtype=dtype).cast(dtype, "cuda")
    alpha = torch.tensor(0.5, device="cuda")

    def run(strength: Tensor | float) -> Tensor:
        return F.tde_logits(p.x, p.w, p.direction, alpha=strength, **p.family, backend=backend)

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        run(alpha)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(alpha)
    results = []
    for strength in (0.5, 3.0, 0.0):
        alpha.fill_(strength)
        graph.replay()
        torch.testing.assert_close(out, run(strength))
        results.append(out.clone())
    assert not torch.equal(results[0], results[1])
    p.x.mul_(-1)
    graph.replay()
    torch.testing.assert_close(out, run(0.0))


@LOGITS_AND_REFERENCE
@DTYPES
def test_capture_of_a_training_step(dtype: torch.dtype, backend: str) -> None:
    """Each replay takes the features of then into the EMA once, counts, and gives their gradients."""
    p = problem(300, 128, 77, 2, dtype=dtype).cast(dtype, "cuda", grad=True)
    upstream = torch.randn(300, 77, device="cuda").to(dtype)
    ema, count = torch.zeros(128, device="cuda"), torch.tensor(0, device="cuda")

    def step(ema: Tensor, count: Tensor) -> list[Tensor]:
        z = F.grouped_logits_with_ema_(p.x, p.w, ema, count, momentum=0.5, **p.family, backend=backend)
        return [z.detach(), *torch.autograd.grad(z, p.leaves(), upstream)]

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for _ in range(2):
            step(ema, count)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = step(ema, count)
    ema.zero_()
    count.zero_()
    expected, expected_count = torch.zeros_like(ema), torch.zeros_like(count)
    for replay in range(4):
        with torch.no_grad():
            p.x.copy_(torch.randn(300, 128, device="cuda") + replay)
        graph.replay()
        for got, want in zip(outs, step(expected, expected_count), strict=True):
            torch.testing.assert_close(got, want)
        torch.testing.assert_close(ema, expected, rtol=1e-6, atol=1e-6)
        assert count == expected_count == replay + 1


@LOGITS
def test_logits_run_on_the_current_stream(backend: str) -> None:
    """Operands that a stream is still writing, forward and backward: only work queued there sees them whole."""
    p = problem(2048, 512, 300, 2, tde=True, dtype=torch.bfloat16).cast(torch.bfloat16, "cuda")
    upstream = torch.randn(2048, 300, device="cuda").bfloat16()
    late = replace(p, x=torch.zeros_like(p.x).requires_grad_(), w=torch.ones_like(p.w).requires_grad_())

    def run(q: Problem) -> Tensor:
        return F.tde_logits(q.x, q.w, q.direction, alpha=1.5, **q.family, backend=backend)

    want = gradients(p.cast(torch.bfloat16, "cuda", grad=True), run, upstream)
    gradients(late, run, upstream)  # loads the kernels
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            late.x.copy_(p.x)
            late.w.copy_(p.w)
        got = gradients(late, run, upstream)
    stream.synchronize()
    torch.testing.assert_close(got[0], want[0])
    for ours, theirs in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(ours, theirs)


def skip_unless_served(backend: str, op: str, dtype: torch.dtype) -> None:
    """A backend may serve an op for some dtypes alone."""
    reason = backends.refusal(backend, op, "cuda", dtype)
    if reason is not None:
        pytest.skip(reason)


def fused_logits(backend: str) -> Callable[[Problem], Tensor]:
    def run(p: Problem) -> Tensor:
        if p.direction is None:
            return F.grouped_logits(p.x, p.w, **p.family, backend=backend)
        return F.tde_logits(p.x, p.w, p.direction, alpha=p.alpha, **p.family, backend=backend)

    return run


@LOGITS
@FLOATS
@pytest.mark.parametrize("tde", [False, True], ids=["eq7", "eq8"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_oracle_of_logits(normalizer: str, tde: bool, dtype: torch.dtype, backend: str) -> None:
    """At a size where many programs work on one result, which no CPU test reaches."""
    skip_unless_served(backend, "logits", dtype)
    p = problem(*IMAGENET_LT, normalizer, tde=tde, dtype=dtype)
    upstream = torch.randn(IMAGENET_LT[0], IMAGENET_LT[2], device="cuda").to(dtype)
    want = gradients(p.cast(torch.float64, "cuda", grad=True), reference_logits, upstream)
    naive = gradients(p.cast(dtype, "cuda", grad=True), naive_logits, upstream)
    ours = gradients(p.cast(dtype, "cuda", grad=True), fused_logits(backend), upstream)
    assert ours[0].dtype == dtype
    names = "logits", "gradient of x", "gradient of w", "gradient of class_scale"
    results = zip(names, (ours[0], *ours[1]), (naive[0], *naive[1]), (want[0], *want[1]), strict=False)
    for name, got, theirs, right in results:
        assert_close(got, theirs, right, name)


@pytest.mark.parametrize("backend", serving("background_exempt", fused=True))
@FLOATS
def test_oracle_of_background_exempt(dtype: torch.dtype, backend: str) -> None:
    skip_unless_served(backend, "background_exempt", dtype)
    p = replace(problem(*IMAGENET_LT, tde=True, dtype=dtype), tau=4.0).cast(dtype, "cuda")
    q = p.cast(torch.float64, "cuda")
    for background in (0, 999):
        options = {"alpha": p.alpha, "background_index": background}
        want = F.background_exempt(q.x, q.w, q.direction, **options, **q.family, backend="reference")
        got = F.background_exempt(p.x, p.w, p.direction, **options, **p.family, backend=backend)
        assert got.dtype == dtype
        assert_close(got, naive_exempt(p, background), want, "probabilities")
        logs = F.background_exempt(p.x, p.w, p.direction, **options, **p.family, log=True, backend=backend)
        assert_close(logs, naive_exempt(p.cast(torch.float32, "cuda"), background).log().to(dtype), want.log(), "logs")


@pytest.mark.parametrize("backend", serving("alpha_sweep", fused=True))
@FLOATS
def test_oracle_of_alpha_sweep(dtype: torch.dtype, backend: str) -> None:
    """The winners' exact logits are the largest, but for what float32 loses: of two near ties either may be named."""
    skip_unless_served(backend, "alpha_sweep", dtype)
    p = problem(*IMAGENET_LT, tde=True, dtype=dtype).cast(dtype, "cuda")
    alphas = [0.0, 0.5, 1.5, 6.0]
    found = F.alpha_sweep(p.x, p.w, p.direction, alphas, **p.family, backend=backend)
    assert found.dtype == torch.int64 and found.shape == (4, IMAGENET_LT[0])
    for alpha, classes in zip(alphas, found, strict=True):
        exact = replace(p.cast(torch.float64, "cuda"), alpha=alpha)
        want = reference_logits(exact)
        single = error(naive_logits(exact.cast(torch.float32, "cuda")), want)
        short = want.amax(-1) - want.gather(1, classes[:, None])[:, 0]
        assert (short / want.abs().amax(-1)).max() <= 2 * (2 * single + tiny(torch.float32))


@pytest.mark.parametrize("backend", serving("topk", fused=True))
@FLOATS
@pytest.mark.parametrize("tde", [False, True], ids=["eq7", "eq8"])
def test_oracle_of_topk(tde: bool, dtype: torch.dtype, backend: str) -> None:
    skip_unless_served(backend, "topk", dtype)
    p = problem(*IMAGENET_LT, tde=tde, dtype=dtype).cast(dtype, "cuda")
    want, naive = reference_logits(p.cast(torch.float64, "cuda")), naive_logits(p)
    options = {} if p.direction is None else {"direction": p.direction, "alpha": p.alpha}
    for k in (1, 5, 32):
        values, classes = F.topk(p.x, p.w, k, **options, **p.family, backend=backend)
        assert values.dtype == dtype and classes.dtype == torch.int64
        theirs = error(naive, want)
        assert_within(values, theirs, want.topk(k).values, "values")
        assert_within(values, theirs, want.gather(1, classes), "values of the classes named")
        assert (values[:, :-1] >= values[:, 1:]).all()
        assert all(len(set(row)) == k for row in classes.tolist())


AUTOTUNED = """
import torch
from oracle import problem
from tde_kernels import functional as F
from tde_kernels.backends.triton import launch
assert launch.autotuning()
p = problem(512, 512, 300, 2, dtype=torch.bfloat16).cast(torch.bfloat16, "cuda", grad=True)
ema, count = torch.zeros(512, device="cuda"), torch.tensor(0, device="cuda")
want = torch.zeros(512, device="cuda")
for step in range(3):
    z = F.grouped_logits_with_ema_(p.x, p.w, ema, count, momentum=0.5, **p.family, backend="triton")
    z.sum().backward()
    assert launch._tuner.cache_info().currsize > 0, "nothing was tuned"
    F.update_head_ema_(want, p.x, momentum=0.5, backend="reference")
    torch.testing.assert_close(ema, want, rtol=1e-5, atol=1e-5)
    assert count == step + 1, count
torch.testing.assert_close(z, F.grouped_logits(p.x, p.w, **p.family, backend="reference"), rtol=2e-2, atol=5e-2)
F.grouped_logits(p.x, p.w, **p.family, backend="triton")  # and without an EMA, of which there is nothing to restore
with torch.no_grad():
    F.grouped_logits(p.x[:17], p.w, **p.family, backend="triton")
"""


@pytest.mark.skipif("triton" not in serving("logits"), reason="Triton serves no device here")
def test_trials_of_the_autotuner_do_not_fold_the_ema(tmp_path: Path) -> None:
    """A step that tunes runs the kernel many times and updates once; its cache is fresh, so that it does tune."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {"TDE_AUTOTUNE": "1", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", AUTOTUNED],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
