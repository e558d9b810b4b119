"""The limits: nothing but what a piece of work cannot do without, on the raw operands."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.problem import Make, Problem, Run
from tde_kernels.backends import product

Multiply = Callable[[Tensor, Tensor], Tensor]  # a, b -> a @ b^T


def by_torch(a: Tensor, b: Tensor) -> Tensor:
    """``torch.mm``: MKL, cuBLAS."""
    return torch.mm(a, b.t())


def by_library(a: Tensor, b: Tensor) -> Tensor:
    """The library that the CPU backend takes on this machine: what its own passes add to."""
    return product.product(a, b)


def one(multiply: Multiply) -> Make:
    """The product of a forward."""

    def make(p: Problem) -> Run:
        x, w = p.x.detach(), p.w.detach()
        return lambda: (multiply(x, w),)

    return make


def three(multiply: Multiply) -> Make:
    """The products of a training step."""

    def make(p: Problem) -> Run:
        x, w, grad = p.x.detach(), p.w.detach(), p.grad
        return lambda: (multiply(x, w), multiply(grad, w.t()), multiply(grad.t(), x.t()))

    return make


def mean(p: Problem) -> Run:
    """The mean of the features: what an average has to take in."""
    x = p.x.detach()
    return lambda: (x.mean(0),)


ONE: dict[str, Make] = {"bare": one(by_torch), "bare_by_library": one(by_library)}
THREE: dict[str, Make] = {"bare": three(by_torch), "bare_by_library": three(by_library)}
