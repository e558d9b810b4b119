"""What ranks tell one another: how often, when they disagree, and when one of them dies."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from class_parallel_checks.common import (
    ROWS,
    C,
    D,
    K,
    check,
    device,
    fused,
    heads,
    little_workspace,
    mild,
    own_rows,
    rank,
    ranks,
    refused,
)
from tde_kernels import ClassParallelTDEHead, backends
from tde_kernels.backends import cpu
from tde_kernels.class_parallel import collectives


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
