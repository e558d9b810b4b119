"""Sampled negatives: the loss of the classes drawn, drawn again by seed and step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from oracle import Problem
from torch import Tensor
from torch import distributed as dist

from class_parallel_checks.common import (
    ROWS,
    SOME,
    C,
    D,
    check,
    fused,
    heads,
    labels_of,
    mild,
    noted,
    options_of,
    own_classes,
    own_rows,
    rank,
    ranks,
    step,
)
from tde_kernels import ClassParallelTDEHead
from tde_kernels.class_parallel import head, sampling


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
