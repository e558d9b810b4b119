"""The ``torch.library`` ops as torch sees them: schemas, fakes, mutation, and the same numbers when compiled."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import NORMALIZERS, problem
from torch import Tensor

from tde_kernels import FusedTDEHead, backends, reference
from tde_kernels import functional as F
from tde_kernels.normalizers import resolve

Fused = tuple[str, str]
UTILS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(autouse=True)
def no_poison(poison: None) -> None:
    """opcheck compares uninitialised outputs, which for a NaN would differ from themselves."""
    torch.use_deterministic_algorithms(False)


def arguments(normalizer: str, dtype: torch.dtype, backend: str, device: str) -> tuple[list[Any], dict]:
    """Operands and keywords that several ops begin with."""
    p = problem(6, 12, 9, 3, normalizer, tde=True, dtype=dtype).cast(dtype, device)
    assert p.direction is not None
    family = resolve(normalizer, gamma=p.gamma, exponent=p.exponent)
    keywords = dict(
        num_heads=3,
        scale=p.tau / 3,
        feature_factor=list(family.feature),
        weight_factor=list(family.weight),
        backend=backend,
    )
    return [p.x, p.w, p.class_scale, p.direction.float()], keywords


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("normalizer", ["deconfound", "linear", "lws"])
def test_logits(normalizer: str, dtype: torch.dtype, fused: Fused) -> None:
    backend, device = fused
    (x, w, scale, direction), keywords = arguments(normalizer, dtype, backend, device)
    alpha, mask = torch.tensor(1.5, device=device), torch.rand(6, device=device) > 0.5
    ema, count = torch.zeros(12, device=device), torch.tensor(0, device=device)
    nothing = None, None, None
    for subtract, update, out in (
        (None, (mask, ema, count), dtype),
        (direction, nothing, dtype),
        (direction, (None, ema, None), torch.bfloat16),
    ):
        forward = (x, w, scale, subtract, None if subtract is None else alpha, *update)
        options = dict(keywords, momentum=0.9, take_sum=True, dtype=out)
        torch.library.opcheck(torch.ops.tde.logits.default, forward, options, test_utils=UTILS)
        z, *saved, _ = torch.ops.tde.logits(*forward, **options)
        backward = (*forward[:5], torch.randn_like(z), *saved)
        for wanted in ((True, True, scale is not None), (True, False, False), (False, True, False)):
            wants = dict(zip(("wants_x", "wants_w", "wants_class_scale"), wanted, strict=True))
            torch.library.opcheck(
                torch.ops.tde.logits_backward.default, backward, {**keywords, **wants}, test_utils=UTILS
            )


@pytest.mark.parametrize("workspace", [1 << 20, 200], ids=["whole", "classes"])
@pytest.mark.parametrize("normalizer", ["deconfound", "lws"])
def test_loss_ops(normalizer: str, workspace: int, fused: Fused, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, device = fused
    monkeypatch.setattr(type(backends.implementation(backend).PASSES), "workspace", workspace)
    (x, w, scale, _), keywords = arguments(normalizer, torch.float32, backend, device)
    target = torch.randint(w.shape[0], (x.shape[0],), device=device)
    ones, mask = torch.ones(x.shape[0], device=device), torch.rand(x.shape[0], device=device) > 0.3
    ema, count = torch.zeros(x.shape[1], device=device), torch.tensor(0, device=device)
    numbers = {"label_smoothing": 0.1, "ignore_index": -100, "focal_exponent": 0.0, "first": 0, "classes": 0}
    options = {**numbers, "dtype": torch.float32}
    for vectors, intake, take_sum, wanted in (
        ((None,) * 5, (None, None, None), False, (True, True, scale is not None)),
        ((target, ones, *torch.rand(3, w.shape[0], device=device)), (mask, ema, count), True, (True, False, False)),
        ((None,) * 5, (None, None, None), False, (False, False, False)),
    ):
        wants = dict(zip(("wants_x", "wants_w", "wants_class_scale"), wanted, strict=True))
        both = {**keywords, **options, **wants}
        operands = x, w, scale, None, None, target, ones, *vectors
        forward = {**both, "momentum": 0.9, "take_sum": take_sum}
        torch.library.opcheck(torch.ops.tde.cross_entropy.default, (*operands, *intake), forward, test_utils=UTILS)
        nothing = dict.fromkeys(wants, False)
        sums = torch.ops.tde.cross_entropy(*operands, *intake, **{**forward, **nothing})[4]
        torch.library.opcheck(torch.ops.tde.cross_entropy_backward.default, (*operands, sums), both, test_utils=UTILS)
    shard = {**numbers, "first": 2, "classes": w.shape[0] + 3}
    vectors = (target, ones, *torch.rand(3, w.shape[0] + 3, dtype=torch.float64, device=device))
    operands, loss = (x, w, scale, None, None), (target, ones, *vectors)
    both = {**keywords, **shard, "dtype": torch.float32}
    torch.library.opcheck(torch.ops.tde.cross_entropy_sums.default, (*operands, *loss), both, test_utils=UTILS)
    sums = torch.ops.tde.cross_entropy_sums(*operands, *loss, **both)
    last = (sums, *loss), {**shard, "backend": backend}
    torch.library.opcheck(torch.ops.tde.cross_entropy_losses.default, *last, test_utils=UTILS)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_inference_ops(normalizer: str, fused: Fused) -> None:
    backend, device = fused
    operands, keywords = arguments(normalizer, torch.float32, backend, device)
    alphas = torch.tensor([0.0, 1.5], dtype=torch.float64, device=device)
    torch.library.opcheck(torch.ops.tde.alpha_sweep.default, (*operands, None, alphas), keywords, test_utils=UTILS)
    segments = dict(keywords, most=4)
    torch.library.opcheck(torch.ops.tde.alpha_segments.default, (*operands, None), segments, test_utils=UTILS)
    for log, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        options = dict(keywords, background=2, log=log, dtype=dtype)
        exempt = (*operands, torch.tensor(1.5, device=device))
        torch.library.opcheck(torch.ops.tde.background_exempt.default, exempt, options, test_utils=UTILS)
        largest = dict(keywords, k=3, dtype=dtype)
        torch.library.opcheck(torch.ops.tde.topk.default, exempt, largest, test_utils=UTILS)


def test_ema_ops(fused: Fused) -> None:
    backend, device = fused
    x, mask = torch.randn(6, 12, device=device), torch.rand(6, device=device) > 0.5
    for operands in ((x, None), (x, mask), (x.bfloat16(), mask)):
        torch.library.opcheck(torch.ops.tde.feature_sum.default, operands, {"backend": backend}, test_utils=UTILS)
    ema, options = torch.randn(12, device=device), {"num_heads": 3, "backend": backend}
    ema[:4] = 0
    torch.library.opcheck(torch.ops.tde.head_direction.default, (ema,), options, test_utils=UTILS)
    direction = F.head_direction(ema, **options)
    torch.testing.assert_close(
        direction.double(), reference.head_direction(ema.double(), num_heads=3), rtol=1e-6, atol=0
    )
    for count in (None, torch.tensor(2, device=device)):
        torch.library.opcheck(
            torch.ops.tde.fold_ema_.default,
            (torch.randn(12, device=device), count, torch.ones(13, device=device)),
            {"momentum": 0.9, "backend": backend},
            test_utils=UTILS,
        )
        torch.library.opcheck(
            torch.ops.tde.update_ema_.default,
            (torch.randn(12, device=device), count, x, mask),
            {"momentum": 0.9, "backend": backend},
            test_utils=UTILS,
        )


def test_no_output_is_another_or_an_input(fused: Fused) -> None:
    """What torch.library asks of an op that is said to return fresh tensors."""
    backend, device = fused
    for normalizer in ("linear", "deconfound", "lws"):
        (x, w, scale, _), keywords = arguments(normalizer, torch.float32, backend, device)
        keywords["scale"] = 1.0
        for take_sum in (False, True):
            options = dict(keywords, momentum=0.0, take_sum=take_sum, dtype=torch.float32)
            outs = torch.ops.tde.logits(x, w, scale, None, None, None, None, None, **options)
            assert len({id(out) for out in outs}) == len(outs)
            used = [out.data_ptr() for out in (*outs, x, w) if out.numel()]
            assert len(set(used)) == len(used)


def test_every_op_is_tested_here() -> None:
    """A new op has to come with its opcheck."""
    assert set(backends.OPS) == {
        "logits",
        "cross_entropy",
        "update_ema_",
        "feature_sum",
        "fold_ema_",
        "head_direction",
        "background_exempt",
        "alpha_sweep",
        "alpha_segments",
        "topk",
    }


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("background", [None, 1])
@pytest.mark.parametrize("normalizer", ["deconfound", "lws"])
def test_compiled_head(normalizer: str, background: int | None, fused: Fused, fresh_compiler: None) -> None:
    """fullgraph: logits, loss, gradients and EMA of three steps of changing batch size, then evaluation."""
    backend, device = fused
    options = {"normalizer": normalizer, "background_index": background, "backend": backend}
    eager = FusedTDEHead(12, 9, num_heads=3, device=device, **options)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, dynamic=True)

    def step(module: Any, head: FusedTDEHead, x: Tensor, mask: Tensor, upstream: Tensor) -> list[Tensor]:
        head.zero_grad()
        x = x.clone().requires_grad_()
        out = module(x, mask=mask)
        out.backward(upstream)
        return [out.detach(), x.grad, *(p.grad for p in head.parameters())]

    for batch in (5, 8, 33):
        data = torch.randn(batch, 12, device=device), torch.rand(batch, device=device) > 0.5
        upstream = torch.randn(batch, 9, device=device)
        for got, want in zip(step(compiled, other, *data, upstream), step(eager, eager, *data, upstream), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other.ema, eager.ema, rtol=1e-6, atol=1e-6)
        assert torch.equal(other.num_updates, eager.num_updates)
    eager.eval(), other.eval()
    with torch.no_grad():
        for batch in (5, 8):
            x = torch.randn(batch, 12, device=device)
            torch.testing.assert_close(compiled(x), eager(x), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(compiled(x, alpha=0.5), eager(x, alpha=0.5), rtol=1e-5, atol=1e-5)


def test_export_with_any_batch() -> None:
    """Where the weights decide how logits are computed, a graph holds for every number of rows."""
    head = FusedTDEHead(2048, 1000).fit_direction(torch.randn(9, 2048)).eval()
    rows = torch.export.Dim("rows")
    graph = torch.export.export(head, (torch.randn(6, 2048),), dynamic_shapes={"x": {0: rows}}).module()
    x = torch.randn(1100, 2048)
    torch.testing.assert_close(graph(x), head(x))


def test_labels_that_are_no_class_in_a_graph(fresh_compiler: None) -> None:
    """Nobody looks at them there: not a number, and no memory is read for them."""
    x, y, weight = torch.randn(6, 8), torch.arange(6), torch.ones(5)
    head = FusedTDEHead(8, 5)
    loss = torch.compile(lambda x, y, weight: head.loss(x, y, class_weight=weight))
    assert loss(x, y, weight).isnan() and loss(x, y % 5, weight).isfinite()


def test_compiled_step_under_autocast_with_a_loss(fused: Fused, fresh_compiler: None) -> None:
    backend, device = fused
    eager = FusedTDEHead(12, 9, device=device, backend=backend)
    other = copy.deepcopy(eager)
    x, y = torch.randn(16, 12, device=device), torch.randint(9, (16,), device=device)

    def step(head: FusedTDEHead) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return head.loss(x, y, label_smoothing=0.1)

    got, want = torch.compile(step, fullgraph=True)(other), step(eager)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    got.backward()
    want.backward()
    torch.testing.assert_close(other.weight.grad, eager.weight.grad, rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(other.ema, eager.ema, rtol=1e-6, atol=1e-6)
