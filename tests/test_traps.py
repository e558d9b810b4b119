"""The traps that published code and other kernel packages fell into: a test for each, here or where its subject is.

Of the published code of the paper:

- NaN for a zero feature group or a zero average: :func:`test_a_zero_group_and_a_zero_average_are_nothing`
- an all-background batch that turns the average into NaN: :func:`test_a_batch_of_background_alone_leaves_the_average`
- ``label > 0`` as foreground where background is last: :func:`test_the_background_is_where_it_was_said_to_be`
- probabilities for a caller who applies softmax again: :func:`test_a_callers_softmax_changes_nothing`
- an average of each rank's own under data parallelism: :func:`test_ranks_hold_one_average`
- best weights saved with the last average: :func:`test_weights_and_average_are_of_one_moment`
- best epoch or alpha chosen on the test set, an unseeded long-tailed subset: ``ELSEWHERE``

Of users of kernel packages:

- Triton launching on the current device: :func:`test_triton_launches_on_the_device_of_the_tensor`
- ``.item()`` in a forward: :func:`test_nothing_is_read_back`
- int32 offsets: :func:`test_offsets_past_32_bits`
- an empty grid, whose error sticks: :func:`test_nothing_is_launched_for_nothing`
- 10 us of ``custom_op`` a call: :func:`test_a_plain_call_goes_past_the_dispatcher`
- a logit rounded to bfloat16 before a subtraction: :func:`test_nothing_is_rounded_before_the_subtraction`
- writes that autograd cannot see, nvcc and torch mismatched at build time: ``ELSEWHERE``

Those marked ``gpu`` there have a form here, or elsewhere, that needs none.
"""

from __future__ import annotations

import ast
import importlib.util
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FUSED
from oracle import error, naive_logits, problem, reference_logits
from test_logits import run_on
from torch import Tensor

from tde_kernels import FusedTDEHead, distributed, reference
from tde_kernels import functional as F

Fused = tuple[str, str]
TESTS = Path(__file__).parent
# Trap: the tests that show it elsewhere
ELSEWHERE = {
    "label > 0 as foreground": ["trainer/test_box_predictor.py::test_the_background_may_be_first_or_last"],
    "an all-background batch": ["trainer/test_box_predictor.py::test_a_batch_without_foreground_changes_nothing"],
    "an average of each rank's own": ["test_distributed.py::test_two_processes"],
    "best epoch or alpha on the test set": [
        "trainer/test_accuracy.py::test_alpha_does_not_depend_on_the_test_data",
        "trainer/test_posthoc.py::test_alpha_is_the_best_on_validation_data_and_sees_no_test_data",
    ],
    "an unseeded long-tailed subset": [
        "trainer/test_longtail_data.py::test_the_subset_seed_chooses_the_images_and_the_seed_chooses_nothing",
        "trainer/test_longtail_data.py::test_the_first_shuffle_of_seed_0_is_the_one_that_numpy_always_made",
    ],
    "the current device": ["test_gpu.py::test_the_device_of_the_tensor_not_the_current_one"],
    "writes that autograd cannot see": ["test_ema.py::test_autograd_sees_the_write"],
    ".item() in a forward": [
        "test_gpu.py::test_autograd_sees_the_write_and_nothing_synchronises",
        "test_gpu_loss.py::test_nothing_synchronises",
    ],
    "an empty grid": ["test_gpu.py::test_strided_and_empty", "test_logits.py::test_leading_shapes"],
    "nvcc and torch mismatched": [
        "test_package.py::test_the_core_knows_neither_torch_nor_python",
        "test_package.py::test_core_needs_no_torch_at_run_time",
    ],
}


@pytest.mark.parametrize("trap", sorted(ELSEWHERE))
def test_what_is_shown_elsewhere_is_there(trap: str) -> None:
    for place in ELSEWHERE[trap]:
        file, name = place.split("::")
        tree = ast.parse((TESTS / file).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, place


def test_a_zero_group_and_a_zero_average_are_nothing() -> None:
    head, x = FusedTDEHead(12, 7, num_heads=3), torch.randn(5, 12)
    x[1], x[2, 4:8] = 0, 0
    x.requires_grad_()
    out = head.eval()(x)  # no batch was seen yet: the direction is zero
    torch.testing.assert_close(out, reference.grouped_logits(x, head.weight, num_heads=3, tau=16.0, gamma=1 / 32))
    assert (out[1] == 0).all()
    for result in (out, head.train()(x), head.loss(x, torch.arange(5))):
        gradients = torch.autograd.grad(result.square().sum(), (x, head.weight))
        assert result.isfinite().all() and all(g.isfinite().all() for g in gradients)


def test_a_batch_of_background_alone_leaves_the_average() -> None:
    head, x = FusedTDEHead(12, 7, background_index=0), torch.randn(5, 12)
    target = torch.tensor([1, 0, 3, 0, 5])
    head.loss(x, target, mask=target != 0).backward()
    before = head.ema.clone()
    for _ in range(3):
        background = torch.zeros(5, dtype=torch.int64)
        head.loss(x * torch.nan, background, mask=background != 0)
        head(x, mask=background != 0)
    assert torch.equal(head.ema, before) and head.num_updates == 1 and before.isfinite().all()


@pytest.mark.parametrize("background", [0, 3, -1])
def test_the_background_is_where_it_was_said_to_be(background: int) -> None:
    """That class alone keeps its probability of Eq. 7; the others share the rest as Eq. 8 says."""
    head, x = FusedTDEHead(12, 7, background_index=background), torch.randn(5, 12)
    head.fit_direction(torch.randn(50, 12) + 1)
    probability = head.eval()(x).exp()
    family: dict[str, Any] = {"num_heads": 2, "tau": 16.0, "gamma": 1 / 32}
    total = reference.grouped_logits(x, head.weight, **family)
    direct = reference.tde_logits(x, head.weight, head.head_direction, alpha=3.0, **family)
    torch.testing.assert_close(probability[:, background], total.softmax(-1)[:, background])
    others = torch.arange(7) != background % 7
    share = probability[:, others] / probability[:, others].sum(-1, keepdim=True)
    torch.testing.assert_close(share, direct[:, others].softmax(-1), rtol=1e-4, atol=1e-6)


def test_a_callers_softmax_changes_nothing() -> None:
    head, x = FusedTDEHead(12, 7, background_index=0), torch.randn(5, 12)
    head.fit_direction(torch.randn(50, 12) + 1)
    arguments: dict[str, Any] = {"alpha": 3.0, "background_index": 0, "num_heads": 2, "tau": 16.0, "gamma": 1 / 32}
    want = reference.background_exempt(x, head.weight, head.head_direction, **arguments)
    torch.testing.assert_close(head.eval()(x).softmax(-1), want)


def test_ranks_hold_one_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sum and count are added over the ranks: the mean of means would weigh a rank of few rows as one of many."""
    here, there = torch.randn(3, 12), torch.randn(9, 12) + 1

    def reduced(total: Tensor, group: object = None) -> Tensor:
        return total + reference.feature_sum(there)

    monkeypatch.setattr(distributed, "active", lambda: True)
    monkeypatch.setattr(distributed, "reduce_sum", reduced)
    ema = F.update_head_ema_(torch.ones(12), here, momentum=0.5)
    torch.testing.assert_close(ema, 0.5 + torch.cat([here, there]).mean(0))


def test_weights_and_average_are_of_one_moment() -> None:
    head, x = FusedTDEHead(12, 7), torch.randn(5, 12)
    head.loss(x, torch.arange(5)).backward()
    best = {name: value.clone() for name, value in head.state_dict().items()}
    want = head.eval()(x)
    head.train().loss(x + 5, torch.arange(5)).backward()
    with torch.no_grad():
        head.weight.normal_()
    head.load_state_dict(best)
    assert {"weight", "ema", "num_updates", "tde_alpha"} <= set(best)
    assert torch.equal(head.eval()(x), want) and head.num_updates == 1


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_triton_launches_on_the_device_of_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    from tde_kernels.backends.triton import launch

    current = ["cuda:0"]

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        current.append(str(wanted))
        yield
        current.pop()

    monkeypatch.setattr(torch, "get_device_module", lambda _: type("cuda", (), {"device": staticmethod(device)}))
    launched = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda **_: launched.append((grid, current[-1]))

    launch.run(Kernel(), 3, torch.device("cuda:1"), {}, {})
    assert launched == [((3,), "cuda:1")] and current == ["cuda:0"]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
def test_nothing_is_launched_for_nothing() -> None:
    """A grid of no programs is an error on a device, which the next launch may be told of."""
    from tde_kernels.backends.triton import launch

    launch.run(None, 0, torch.device("cuda:0"), {}, {})
    launch.run_tuned(None, lambda _: 0, torch.device("cuda:0"), {}, {}, [])


def test_no_rows_are_no_launch(fused: Fused) -> None:
    """By the kernels' own source, where they are emulated."""
    backend, device = fused
    p = problem((2, 0), 12, 9, 2, tde=True).cast(torch.float32, device, grad=True)
    out = run_on(backend)(p)
    assert all((g == 0).all() for g in torch.autograd.grad(out, p.leaves(), torch.zeros_like(out)))
    F.update_head_ema_(torch.zeros(12, device=device), p.x.detach(), momentum=0.9, backend=backend)
    target = torch.zeros((2, 0), dtype=torch.int64, device=device)
    F.grouped_cross_entropy(p.x, p.w, target, reduction="sum", **p.family, backend=backend).backward()


def test_nothing_is_read_back() -> None:
    """Tensors on meta have no values to read: a training step and an evaluation need none."""
    head = FusedTDEHead(12, 7, device="meta")
    x, target = torch.empty(5, 12, device="meta", requires_grad=True), torch.empty(5, dtype=torch.int64, device="meta")
    head(x, mask=torch.empty(5, dtype=torch.bool, device="meta")).sum().backward()
    head.loss(x, target, label_smoothing=0.1).backward()
    assert x.grad is not None and x.grad.shape == (5, 12)
    head.eval()
    assert head(x, alpha=torch.empty((), device="meta")).shape == (5, 7)
    assert head.predict(x, topk=2)[1].shape == (5, 2) and head.alpha_sweep(x, [0.0, 1.0]).shape == (2, 5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the memory is reserved, not filled, which a GPU does not offer")
@pytest.mark.parametrize("backend", [name for name, device in FUSED if device == "cpu"])
def test_offsets_past_32_bits(backend: str) -> None:
    """Rows 2**29 elements apart: the fifth begins past what 32 bits count."""
    rows, apart = 5, 2**29
    memory = mmap.mmap(
        -1, ((rows - 1) * apart + 64) * 2, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    )  # no reserve
    wide = torch.frombuffer(memory, dtype=torch.bfloat16)
    x = wide.as_strided((rows, 16), (apart, 1))
    x.copy_(torch.randn(rows, 16))
    w = torch.randn(5, 16).bfloat16()
    family = {"num_heads": 2, "tau": 16.0}
    for a, b in ((x, w), (w, x)):
        got = F.grouped_logits(a, b, **family, backend=backend)
        assert torch.equal(got, F.grouped_logits(a.clone(), b.clone(), **family, backend=backend))
    assert torch.equal(F.feature_sum(x, backend=backend), F.feature_sum(x.clone(), backend=backend))


def test_a_plain_call_goes_past_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no op is a ``custom_op``, which costs microseconds more."""
    x, target = torch.randn(5, 12, requires_grad=True), torch.arange(5)
    head = FusedTDEHead(12, 7)

    class Refusing:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"tde::{name} was dispatched")

    monkeypatch.setattr(torch.ops, "tde", Refusing())
    head.loss(x, target).backward()
    head(x).sum().backward()
    with torch.no_grad():
        head.eval()(x), head.predict(x, topk=2), head.alpha_sweep(x, [0.0, 1.0])
    package = Path(reference.__file__).parent
    assert not [path for path in package.rglob("*.py") if "custom_op(" in path.read_text()]


def test_nothing_is_rounded_before_the_subtraction(fused: Fused) -> None:
    """Features that lie almost on the direction: logits and counterfactual are large, and their difference is not."""
    backend, device = fused
    p = problem(20, 64, 9, 2, tde=True, dtype=torch.bfloat16, alpha=1.0)
    assert p.direction is not None
    p.x.copy_(30 * p.direction + 0.3 * torch.randn(20, 64))
    exact = p.cast(torch.float64)
    want = reference_logits(exact)
    total = reference.grouped_logits(exact.x, exact.w, **exact.family)
    rounded = total.bfloat16() - (total - want).bfloat16()
    got = run_on(backend)(p.cast(torch.bfloat16, device))
    assert error(rounded, want) > 4 * error(got, want), "the features do not show the difference"
    assert error(got, want) <= 2 * error(naive_logits(p), want) + torch.finfo(torch.bfloat16).eps
