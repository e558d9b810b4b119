"""What only a device can show: kernels on its streams and graphs. Everything else joins the other tests by fixture."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tde_kernels import FusedTDEHead, backends
from tde_kernels import functional as F

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def serving() -> list[str]:
    """Backends that serve the EMA on a device."""
    if not torch.cuda.is_available():
        return ["reference"]
    served = (n for n in backends.NAMES if backends.refusal(n, "feature_sum", "cuda", torch.float32) is None)
    return list(served)


BACKENDS = pytest.mark.parametrize("backend", serving())


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
