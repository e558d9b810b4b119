"""This package, as its users call it, on the backend that the problem names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from bench.problem import ALPHA, ALPHAS, BACKGROUND, LARGEST, MOMENTUM, Problem, Results, Run
from tde_kernels import FusedTDEHead
from tde_kernels import functional as F
from tde_kernels.backends import crossovers


def head(p: Problem) -> FusedTDEHead:
    """A head over the problem's weight, with a copy of its average."""
    device = p.x.device
    made = FusedTDEHead(p.shape.dim, p.shape.classes, alpha=ALPHA, backend=p.backend, device=device, **p.family)
    made.weight = p.w
    made.ema.copy_(p.ema)
    return made


def train(p: Problem) -> Callable[[], tuple[Tensor, Tensor]]:
    """Eq. 7, and the moving average."""
    made = head(p)
    return lambda: (made(p.x), made.ema)


def loss(p: Problem) -> Callable[[], Tensor]:
    """Cross entropy, and the moving average."""
    made = head(p)
    return lambda: made.loss(p.x, p.target)


def logits_first(p: Problem) -> Callable[[], Tensor]:
    """The fused logits, and torch's loss over them."""
    made = head(p)
    return lambda: nnf.cross_entropy(made(p.x), p.target)


def plain(p: Problem) -> Callable[[], Tensor]:
    """Inference without a direction."""
    return lambda: F.grouped_logits(p.x, p.w, backend=p.backend, **p.family)


def tde(p: Problem) -> Callable[[], Tensor]:
    """Eq. 8."""
    made = head(p).eval()
    return lambda: made(p.x)


def exempt(p: Problem) -> Callable[[], Tensor]:
    """Eq. 9."""
    background: dict[str, Any] = {"alpha": ALPHA, "background_index": BACKGROUND, "backend": p.backend}
    return lambda: F.background_exempt(p.x, p.w, p.direction(), **background, **p.family)


def ema(p: Problem) -> Run:
    """The moving average alone."""
    average = p.ema.clone()
    return lambda: (F.update_head_ema_(average, p.x, momentum=MOMENTUM, backend=p.backend),)


def sweep(p: Problem) -> Callable[[], Tensor]:
    """The winners for many alphas."""
    alphas = ALPHAS.to(p.x.device)
    return lambda: F.alpha_sweep(p.x, p.w, p.direction(), alphas, backend=p.backend, **p.family)


def sweep_by_inference(p: Problem) -> Callable[[], Tensor]:
    """The same by as many inferences."""
    made = head(p).eval()
    return lambda: torch.stack([made(p.x, alpha=alpha).argmax(-1) for alpha in ALPHAS.tolist()])


def segments(p: Problem) -> Run:
    """The winner for every alpha."""
    return lambda: F.alpha_segments(p.x, p.w, p.direction(), backend=p.backend, **p.family)


def topk(p: Problem) -> Callable[[], Tensor]:
    """The classes of the largest logits."""
    made = head(p)
    return lambda: made.predict(p.x, LARGEST)[1]


def topk_by_inference(p: Problem) -> Callable[[], Tensor]:
    """The same by torch, of all logits."""
    made = head(p).eval()
    return lambda: made(p.x).topk(LARGEST).indices


def planned(run: Run, plan: str) -> Run:
    """``run`` with the CUDA backend held to one way of computing logits."""

    def held() -> Results:
        before, crossovers.plan = crossovers.plan, plan
        try:
            return run()
        finally:
            crossovers.plan = before

    return held
