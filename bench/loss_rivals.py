"""What computes the loss of a training step: this package, what its users would write, and what others have built.

Others know a plain linear head alone: they get operands that are normalised already, and take gradients for those.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nnf

from bench.rivals import GAMMA, HEADS, MOMENTUM, TAU, Problem, eager_logits, eager_operands
from tde_kernels import FusedTDEHead


class Absent(Exception):
    """Why a rival does not run here."""


@dataclass(frozen=True)
class Step:
    """A loss and its backward; called, it returns the loss."""

    leaves: tuple[Tensor, Tensor]
    loss: Callable[[], Tensor]

    def clear(self) -> None:
        """Forgets the gradients."""
        for leaf in self.leaves:
            leaf.grad = None

    def __call__(self) -> Tensor:
        self.clear()
        value = self.loss()
        value.backward()
        return value


def _head(problem: Problem, backend: str | None = None) -> FusedTDEHead:
    options: dict[str, Any] = {"num_heads": HEADS, "tau": TAU, "gamma": GAMMA, "device": problem.x.device}
    head = FusedTDEHead(problem.x.shape[1], problem.w.shape[0], backend=backend, **options)
    head.weight = problem.w
    return head


def fused(problem: Problem, backend: str | None = None) -> Step:
    """This package's head, its moving average included."""
    head = _head(problem, backend)
    return Step((problem.x, problem.w), lambda: head.loss(problem.x, problem.target))


def logits_first(problem: Problem) -> Step:
    """This package's fused logits, and torch's loss over them."""
    head = _head(problem)
    return Step((problem.x, problem.w), lambda: nnf.cross_entropy(head(problem.x), problem.target))


def eager(problem: Problem) -> Step:
    """Operation by operation, the average kept as an array on the host, as the paper's published code does."""
    ema = problem.ema.cpu().numpy().copy()

    def loss() -> Tensor:
        nonlocal ema
        ema = MOMENTUM * ema + np.asarray(problem.x.detach().float().mean(0).cpu())
        return nnf.cross_entropy(eager_logits(problem.x, problem.w), problem.target)

    return Step((problem.x, problem.w), loss)


def compiled_eager(problem: Problem) -> Step:
    """``torch.compile`` of the same operations, with the average left on the device."""
    ema = problem.ema.clone()

    @torch.compile
    def loss(x: Tensor, w: Tensor, target: Tensor, ema: Tensor) -> Tensor:
        ema.mul_(MOMENTUM).add_(x.detach().float().mean(0))
        return nnf.cross_entropy(eager_logits(x, w), target)

    return Step((problem.x, problem.w), lambda: loss(problem.x, problem.w, problem.target, ema))


def _on_normalised(problem: Problem, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
    with torch.no_grad():
        x, w = eager_operands(problem.x, problem.w)
    x, w = (x * TAU / HEADS).detach().requires_grad_(), w.detach().requires_grad_()
    return Step((x, w), lambda: loss(x, w, problem.target))


def torch_linear(problem: Problem) -> Step:
    """``torch.nn.functional.linear_cross_entropy`` as it is, of torch 2.13 and newer: it stores the logits."""
    return _on_normalised(problem, _torch_entry())


def torch_chunked(problem: Problem) -> Step:
    """The same in four chunks of rows; left to itself it takes chunks of a few rows, and many times as long."""
    entry, options = _torch_entry(), torch.nn.LinearCrossEntropyOptions
    chunked = options(batch_chunk_size=max(1, len(problem.target) // 4))
    return _on_normalised(problem, lambda x, w, target: entry(x, w, target, options=chunked))


def _torch_entry() -> Callable[..., Tensor]:
    entry: Callable[..., Tensor] | None = getattr(nnf, "linear_cross_entropy", None)
    if entry is None:
        raise Absent(f"torch {torch.__version__} has no linear_cross_entropy")
    return entry


def _needs(package: str) -> None:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise Absent(f"{package} is not installed") from None


def cut_cross_entropy(problem: Problem) -> Step:
    """Cut Cross-Entropy; on the CPU, where its kernels do not run, what it offers there: ``torch.compile``."""
    _needs("cut-cross-entropy")
    from cut_cross_entropy import linear_cross_entropy

    where: dict[str, Any] = {"impl": "cce" if problem.x.is_cuda else "torch_compile"}
    return _on_normalised(problem, lambda x, w, target: linear_cross_entropy(x, w, target, **where))


def liger(problem: Problem) -> Step:
    """Liger's fused linear cross entropy, whose kernels are for GPUs."""
    _needs("liger-kernel")
    if not problem.x.is_cuda:
        raise Absent("Liger's kernels need a GPU")
    from liger_kernel.ops.fused_linear_cross_entropy import (
        LigerFusedLinearCrossEntropyFunction,
    )

    return _on_normalised(problem, lambda x, w, target: LigerFusedLinearCrossEntropyFunction.apply(x, w, target)[0])


LOSSES: dict[str, Callable[[Problem], Step]] = {
    "tde_kernels": fused,
    "logits_first": logits_first,
    "eager": eager,
    "compiled_eager": compiled_eager,
    "torch_linear": torch_linear,
    "torch_chunked": torch_chunked,
    "cut_cross_entropy": cut_cross_entropy,
    "liger": liger,
}
