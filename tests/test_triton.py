"""What is Triton's alone: both plans of a product, offsets past 32 bits, the arrival counters, precision flags."""

from __future__ import annotations

import pytest
import torch
from oracle import NORMALIZERS, problem
from test_logits import check

from tde_kernels import backends
from tde_kernels import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = ("triton", DEVICE)
REFUSED = backends.refusal("triton", "logits", DEVICE, torch.float32)
pytestmark = pytest.mark.skipif(REFUSED is not None, reason=str(REFUSED))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("plan", ["single", "library"])
def test_both_plans(plan: str, normalizer: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass, and a library's product between two passes; heads wider and narrower than a tile."""
    from tde_kernels.backends.triton import configs

    monkeypatch.setattr(configs, "plan", plan)
    for width in (24, 200):
        check(problem(33, 2 * width, 40, 2, normalizer, tde=width == 200, dtype=dtype), TRITON, dtype)


def test_one_average_at_changing_batch_and_class_sizes() -> None:
    """Its arrival counters are kept from call to call, and grow."""
    ema, count = torch.zeros(24, device=DEVICE), torch.tensor(0, device=DEVICE)
    want = torch.zeros(24, dtype=torch.float64)
    for step, (batch, classes) in enumerate([(5, 3), (200, 300), (1, 500), (130, 7)]):
        x, w = torch.randn(batch, 24, device=DEVICE), torch.randn(classes, 24, device=DEVICE)
        F.grouped_logits_with_ema_(x, w, ema, count, momentum=0.5, num_heads=2, tau=1.0, backend="triton")
        want = 0.5 * want + x.double().mean(0).cpu()
        torch.testing.assert_close(ema.double().cpu(), want, rtol=1e-6, atol=1e-6)
        assert count == step + 1


def test_topk_beyond_the_lists_length() -> None:
    p = problem(9, 24, 80, 2, tde=True).cast(torch.float32, DEVICE)
    for k in (1, 32, 33, 80):
        values, classes = F.topk(p.x, p.w, k, direction=p.direction, alpha=1.5, **p.family, backend="triton")
        scores = F.tde_logits(p.x, p.w, p.direction, alpha=1.5, **p.family, backend="triton")
        right, order = scores.sort(descending=True, stable=True)
        assert torch.equal(classes, order[:, :k])
        torch.testing.assert_close(values, right[:, :k])


def test_precision_follows_torchs_flag() -> None:
    from tde_kernels.backends.triton import launch

    before = torch.get_float32_matmul_precision()
    try:
        for asked, want in (("highest", "ieee"), ("high", "tf32")):
            torch.set_float32_matmul_precision(asked)
            assert launch.precision() == want
    finally:
        torch.set_float32_matmul_precision(before)
