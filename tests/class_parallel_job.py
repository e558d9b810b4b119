"""What ``test_class_parallel.py`` starts on several ranks: every check of a head whose classes lie on them.

``python -m torch.distributed.run --nproc-per-node P tests/class_parallel_job.py results.json`` writes for each check
what went wrong, by rank. Checks compare with one process that holds all classes and features.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from oracle import NORMALIZERS, Problem, assert_within, error, naive_logits, problem, reference_logits
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tde_kernels import ClassParallelTDEHead, FusedTDEHead, backends, reference
from tde_kernels.backends import cpu
from tde_kernels.class_parallel import collectives, sampling
from tde_kernels.class_parallel.shards import Shards

C, D, K, ROWS = 37, 12, 3, 7  # ROWS: of a rank
CHECKS: dict[str, Callable[[], None]] = {}
NEEDS_FOUR = ("mesh",)
SOME = ("linear", "deconfound", "lws")


def check(run: Callable[[], None]) -> Callable[[], None]:
    """Joins the checks under the function's name."""
    CHECKS[run.__name__] = run
    return run


FAULTS: list[str] = []  # of the check that runs
DRAWS = torch.Generator()


@contextmanager
def noted(what: str) -> Iterator[None]:
    """A failure of this rank alone is reported in the end, so that ranks stay in step."""
    try:
        yield
    except AssertionError as fault:
        FAULTS.append(f"{what}: {fault}")


def rank() -> int:
    return dist.get_rank()


def ranks() -> int:
    return dist.get_world_size()


def own_rows(a: Tensor) -> Tensor:
    """This rank's rows of everybody's."""
    return a.unflatten(0, (ranks(), -1))[rank()]


def device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def fused() -> str:
    return "cuda" if device() == "cuda" else "cpu"


def heads(p: Problem, **options: Any) -> tuple[FusedTDEHead, ClassParallelTDEHead]:
    """One head with all classes and one with this rank's, on the same weights."""
    keywords = {name: getattr(p, name) for name in ("num_heads", "tau", "gamma", "normalizer", "exponent")}
    of_all = {name: value for name, value in options.items() if name not in ("sample_rate", "seed", "group")}
    whole = FusedTDEHead.from_weight(p.w.detach(), **keywords, **of_all)
    part = ClassParallelTDEHead.from_weight(p.w.detach(), **keywords, **options)
    if p.class_scale is not None:
        own = part.shards.of(part.ranks.rank)
        with torch.no_grad():
            whole.class_scale.copy_(p.class_scale)
            part.class_scale.copy_(p.class_scale[own.start : own.stop])
    return whole, part


def in_place(part: ClassParallelTDEHead, value: Tensor, all_classes: Tensor) -> Tensor:
    """``all_classes``, with this rank's replaced by ``value``."""
    own = part.shards.of(part.ranks.rank)
    found = all_classes.to(value.dtype).clone()
    found[own.start : own.stop] = value
    return found


def step(head: FusedTDEHead, x: Tensor, upstream: Tensor, *args: Any, **options: Any) -> list[Tensor]:
    """Loss, and gradients of features, weights and, where there is one, class scale, for an upstream gradient."""
    x = x.clone().requires_grad_()
    loss = head.loss(x, *args, **options)
    leaves = [x, *head.parameters()]
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss))]


def options_of(batch: int, generator: torch.Generator) -> dict[str, dict[str, Any]]:
    """Every option of the loss, and all of them."""
    weight, margin = torch.rand(C, generator=generator) + 0.5, torch.rand(C, generator=generator)
    bias, other = torch.randn(C, generator=generator), torch.randint(C, (batch,), generator=generator)
    single = {
        "plain": {},
        "class_weight": {"class_weight": weight},
        "logit_bias": {"logit_bias": bias},
        "margin": {"margin": margin},
        "label_smoothing": {"label_smoothing": 0.1},
        "ignored class": {"ignore_index": 3},
        "mixup": {"target_b": other, "lam": 0.3},
        "focal": {"focal_exponent": 1.5},
        "lam of a tensor": {"target_b": other, "lam": torch.tensor(0.6)},
    }
    everything = {name: value for options in single.values() for name, value in options.items()}
    everything |= {"ignore_index": -100}
    reductions = {f"all, {reduction}": {**everything, "reduction": reduction} for reduction in ("mean", "sum", "none")}
    return {**single, "sum": {"reduction": "sum"}, "none": {"reduction": "none"}, **reductions}


def labels_of(batch: int, options: dict[str, Any], generator: torch.Generator) -> Tensor:
    target = torch.randint(C, (batch,), generator=generator)
    target[::5] = options.get("ignore_index", -100)
    return target


def mild(normalizer: str, dtype: torch.dtype) -> Problem:
    """A problem of all ranks' rows whose logits are some tens at most."""
    bounded = normalizer in ("cosine", "capsule", "deconfound")
    return problem(ranks() * ROWS, D, C, K, normalizer, tau=16.0 if bounded else 1.0, dtype=dtype)


def assert_equals_one_process(
    p: Problem, dtype: torch.dtype, target: Tensor, mask: Tensor | None, options: dict[str, Any], what: str
) -> None:
    """Everything that a training step gives: twice the error of one process and of naive torch, in that dtype."""
    none = options.get("reduction") == "none"
    upstream = torch.linspace(0.1, 1.0, len(target)) if none else torch.tensor(1.7)

    def composed(q: Problem, logits: Callable[[Problem], Tensor]) -> list[Tensor]:
        loss = reference.cross_entropy(logits(q), target, **options)
        return [loss.detach(), *torch.autograd.grad(loss, q.leaves(), upstream.to(loss))]

    measured = torch.zeros(len(p.leaves()) + 1)
    for _ in range(-(-10 // ranks())):  # one number, or few that cancel: the worst of some scales, each rank's own
        scales = 1 + torch.rand(2, generator=DRAWS)
        drawn = replace(p, x=p.x * scales[0], w=p.w * scales[1]).cast(dtype)
        right = composed(drawn.cast(torch.float64, grad=True), reference_logits)
        naive = composed(drawn.cast(dtype, grad=True), naive_logits)
        errors = torch.tensor([error(a, b) for a, b in zip(naive, right, strict=True)])
        measured = torch.maximum(measured, errors)
    measured = measured.to(device())
    dist.all_reduce(measured, dist.ReduceOp.MAX)
    want = composed(p.cast(torch.float64, grad=True), reference_logits)
    for backend in (fused(), "reference"):
        compare_with_one_process(p, dtype, target, mask, options, what, upstream, want, measured.tolist(), backend)


def compare_with_one_process(
    p: Problem,
    dtype: torch.dtype,
    target: Tensor,
    mask: Tensor | None,
    options: dict[str, Any],
    what: str,
    upstream: Tensor,
    want: list[Tensor],
    measured: list[float],
    backend: str,
) -> None:
    """On one backend, where naive torch has errors ``measured``."""
    none = options.get("reduction") == "none"
    q = p.cast(dtype, device())
    there = {name: value.to(q.x.device) if isinstance(value, Tensor) else value for name, value in options.items()}
    target, mask, upstream = (None if a is None else a.to(q.x.device) for a in (target, mask, upstream))
    whole, part = heads(q, backend=backend)
    alone = step(whole, q.x, upstream, target, mask=mask, **there)
    mine = {name: own_rows(value) if name == "target_b" else value for name, value in there.items()}
    loss, dx, *dw = step(
        part,
        own_rows(q.x),
        ranks() * own_rows(upstream) if none else upstream,  # the mean over ranks of their sums
        own_rows(target),
        mask=None if mask is None else own_rows(mask),
        **mine,
    )
    parts = [own_rows(want[0]) if none else want[0], own_rows(want[1]), *want[2:]]
    theirs = [error(a, b) for a, b in zip(alone, want, strict=True)]
    found = [loss, dx / ranks(), *(in_place(part, g, w) for g, w in zip(dw, want[2:], strict=True))]
    theirs = [max(pair) for pair in zip(theirs, measured, strict=True)]
    with noted(f"{what}, {p.normalizer}, {dtype}, {backend}"):
        for name, got, measure, right in zip(("loss", "dx", "dw", "dscale"), found, theirs, parts, strict=False):
            assert_within(got, measure, right, name)
        torch.testing.assert_close(part.ema, whole.ema, rtol=1e-5, atol=1e-5)
        assert torch.equal(part.num_updates, whole.num_updates)


@check
def every_option() -> None:
    generator = torch.Generator().manual_seed(7)
    mask = torch.rand(ranks() * ROWS, generator=generator) > 0.4
    for normalizer in NORMALIZERS:
        for what, options in options_of(ranks() * ROWS, generator).items():
            target = labels_of(ranks() * ROWS, options, generator)
            for dtype in (torch.float32, torch.bfloat16):
                assert_equals_one_process(mild(normalizer, dtype), dtype, target, mask, options, what)


@contextmanager
def little_workspace() -> Iterator[None]:
    """The loss takes some classes at a time."""
    passes = type(backends.implementation(fused()).PASSES)
    before, passes.workspace, passes.fewest_rows = (passes.workspace, passes.fewest_rows), ROWS * 10 * 4, 1000
    try:
        yield
    finally:
        passes.workspace, passes.fewest_rows = before


@check
def some_classes_at_a_time() -> None:
    generator = torch.Generator().manual_seed(8)
    with little_workspace():
        for normalizer in SOME:
            offered = options_of(ranks() * ROWS, generator)
            for what in ("plain", "ignored class", *(name for name in offered if name.startswith("all"))):
                options = offered[what]
                target = labels_of(ranks() * ROWS, options, generator)
                for dtype in (torch.float32, torch.bfloat16):
                    assert_equals_one_process(mild(normalizer, dtype), dtype, target, None, options, what)


@check
def float64_is_exact() -> None:
    generator = torch.Generator().manual_seed(9)
    for normalizer in NORMALIZERS if ranks() == 2 else SOME:
        p = mild(normalizer, torch.float64)
        for what, options in options_of(ranks() * ROWS, generator).items():
            target = labels_of(ranks() * ROWS, options, generator)
            whole, part = heads(p)
            none = options.get("reduction") == "none"
            upstream = torch.rand(len(target), generator=generator, dtype=torch.float64) if none else torch.tensor(1.3)
            want = step(whole, p.x, upstream, target, **options)
            mine = {name: own_rows(value) if name == "target_b" else value for name, value in options.items()}
            own_upstream = ranks() * own_rows(upstream) if none else upstream
            loss, dx, *dw = step(part, own_rows(p.x), own_upstream, own_rows(target), **mine)
            parts = [own_rows(want[0]) if none else want[0], own_rows(want[1]), *want[2:]]
            found = [loss, dx / ranks(), *(in_place(part, g, w) for g, w in zip(dw, want[2:], strict=True))]
            with noted(f"{what}, {normalizer}"):
                torch.testing.assert_close(found, parts, rtol=1e-12, atol=1e-12)


@check
def learnt_class_vectors() -> None:
    """Their gradient is for a data-parallel mean."""
    p, target = mild("deconfound", torch.float32), torch.arange(ranks() * ROWS) % C
    whole, part = heads(p)
    biases = [torch.zeros(C, requires_grad=True) for _ in range(2)]
    whole.loss(p.x, target, logit_bias=biases[0]).backward()
    part.loss(own_rows(p.x), own_rows(target), logit_bias=biases[1]).backward()
    dist.all_reduce(biases[1].grad)
    torch.testing.assert_close(biases[1].grad / ranks(), biases[0].grad)
    torch.testing.assert_close(part.weight.grad, in_place(part, part.weight.grad, whole.weight.grad)[own_classes(part)])


def own_classes(part: ClassParallelTDEHead) -> slice:
    own = part.shards.of(part.ranks.rank)
    return slice(own.start, own.stop)


@check
def uneven_batches_of_meaning() -> None:
    """A rank whose rows are all ignored, one that the mask leaves out, labels of one shard alone, no row at all."""
    p = mild("deconfound", torch.float32)
    target = torch.arange(ranks() * ROWS) % C
    last, first = slice(-ROWS, None), slice(ROWS)
    ignored, masked = target.clone(), torch.ones(len(target), dtype=torch.bool)
    ignored[last], masked[first] = -100, False
    assert_equals_one_process(p, torch.float32, ignored, masked, {}, "a rank ignored")
    for shard in range(ranks()):
        own = Shards(C, ranks()).of(shard)
        assert_equals_one_process(p, torch.float32, own.start + target % len(own), None, {}, "labels of one shard")
    for backend in (fused(), "reference"):
        _, part = heads(p, backend=backend)
        loss = part.loss(p.x[:0], target[:0], reduction="sum")
        loss.backward()
        assert loss == 0 and part.num_updates == 0 and not part.ema.any() and not part.weight.grad.any()
        nothing = torch.zeros(ROWS, dtype=torch.bool)
        part.loss(own_rows(p.x), own_rows(target), mask=nothing)
        assert part.num_updates == 0 and not part.ema.any()
        assert part.loss(own_rows(p.x), torch.full((ROWS,), -100)).isnan()


@check
def shapes_autocast_and_recomputation() -> None:
    p, target = mild("deconfound", torch.float32), torch.arange(ranks() * ROWS) % C
    whole, part = heads(p)
    x, y = own_rows(p.x), own_rows(target)
    flat = part.loss(x, y, reduction="none")
    assert torch.equal(part.loss(x[:, None], y[:, None], reduction="none"), flat[:, None])
    assert part(x[:, None]).shape == (ROWS, 1, C)
    with torch.autocast(device(), torch.bfloat16):
        mixed, alone = part.loss(x, y), whole.loss(p.x, target)
        assert part(x).dtype == torch.bfloat16 and mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, alone, rtol=2e-2, atol=2e-2)
    for rate in (1.0, 0.3):
        _, part = heads(p, sample_rate=rate)
        results = []
        for again in (False, True):
            part.zero_grad()
            part.num_updates.zero_()
            z = x.clone().requires_grad_()
            loss = torch.utils.checkpoint.checkpoint(part.loss, z, y, use_reentrant=False) if again else part.loss(z, y)
            loss.backward()
            results.append([loss.detach(), z.grad, part.weight.grad.clone()])
        torch.testing.assert_close(*results)
        assert part.num_updates == 1


@check
def beside_a_compiled_network() -> None:
    p, y = mild("deconfound", torch.float32), torch.arange(ranks() * ROWS) % C
    results = []
    for compiles in (False, True):
        model = Model(network(), heads(p)[1])
        run = torch.compile(model, backend="aot_eager") if compiles else model
        loss = run(own_rows(p.x), own_rows(y))
        loss.backward()
        results.append([loss.detach(), *(a.grad for a in model.parameters())])
        assert model.head.num_updates == 1
    torch.testing.assert_close(*results)


class Model(nn.Module):
    """A network and its head, which is no part of what is data parallel."""

    def __init__(self, network: nn.Module, head: FusedTDEHead) -> None:
        super().__init__()
        self.network, self.head = network, head

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head.loss(self.network(x), y)


def trained(network: nn.Module, head: FusedTDEHead, x: Tensor, y: Tensor, run: nn.Module | None = None) -> None:
    model = Model(network, head) if run is None else run
    optimizer = torch.optim.SGD([*network.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        model(x, y).backward()
        optimizer.step()


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(D, 16), nn.Tanh(), nn.Linear(16, D))


def assert_trained_alike(part: ClassParallelTDEHead, whole: FusedTDEHead, got: nn.Module, want: nn.Module) -> None:
    for mine, one in zip(got.parameters(), want.parameters(), strict=True):
        full = mine.full_tensor() if isinstance(mine, DTensor) else mine
        torch.testing.assert_close(full, one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part.weight, whole.weight[own_classes(part)], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part.ema, whole.ema, rtol=1e-4, atol=1e-5)
    assert part.num_updates == whole.num_updates == 5


@check
def behind_a_data_parallel_network() -> None:
    p, y = mild("deconfound", torch.float32), torch.arange(ranks() * ROWS) % C
    y[::4] = -100
    for way in ("ddp", "ddp around all", "fsdp2"):
        (whole, part), want, got = heads(p), network(), network()
        trained(want, whole, p.x, y)
        if way == "ddp":
            trained(DistributedDataParallel(got), part, own_rows(p.x), own_rows(y))
        elif way == "fsdp2":
            fully_shard(got, mesh=init_device_mesh(device(), (ranks(),)))
            trained(got, part, own_rows(p.x), own_rows(y))
        else:
            model = Model(got, part)
            names = [f"head.{name}" for name in part.state_dict()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
            trained(got, part, own_rows(p.x), own_rows(y), DistributedDataParallel(model))
        assert_trained_alike(part, whole, got, want)


@check
def logits_and_predictions() -> None:
    for normalizer in NORMALIZERS if ranks() == 2 else SOME:
        for background in (None, 0, -1) if normalizer in SOME else (None,):
            for backend in (fused(), "reference"):
                p = mild(normalizer, torch.float32)
                whole, part = heads(p, background_index=background, backend=backend)
                mask = torch.arange(ranks() * ROWS) % 3 > 0
                upstream = torch.randn(ranks() * ROWS, C)
                x = p.x.clone().requires_grad_()
                mine = own_rows(p.x).clone().requires_grad_()
                want, got = whole(x, mask=mask), part(mine, mask=own_rows(mask))
                torch.testing.assert_close(got, own_rows(want), rtol=1e-5, atol=1e-5)
                want.backward(upstream)
                got.backward(ranks() * own_rows(upstream))
                torch.testing.assert_close(mine.grad / ranks(), own_rows(x.grad), rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(part.weight.grad, whole.weight.grad[own_classes(part)], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(part.ema, whole.ema, rtol=1e-5, atol=1e-6)
                whole.eval(), part.eval()
                x, mine = p.x, own_rows(p.x)
                with torch.no_grad():
                    for extra in ({}, {"alpha": 0.5}, {"alpha": torch.tensor(2.0)}):
                        torch.testing.assert_close(
                            part(mine, **extra), own_rows(whole(x, **extra)), rtol=1e-4, atol=1e-4
                        )
                        for topk in (1, 5, C):  # the last more than a shard holds
                            (values, classes), found = (
                                whole.predict(x, topk, **extra),
                                part.predict(mine, topk, **extra),
                            )
                            torch.testing.assert_close(found[0], own_rows(values), rtol=1e-4, atol=1e-4)
                            assert (found[1] == own_rows(classes)).float().mean() > 0.98
                    alphas = [0.0, 0.5, 1.0, 3.0]
                    found = part.alpha_sweep(mine, alphas)
                    assert (
                        found == whole.alpha_sweep(x, alphas).unflatten(1, (ranks(), -1))[:, rank()]
                    ).float().mean() > 0.95
                    part.train()
                    assert torch.equal(part.predict(mine)[1], part.eval().predict(mine)[1])
                    assert part.alpha_sweep(mine, []).shape == (0, ROWS)


@check
def ties_go_to_the_lowest_class() -> None:
    """Of logits that are integers, and so alike whatever the order of summation."""
    p = problem(ranks() * ROWS, D, C, K, "linear", tau=float(K))
    p = replace(p, x=p.x.round(), w=(8 * p.w[:1]).round().repeat(C, 1))
    for backend in (fused(), "reference"):
        part = heads(p, backend=backend)[1].eval()
        found = [part.predict(own_rows(p.x), topk)[1] for topk in (1, 5, C)]
        swept = part.alpha_sweep(own_rows(p.x), [0.0, 1.0])
        for classes in found:
            assert torch.equal(classes, torch.arange(classes.shape[1]).expand_as(classes)), classes
        assert not swept.any()


@check
def directions_and_alphas() -> None:
    """Of all ranks' features, alike on all."""
    p, y = mild("deconfound", torch.float32), torch.arange(ranks() * ROWS) % C
    whole, part = heads(p)
    whole.fit_direction(p.x)
    part.fit_direction(own_rows(p.x).split(3))
    torch.testing.assert_close(part.ema, whole.ema)
    alphas = [0.0, 0.5, 1.0, 2.0, 3.0, 5.0]
    for metric in ("accuracy", "mean_per_class"):
        assert part.choose_alpha(own_rows(p.x), own_rows(y), alphas, metric) == whole.choose_alpha(
            p.x, y, alphas, metric
        )
    refused(lambda: part.choose_alpha(own_rows(p.x), own_rows(y)), "no exact curve")


@check
def taken_over_weights() -> None:
    linear = nn.Linear(D, C, bias=False)
    dist.broadcast(linear.weight.data, 0)
    part = ClassParallelTDEHead.from_linear(linear)
    assert torch.equal(part.weight, linear.weight[own_classes(part)])
    published = {"fc.weight": linear.weight.detach(), "embed": torch.arange(D).float()}
    part = ClassParallelTDEHead.load_published(published)
    assert torch.equal(part.weight, linear.weight[own_classes(part)]) and part.ema[3] == 3 and part.num_updates == 1


@check
def random_weights_differ_between_shards() -> None:
    torch.manual_seed(11)
    part = ClassParallelTDEHead(D, C)
    found: list[Any] = [None] * ranks()
    dist.all_gather_object(found, (part.weight.detach(), torch.rand(())))
    rows = torch.cat([weight for weight, _ in found])
    assert len(rows) == C and len(rows.unique(dim=0)) == C
    assert len({float(drawn) for _, drawn in found}) == 1  # ranks stay in step


@check
def samples() -> None:
    generator = torch.Generator().manual_seed(13)
    rows = ranks() * ROWS
    for normalizer in SOME:
        for what, options in options_of(rows, generator).items():
            p, target = mild(normalizer, torch.float32), labels_of(rows, options, generator)
            mine = {name: own_rows(value) if name == "target_b" else value for name, value in options.items()}
            none = options.get("reduction") == "none"
            upstream = torch.linspace(0.1, 1.0, rows) if none else torch.tensor(1.7)
            own_upstream = ranks() * own_rows(upstream) if none else upstream
            for backend in (fused(), "reference"):
                _, part = heads(p, backend=backend, sample_rate=0.3, seed=5)
                seen: list[Tensor] = []
                with recorded_sample(seen):
                    loss, dx, *dw = step(part, own_rows(p.x), own_upstream, own_rows(target), **mine)
                everyone: list[Any] = [None] * ranks()
                dist.all_gather_object(everyone, seen[0] + part.shards.of(rank()).start)
                classes = torch.cat(everyone)
                labels = torch.cat([target, *([options["target_b"]] if "target_b" in options else [])])
                labels = labels[labels != options.get("ignore_index", -100)]
                assert len(classes.unique()) == len(classes) and torch.isin(labels, classes).all(), what
                want = of_classes(p, classes, target, options, upstream, backend)
                got = [loss, dx / ranks(), *dw]
                right = [own_rows(want[0]) if none else want[0], own_rows(want[1])]
                right += [value[own_classes(part)] for value in want[2:]]
                with noted(f"{what}, {normalizer}, {backend}"):
                    torch.testing.assert_close(got, right, rtol=2e-4, atol=1e-5)


@contextmanager
def recorded_sample(seen: list[Tensor]) -> Iterator[None]:
    from tde_kernels.class_parallel import head

    def noting(*args: Any) -> sampling.Sample:
        drawn = sampling.sample(*args)
        seen.append(drawn.own)
        return drawn

    before, head.sample = head.sample, noting
    try:
        yield
    finally:
        head.sample = before


def of_classes(
    p: Problem, classes: Tensor, target: Tensor, options: dict[str, Any], upstream: Tensor, backend: str
) -> list[Tensor]:
    """A step of one process that knows these classes alone; gradients of all classes, zero for others."""
    ignored = options.get("ignore_index", -100)
    place = torch.full((C,), -1)
    place[classes] = torch.arange(len(classes))

    def renamed(labels: Tensor) -> Tensor:
        return torch.where(labels == ignored, -100, place[labels.clamp_min(0)])

    changed = {**options, "ignore_index": -100}
    for name in ("class_weight", "logit_bias", "margin"):
        if name in options:
            changed[name] = options[name][classes]
    if "target_b" in options:
        changed["target_b"] = renamed(options["target_b"])
    q = replace(p, w=p.w[classes], class_scale=None if p.class_scale is None else p.class_scale[classes])
    whole, _ = heads(q, backend=backend)
    loss, dx, *dw = step(whole, p.x, upstream, renamed(target), **changed)
    return [loss, dx, *(torch.zeros(C, *g.shape[1:]).index_copy(0, classes, g) for g in dw)]


@check
def samples_by_seed_and_step() -> None:
    p, target = mild("deconfound", torch.float32), torch.zeros(ranks() * ROWS, dtype=torch.int64)
    wide = replace(p, w=torch.randn(400 * ranks(), D, generator=torch.Generator().manual_seed(1)))

    def drawn(head: ClassParallelTDEHead, steps: int) -> list[list[int]]:
        seen: list[Tensor] = []
        with recorded_sample(seen):
            for _ in range(steps):
                head.loss(own_rows(p.x), own_rows(target))
        return [own.sort().values.tolist() for own in seen]

    options = {"sample_rate": 0.25, "seed": 1}
    first = drawn(heads(wide, **options)[1], 4)
    assert all(len(own) == 100 for own in first) and first[0] != first[1]
    assert drawn(heads(wide, **options)[1], 4) == first
    assert drawn(heads(wide, sample_rate=0.25, seed=2)[1], 1)[0] != first[0]
    resumed = heads(wide, **options)[1]
    before = heads(wide, **options)[1]
    drawn(before, 2)
    resumed.load_state_dict(before.state_dict())
    assert drawn(resumed, 2) == first[2:]
    whole, part = heads(wide, sample_rate=1.0)
    torch.testing.assert_close(part.loss(own_rows(p.x), own_rows(target)), whole.loss(p.x, target))
    part = heads(wide, sample_rate=0.25)[1].eval()
    torch.testing.assert_close(part.loss(own_rows(p.x), own_rows(target)), whole.loss(p.x, target))


@check
def checkpoints() -> None:
    """Saved by two ranks, read by all, by one, and by a head that knows no ranks."""
    p = mild("lws", torch.float32)
    pair = dist.new_group([0, 1])
    alone = [dist.new_group([r]) for r in range(ranks())][rank()]
    with tempfile.TemporaryDirectory() as fresh:
        folder = [fresh]
        dist.broadcast_object_list(folder)
        if rank() < 2:
            _, part = heads(p, group=pair)
            part.ema.copy_(torch.arange(D))
            part.num_updates.fill_(4)
            checkpoint.save({"head": part.state_dict()}, checkpoint_id=folder[0], process_group=pair)
        dist.barrier()
        want = heads(p)[0]
        for group in (None, alone):
            part = ClassParallelTDEHead(D, C, normalizer="lws", num_heads=K, group=group)
            state = {"head": part.state_dict()}
            checkpoint.load(state, checkpoint_id=folder[0], process_group=group)
            part.load_state_dict(state["head"])
            own = part.shards.of(part.ranks.rank)
            assert torch.equal(part.weight, want.weight[own.start : own.stop])
            assert torch.equal(part.class_scale, want.class_scale[own.start : own.stop])
            assert torch.equal(part.ema, torch.arange(D).float()) and part.num_updates == 4
        whole = FusedTDEHead(D, C, normalizer="lws", num_heads=K)
        state = {"head": whole.state_dict()}
        checkpoint.load(state, checkpoint_id=folder[0], process_group=alone)
        whole.load_state_dict(state["head"])
        assert torch.equal(whole.weight, want.weight) and torch.equal(whole.ema, torch.arange(D).float())
        dist.barrier()


@check
def states() -> None:
    p = mild("lws", torch.float32)
    whole, part = heads(p)
    state = part.state_dict()
    assert state.keys() == whole.state_dict().keys()
    assert isinstance(state["weight"], DTensor) and state["weight"].shape == (C, D)
    assert torch.equal(state["weight"].full_tensor(), p.w) and torch.equal(
        state["class_scale"].full_tensor(), p.class_scale
    )
    for given in (state, whole.state_dict(), {name: a.double() for name, a in whole.state_dict().items()}):
        other = ClassParallelTDEHead(D, C, normalizer="lws")
        other.load_state_dict(given)
        assert torch.equal(other.weight, part.weight) and torch.equal(other.class_scale, part.class_scale)
        assert other.weight.dtype == torch.float32
    of_more = ClassParallelTDEHead(D, C + 1, normalizer="lws").state_dict()  # the same shards, but for the last
    wrong = {
        "must hold all 37 classes": {**state, "weight": part.weight.detach()},
        "got (37, 24)": {**whole.state_dict(), "weight": torch.zeros(C, 2 * D)},
        "got (38, 12)": {**of_more},
        "Missing key": {name: value for name, value in state.items() if name != "class_scale"},
    }
    before = part.weight.detach().clone()
    for message, given in wrong.items():
        refused(lambda given=given: part.load_state_dict(given), message, RuntimeError)
        assert torch.equal(part.weight, before)
    import copy

    twin = copy.deepcopy(part)
    x, y = own_rows(p.x), own_rows(torch.arange(ranks() * ROWS) % C)
    assert torch.equal(twin.loss(x, y), part.loss(x, y))


def refused(call: Callable[[], Any], message: str, kind: type[Exception] = ValueError) -> None:
    """On every rank, with that message."""
    try:
        call()
    except kind as found:
        assert message in str(found), str(found)
        return
    raise AssertionError(f"nothing was refused, wanted {message!r}")


@check
def refusals() -> None:
    r = rank()
    refused(lambda: ClassParallelTDEHead(D, ranks() + 1 if ranks() > 2 else 1), "every rank a class")
    refused(lambda: ClassParallelTDEHead(D + K * r, C, num_heads=K), "the same in_features")
    refused(lambda: ClassParallelTDEHead(D + r, C, num_heads=K), "the same in_features")  # and one that K divides not
    refused(lambda: ClassParallelTDEHead(D, C + r), "the same num_classes")
    dtype = torch.bfloat16 if r else torch.float32
    refused(lambda: ClassParallelTDEHead(D, C, dtype=dtype), "the same dtype")
    refused(lambda: ClassParallelTDEHead(D, C, normalizer="lws" if r else "linear"), "the same normalizer")
    refused(lambda: ClassParallelTDEHead(D, C, sample_rate=0.0), "sample_rate must be above 0")
    refused(lambda: ClassParallelTDEHead(D, C, group=init_device_mesh(device(), (1, 1, ranks()))), "got 3 dimensions")
    group = dist.new_group([0])
    if r:
        refused(lambda: ClassParallelTDEHead(D, C, group=group), "must hold this process")
    part = ClassParallelTDEHead(D, C)
    x, y = torch.randn(ROWS, D), torch.zeros(ROWS, dtype=torch.int64)
    short = slice(ROWS - (r == 1))  # on one rank alone
    here = torch.ones(ROWS, dtype=torch.bool) if r == 1 else None
    refused(lambda: part.loss(x[short], y[short]), "the same number of features, got 7, 6")
    refused(lambda: part(x[short]), "the same number of features")
    refused(lambda: part.predict(x[short]), "the same number of features")
    refused(lambda: part.alpha_sweep(x[short], [0.0]), "the same number of features")
    refused(lambda: part.loss(x, y, mask=here), "the same use of a mask")
    refused(lambda: part.loss(x, y, target_b=y if r == 1 else None), "target_b")
    refused(lambda: part.loss(x, y, label_smoothing=0.1 * r), "the same label_smoothing")
    refused(lambda: part.loss(x, torch.full_like(y, C) if r == 1 else y), "rank 1 of the group: target must be in")
    refused(lambda: part.loss(x.double() if r == 1 else x, y), "rank 1 of the group: w must have the dtype of x")
    refused(lambda: part.predict(x, C + 1), "topk must be at most")
    assert part.num_updates == 0
    part.loss(x, y)  # and the ranks are still in step


@contextmanager
def watched(seen: list[str]) -> Iterator[None]:
    """Messages and products, in their order, while the CPU's loss multiplies as for great sizes."""
    passes = type(backends.implementation(fused()).PASSES)

    def noting(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            seen.append(f"{name} {tuple(args[1].shape)}" if name != "product" else name)
            return run(*args, **kwargs)

        return noted

    patched = [(collectives, "_gather", "gather"), (collectives, "_scatter", "sum")]
    patched += [(passes, "product", "product"), (passes, "wide_product", "product")]
    before = [getattr(where, name) for where, name, _ in patched]
    plan, cpu.plan = cpu.plan, "product"
    for (where, name, short), run in zip(patched, before, strict=True):
        setattr(where, name, noting(short, run))
    try:
        yield
    finally:
        cpu.plan = plan
        for (where, name, _), run in zip(patched, before, strict=True):
            setattr(where, name, run)


@check
def messages() -> None:
    """Three gathers forward, and one sum backward that is on its way before the weights' gradient is complete."""
    p, y = mild("deconfound", torch.float32), torch.arange(ranks() * ROWS) % C
    _, part = heads(p, backend=fused())
    b, mask = ranks() * ROWS, torch.ones(ROWS, dtype=torch.bool)
    digest = ["gather (1,)"] if device() == "cpu" else []
    for chunked in (False, True):
        seen: list[str] = []
        with watched(seen), little_workspace() if chunked else nullcontext():
            loss = part.loss(own_rows(p.x).requires_grad_(), own_rows(y), mask=mask)
            sent = [what for what in seen if what != "product"]
            assert sent == [*digest, f"gather ({ROWS}, {D})", f"gather ({ROWS}, 2)", f"gather ({b}, 6)"], seen
            seen.clear()
            loss.backward()
            last = ["product", f"sum ({b}, {D})", "product"]  # dx, its sum, dw; of the last chunk where there are some
            assert seen[-3:] == last and seen.count(last[1]) == 1 and len(seen) == (4 if not chunked else len(seen)), (
                seen
            )


@check
def mesh() -> None:
    """Data along the first dimension, classes along the second."""
    grid = init_device_mesh(device(), (2, ranks() // 2), mesh_dim_names=("data", "class"))
    y = torch.arange(ranks() * ROWS) % C
    for normalizer in SOME:
        p, want, got = mild(normalizer, torch.float32), network(), network()
        whole, part = heads(p, group=grid)
        trained(want, whole, p.x, y)
        trained(DistributedDataParallel(got), part, own_rows(p.x), own_rows(y))
        assert_trained_alike(part, whole, got, want)
    assert part.ranks.size == 2 and part.data_ranks.size == ranks() // 2
    whole.fit_direction(p.x)
    part.fit_direction(own_rows(p.x))
    torch.testing.assert_close(part.ema, p.x.mean(0))
    alphas = [0.0, 0.5, 1.0, 2.0, 3.0, 5.0]
    assert part.choose_alpha(own_rows(p.x), own_rows(y), alphas) == whole.choose_alpha(p.x, y, alphas)
    refused(lambda: ClassParallelTDEHead(D, C + (rank() == 3), group=grid), "the same num_classes")
    refused(lambda: ClassParallelTDEHead(D, C, tau=1.0 + (rank() > 1), group=grid), "the same tau")
    fresh = ClassParallelTDEHead(D, C, group=grid)
    found: list[Any] = [None] * ranks()
    dist.all_gather_object(found, fresh.weight.detach())
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    assert not torch.equal(found[0][:5], found[1][:5])
    on_classes = ClassParallelTDEHead(D, C, group=grid["class"])
    assert on_classes.ranks.size == 2 and on_classes.data_ranks.size == 1


def killed() -> str:
    """One rank dies: the others hear of it within seconds, and do not wait for it."""
    p, y = mild("deconfound", torch.float32), torch.arange(ranks() * ROWS) % C
    _, part = heads(p)
    dist.barrier()
    if rank() == ranks() - 1:
        os._exit(0)
    began = time.monotonic()
    try:
        for _ in range(2):
            part.loss(own_rows(p.x), own_rows(y)).backward()
    except RuntimeError:
        took = time.monotonic() - began
        return "" if took < 15 else f"it took {took:.0f} s"
    return "nothing happened"


def main(results: Path, names: list[str]) -> None:
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=30))
    found: dict[str, dict[int, str]] = {}
    for name in names or checks_of(ranks()):
        told: list[Any] = [None] * ranks()
        began = time.monotonic()
        wrong = killed() if name == "killed" else faults_of(CHECKS[name])
        if name != "killed":  # there the group has lost a member
            dist.all_gather_object(told, wrong)
        found[name] = (
            {r: text for r, text in enumerate(told) if text} if name != "killed" else {0: wrong} if wrong else {}
        )
        if rank() == 0:
            print(f"{time.monotonic() - began:6.2f} s  {name}", flush=True)
            results.write_text(json.dumps(found))
    os._exit(0)  # nothing is to be ended in an orderly manner any more


def checks_of(size: int) -> list[str]:
    """The names of the checks that so many ranks can make; in the last one of them dies."""
    return [*(name for name in CHECKS if size >= 4 or name not in NEEDS_FOUR), "killed"]


def faults_of(run: Callable[[], None]) -> str:
    """What is wrong on this rank."""
    torch.manual_seed(0)
    DRAWS.manual_seed(rank())
    FAULTS.clear()
    try:
        run()
    except Exception:
        FAULTS.append(traceback.format_exc())
    return "\n".join(FAULTS[:5])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
