"""The loss by what others have built.

They know a plain linear head alone: they get operands that are normalised already, and take gradients for those.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from bench import paper
from bench.problem import TAU, Make, Problem, Results, Run

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
PACKAGES = {  # and the modules they install
    "cut-cross-entropy": "cut_cross_entropy",
    "liger-kernel": "liger_kernel",
    "torchvision": "torchvision",
}


class Absent(Exception):
    """Why a rival does not run here."""


def normalised(p: Problem) -> tuple[Tensor, Tensor]:
    """Features and weights whose product is Eq. 7, as leaves."""
    with torch.no_grad():
        x, w = paper.operands(p.x, p.w, p.shape.heads)
    return (x * TAU / p.shape.heads).detach().requires_grad_(), w.detach().requires_grad_()


def _on_normalised(p: Problem, loss: Loss) -> Run:
    """Its gradients are for other operands than the head's: the value alone is a result to check."""
    x, w = normalised(p)

    def run() -> Results:
        value = loss(x, w, p.target)
        torch.autograd.grad(value, (x, w))
        return (value.detach(),)

    return run


def _torch_entry() -> Callable[..., Tensor]:
    entry: Callable[..., Tensor] | None = getattr(nnf, "linear_cross_entropy", None)
    if entry is None:
        raise Absent(f"torch {torch.__version__} has no linear_cross_entropy")
    return entry


def torch_linear(p: Problem) -> Run:
    """``torch.nn.functional.linear_cross_entropy`` as it is, of torch 2.13 and newer: it stores the logits."""
    return _on_normalised(p, _torch_entry())


def torch_chunked(p: Problem) -> Run:
    """The same in four chunks of rows; left to itself it takes chunks of a few rows, and many times as long."""
    entry, options = _torch_entry(), torch.nn.LinearCrossEntropyOptions
    chunked = options(batch_chunk_size=max(1, len(p.target) // 4))
    return _on_normalised(p, lambda x, w, target: entry(x, w, target, options=chunked))


def needs(package: str) -> None:
    """Raises `Absent` where ``package`` is not installed."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise Absent(f"{package} is not installed") from None


def cut_cross_entropy(p: Problem) -> Run:
    """Cut Cross-Entropy; on the CPU, where its kernels do not run, what it offers there: ``torch.compile``."""
    needs("cut-cross-entropy")
    from cut_cross_entropy import linear_cross_entropy

    where: dict[str, Any] = {"impl": "cce" if p.x.is_cuda else "torch_compile"}
    return _on_normalised(p, lambda x, w, target: linear_cross_entropy(x, w, target, **where))


def liger(p: Problem) -> Run:
    """Liger's fused linear cross entropy, whose kernels are for GPUs."""
    needs("liger-kernel")
    if not p.x.is_cuda:
        raise Absent("Liger's kernels need a GPU")
    from liger_kernel.ops.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyFunction,
    )

    return _on_normalised(p, lambda x, w, target: LigerFusedLinearCrossEntropyFunction.apply(x, w, target)[0])


PEERS: dict[str, Make] = {
    "torch_linear": torch_linear,
    "torch_chunked": torch_chunked,
    "cut_cross_entropy": cut_cross_entropy,
    "liger": liger,
}
