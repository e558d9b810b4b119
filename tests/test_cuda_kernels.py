"""The CUDA kernels one by one: each way of computing logits held to, whatever the crossovers would choose.

Without a GPU these run in the emulator, by ``python tests/emulated.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from conftest import FUSED
from oracle import NORMALIZERS, Problem, error, gradients, naive_exempt, naive_logits, problem, reference_logits, tiny
from test_logits import check, run_on
from torch import Tensor

from tde_kernels import functional as F
from tde_kernels import reference
from tde_kernels.backends import core, crossovers
from tde_kernels.backends.cuda import small
from tde_kernels.backends.cuda import tiled as tiled_backend
from tde_kernels.backends.grouped import Grouped
from tde_kernels.normalizers import Classifier, resolve

CUDA = [pair for pair in FUSED if pair[0] == "cuda"]
Fused = tuple[str, str]
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
# Heads start on sixteen bytes, and end within a tile, at its end and beyond it; one and two row tiles; ragged classes
TILED = [(1, 8, 1, 1), (65, 64, 63, 2), (70, 72, 130, 3), (130, 136, 65, 1), (33, 16, 129, 8)]

pytestmark = pytest.mark.skipif(not CUDA, reason="no CUDA device, and the kernels are not emulated")


@pytest.fixture(params=CUDA or [("cuda", "none")], ids=lambda pair: "-".join(pair))
def cuda(request: pytest.FixtureRequest) -> Fused:
    """Name and device of the backend."""
    pair: Fused = request.param
    return pair


@pytest.fixture(params=["small", "tiled", "hopper", "product"])
def plan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way of computing logits that is held to."""
    monkeypatch.setattr(crossovers, "plan", request.param)
    chosen: str = request.param
    return chosen


@pytest.fixture(params=["tiled", "hopper"])
def tiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, cuda: Fused) -> None:
    """One pass on tensor cores, by each of the instructions that the device has."""
    if request.param == "hopper" and (reason := tiled_backend.hopper_refusal(torch.device(cuda[1]))) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(crossovers, "plan", request.param)


@pytest.fixture
def tf32() -> Iterator[None]:
    """torch allows its float32 products the precision of tf32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def in_tf32(a: Tensor) -> Tensor:
    """Rounded to a mantissa of ten bits."""
    mantissa, exponent = torch.frexp(a.double())
    return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent)


@HALVES
@pytest.mark.parametrize("tde", [False, True], ids=["eq7", "eq8"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_every_plan(normalizer: str, tde: bool, dtype: torch.dtype, plan: str, cuda: Fused) -> None:
    check(problem(37, 48, 21, 3, normalizer, tde=tde, dtype=dtype), cuda, dtype)


@HALVES
@pytest.mark.parametrize("tde", [False, True], ids=["eq7", "eq8"])
@pytest.mark.parametrize("size", TILED, ids=lambda s: "x".join(map(str, s)))
def test_tiles(size: tuple[int, ...], tde: bool, dtype: torch.dtype, tiled: None, cuda: Fused) -> None:
    batch, width, classes, num_heads = size
    check(problem(batch, num_heads * width, classes, num_heads, tde=tde, dtype=dtype), cuda, dtype)


def test_tiles_of_many_rows(tiled: None, cuda: Fused) -> None:
    """So many tiles that they are of the larger kind."""
    check(problem(140, 16, 64 * 128, 2, tde=True, dtype=torch.bfloat16), cuda, torch.bfloat16)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("tde", [False, True], ids=["eq7", "eq8"])
def test_tf32(normalizer: str, tde: bool, tf32: None, cuda: Fused, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice what operands rounded to tf32 lose, normalised or not: that is where the rounding may be."""
    monkeypatch.setattr(crossovers, "plan", "tiled")
    p = problem(70, 72, 65, 2, normalizer, tde=tde)
    want = reference_logits(p.cast(torch.float64))
    rounded = replace(p.cast(torch.float64), x=in_tf32(p.x), w=in_tf32(p.w))
    got = run_on(cuda[0])(p.cast(torch.float32, cuda[1]))
    exact = naive_logits(p.cast(torch.float32))
    assert error(got, want) <= 2 * error(reference_logits(rounded), want) + tiny(torch.float32)
    assert error(got, want) > 2 * error(exact, want)  # tensor cores were used


@HALVES
@pytest.mark.parametrize("shape", [(70, 48, 21, 3), (300, 16, 5, 1), (64, 256, 70, 2)], ids=str)
def test_the_ema_rides_along(shape: tuple[int, ...], dtype: torch.dtype, plan: str, cuda: Fused) -> None:
    """With a mask, whose rows may hold anything."""
    backend, device = cuda
    p = problem(*shape, dtype=dtype).cast(dtype, device)
    mask = torch.rand(shape[0], device=device) > 0.4
    p.x[~mask] = float("nan")
    for step in range(2):
        ema, count = torch.full((shape[1],), 2.0, device=device), torch.tensor(step, device=device)
        F.grouped_logits_with_ema_(p.x, p.w, ema, count, momentum=0.6, mask=mask, **p.family, backend=backend)
        torch.testing.assert_close(ema.double(), 1.2 + p.x[mask].double().mean(0), rtol=1e-6, atol=1e-6)
        assert count == step + 1


@HALVES
def test_sums_are_in_a_fixed_order(dtype: torch.dtype, plan: str, cuda: Fused) -> None:
    """Bit for bit, though no two runs are scheduled alike."""
    backend, device = cuda
    p = problem(150, 48, 90, 3, "lws", tde=True, dtype=dtype).cast(dtype, device, grad=True)
    upstream = torch.randn(150, 90, device=device).to(dtype)
    first = gradients(p, run_on(backend), upstream)
    for _ in range(3):
        again = gradients(p, run_on(backend), upstream)
        assert torch.equal(first[0], again[0])
        assert all(torch.equal(a, b) for a, b in zip(first[1], again[1], strict=True))


@HALVES
@pytest.mark.parametrize("log", [False, True])
def test_background_exempt_over_tiles(log: bool, dtype: torch.dtype, tiled: None, cuda: Fused) -> None:
    backend, device = cuda
    p = problem(70, 48, 130, 3, tde=True, dtype=dtype)

    def run(p: Problem, backend: str) -> Tensor:
        return F.background_exempt(
            p.x, p.w, p.direction, alpha=p.alpha, background_index=4, log=log, **p.family, backend=backend
        )

    got, want = run(p.cast(dtype, device), backend), run(p.cast(torch.float64), "reference")
    naive = naive_exempt(p.cast(dtype), 4)
    assert error(got, want) <= 2 * error(naive.log() if log else naive, want) + tiny(dtype)


def test_a_row_whose_squares_overflow_is_read_again(tiled: None, cuda: Fused) -> None:
    p = problem(20, 32, 9, 2, "cosine", dtype=torch.bfloat16)
    scales = torch.tensor([2.0**-100, 2.0**100, 0.0, 1.0]).repeat(5)[:, None]
    wide = replace(p, x=(p.x * scales).bfloat16())
    got = run_on(cuda[0])(wide.cast(torch.bfloat16, cuda[1]))
    want = reference_logits(wide.cast(torch.float64))
    assert error(got, want) <= 2 * error(naive_logits(p), reference_logits(p.cast(torch.float64))) + tiny(
        torch.bfloat16
    )
    assert (got[2] == 0).all()


def test_the_direction_may_lie_anywhere(tiled: None, cuda: Fused) -> None:
    backend, device = cuda
    p = problem(9, 32, 5, 2, tde=True, dtype=torch.bfloat16).cast(torch.bfloat16, device)
    assert p.direction is not None
    shifted = torch.cat([p.direction.new_zeros(1), p.direction]).float()[1:]
    assert torch.equal(run_on(backend)(replace(p, direction=shifted)), run_on(backend)(p))


def test_errors_name_the_kernel_and_the_shape(cuda: Fused) -> None:
    compiled, x = core.compiled(), torch.zeros(4, 12, device=cuda[1])
    operand = compiled.Operand(core.matrix(x), compiled.RowTransform(2, 0.0, 1.0, 1.0))
    out = torch.zeros(4, 5, device=cuda[1])
    with pytest.raises(RuntimeError, match=r"cuda::small_logits: out has the shape \[4, 5\]"):
        compiled.cuda_small_logits(operand, operand, compiled.EmaUpdate(), core.matrix(out), 0, 0, 0)
    with pytest.raises(RuntimeError, match="cuda::tiled_logits: out has the shape"):
        compiled.cuda_tiled_logits(
            operand, operand, compiled.LogitsByproducts(), compiled.EmaUpdate(), core.matrix(out), False, 0, 0, 0
        )
    square = core.matrix(torch.zeros(4, 4, device=cuda[1]))
    whole = compiled.Operand(square, compiled.RowTransform(1, 0.0, 1.0, 1.0))
    with pytest.raises(RuntimeError, match="cuda::tiled_logits: wgmma would cut float32 off to tf32"):
        compiled.cuda_tiled_logits(
            whole, whole, compiled.LogitsByproducts(), compiled.EmaUpdate(), square, True, 0, 0, 0
        )
    with pytest.raises(RuntimeError, match=r"cuda::normalize_rows: a and out differ in shape: \[4, 12\] and \[4, 5\]"):
        compiled.cuda_normalize_rows(core.matrix(x), compiled.RowTransform(2, 0.0, 1.0, 1.0), core.matrix(out), 0, 0, 0)
    assert not compiled.cuda_small_logits_fit(257, 10, 1) and not compiled.cuda_small_logits_fit(64, 1025, 1)
    assert compiled.cuda_small_logits_fit(256, 1024, 8)


@pytest.mark.parametrize("dim", [1, 3, 12, 60, 129, 256, 257])
@pytest.mark.parametrize("classes", [1, 1024, 1025])
def test_python_and_core_agree_on_what_is_small(dim: int, classes: int, cuda: Fused) -> None:
    for num_heads in (k for k in (1, 2, 3, 4, 8) if dim % k == 0):
        normalizer = resolve("cosine", gamma=0.0, exponent=1.0)
        classifier = Classifier(num_heads=num_heads, tau=1.0, normalizer=normalizer, class_scale=None)
        p = Grouped.of(torch.zeros(2, dim), torch.zeros(classes, dim), classifier)
        fits = core.compiled().cuda_small_logits_fit(dim, classes, num_heads)
        assert small.can_serve(p, torch.float32) == fits


def test_reference_is_untouched_by_the_plan(plan: str) -> None:
    p = problem(3, 12, 4, 2)
    assert torch.equal(
        F.grouped_logits(p.x, p.w, **p.family, backend="reference"), reference.grouped_logits(p.x, p.w, **p.family)
    )
