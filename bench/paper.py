"""Operation by operation, as the paper's published code does: what its users run today."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf

from bench.problem import ALPHA, ALPHAS, BACKGROUND, GAMMA, LARGEST, MOMENTUM, TAU, Problem, Run


def _groups(a: Tensor, heads: int) -> tuple[Tensor, ...]:
    return torch.split(a, a.shape[1] // heads, dim=1)


def operands(x: Tensor, w: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Features and weights, normalised."""
    x_hat = [group / torch.norm(group, 2, 1, keepdim=True) for group in _groups(x, heads)]
    w_hat = [group / (torch.norm(group, 2, 1, keepdim=True) + GAMMA) for group in _groups(w, heads)]
    return torch.cat(x_hat, dim=1), torch.cat(w_hat, dim=1)


def logits(x: Tensor, w: Tensor, heads: int) -> Tensor:
    """Eq. 7."""
    x_hat, w_hat = operands(x, w, heads)
    return torch.mm(x_hat * TAU / heads, w_hat.t())


def tde_logits(x: Tensor, w: Tensor, ema: Tensor, heads: int, alpha: float = ALPHA) -> Tensor:
    """Eq. 8."""
    x_hat, w_hat = operands(x, w, heads)
    z = torch.mm(x_hat * TAU / heads, w_hat.t())
    for x_k, w_k, ema_k in zip(*(_groups(a, heads) for a in (x_hat, w_hat, ema.to(x.dtype)[None])), strict=True):
        direction = ema_k / torch.norm(ema_k, 2)
        cosine = torch.mm(x_k, direction.t())
        z = z - alpha * torch.mm(cosine * direction * TAU / heads, w_k.t())
    return z


def exempted(x: Tensor, w: Tensor, ema: Tensor, heads: int) -> Tensor:
    """Eq. 9, from the softmax of Eq. 7 and that of Eq. 8."""
    p, q = (torch.softmax(z, dim=1) for z in (logits(x, w, heads), tde_logits(x, w, ema, heads)))
    p_0, q_0 = p[:, BACKGROUND, None], q[:, BACKGROUND, None]
    result = q / (1 - q_0) * (1 - p_0)
    result[:, BACKGROUND] = p[:, BACKGROUND]
    return result


def exempted_by_class(x: Tensor, w: Tensor, ema: Tensor, heads: int) -> Tensor:
    """Eq. 9 likewise, a class at a time."""
    p, q = (torch.softmax(z, dim=1) for z in (logits(x, w, heads), tde_logits(x, w, ema, heads)))
    foreground = (1 - p[:, BACKGROUND]) / (1 - q[:, BACKGROUND])
    result = torch.empty_like(p)
    for c in range(p.shape[1]):
        result[:, c] = p[:, c] if c == BACKGROUND else q[:, c] * foreground
    return result


def _host_average(p: Problem) -> Callable[[], Tensor]:
    """The average, kept as an array on the host: a copy, and a synchronisation, each step."""
    ema = p.ema.cpu().numpy().copy()

    def update() -> Tensor:
        nonlocal ema
        ema = MOMENTUM * ema + np.asarray(p.x.detach().mean(0).float().cpu())
        return torch.from_numpy(ema)

    return update


def train(p: Problem) -> Callable[[], tuple[Tensor, Tensor]]:
    update = _host_average(p)

    def run() -> tuple[Tensor, Tensor]:
        ema = update()
        return logits(p.x, p.w, p.shape.heads), ema

    return run


def loss(p: Problem) -> Callable[[], Tensor]:
    update = _host_average(p)

    def run() -> Tensor:
        update()
        return nnf.cross_entropy(logits(p.x, p.w, p.shape.heads), p.target)

    return run


def average(p: Problem) -> Run:
    update = _host_average(p)
    return lambda: (update(),)


def plain(p: Problem) -> Callable[[], Tensor]:
    return lambda: logits(p.x, p.w, p.shape.heads)


def tde(p: Problem) -> Callable[[], Tensor]:
    ema = p.ema.cpu()  # comes from the host each time
    return lambda: tde_logits(p.x, p.w, ema.to(p.x.device), p.shape.heads)


def exempt(p: Problem) -> Callable[[], Tensor]:
    ema = p.ema.cpu()
    return lambda: exempted(p.x, p.w, ema.to(p.x.device), p.shape.heads)


def exempt_by_class(p: Problem) -> Callable[[], Tensor]:
    ema = p.ema.cpu()
    return lambda: exempted_by_class(p.x, p.w, ema.to(p.x.device), p.shape.heads)


def winners(p: Problem) -> Callable[[], Tensor]:
    """Predictions for many alphas, one alpha at a time."""
    return lambda: torch.stack(
        [tde_logits(p.x, p.w, p.ema, p.shape.heads, alpha).argmax(1) for alpha in ALPHAS.tolist()]
    )


def largest(p: Problem) -> Callable[[], Tensor]:
    """The classes of the largest logits."""
    return lambda: tde_logits(p.x, p.w, p.ema, p.shape.heads).topk(LARGEST, dim=1).indices
