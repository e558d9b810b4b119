"""The limits: nothing but what a piece of work cannot do without, on the raw operands."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from bench.problem import Make, Problem, Run
from tde_kernels.backends import product


class Library(Protocol):
    """What multiplies."""

    def kind(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which operands in ``dtype`` are multiplied."""
        ...

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b^T``."""
        ...


class ByTorch:
    """``torch.mm``: MKL, cuBLAS."""

    def kind(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b.t())


class OfTheBackend:
    """As the CPU backend multiplies on this machine, which its own passes add to."""

    def kind(self, dtype: torch.dtype) -> torch.dtype:
        return product.multiplied_as(dtype)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return product.product(a, b)


LIBRARIES: dict[str, tuple[Library, ...]] = {"cpu": (ByTorch(), OfTheBackend()), "cuda": (ByTorch(),)}


def one(library: Library) -> Make:
    """The product of a forward."""

    def make(p: Problem) -> Run:
        x, w = (a.detach().to(library.kind(a.dtype)) for a in (p.x, p.w))
        return lambda: (library.product(x, w),)

    return make


def three(library: Library) -> Make:
    """The products of a training step."""

    def make(p: Problem) -> Run:
        x, w, grad = (a.detach().to(library.kind(a.dtype)) for a in (p.x, p.w, p.grad))
        multiply = library.product
        return lambda: (multiply(x, w), multiply(grad, w.t()), multiply(grad.t(), x.t()))

    return make


def mean(p: Problem) -> Run:
    """The mean of the features: what an average has to take in."""
    x = p.x.detach()
    return lambda: (x.mean(0),)


ONE: dict[str, Make] = {"bare": one(ByTorch()), "bare_by_library": one(OfTheBackend())}
THREE: dict[str, Make] = {"bare": three(ByTorch()), "bare_by_library": three(OfTheBackend())}
