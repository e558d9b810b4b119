"""``torch.compile`` of the paper's operations, and of this package's reference; the average stays on the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from bench import paper
from bench.problem import ALPHA, GAMMA, MOMENTUM, TAU, Problem, Results, Run
from tde_kernels import reference

Logits = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # of x, w, the average and the number of heads


@cache
def compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """Compiled once for all works that share it."""
    return torch.compile(function, mode=mode, dynamic=False)


def _average_(ema: Tensor, x: Tensor) -> Tensor:
    return ema.mul_(MOMENTUM).add_(x.detach().float().mean(0))


def paper_train(x: Tensor, w: Tensor, ema: Tensor, heads: int) -> Tensor:
    _average_(ema, x)
    return paper.logits(x, w, heads)


def paper_plain(x: Tensor, w: Tensor, _: Tensor, heads: int) -> Tensor:
    return paper.logits(x, w, heads)


def paper_loss(x: Tensor, w: Tensor, ema: Tensor, heads: int, target: Tensor) -> Tensor:
    return nnf.cross_entropy(paper_train(x, w, ema, heads), target)


def reference_train(x: Tensor, w: Tensor, ema: Tensor, heads: int) -> Tensor:
    reference.update_head_ema_(ema, x, momentum=MOMENTUM)
    return reference_plain(x, w, ema, heads)


def reference_plain(x: Tensor, w: Tensor, _: Tensor, heads: int) -> Tensor:
    return reference.grouped_logits(x, w, num_heads=heads, tau=TAU, gamma=GAMMA)


def reference_tde(x: Tensor, w: Tensor, ema: Tensor, heads: int) -> Tensor:
    direction = reference.head_direction(ema, num_heads=heads)
    return reference.tde_logits(x, w, direction, alpha=ALPHA, num_heads=heads, tau=TAU, gamma=GAMMA)


def train(function: Logits, mode: str = "default") -> Callable[[Problem], Callable[[], tuple[Tensor, Tensor]]]:
    """A rival that trains."""

    def make(p: Problem) -> Callable[[], tuple[Tensor, Tensor]]:
        ema, run = p.ema.clone(), compiled(function, mode)
        return lambda: (run(p.x, p.w, ema, p.shape.heads), ema)

    return make


def infer(function: Logits, mode: str = "default") -> Callable[[Problem], Callable[[], Tensor]]:
    """A rival that infers."""

    def make(p: Problem) -> Callable[[], Tensor]:
        run = compiled(function, mode)
        return lambda: run(p.x, p.w, p.ema, p.shape.heads)

    return make


def loss(mode: str = "default") -> Callable[[Problem], Callable[[], Tensor]]:
    """The loss over the paper's operations."""

    def make(p: Problem) -> Callable[[], Tensor]:
        ema, run = p.ema.clone(), compiled(paper_loss, mode)
        return lambda: run(p.x, p.w, ema, p.shape.heads, p.target)

    return make


def average(p: Problem) -> Run:
    """The moving average alone."""
    ema, run = p.ema.clone(), compiled(_average_, "default")

    def update() -> Results:
        with torch.no_grad():
            return (run(ema, p.x),)

    return update
