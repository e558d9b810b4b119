"""The loss on a GPU: nothing synchronises, graphs, equal bits, labels out of range, many classes in little memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tde_kernels import FusedTDEHead, backends, checks, reference
from tde_kernels import functional as F

pytestmark = pytest.mark.gpu
BATCH, DIM, CLASSES = 64, 48, 301
OPTIONS = {"label_smoothing": 0.1, "focal_exponent": 1.5}


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = backends.refusal(name, "cross_entropy", "cuda", torch.float32)
    if reason is not None:
        pytest.skip(reason)
    return name


@pytest.fixture(params=["whole", "classes"])
def way(request: pytest.FixtureRequest, backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With all logits at once, or those of some classes."""
    if request.param == "classes":
        monkeypatch.setattr(type(backends.implementation(backend).PASSES), "workspace", BATCH * CLASSES)
    yield request.param


def problem(backend: str) -> tuple[FusedTDEHead, Tensor, Tensor]:
    head = FusedTDEHead(DIM, CLASSES, device="cuda", backend=backend)
    return head, torch.randn(BATCH, DIM, device="cuda", requires_grad=True), torch.arange(BATCH, device="cuda")


def step(head: FusedTDEHead, x: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    loss = head.loss(x, target, **OPTIONS)
    return loss, *torch.autograd.grad(loss, (x, head.weight))


def test_nothing_synchronises(way: str, backend: str) -> None:
    head, x, target = problem(backend)
    step(head, x, target)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(head, x, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_two_runs_give_the_same_bits(way: str, backend: str) -> None:
    head, x, target = problem(backend)
    assert all(map(torch.equal, step(head, x, target), step(head, x, target)))


def test_capture(way: str, backend: str) -> None:
    """A captured step, replayed on other features, is the step on those; the moving average takes each batch in."""
    head, x, target = problem(backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(head, x, target)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(head, x, target)
    with torch.no_grad():
        x.normal_()
    before = int(head.num_updates)
    graph.replay()
    assert int(head.num_updates) == before + 1
    assert all(map(torch.equal, captured, step(head, x, target)))


def test_a_label_out_of_range_is_not_a_number(way: str, backend: str) -> None:
    head, x, target = problem(backend)
    target[3], target[5] = CLASSES, -7
    losses = head.loss(x, target, reduction="none")
    losses.sum().backward()
    wrong = torch.zeros(BATCH, dtype=torch.bool, device="cuda")
    wrong[[3, 5]] = True
    assert torch.equal(losses.isnan(), wrong) and x.grad is not None and torch.equal(x.grad.isnan().any(1), wrong)


def test_a_label_out_of_range_is_an_error_when_debugging(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "debug", True)
    head, x, target = problem(backend)
    target[3] = CLASSES
    with pytest.raises(ValueError, match=f"target must be in .*got {CLASSES}"):
        head.loss(x, target)


def test_many_classes_in_little_memory(backend: str) -> None:
    """Beyond inputs and gradients less than a fifth of the logits."""
    batch, dim, classes = 4096, 128, 400_000
    x = torch.randn(batch, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    w = (torch.randn(classes, dim, device="cuda") / dim**0.5).bfloat16().requires_grad_()
    target = torch.randint(classes, (batch,), device="cuda")
    family = {"num_heads": 2, "tau": 16.0}
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    losses = F.grouped_cross_entropy(x, w, target, reduction="none", **family, backend=backend)
    losses.sum().backward()
    taken = torch.cuda.max_memory_allocated() - held - x.nbytes - w.nbytes
    assert taken < 2 * batch * classes / 5
    some = slice(0, 32)
    right = reference.grouped_cross_entropy(
        x.detach()[some].double(), w.detach().double(), target[some], reduction="none", **family
    )
    torch.testing.assert_close(losses[some].double(), right, rtol=2e-2, atol=2e-2)
