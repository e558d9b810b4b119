"""The loss of classes in shards, without processes: shards that are merged give what all classes give."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import NORMALIZERS, Problem, assert_within, error, naive_logits, reference_logits
from test_loss import BATCH, CLASSES, DTYPES, OPTIONS, labels, mild, some_options, way
from torch import Tensor

from tde_kernels import ClassParallelTDEHead, FusedTDEHead, backends, checks, ops, reference
from tde_kernels.backends.grouped import Grouped, Loss, Wants
from tde_kernels.class_parallel.loss import merged_sums
from tde_kernels.class_parallel.sampling import Draw, Sample, sample
from tde_kernels.class_parallel.shards import Shards
from tde_kernels.functional import LossOptions

Fused = tuple[str, str]
__all__ = ["way"]  # the fixture that holds the loss to each of its ways


def sharded(
    p: Problem, target: Tensor, upstream: Tensor, options: dict[str, Any], shards: int, backend: str, dtype: torch.dtype
) -> list[Tensor]:
    """Losses, and gradients of their sum as it is weighted, from each shard's part."""
    loss = LossOptions(**options).of(target)._replace(classes=len(p.w))
    parts, begins = [], []
    for held in map(Shards(len(p.w), shards).of, range(shards)):
        own = slice(held.start, held.stop)
        scale = None if p.class_scale is None else p.class_scale[own]
        family = {**p.family, "class_scale": scale}
        parts.append(Grouped.of(p.x.float(), p.w[own], checks.logits(p.x, p.w[own], **family)))
        begins.append(loss._replace(first=held.start))
    how: dict[str, Any] = {"dtype": dtype, "backend": backend}
    of_shards = zip(parts, begins, strict=True)
    sums = merged_sums(torch.stack([ops.cross_entropy_sums(q, of, **how) for q, of in of_shards]))
    losses = ops.cross_entropy_losses(sums, loss, backend=backend)
    dx: list[Tensor] = []
    wants = Wants(True, True, p.class_scale is not None)
    gradients = []
    for q, of in zip(parts, begins, strict=True):
        of = of._replace(share=of.share * upstream, share_b=None if of.share_b is None else of.share_b * upstream)
        gradients.append(ops.cross_entropy_gradients(q, of, sums, wants, ready=dx.append, **how))
    dw, dscale = (torch.cat(of_all) for of_all in zip(*gradients, strict=True))
    assert all(part.dtype == torch.float32 for part in dx)
    return [losses, torch.stack(dx).sum(0).to(p.x.dtype), dw, *([dscale] if p.class_scale is not None else [])]


def check(p: Problem, fused: Fused, dtype: torch.dtype, shards: int, options: dict[str, Any]) -> None:
    """Twice what naive torch loses in that dtype."""
    backend, device = fused
    if backends.refusal(backend, "cross_entropy", device, dtype) is not None:
        pytest.skip(f"{backend} does not serve {dtype}")
    target = labels(len(p.x), len(p.w))
    target[target == -100] = options.get("ignore_index", -100)
    upstream = torch.rand(len(target)) + 0.5

    def composed(q: Problem, logits: Any) -> list[Tensor]:
        losses = reference.cross_entropy(logits(q), target, reduction="none", **options)
        return [losses.detach(), *torch.autograd.grad(losses, q.leaves(), upstream.to(losses))]

    want = composed(p.cast(torch.float64, grad=True), reference_logits)
    there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    there["reduction"] = "none"
    got = sharded(p.cast(dtype, device), target.to(device), upstream.to(device), there, shards, backend, dtype)
    measure = [0.0] * len(want)
    for _ in range(10):
        drawn = replace(p, x=p.x * (1 + torch.rand(())), w=p.w * (1 + torch.rand(()))).cast(dtype)
        right = composed(drawn.cast(torch.float64, grad=True), reference_logits)
        naive = composed(drawn.cast(dtype, grad=True), naive_logits)
        measure = [max(m, error(a, b)) for m, a, b in zip(measure, naive, right, strict=True)]
    for name, ours, theirs, right in zip(("losses", "dx", "dw", "dscale"), got, measure, want, strict=False):
        assert_within(ours, theirs, right, name)


@DTYPES
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("options", [(), OPTIONS], ids=["plain", "every option"])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_oracle(normalizer: str, options: tuple[str, ...], shards: int, dtype: torch.dtype, fused: Fused) -> None:
    p = mild(normalizer, BATCH, 24, CLASSES, 3, dtype=dtype)
    check(p, fused, dtype, shards, some_options(set(options), BATCH, CLASSES))


@DTYPES
@pytest.mark.parametrize("normalizer", ["linear", "deconfound", "lws"])
def test_every_way(normalizer: str, dtype: torch.dtype, way: str, fused: Fused) -> None:
    p = mild(normalizer, BATCH, 24, CLASSES, 3, dtype=dtype)
    check(p, fused, dtype, 2, some_options(set(OPTIONS), BATCH, CLASSES))


@pytest.mark.parametrize("option", [*OPTIONS, "ignore_index"])
def test_every_option(option: str, fused: Fused) -> None:
    p = mild("deconfound", BATCH, 24, CLASSES, 3)
    options = {"ignore_index": 3} if option == "ignore_index" else some_options({option}, BATCH, CLASSES)
    check(p, fused, torch.float32, 3, options)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_certain_and_impossible_classes(shards: int, fused: Fused) -> None:
    """Logits of minus infinity and of great size, whole shards of them, merge without loss."""
    backend, device = fused
    p = mild("deconfound", 12, 24, 16, 3).cast(torch.float32, device, grad=True)
    bias = torch.zeros(16, device=device)
    bias[4:9], bias[13] = -torch.inf, 500.0
    target = torch.tensor([13, 1, 5, 14] * 3, device=device)
    for extra in ({}, {"margin": torch.full((16,), 200.0, device=device)}):
        options = {"logit_bias": bias, **extra, "reduction": "none"}
        losses = reference.grouped_cross_entropy(p.x, p.w, target, **p.family, **options)
        known = losses.isfinite()  # an impossible label has an infinite loss
        assert known.any() and not known.all()
        upstream = known.float()
        grads = torch.autograd.grad(torch.where(known, losses, 0).sum(), p.leaves())
        got = sharded(p.cast(torch.float32, device), target, upstream, options, shards, backend, torch.float32)
        torch.testing.assert_close(got[0], losses.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[1][known], grads[0][known], rtol=1e-4, atol=1e-5)


def test_a_label_that_is_no_class(fused: Fused) -> None:
    """Not a number, in that row alone; and it stays so in a sample of the classes."""
    backend, device = fused
    p = mild("linear", 4, 24, CLASSES, 3).cast(torch.float32, device)
    upstream = torch.ones(4, device=device)
    for label in (-1, CLASSES, 2**40):
        target = torch.tensor([2, label, 32, -100], device=device)
        losses, dx, *_ = sharded(p, target, upstream, {"reduction": "none"}, 2, backend, torch.float32)
        assert losses.isnan().tolist() == dx.isnan().any(1).tolist() == [False, True, False, False]
        drawn = sample_of(LossOptions(reduction="none").of(target), 2)[0].loss
        assert drawn.target[1] == -1 and drawn.target[3] == drawn.ignore_index != -1


def sample_of(loss: Loss, shards: int, rate: float = 0.4, step: int = 1, all_vectors: bool = False) -> list[Sample]:
    """Every rank's."""
    draw = Draw(rate, 5, torch.tensor(step, device=loss.target.device), all_vectors)
    return [sample(loss, Shards(CLASSES, shards), rank, draw) for rank in range(shards)]


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("ignored", [-100, 0, 32])
@pytest.mark.parametrize("all_vectors", [False, True])
def test_samples_name_their_classes(shards: int, ignored: int, all_vectors: bool) -> None:
    """Every rank calls the same class the same; labels are in, and vectors follow."""
    target, other = torch.randint(CLASSES, (2, 6))
    target[0] = other[1] = ignored
    vector = torch.arange(float(CLASSES))
    loss = LossOptions(vector, vector, vector, target_b=other, lam=0.3, ignore_index=ignored).of(target)
    drawn = sample_of(loss, shards, all_vectors=all_vectors)
    columns = torch.cat([d.own + Shards(CLASSES, shards).of(rank).start for rank, d in enumerate(drawn)])
    assert len(columns.unique()) == len(columns) == sum(drawn[0].sizes)
    for rank, d in enumerate(drawn):
        assert [len(e.own) for e in drawn] == d.sizes and d.loss.classes == len(columns)
        assert d.loss.first == sum(d.sizes[:rank])
        for before, after in ((target, d.loss.target), (other, d.loss.target_b)):
            kept = before != ignored
            assert torch.equal(columns[after[kept]], before[kept]) and (after[~kept] == d.loss.ignore_index).all()
            known = torch.cat([after[kept], d.loss.first + torch.arange(len(d.own))])
            if all_vectors:
                known = torch.arange(len(columns))
            for chosen in (d.loss.class_weight, d.loss.logit_bias, d.loss.margin):
                assert torch.equal(chosen[known], vector[columns[known]])


def test_negatives_are_drawn_evenly() -> None:
    """Each class as often as the rate says, whatever the shards; a class's fate does not depend on their number."""
    loss = LossOptions().of(torch.tensor([3]))
    counts, steps = torch.zeros(CLASSES), 2000
    for step in range(steps):
        (drawn,) = sample_of(loss, 1, step=step)
        counts[drawn.own] += 1
    counts[3] = counts[3] * 12 / 32  # the label, which is always in
    expected = torch.full((CLASSES,), steps * 12 / 32)
    deviation = (steps * 12 / 32 * 20 / 32) ** 0.5
    assert counts[3] == expected[3] and ((counts - expected).abs() < 4.5 * deviation).all()


def test_one_rank_is_a_head_of_its_own() -> None:
    """No process group: the same code, and the same numbers as the head that knows no ranks."""
    p, target = mild("deconfound", BATCH, 24, CLASSES, 3), labels(BATCH, CLASSES)
    whole = FusedTDEHead.from_weight(p.w, num_heads=3)
    part = ClassParallelTDEHead.from_weight(p.w, num_heads=3)
    for options in ({}, {"reduction": "none"}, {"label_smoothing": 0.1, "mask": target >= 0}):
        want, got = whole.loss(p.x, target, **options), part.loss(p.x, target, **options)
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(loss.sum(), head.weight) for loss, head in ((want, whole), (got, part))]
        torch.testing.assert_close(*grads)
    torch.testing.assert_close(part.ema, whole.ema)
    whole.eval(), part.eval()
    torch.testing.assert_close(part(p.x), whole(p.x))
    assert torch.equal(part.predict(p.x)[1], whole.predict(p.x)[1])
    part.load_state_dict(whole.state_dict())
    whole.load_state_dict(part.state_dict())
    copy.deepcopy(part)(p.x)
    with pytest.raises(RuntimeError, match="no second derivative"):
        loss = ClassParallelTDEHead.from_weight(p.w, num_heads=3, backend="cpu").loss(p.x.requires_grad_(), target)
        torch.autograd.grad(loss, p.x, create_graph=True)


def test_processes_that_were_launched_and_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="init_process_group"):
        ClassParallelTDEHead(24, CLASSES)


def test_the_sampled_loss_waits_for_nothing_on_meta() -> None:
    """Shapes follow from shapes alone, so that no device is waited for."""
    loss = LossOptions().of(torch.randint(CLASSES, (6,)))
    there = loss._replace(target=loss.target.to("meta"), share=loss.share.to("meta"))
    draw = Draw(0.4, 5, torch.tensor(1, device="meta"), all_vectors=False)
    drawn = sample(there, Shards(CLASSES, 2), 1, draw)
    assert drawn.own.shape == (6,) and drawn.loss.target.shape == (6,)
