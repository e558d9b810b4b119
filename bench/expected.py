"""What is right, in float64 by the reference; of predictions, the logits that they win with."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bench.problem import ALPHA, ALPHAS, BACKGROUND, LARGEST, MOMENTUM, Problem, Results
from tde_kernels import reference
from tde_kernels.envelope import Envelope

CHECKED = 64  # rows of which predictions are looked at
_AT_ONCE = 2**26  # logits


def exact(p: Problem) -> Problem:
    """The operands in float64."""
    return replace(p, x=p.x.detach().double(), w=nn.Parameter(p.w.detach().double()), ema=p.ema.double())


def averaged(p: Problem) -> Tensor:
    """The moving average after one batch."""
    return MOMENTUM * p.ema.double() + p.x.detach().double().mean(0)


def trained(p: Problem) -> Results:
    return logits(p, 0.0), averaged(p)


@torch.no_grad()
def logits(p: Problem, alpha: float = ALPHA) -> Tensor:
    q = exact(p)
    return reference.tde_logits(q.x, q.w, q.direction(), alpha=alpha, **q.family)


def stepped(p: Problem) -> Results:
    q = exact(p)
    x = q.x.requires_grad_()
    z = reference.grouped_logits(x, q.w, **q.family)
    return z.detach(), *torch.autograd.grad(z, (x, q.w), p.grad.double()), averaged(p)


def loss(p: Problem) -> Results:
    """Some rows at a time: all logits in float64 may not fit."""
    q = exact(p)
    x, total = q.x.requires_grad_(), torch.zeros((), dtype=torch.float64, device=p.x.device)
    rows = max(1, _AT_ONCE // p.shape.classes)
    for x_rows, target in zip(x.split(rows), p.target.split(rows), strict=True):
        part = reference.grouped_cross_entropy(x_rows, q.w, target, reduction="sum", **q.family) / p.shape.batch
        part.backward()
        total += part.detach()
    assert x.grad is not None and q.w.grad is not None
    return total, x.grad, q.w.grad


@torch.no_grad()
def exempted(p: Problem) -> Results:
    q = exact(p)
    options: dict[str, Any] = {"alpha": ALPHA, "background_index": BACKGROUND}
    return (reference.background_exempt(q.x, q.w, q.direction(), **options, **q.family),)


@cache
def _lines(p: Problem) -> Tensor:
    """The logits ``[A, rows, C]`` of the first rows for each alpha, in which they are linear."""
    _lines.cache_clear()
    first = replace(p, x=p.x.detach()[:CHECKED])
    at_0, at_1 = logits(first, 0.0), logits(first, 1.0)
    return torch.stack([at_0 + alpha * (at_1 - at_0) for alpha in ALPHAS.tolist()])


def winning_values(p: Problem) -> Results:
    return (_lines(p).amax(-1),)


def scored_winners(p: Problem, found: Results) -> Results:
    """The logits of the predicted classes."""
    classes = torch.stack([found.at(a) for a in ALPHAS.tolist()]) if isinstance(found, Envelope) else found[0]
    return (_lines(p).gather(-1, classes[:, :CHECKED, None])[..., 0],)


def top_values(p: Problem) -> Results:
    return (_lines(p)[-1].topk(LARGEST).values,)


def scored_topk(p: Problem, found: Results) -> Results:
    return (_lines(p)[-1].gather(-1, found[0][:CHECKED]),)
