"""The problems whose results are on record: operands of integer arithmetic, and what each backend makes of them.

Operands are multiples of 1/64 that every dtype holds exactly, so that one record is the measure of all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from oracle import NORMALIZERS, Problem, naive_exempt, naive_logits
from torch import Tensor

from tde_kernels import functional as F
from tde_kernels import reference

BATCH, DIM, CLASSES, HEADS = 9, 24, 11, 3
BACKGROUND, TOP, ALPHAS, MOMENTUM = 2, 3, (0.0, 0.75, 1.5, 3.0), 0.75
Results = dict[str, Tensor]


def whole(seed: int, *shape: int, least: int = -60, most: int = 60) -> Tensor:
    """Whole numbers from ``least`` to ``most``, int64: a hash of their places, which no release of torch changes."""
    place = torch.arange(torch.Size(shape).numel()) + 1009 * seed
    mixed = place * 1_103_515_245 % (1 << 31)
    mixed = (mixed ^ (mixed >> 15)) * 1_812_433_253 % (1 << 31)
    return (least + (mixed ^ (mixed >> 13)) % (most - least + 1)).reshape(shape)


def features(seed: int, rows: int = BATCH) -> Tensor:
    """``[rows, D]`` float64 with a common mean, as the features of a network have."""
    return (whole(seed, rows, DIM, least=-80, most=80) + whole(100, DIM, least=-40, most=40)).double() / 64


def problem(normalizer: str) -> Problem:
    """In float64."""
    direction = reference.head_direction(features(7, 1)[0], num_heads=HEADS).bfloat16().double()
    return Problem(
        features(1),
        whole(2, CLASSES, DIM).double() / 64,
        direction,
        whole(3, CLASSES, least=32, most=96).double() / 64 if normalizer == "lws" else None,
        HEADS,
        normalizer,
        tau=16.0 if normalizer in ("cosine", "capsule", "deconfound") else 1.0,
    )


def loss_options() -> dict[str, Any]:
    """Every option of the loss; labels of which two are ignored."""
    target = whole(4, BATCH, least=0, most=CLASSES - 1)
    target[3::4] = -100
    return {
        "target": target,
        "target_b": whole(5, BATCH, least=0, most=CLASSES - 1),
        "lam": 0.75,
        "class_weight": whole(6, CLASSES, least=32, most=96).float() / 64,
        "logit_bias": whole(8, CLASSES, least=-64, most=64).float() / 64,
        "margin": whole(9, CLASSES, least=0, most=64).float() / 64,
        "label_smoothing": 0.125,
        "focal_exponent": 1.5,
        "reduction": "none",
    }


def _with_gradients(name: str, p: Problem, run: Callable[[Problem], Tensor]) -> Results:
    """Under names with a dot the gradients for an upstream gradient of whole numbers."""
    p = p.cast(p.x.dtype, p.x.device.type, grad=True)
    out = run(p)
    upstream = (whole(10, *out.shape, least=-8, most=8).to(out) / 8).to(out.device)
    grads = torch.autograd.grad(out, p.leaves(), upstream)
    return {name: out.detach(), **{f"{name}.d{leaf}": g for leaf, g in zip(("x", "w", "scale"), grads, strict=False)}}


def _on(p: Problem, options: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(p.x.device) if isinstance(value, Tensor) else value for name, value in options.items()}


def results(p: Problem, backend: str) -> Results:
    """Of every op, in the dtype of ``p`` and on its device."""
    assert p.direction is not None
    served: dict[str, Any] = {"num_heads": HEADS, "backend": backend}
    there = _on(p, loss_options())
    family = {**p.family, "backend": backend}
    found = _with_gradients("logits", p, lambda q: F.grouped_logits(q.x, q.w, **{**q.family, "backend": backend}))
    found |= _with_gradients(
        "tde_logits",
        p,
        lambda q: F.tde_logits(q.x, q.w, p.direction, alpha=p.alpha, **{**q.family, "backend": backend}),
    )
    found |= _with_gradients(
        "loss", p, lambda q: F.grouped_cross_entropy(q.x, q.w, **there, **{**q.family, "backend": backend})
    )
    exempt = {"alpha": p.alpha, "background_index": BACKGROUND, **family}
    found["background_exempt"] = F.background_exempt(p.x, p.w, p.direction, **exempt)
    found["background_exempt.log"] = F.background_exempt(p.x, p.w, p.direction, log=True, **exempt)
    found["topk"], found["topk.classes"] = F.topk(p.x, p.w, TOP, direction=p.direction, alpha=p.alpha, **family)
    found["alpha_sweep.classes"] = F.alpha_sweep(p.x, p.w, p.direction, ALPHAS, **family)
    found["ema"] = features(7, 1)[0].to(p.x.device, torch.float32)
    mask = torch.arange(BATCH, device=p.x.device) % 3 != 1
    F.update_head_ema_(found["ema"], p.x, momentum=MOMENTUM, mask=mask, backend=backend)
    found["head_direction"] = F.head_direction(found["ema"], **served)
    return found


def naive(p: Problem) -> Results:
    """What plain torch makes of them in the dtype of ``p``, without the classes: its error is the measure of ours."""
    options = loss_options()
    total, direct = replace(p, direction=None), naive_logits(p)
    found = _with_gradients("logits", total, naive_logits) | _with_gradients("tde_logits", p, naive_logits)
    found |= _with_gradients("loss", total, lambda q: reference.cross_entropy(naive_logits(q), **options))
    found["background_exempt"] = naive_exempt(p, BACKGROUND)
    found["background_exempt.log"] = found["background_exempt"].log()
    found["topk"] = direct.sort(-1, descending=True).values[:, :TOP]
    rows = p.x[torch.arange(BATCH) % 3 != 1]
    found["ema"] = MOMENTUM * features(7, 1)[0].to(rows) + rows.mean(0)
    ema = found["ema"].view(HEADS, -1)
    found["head_direction"] = (ema / ema.norm(dim=-1, keepdim=True)).flatten()
    return found


def exact(p: Problem) -> Results:
    """The reference's results in float64, the average among them, which the package itself keeps in float32."""
    rows, found = p.x[torch.arange(BATCH) % 3 != 1], results(p, "reference")
    found["ema"] = MOMENTUM * features(7, 1)[0] + rows.mean(0)
    found["head_direction"] = reference.head_direction(found["ema"], num_heads=HEADS)
    return found


__all__ = ["NORMALIZERS", "Results", "exact", "features", "naive", "problem", "results", "whole"]
