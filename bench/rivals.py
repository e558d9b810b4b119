"""What does the work of the head: the bare products as the limit, this package, and what its users would write.

Each rival makes functions of no arguments over the same :class:`Problem`. ``forward`` is a training forward (Eq. 7 and
the EMA), ``step`` adds the backward from a given gradient of the logits, ``inference`` is Eq. 8. The loss has rivals of
its own, in :mod:`bench.loss_rivals`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bench.shapes import Shape
from tde_kernels import FusedTDEHead, reference
from tde_kernels.backends.product import product

HEADS, TAU, GAMMA, ALPHA, MOMENTUM = 2, 16.0, 1 / 32, 3.0, 0.9
WORKS = ("forward", "step", "inference")
Run = Callable[[], Tensor]


@dataclass
class Problem:
    """The operands that all rivals share. ``x`` and ``w`` take gradients."""

    x: Tensor
    w: nn.Parameter
    target: Tensor
    grad: Tensor
    ema: Tensor

    @classmethod
    def draw(cls, shape: Shape, seed: int = 0, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device, dtype=dtype)

        x = normal(shape.batch, shape.dim).requires_grad_()
        w = nn.Parameter(normal(shape.classes, shape.dim) / shape.dim**0.5)
        target = torch.randint(shape.classes, (shape.batch,), generator=generator, device=device)
        grad = normal(shape.batch, shape.classes) / shape.batch
        return cls(x, w, target, grad, torch.randn(shape.dim, generator=generator, device=device))


def _works(problem: Problem, train: Callable[[], Tensor], infer: Callable[[], Tensor]) -> dict[str, Run]:
    """The three pieces of work, from a rival's training forward and its inference."""

    def step() -> Tensor:
        problem.x.grad = problem.w.grad = None
        logits = train()
        logits.backward(problem.grad)
        return logits

    def inference() -> Tensor:
        with torch.no_grad():
            return infer()

    return {"forward": train, "step": step, "inference": inference}


def bare(problem: Problem) -> dict[str, Run]:
    """The matrix products alone, by ``torch.mm``, without anything around them: the limit."""
    x, w, grad = problem.x.detach(), problem.w.detach(), problem.grad

    def forward() -> Tensor:
        return torch.mm(x, w.t())

    def step() -> Tensor:
        logits = torch.mm(x, w.t())
        torch.mm(grad, w)
        torch.mm(grad.t(), x)
        return logits

    return {"forward": forward, "step": step, "inference": forward}


def bare_by_library(problem: Problem) -> dict[str, Run]:
    """The same products by the library that the CPU backend takes on this machine: what its own passes add to."""
    x, w, grad = problem.x.detach(), problem.w.detach(), problem.grad

    def forward() -> Tensor:
        return product(x, w)

    def step() -> Tensor:
        logits = product(x, w)
        product(grad, w.t())
        product(grad.t(), x.t())
        return logits

    return {"forward": forward, "step": step, "inference": forward}


def fused(problem: Problem) -> dict[str, Run]:
    """This package's head."""
    head = FusedTDEHead(problem.x.shape[1], problem.w.shape[0], num_heads=HEADS, tau=TAU, gamma=GAMMA, alpha=ALPHA)
    head.weight = problem.w
    head.ema.copy_(problem.ema)

    def train() -> Tensor:
        logits: Tensor = head.train()(problem.x)
        return logits

    def infer() -> Tensor:
        logits: Tensor = head.eval()(problem.x)
        return logits

    return _works(problem, train, infer)


def _groups(a: Tensor) -> tuple[Tensor, ...]:
    return torch.split(a, a.shape[1] // HEADS, dim=1)


def eager_operands(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    x_hat = [group / torch.norm(group, 2, 1, keepdim=True) for group in _groups(x)]
    w_hat = [group / (torch.norm(group, 2, 1, keepdim=True) + GAMMA) for group in _groups(w)]
    return torch.cat(x_hat, dim=1), torch.cat(w_hat, dim=1)


def eager_logits(x: Tensor, w: Tensor) -> Tensor:
    x_hat, w_hat = eager_operands(x, w)
    return torch.mm(x_hat * TAU / HEADS, w_hat.t())


def _eager_tde(x: Tensor, w: Tensor, ema: Tensor) -> Tensor:
    x_hat, w_hat = eager_operands(x, w)
    logits = torch.mm(x_hat * TAU / HEADS, w_hat.t())
    for x_k, w_k, ema_k in zip(_groups(x_hat), _groups(w_hat), _groups(ema[None]), strict=True):
        direction = ema_k / torch.norm(ema_k, 2)
        cosine = torch.mm(x_k, direction.t())
        logits = logits - ALPHA * torch.mm(cosine * direction * TAU / HEADS, w_k.t())
    return logits


def eager(problem: Problem) -> dict[str, Run]:
    """Operation by operation, the average kept as an array on the host, as the paper's published code does."""
    ema = problem.ema.numpy().copy()

    def train() -> Tensor:
        nonlocal ema
        ema = MOMENTUM * ema + np.asarray(problem.x.detach().mean(0).cpu())
        return eager_logits(problem.x, problem.w)

    return _works(problem, train, lambda: _eager_tde(problem.x, problem.w, torch.from_numpy(ema).to(problem.x.device)))


def compiled_eager(problem: Problem) -> dict[str, Run]:
    """``torch.compile`` of the same operations, with the average left on the device."""
    ema = problem.ema.clone()

    @torch.compile
    def train(x: Tensor, w: Tensor, ema: Tensor) -> Tensor:
        ema.mul_(MOMENTUM).add_(x.detach().mean(0))
        return eager_logits(x, w)

    infer = torch.compile(_eager_tde)
    return _works(problem, lambda: train(problem.x, problem.w, ema), lambda: infer(problem.x, problem.w, ema))


def compiled_reference(problem: Problem) -> dict[str, Run]:
    """``torch.compile`` of this package's reference."""
    ema = problem.ema.clone()

    @torch.compile
    def train(x: Tensor, w: Tensor, ema: Tensor) -> Tensor:
        reference.update_head_ema_(ema, x, momentum=MOMENTUM)
        return reference.grouped_logits(x, w, num_heads=HEADS, tau=TAU, gamma=GAMMA)

    @torch.compile
    def infer(x: Tensor, w: Tensor, ema: Tensor) -> Tensor:
        direction = reference.head_direction(ema, num_heads=HEADS)
        return reference.tde_logits(x, w, direction, alpha=ALPHA, num_heads=HEADS, tau=TAU, gamma=GAMMA)

    return _works(problem, lambda: train(problem.x, problem.w, ema), lambda: infer(problem.x, problem.w, ema))


RIVALS: dict[str, Callable[[Problem], dict[str, Run]]] = {
    "bare": bare,
    "bare_by_library": bare_by_library,
    "tde_kernels": fused,
    "eager": eager,
    "compiled_eager": compiled_eager,
    "compiled_reference": compiled_reference,
}
LIMITS = ("bare", "bare_by_library")  # products of the raw operands: nothing to hold against the reference
