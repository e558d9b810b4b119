"""What all rivals of a benchmark share: the operands, and the head's constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.shapes import Shape
from tde_kernels import reference

TAU, GAMMA, ALPHA, MOMENTUM = 16.0, 1 / 32, 3.0, 0.9
ALPHAS = torch.linspace(0, 3, 32)
LARGEST = 5  # of top-k
BACKGROUND = 0  # the class of Eq. 9

Results = tuple[Tensor, ...]
Run = Callable[[], Results]


@dataclass(frozen=True, eq=False)
class Problem:
    """Operands; ``x`` and ``w`` take gradients. ``backend`` is the one that this package is to run on."""

    shape: Shape
    x: Tensor
    w: nn.Parameter
    target: Tensor
    grad: Tensor
    ema: Tensor
    backend: str | None = None

    @classmethod
    def draw(cls, shape: Shape, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.randn(*size, generator=generator, device=device, dtype=kind)

        x = normal(shape.batch, shape.dim).requires_grad_()
        w = nn.Parameter(normal(shape.classes, shape.dim) / shape.dim**0.5)
        target = torch.randint(shape.classes, (shape.batch,), generator=generator, device=device)
        grad = normal(shape.batch, shape.classes) / shape.batch
        return cls(shape, x, w, target, grad, normal(shape.dim, kind=torch.float32))

    @property
    def family(self) -> dict[str, Any]:
        """The classifier's options."""
        return {"num_heads": self.shape.heads, "tau": TAU, "gamma": GAMMA}

    def direction(self) -> Tensor:
        """Of the head, in float32."""
        return reference.head_direction(self.ema, num_heads=self.shape.heads)


Make = Callable[[Problem], Run]  # a rival: from the operands, a call without arguments
Train = Callable[[Problem], Callable[[], tuple[Tensor, Tensor]]]  # one that gives logits and the moving average


def forward(train: Train) -> Make:
    """A training forward as it is."""
    return train


def step(train: Train) -> Make:
    """A training forward, and the backward from a given gradient of its logits."""

    def make(p: Problem) -> Run:
        run = train(p)

        def both() -> Results:
            logits, ema = run()
            return logits, *torch.autograd.grad(logits, (p.x, p.w), p.grad), ema

        return both

    return make


def loss_step(loss: Callable[[Problem], Callable[[], Tensor]]) -> Make:
    """A loss, and its gradients."""

    def make(p: Problem) -> Run:
        run = loss(p)

        def both() -> Results:
            value = run()
            return value.detach(), *torch.autograd.grad(value, (p.x, p.w))

        return both

    return make


def inference(infer: Callable[[Problem], Callable[[], Tensor]]) -> Make:
    """One result, without a graph."""

    def make(p: Problem) -> Run:
        run = torch.no_grad()(infer(p))
        return lambda: (run(),)

    return make
