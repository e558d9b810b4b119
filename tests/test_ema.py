"""The EMA of the head direction: what it takes in, what it leaves alone, and how exactly it adds."""

from __future__ import annotations

import pytest
import torch
from oracle import problem
from torch import Tensor

from tde_kernels import functional as F
from tde_kernels import reference

Fused = tuple[str, str]
EVERY = ("reference", "fused")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@pytest.fixture
def fused(every_way: Fused) -> Fused:
    """Every backend, and every way of the CPU's."""
    return every_way


@pytest.fixture(params=EVERY)
def served(request: pytest.FixtureRequest, fused: Fused) -> Fused:
    """The reference, then the fused backend."""
    return fused if request.param == "fused" else ("reference", fused[1])


def naive_sum(x: Tensor, mask: Tensor | None) -> Tensor:
    return (x if mask is None else x[mask]).reshape(-1, x.shape[-1]).sum(0)


@DTYPES
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (127, 3), (129, 65), (7, 9, 24), (40, 1000), (24,)], ids=str)
def test_mean_of_the_rows(shape: tuple[int, ...], masked: bool, dtype: torch.dtype, served: Fused) -> None:
    backend, device = served
    x = (torch.randn(shape) + 1).to(dtype)
    mask = torch.rand(shape[:-1]) > 0.4 if masked else None
    if mask is not None and mask.dim():
        mask.view(-1)[0] = True
    elif mask is not None:
        mask = torch.tensor(True)
    start = torch.randn(shape[-1])
    rows = x.double() if mask is None else x[mask].double()
    want = 0.7 * start.double() + rows.reshape(-1, shape[-1]).mean(0)
    ema = start.to(device, copy=True)
    got = F.update_head_ema_(
        ema, x.to(device), momentum=0.7, mask=None if mask is None else mask.to(device), backend=backend
    )
    assert got is ema
    # the sum, the quotient and the update round in float32, whatever the dtype of the features
    torch.testing.assert_close(ema.double().cpu(), want, rtol=1e-6, atol=1e-6)


@DTYPES
def test_large_batches_lose_nothing_more_than_one_sum_in_float32(dtype: torch.dtype, served: Fused) -> None:
    backend, device = served
    x = (torch.randn(50_001, 5) + 100).to(dtype)
    want = x.double().sum(0)
    got = F.feature_sum(x.to(device), backend=backend).double().cpu()
    naive = x.float().sum(0).double()
    assert got[-1] == len(x)
    assert (got[:-1] - want).abs().max() <= 2 * (naive - want).abs().max() + torch.finfo(torch.float32).eps * want.max()


@pytest.mark.parametrize("empty", ["no rows", "nothing in the mask", "no rows and a mask"])
def test_no_row_changes_nothing(empty: str, served: Fused) -> None:
    backend, device = served
    x = torch.randn(0 if empty.startswith("no") else 5, 8, device=device)
    mask = None if empty == "no rows" else torch.zeros(len(x), dtype=torch.bool, device=device)
    ema = torch.randn(8, device=device)
    before, count = ema.clone(), torch.tensor(3, device=device)
    F.update_head_ema_(ema, x, momentum=0.5, mask=mask, backend=backend)
    assert torch.equal(ema, before)
    p = problem(5, 8, 4, 2)
    F.grouped_logits_with_ema_(
        x, p.w.to(device), ema, count, momentum=0.5, mask=mask, num_heads=2, tau=1.0, backend=backend
    )
    assert torch.equal(ema, before) and count == 3


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_that_the_mask_leaves_out_are_harmless(poison: float, served: Fused) -> None:
    backend, device = served
    x = torch.randn(70, 8, device=device)
    mask = torch.rand(70, device=device) > 0.5
    want = F.update_head_ema_(torch.zeros(8, device=device), x[mask], momentum=0.9, backend=backend)
    x[~mask] = poison
    for wide in (x, x.repeat(1, 2)[:, :8]):
        got = F.update_head_ema_(torch.zeros(8, device=device), wide, momentum=0.9, mask=mask, backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("normalizer", ["deconfound", "linear", "capsule"])
@pytest.mark.parametrize("masked", [False, True])
def test_rides_on_the_logits(masked: bool, normalizer: str, dtype: torch.dtype, served: Fused) -> None:
    """The same logits as without, the same EMA as alone, and gradients as without."""
    backend, device = served
    p = problem((3, 50), 24, 7, 2, normalizer, dtype=dtype).cast(dtype, device, grad=True)
    mask = torch.rand(3, 50, device=device) > 0.5 if masked else None
    ema, alone = torch.ones(24, device=device), torch.ones(24, device=device)
    count = torch.tensor(0, device=device)
    for step in range(3):
        out = F.grouped_logits_with_ema_(p.x, p.w, ema, count, momentum=0.6, mask=mask, **p.family, backend=backend)
        F.update_head_ema_(alone, p.x, momentum=0.6, mask=mask, backend=backend)
        assert count == step + 1
        if backend in (
            "triton",
            "cuda",
        ):  # rows are summed block by block, and the blocks are those of the logits' tiles
            torch.testing.assert_close(ema, alone, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(ema, alone)
    plain = F.grouped_logits(p.x, p.w, **p.family, backend=backend)
    assert torch.equal(out, plain)
    upstream = torch.randn_like(out)
    for a, b in zip(
        torch.autograd.grad(out, p.leaves(), upstream), torch.autograd.grad(plain, p.leaves(), upstream), strict=True
    ):
        assert torch.equal(a, b)
    assert not ema.requires_grad and ema.grad_fn is None


def test_counts_only_what_the_mask_takes(served: Fused) -> None:
    backend, device = served
    x, mask = torch.ones(100, 4, device=device), torch.arange(100, device=device) % 3 == 0
    assert F.feature_sum(x, mask, backend=backend).tolist() == [34.0] * 5
    assert F.feature_sum(x.expand(2, 100, 4), mask.expand(2, 100), backend=backend).tolist() == [68.0] * 5


def test_autograd_sees_the_write(served: Fused) -> None:
    backend, device = served
    ema = torch.randn(8, device=device)
    weight = torch.randn(8, device=device, requires_grad=True)
    product = (ema * weight).sum()  # saves ema
    version = ema._version
    F.update_head_ema_(ema, torch.randn(4, 8, device=device), momentum=0.9, backend=backend)
    assert ema._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_inference_mode(served: Fused) -> None:
    backend, device = served
    with torch.inference_mode():
        ema = F.update_head_ema_(
            torch.zeros(8, device=device), torch.ones(4, 8, device=device), momentum=0.9, backend=backend
        )
    assert ema.tolist() == [1.0] * 8


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum_at_its_ends(momentum: float, served: Fused) -> None:
    ema = torch.full((8,), 2.0, device=served[1])
    F.update_head_ema_(ema, torch.ones(4, 8, device=served[1]), momentum=momentum, backend=served[0])
    assert ema.tolist() == [1.0 + 2 * momentum] * 8


@DTYPES
def test_same_bits_twice(dtype: torch.dtype, served: Fused) -> None:
    x = torch.randn(3001, 130, device=served[1]).to(dtype)
    runs = [F.feature_sum(x, backend=served[0]) for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])


def test_strided_and_transposed_features(served: Fused) -> None:
    x = torch.randn(40, 50, device=served[1])
    for view in (x[:, 5:20], x.T, x[::3], x[:1].expand(7, 50), x[:, ::2]):
        got = F.feature_sum(view, backend=served[0])
        torch.testing.assert_close(got[:-1], view.double().sum(0).float(), rtol=1e-6, atol=1e-5)
        assert got[-1] == len(view)


def test_a_default_dtype_does_not_reach_the_sum(served: Fused) -> None:
    x = torch.randn(40, 50, device=served[1])
    want = F.feature_sum(x, backend=served[0])
    torch.set_default_dtype(torch.float64)
    try:
        got = F.feature_sum(x, backend=served[0])
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32 and torch.equal(got, want)


def test_the_direction_does_not_depend_on_the_scale_of_the_average() -> None:
    ema = torch.randn(12)
    torch.testing.assert_close(
        reference.head_direction(ema, num_heads=3), reference.head_direction(17 * ema, num_heads=3)
    )


def test_many_rows_of_a_small_problem_ride_along(fused: Fused) -> None:
    """More rows than a kernel has blocks for: each takes several tiles of them, one after the other."""
    backend, device = fused
    p = problem(9000, 8, 3, 2).cast(torch.float32, device)
    mask = torch.rand(9000, device=device) > 0.5
    ema = torch.ones(8, device=device)
    out = F.grouped_logits_with_ema_(
        p.x, p.w, ema, torch.tensor(0, device=device), momentum=0.6, mask=mask, **p.family, backend=backend
    )
    want = 0.6 + p.x[mask].double().mean(0)
    torch.testing.assert_close(ema.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out, F.grouped_logits(p.x, p.w, **p.family, backend="reference"), rtol=1e-5, atol=1e-4)
